"""Encoded images: as they lie in shards, and decoded, as far down as they are needed.

Decoding JPEGs is most of a loader's work, and a JPEG is decoded from its first row on: what lies below a crop can be
left out. libjpeg-turbo does so when it is told that the image is no higher (ITU-T T.81, B.2.2: the number of lines in
the header of a frame), and the rows above stay what they are, bit for bit.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import simplejpeg

LARGEST = 2**30  # pixels of an image; OpenCV refuses larger ones
BELOW = 16  # rows decoded beside those that are needed: colours are interpolated between rows
START, END = b"\xff\xd8", b"\xff\xd9"  # of an image
FILL, SCAN = b"\xff", b"\xff\xda"  # what each marker begins with; that of the data
ALL_AT_ONCE = b"\x00\x3f\x00"  # at the end of a scan's header: all coefficients, in all bits
SEQUENTIAL = (b"\xff\xc0", b"\xff\xc1")  # frames whose rows come one after the other: not so progressive ones


@dataclass(frozen=True)
class StoredImage:
    """An image as it lies in the shards, encoded or as RGB pixels (height, width, 3), and its size in pixels."""

    data: np.ndarray | bytes
    height: int
    width: int


class KeptPixels(Protocol):
    """Images that were decoded before, by their rows in the shards."""

    def get(self, row: int) -> np.ndarray | None:
        """RGB pixels (height, width, 3); None of an image that is not kept."""
        ...


def decode_image(data: np.ndarray | bytes, *, rows: int | None = None) -> np.ndarray | None:
    """RGB pixels (height, width, 3), the EXIF orientation ignored as COCO's annotations want; None if undecodable.

    What is decoded already is given back. Where only the uppermost ``rows`` are needed, what is below them may be
    missing; those that come are the same with and without.
    """
    if not len(data):
        return None
    if isinstance(data, np.ndarray) and data.ndim == 3:
        return data
    if bytes(data[:2]) == START:
        with suppress(ValueError):  # damaged, or of a kind it does not read: OpenCV makes of it what it can
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            if height * width <= LARGEST:
                return _decode_jpeg(data, rows)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    with suppress(cv2.error):  # too large
        return cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    return None


def _decode_jpeg(data: np.ndarray | bytes, rows: int | None) -> np.ndarray:
    """Raises ValueError where libjpeg-turbo finds fault with it."""
    shortened = None if rows is None else shorten_jpeg(data, rows + BELOW)
    if shortened is None:
        return simplejpeg.decode_jpeg(data, "RGB")
    # Not strict: it would find fault with the data that are left over, and OpenCV would print a line about them.
    return simplejpeg.decode_jpeg(shortened, "RGB", strict=False)


def shorten_jpeg(data: np.ndarray | bytes, rows: int) -> bytearray | None:
    """The same JPEG, but its header says that it ends after ``rows`` rows.

    None where it has no more than that, or cannot be shortened so: it is not whole, not sequential, or its colours do
    not come together.
    """
    jpeg = bytearray(data)
    at, frame = len(START), 0  # of the segment, and of that of the frame
    while (marker := jpeg[at : at + 2]) != SCAN and marker.startswith(FILL):
        if marker in SEQUENTIAL:
            frame = at
        at += 1 if marker == 2 * FILL else 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    scan = jpeg[at : at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")]
    height, components = slice(frame + 5, frame + 7), slice(frame + 9, frame + 10)
    in_one_scan = frame and scan[:2] == SCAN and scan[4:5] == jpeg[components] and scan.endswith(ALL_AT_ONCE)
    if not in_one_scan or jpeg[-len(END) :] != END or int.from_bytes(jpeg[height], "big") <= rows:
        return None
    jpeg[height] = rows.to_bytes(2, "big")
    return jpeg


def read_image(path: Path) -> tuple[str | None, bytes, tuple[int, int]]:
    """The problem with an image file (a key of ``SKIPPED`` in ``coco.py``, or None), its bytes, its (height, width)."""
    try:
        data = path.read_bytes()
    except OSError:
        return "image_missing", b"", (0, 0)
    pixels = decode_image(data)
    return ("image_corrupt", b"", (0, 0)) if pixels is None else (None, data, pixels.shape[:2])
