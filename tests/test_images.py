"""Decoding: the pixels that OpenCV gives, and of a JPEG no more rows than are needed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from fpd_accel.bench.crowd import PHOTOGRAPHS, draw_crowd
from fpd_accel.config.schema import Augment
from fpd_accel.data import images
from fpd_accel.data import stream as stream_module
from fpd_accel.data.coco import prepare_coco
from fpd_accel.data.images import MARGIN_ROWS, decode_image, shorten_jpeg
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream

HEIGHT, WIDTH = 75, 101  # pixels: no whole number of a JPEG's blocks
SAMPLINGS = {  # of colours beside brightness
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
}


def photograph(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Random colours, smooth, with some grain."""
    generator = np.random.default_rng(0)
    colours = generator.uniform(0, 255, (height // 12 + 2, width // 12 + 2, channels)).astype(np.float32)
    smooth = cv2.resize(colours, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)
    return np.clip(smooth + generator.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def as_jpeg(pixels: np.ndarray, *options: int) -> bytes:
    return cv2.imencode(".jpg", pixels, options)[1].tobytes()


def by_opencv(data: bytes) -> np.ndarray | None:
    return cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def test_images_are_decoded_as_they_are_stored_whatever_exif_says_of_their_orientation() -> None:
    stored = cv2.imencode(".jpg", photograph(HEIGHT, WIDTH))[1].tobytes()
    # One directory entry: tag 0x0112 (orientation), type 3 (short), one value: 6, "turn by 90 degrees to show".
    tiff = b"MM\x00\x2a\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
    exif = b"Exif\x00\x00" + tiff
    turned = stored[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + stored[2:]
    obeyed = cv2.imdecode(np.frombuffer(turned, dtype=np.uint8), cv2.IMREAD_COLOR)
    assert obeyed is not None
    assert obeyed.shape == (WIDTH, HEIGHT, 3)  # the tag is understood
    pixels = decode_image(turned)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, decode_image(stored))
    assert pixels.shape == (HEIGHT, WIDTH, 3)


def test_images_are_decoded_as_rgb() -> None:
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 2] = 200  # OpenCV writes BGR
    pixels = decode_image(cv2.imencode(".png", red)[1].tobytes())
    assert pixels is not None
    assert pixels[0, 0].tolist() == [200, 0, 0]
    gray = decode_image(cv2.imencode(".png", red[..., 2])[1].tobytes())
    assert gray is not None
    assert gray.shape == (8, 8, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_whole_jpeg_has_the_pixels_that_opencv_gives(channels: int) -> None:
    for quality in (30, 75, 95):
        data = as_jpeg(photograph(HEIGHT, WIDTH, channels), cv2.IMWRITE_JPEG_QUALITY, quality)
        np.testing.assert_array_equal(decode_image(data), by_opencv(data))


def jpegs() -> Iterator[Any]:
    for name, sampling in SAMPLINGS.items():
        for interval in (0, 3):
            options = cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling, cv2.IMWRITE_JPEG_RST_INTERVAL, interval
            yield pytest.param(as_jpeg(photograph(HEIGHT, WIDTH), *options), id=f"{name} {interval}")
    yield pytest.param(as_jpeg(photograph(HEIGHT, WIDTH, 1)), id="grey")
    yield pytest.param(as_jpeg(photograph(HEIGHT, WIDTH), cv2.IMWRITE_JPEG_OPTIMIZE, 1), id="optimised")


@pytest.mark.parametrize("data", list(jpegs()))
def test_the_rows_of_a_jpeg_that_are_asked_for_are_those_of_the_whole(
    data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = by_opencv(data)
    assert whole is not None
    for rows in range(1, HEIGHT + 20):
        pixels = decode_image(np.frombuffer(data, dtype=np.uint8), rows=rows)
        assert pixels is not None
        assert pixels.shape == (min(HEIGHT, rows + MARGIN_ROWS), WIDTH, 3)  # and no more are decoded
        np.testing.assert_array_equal(pixels[:rows], whole[:rows])
    assert capfd.readouterr() == ("", "")  # libjpeg complains of what is left over


def test_photographs_keep_their_pixels(shared: Path) -> None:
    shortened = 0
    for path in sorted((shared / "data" / "coco_sample" / "images").glob("*.jpg")):
        data = path.read_bytes()
        whole = by_opencv(data)
        assert whole is not None
        np.testing.assert_array_equal(decode_image(data), whole)
        for rows in (50, 200, 333):
            pixels = decode_image(data, rows=rows)
            assert pixels is not None
            shortened += len(pixels) < len(whole)
            np.testing.assert_array_equal(pixels[:rows], whole[:rows])
    assert shortened > 20


def with_filling(data: bytes) -> bytes:
    """Markers may have any number of bytes 0xFF before them (ITU-T T.81, B.1.1.2)."""
    return data[:2] + b"\xff\xff" + data[2:]


def in_several_scans(data: bytes) -> bytes:
    """So that the first scan seems to have one colour alone."""
    at = data.index(b"\xff\xda")
    return data[: at + 4] + b"\x01" + data[at + 5 :]


def without_height(data: bytes) -> bytes:
    """That comes after the first scan (B.2.5)."""
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + b"\x00\x00" + data[at + 7 :]


PLAIN = as_jpeg(photograph(HEIGHT, WIDTH))


def test_filling_between_markers_is_passed_over() -> None:
    pixels, filled = decode_image(PLAIN, rows=20), decode_image(with_filling(PLAIN), rows=20)
    assert pixels is not None
    assert filled is not None
    assert len(filled) == len(pixels) < HEIGHT
    np.testing.assert_array_equal(filled, pixels)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(as_jpeg(photograph(HEIGHT, WIDTH), cv2.IMWRITE_JPEG_PROGRESSIVE, 1), id="progressive"),
        pytest.param(in_several_scans(PLAIN), id="several scans"),
        pytest.param(without_height(PLAIN), id="no height"),
        pytest.param(PLAIN[:-2], id="no end"),
        pytest.param(PLAIN + b"\x00", id="something after the end"),
        pytest.param(PLAIN.replace(b"\xff\xda", b"\x00\xda"), id="no scan"),
        *(pytest.param(PLAIN[:length], id=f"{length} bytes") for length in (2, 3, 5, 200, 400, len(PLAIN) // 2)),
    ],
)
def test_what_cannot_be_shortened_is_decoded_as_opencv_does_it(data: bytes) -> None:
    assert shorten_jpeg(data, 20) is None
    expected, found = by_opencv(data), decode_image(data, rows=4)
    if expected is None:
        assert found is None
    else:
        np.testing.assert_array_equal(found, expected)


def with_size(data: bytes, height: int, width: int) -> bytes:
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 9 :]


@pytest.mark.parametrize("size", [(50_000, 30_000), (65_535, 16), (65_500, 65_500)])
def test_an_image_that_is_too_large_does_not_decode(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any, **__: Any) -> None:
        raise AssertionError("gigabytes of it")

    monkeypatch.setattr(images, "_decode_jpeg", decode)
    for rows in (None, 20):
        assert decode_image(with_size(PLAIN, *size), rows=rows) is None


def test_a_scan_whose_header_is_damaged_does_not_decode() -> None:
    """libjpeg-turbo warns of it, and then fails for another reason: it would leave memory as it was."""
    damaged = bytearray(as_jpeg(photograph(101, 150)))
    at = damaged.index(b"\xff\xda")
    damaged[at + 6], damaged[at + 12] = 0x33, 0
    assert by_opencv(bytes(damaged)) is None
    assert decode_image(bytes(damaged)) is None
    assert decode_image(bytes(damaged), rows=20) is None


def test_of_a_damaged_jpeg_as_much_is_made_as_opencv_makes_of_it() -> None:
    damaged = bytearray(PLAIN)
    at = PLAIN.index(b"\xff\xda")
    damaged[at + (len(PLAIN) - at) // 2] ^= 0x55
    whole = by_opencv(bytes(damaged))
    assert whole is not None
    assert (whole != by_opencv(PLAIN)).any()
    np.testing.assert_array_equal(decode_image(bytes(damaged)), whole)
    for rows in (10, 40, 55):
        pixels = decode_image(bytes(damaged), rows=rows)
        assert pixels is not None
        np.testing.assert_array_equal(pixels[:rows], whole[:rows])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return draw_crowd(tmp_path_factory.mktemp("photographs"), 20, pictures=PHOTOGRAPHS)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parity
def test_crops_are_those_of_whole_images(photographs: Shards, monkeypatch: pytest.MonkeyPatch, unbiased: bool) -> None:
    augment, samples = Augment(rotation=60, scale=0.6), range(200)  # ten epochs
    stream = PoseStream(photographs, input_size=(128, 96), batch_size=4, augment=augment, unbiased=unbiased)
    crops = stream.batch(samples).crops
    monkeypatch.setattr(stream_module, "_group_by_image", lambda people: [[number] for number in range(len(people))])
    asked = []

    def decode(data: np.ndarray, *, rows: int) -> np.ndarray | None:
        asked.append(rows)
        return decode_image(data, rows=rows)

    def decode_no_more(data: np.ndarray, *, rows: int) -> np.ndarray | None:
        pixels = decode_image(data)
        return None if pixels is None else np.ascontiguousarray(pixels[:rows])

    monkeypatch.setattr(stream_module, "decode_image", decode)
    alone = stream.batch(samples).crops
    monkeypatch.setattr(stream_module, "decode_image", decode_no_more)
    assert torch.equal(stream.batch(samples).crops, alone)  # the rows that are asked for suffice
    monkeypatch.setattr(stream_module, "decode_image", lambda data, rows: decode_image(data))  # noqa: ARG005
    assert torch.equal(stream.batch(samples).crops, alone)
    assert torch.equal(crops, alone)  # images that several share are decoded as far down as the lowest needs
    assert sum(rows + MARGIN_ROWS < PHOTOGRAPHS.height for rows in asked) > 20
    assert max(asked) > PHOTOGRAPHS.height  # and some are needed to their end


@pytest.mark.parity
def test_crops_of_photographs_are_those_of_whole_ones(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared / "data" / "coco_sample"
    left_out = 0

    def decode_whole(data: np.ndarray, *, rows: int) -> np.ndarray | None:
        nonlocal left_out
        pixels, fewer = decode_image(data), decode_image(data, rows=rows)
        assert pixels is not None
        assert fewer is not None
        left_out += len(pixels) - len(fewer)
        return pixels

    shards = prepare_coco(folder / "images", folder / "person_keypoints.json", tmp_path / "shards")
    for augment, passes in ((None, 1), (Augment(), 2)):
        stream = PoseStream(shards, input_size=(256, 192), batch_size=4, augment=augment)
        batches = [stream.batch(range(first, first + 4)) for first in range(0, passes * len(shards), 4)]
        with monkeypatch.context() as patch:
            patch.setattr(stream_module, "decode_image", decode_whole)
            for first, batch in zip(range(0, passes * len(shards), 4), batches, strict=True):
                assert torch.equal(stream.batch(range(first, first + 4)).crops, batch.crops)
    assert left_out > 10_000  # rows
