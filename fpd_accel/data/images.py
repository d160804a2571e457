"""Encoded images: as they lie in shards, and decoded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np


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


def decode_image(data: np.ndarray | bytes) -> np.ndarray | None:
    """RGB pixels (height, width, 3), the EXIF orientation ignored as COCO's annotations want; None if undecodable.

    What is decoded already is given back.
    """
    if not len(data):
        return None
    if isinstance(data, np.ndarray) and data.ndim == 3:
        return data
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)


def read_image(path: Path) -> tuple[str | None, bytes, tuple[int, int]]:
    """The problem with an image file (a key of ``SKIPPED`` in ``coco.py``, or None), its bytes, its (height, width)."""
    try:
        data = path.read_bytes()
    except OSError:
        return "image_missing", b"", (0, 0)
    pixels = decode_image(data)
    return ("image_corrupt", b"", (0, 0)) if pixels is None else (None, data, pixels.shape[:2])
