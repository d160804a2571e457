"""A cache of decoded images on a local disk, so that each image is decoded once and not in every epoch.

One file per dataset holds the RGB pixels of each image with usable people, in the order of the shards; the offsets
follow from the image sizes in the shards. The name of the file depends on the dataset, the images kept and the versions
of the decoders, as the pixels do. It is memory-mapped, so that all processes of a machine share its pages.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from filelock import FileLock
from jaxtyping import UInt8

from fpd_accel.console import say, track
from fpd_accel.data.images import decode_image
from fpd_accel.data.shards import Shards
from fpd_accel.distributed.accelerator import available_cores
from fpd_accel.distributed.preemption import StopSignal
from fpd_accel.errors import DataError, Preempted
from fpd_accel.files import amount, sha256, staged

CHANNELS = 3
IMAGES_AHEAD = 64  # decoded images that wait in memory to be written


class DecodedImages:
    """The pixels of images by their rows in the shards, of which `rows` lists those kept, ascending.

    Picklable: a worker maps the file again.
    """

    def __init__(self, path: Path, rows: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> None:
        self.path, self.rows = path, rows
        self.shapes = np.column_stack([heights, widths, np.full(len(rows), CHANNELS)])
        self.ends = np.cumsum(self.shapes.prod(axis=1))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_pixels"}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bytes(self) -> int:
        """The size of the whole file."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @cached_property
    def _pixels(self) -> UInt8[np.ndarray, " byte"]:
        return np.memmap(self.path, dtype=np.uint8, mode="r").view(np.ndarray)

    def __call__(self, row: int) -> UInt8[np.ndarray, "height width 3"] | None:
        """Return a view of the image in this row of the shards, or None if it is not kept."""
        number = int(np.searchsorted(self.rows, row))
        if number == len(self.rows) or self.rows[number] != row:
            return None
        shape, end = self.shapes[number], self.ends[number]
        return self._pixels[end - shape.prod() : end].reshape(shape)

    def is_whole(self) -> bool:
        """Return whether the file exists; it gets its name when it is complete."""
        try:
            return self.path.stat().st_size == self.bytes
        except OSError:  # any other problem than a missing file is reported when it is written
            return False


def open_decoded(
    shards: Shards, folder: str | os.PathLike[str], *, rows: np.ndarray | None = None, stop: StopSignal | None = None
) -> DecodedImages:
    """Return the pixels of a dataset's images; one process of the machine decodes them first.

    Images are kept by their ascending `rows`, by default all with usable people.

    Raises:
        DataError: The disk is too small, the folder cannot be written, or an image does not decode.
        Preempted: `stop` was requested; nothing is kept.
    """
    shards.open()
    rows = np.unique(shards.image_rows) if rows is None else rows
    heights, widths = shards.image_sizes(rows)
    decoders = f"{cv2.__version__} {simplejpeg.__version__}"
    name = sha256(f"{shards.annotated.fingerprint} {sha256(rows.tobytes())} {decoders}")[:16]
    decoded = DecodedImages(Path(folder) / f"{name}.pixels", rows, heights, widths)
    if not len(decoded) or decoded.is_whole():
        return decoded
    folder = decoded.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(decoded.path.with_suffix(".lock")):
            if not decoded.is_whole():  # another process of this machine may have written it meanwhile
                _decode_all(shards, decoded, stop or StopSignal())
    except OSError as error:
        raise DataError(
            f"data.decoded_cache: {folder}: cannot be written: {error.strerror or error}; make room, name "
            "another folder, or leave it out"
        ) from None
    return decoded


def _decode_all(shards: Shards, decoded: DecodedImages, stop: StopSignal) -> None:
    with staged(decoded.path) as temporary:
        temporary.unlink(missing_ok=True)  # left behind by a killed process: its space counts as free
        free = shutil.disk_usage(decoded.path.parent).free
        say(
            f"data.decoded_cache: {len(decoded)} images of {shards.path} as pixels: {amount(decoded.bytes)} in "
            f"{decoded.path}, where {amount(free)} are free"
        )
        if decoded.bytes > free:
            raise DataError(
                f"data.decoded_cache: {decoded.path.parent}: {amount(decoded.bytes)} are needed and "
                f"{amount(free)} are free; make room, name another disk, or leave it out"
            )
        with temporary.open("wb") as file:
            for pixels in track(_decode_in_order(shards, decoded), "decoding", len(decoded)):
                if stop.name is not None:
                    raise Preempted(
                        f"{decoded.path}: asked to stop ({stop.name}) while images were decoded; the same command "
                        "starts over"
                    )
                file.write(pixels.data)


def _decode_in_order(shards: Shards, decoded: DecodedImages) -> Iterator[np.ndarray]:
    """Yield the pixels of all images, decoded by threads: the decoders release Python's GIL."""

    def decode(number: int) -> np.ndarray:
        row = int(decoded.rows[number])
        pixels = decode_image(shards.read_images([row])[0].data)
        if pixels is None or pixels.shape != tuple(decoded.shapes[number]):
            raise shards.damaged_image(row)
        return pixels

    with ThreadPoolExecutor(available_cores()) as threads:
        for first in range(0, len(decoded), IMAGES_AHEAD):
            yield from threads.map(decode, range(first, min(first + IMAGES_AHEAD, len(decoded))))
