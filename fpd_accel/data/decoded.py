"""Images kept as pixels on a local disk, so that they are decoded once and not in every epoch.

One file per dataset: the RGB pixels of each image that has usable people, in the order of the shards, and nothing
else; where each begins follows from the sizes that the shards know. The file is named after the dataset, which of its
images are kept, and the versions of what decodes them, for the pixels hang on all of it. It is memory-mapped, so that
all processes of a machine share what of it is in memory.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from filelock import FileLock
from jaxtyping import UInt8

from fpd_accel.data.images import decode_image
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError, Preempted
from fpd_accel.files import amount, flush
from fpd_accel.log import available_cores, say, track
from fpd_accel.stop import StopRequest

CHANNELS = 3
AT_ONCE = 64  # images that wait in memory to be written


class DecodedImages:
    """The pixels of some images by their rows in the shards. Picklable: a worker maps the file again.

    ``heights`` and ``widths`` are those of the images ``rows``, which ascend.
    """

    def __init__(self, path: Path, rows: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> None:
        self.path, self.rows, self.heights, self.widths = path, rows, heights, widths
        sizes = heights.astype(np.int64) * widths * CHANNELS
        self.ends = np.cumsum(sizes)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_pixels"}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @cached_property
    def _pixels(self) -> UInt8[np.ndarray, " byte"]:
        return np.memmap(self.path, dtype=np.uint8, mode="r").view(np.ndarray)

    def get(self, row: int) -> UInt8[np.ndarray, "height width 3"] | None:
        """The image in this row of the shards, as it lies in the file; None of one that is not kept."""
        number = int(np.searchsorted(self.rows, row))
        if number == len(self.rows) or self.rows[number] != row:
            return None
        height, width = int(self.heights[number]), int(self.widths[number])
        end = int(self.ends[number])
        return self._pixels[end - height * width * CHANNELS : end].reshape(height, width, CHANNELS)

    def is_whole(self) -> bool:
        """Whether the file is there; it is given its name when it is complete."""
        try:
            return self.path.stat().st_size == self.bytes
        except OSError:  # what else is wrong than that there is none, writing it will tell
            return False


def open_decoded(
    shards: Shards,
    folder: str | os.PathLike[str],
    *,
    rows: np.ndarray | None = None,
    stop: StopRequest | None = None,
) -> DecodedImages:
    """The pixels of a dataset's images, which one process of a machine decodes into ``folder`` first.

    ``rows``: which images, ascending; None: all that have usable people.

    Raises:
        DataError: there is no room, the folder cannot be written, or an image does not decode.
        Preempted: ``stop`` was asked for; nothing is kept.
    """
    shards.open()
    rows = np.unique(shards.image_rows) if rows is None else rows
    heights, widths = shards.image_sizes(rows)
    decoders = f"{cv2.__version__} {simplejpeg.__version__}"
    key = f"{shards.annotated.fingerprint} {hashlib.sha256(rows.tobytes()).hexdigest()} {decoders}"
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    decoded = DecodedImages(Path(folder) / f"{name}.pixels", rows, heights, widths)
    if len(decoded) and not decoded.is_whole():
        with _writing(decoded.path), FileLock(decoded.path.with_suffix(".lock")):
            if not decoded.is_whole():  # another process of this machine may have been first
                _decode_all(shards, decoded, stop or StopRequest())
    return decoded


def _decode_all(shards: Shards, decoded: DecodedImages, stop: StopRequest) -> None:
    staged = decoded.path.with_suffix(".writing")
    staged.unlink(missing_ok=True)  # of a process that was killed: it is written anew, and takes no room till then
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
    try:
        with staged.open("wb") as file:
            for pixels in track(_decoded_in_order(shards, decoded), "decoding", len(decoded)):
                if stop.name is not None:
                    raise Preempted(
                        f"{decoded.path}: asked to stop ({stop.name}) while images were decoded; the same command "
                        "begins with it"
                    )
                file.write(pixels.data)
        flush(staged)
        staged.replace(decoded.path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def _decoded_in_order(shards: Shards, decoded: DecodedImages) -> Iterator[np.ndarray]:
    """All images, decoded by threads: decoders do it without Python's lock."""

    def decode(number: int) -> np.ndarray:
        row, shape = int(decoded.rows[number]), (int(decoded.heights[number]), int(decoded.widths[number]), CHANNELS)
        pixels = decode_image(shards.read_images([row])[0].data)
        if pixels is None or pixels.shape != shape:
            raise DataError(f"{shards.path}: image {shards.image_name(row)} no longer decodes; prepare it again")
        return pixels

    with ThreadPoolExecutor(available_cores()) as threads:
        for first in range(0, len(decoded), AT_ONCE):
            yield from threads.map(decode, range(first, min(first + AT_ONCE, len(decoded))))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Into the folder of a file, which is made; what the system refuses is the user's to mend."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(
            f"data.decoded_cache: {path.parent}: cannot be written: {error.strerror or error}; make room, name "
            "another folder, or leave it out"
        ) from None
