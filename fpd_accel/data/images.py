"""Decoding of the encoded images in shards, down to the last row that a crop needs.

Decoding JPEGs is most of a loader's work. A JPEG is decoded from its first row on, so the rows below a crop can be left
out: libjpeg-turbo stops early if the frame header gives a smaller number of lines (ITU-T T.81, B.2.2). The rows above
stay the same, bit for bit.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

MAX_PIXELS = 2**30  # of an image; OpenCV refuses larger ones
MARGIN_ROWS = 16  # decoded below the rows needed: colours are interpolated between rows
# JPEG markers: start and end of the image, the byte that begins each marker, and start of the scan (the pixel data).
START, END, MARKER, SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff", b"\xff\xda"
ALL_COEFFICIENTS = b"\x00\x3f\x00"  # end of a scan header: spectral selection 0 to 63, no successive approximation
SEQUENTIAL_FRAMES = (b"\xff\xc0", b"\xff\xc1")  # frames decoded row after row; progressive ones are not


@dataclass(frozen=True)
class StoredImage:
    """An image as stored: encoded bytes or RGB pixels (height, width, 3), with its height and width in pixels."""

    data: np.ndarray | bytes
    height: int
    width: int


def decode_image(data: np.ndarray | bytes, *, rows: int | None = None) -> np.ndarray | None:
    """Return RGB pixels (height, width, 3), or None if the data do not decode.

    The EXIF orientation is ignored, as COCO's annotations require. Pixels (height, width, 3) are returned as they are.
    If only the topmost `rows` are needed, those below them may be missing.
    """
    if not len(data):
        return None
    if isinstance(data, np.ndarray) and data.ndim == 3:
        return data
    if bytes(data[:2]) == START:
        with suppress(ValueError):  # damaged, or a kind of JPEG that libjpeg-turbo does not read: OpenCV may still
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            if height * width <= MAX_PIXELS:
                return _decode_jpeg(data, rows)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    with suppress(cv2.error):  # too large
        return cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    return None


def _decode_jpeg(data: np.ndarray | bytes, rows: int | None) -> np.ndarray:
    """Return the pixels of a JPEG; raise ValueError where libjpeg-turbo reports an error or a warning."""
    shortened = None if rows is None else shorten_jpeg(data, rows + MARGIN_ROWS)
    if shortened is None:
        return simplejpeg.decode_jpeg(data, "RGB")
    # Not strict: the data left over would be an error, and OpenCV would print a warning about them.
    return simplejpeg.decode_jpeg(shortened, "RGB", strict=False)


def shorten_jpeg(data: np.ndarray | bytes, rows: int) -> bytearray | None:
    """Return a copy of a JPEG whose header gives `rows` as its height.

    Return None if it has no more rows than that, or cannot be shortened: because it is incomplete, not sequential, or
    its colour components are in separate scans.
    """
    jpeg = bytearray(data)
    at, frame = len(START), 0  # offsets of the current segment and of the frame header
    while (marker := jpeg[at : at + 2]) != SCAN and marker.startswith(MARKER):
        if marker in SEQUENTIAL_FRAMES:
            frame = at
        at += 1 if marker == 2 * MARKER else 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    scan = jpeg[at : at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")]
    height, components = slice(frame + 5, frame + 7), slice(frame + 9, frame + 10)
    in_one_scan = frame and scan[:2] == SCAN and scan[4:5] == jpeg[components] and scan.endswith(ALL_COEFFICIENTS)
    if not in_one_scan or jpeg[-len(END) :] != END or int.from_bytes(jpeg[height], "big") <= rows:
        return None
    jpeg[height] = rows.to_bytes(2, "big")
    return jpeg


def read_listed_images(
    folder: Path, listed: Iterable[dict[str, Any]], people: Mapping[int, Sized], skipped: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the shard record of each image that can be used; decode each once to verify it.

    Images are listed with `id`, `file_name` and, if the annotations state them, `height` and `width`. Those left out
    and their people, given by image id, are counted in `skipped` by their keys in `COCO_SKIPPED`.
    """
    for image in listed:
        found = _read_image(folder, image)
        if isinstance(found, dict):
            yield found
        else:
            skipped[found] += 1
            skipped["person_of_skipped_image"] += len(people[image["id"]])


def _read_image(folder: Path, image: dict[str, Any]) -> dict[str, Any] | str:
    """Return the shard record of a listed image, or the problem with it, a key of `COCO_SKIPPED`."""
    try:
        data = (folder / image["file_name"]).read_bytes()
    except OSError:
        return "image_missing"
    pixels = decode_image(data)
    if pixels is None:
        return "image_corrupt"
    height, width = pixels.shape[:2]
    if (image.get("height", height), image.get("width", width)) != (height, width):
        return "image_size"
    return {"id": image["id"], "file_name": image["file_name"], "width": width, "height": height, "bytes": data}
