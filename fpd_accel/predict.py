"""Images and boxes -> keypoints, with a model folder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8

from fpd_accel.data.images import decode_image
from fpd_accel.data.numbers import LARGEST
from fpd_accel.decode import decode, fuse
from fpd_accel.errors import DataError
from fpd_accel.geometry import box_to_region, crop_matrix
from fpd_accel.model_folder import load_model, read_model_config
from fpd_accel.visualize import draw_skeleton


@dataclass(frozen=True)
class Poses:
    """N people of one image."""

    keypoints: Float[np.ndarray, "person joint 2"]  # image pixels
    scores: Float[np.ndarray, "person joint"]


class Predictor:
    """The network of a model folder, ready for images.

    Raises:
        WeightsError: ``folder`` is not a model folder.
    """

    def __init__(self, folder: str | os.PathLike[str], *, device: str = "cpu", flip_test: bool = True) -> None:
        self.config = read_model_config(folder)
        self.codec = self.config.create_codec()
        try:
            self.model = load_model(folder).to(device)
        except (RuntimeError, AssertionError) as error:
            raise DataError(f"device {device!r} cannot be used: {error}") from None
        self.device, self.flip_test = torch.device(device), flip_test

    @torch.inference_mode()
    def __call__(self, image: UInt8[np.ndarray, "height width 3"], boxes: Float[np.ndarray, "person 4"]) -> Poses:
        """Keypoints of the person in each (x, y, width, height) box of an RGB image.

        Raises:
            DataError: a box has no area.
        """
        skeleton, (height, width) = self.config.skeleton, self.config.input_size
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        if not len(boxes):
            return Poses(np.zeros((0, skeleton.num_keypoints, 2)), np.zeros((0, skeleton.num_keypoints)))
        if not (np.abs(boxes) <= LARGEST).all() or (boxes[:, 2:] <= 0).any():
            raise DataError(f"boxes are (x, y, width, height) with positive width and height, not {boxes.tolist()}")
        centers, sizes = box_to_region(boxes, self.config.input_size, padding=self.config.box_padding)
        matrices = [
            crop_matrix(center, float(size[0]), self.config.input_size, unbiased=self.codec.unbiased)
            for center, size in zip(centers, sizes, strict=True)
        ]
        crops = np.stack([cv2.warpAffine(image, matrix, (width, height)) for matrix in matrices])
        images = self.config.normalization(torch.from_numpy(crops).to(self.device))
        output = self.model(images)[-1]
        if self.flip_test:
            output = fuse(output, self.model(images.flip(-1))[-1], self.codec, skeleton.flip_index)
        places = (torch.from_numpy(centers).to(self.device), torch.from_numpy(sizes).to(self.device))
        keypoints, scores = decode(output, self.codec, *places)
        return Poses(keypoints.cpu().numpy(), scores.cpu().numpy())

    def draw(
        self, image: UInt8[np.ndarray, "height width 3"], poses: Poses, *, threshold: float = 0.2
    ) -> UInt8[np.ndarray, "height width 3"]:
        """The image with the keypoints whose score is above ``threshold``."""
        for keypoints, scores in zip(poses.keypoints, poses.scores, strict=True):
            image = draw_skeleton(image, keypoints, scores > threshold, self.config.skeleton)
        return image


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "height width 3"]:
    """RGB pixels of an image file, its EXIF orientation ignored.

    Raises:
        DataError: there is no such file, or it is no image.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such image")
    try:
        pixels = decode_image(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if pixels is None:
        raise DataError(f"{path}: not an image that can be decoded")
    return pixels


def overlay_paths(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Image -> the PNG in ``folder`` that will show its people, once every image has been proven to decode.

    Raises:
        DataError: an image cannot be read, or its overlay would take the place of another's, or its own.
    """
    overlays: dict[Path, Path] = {}
    for path in images:
        overlay = folder / f"{path.stem}.png"
        for other, taken in overlays.items():
            if taken == overlay:
                raise DataError(f"{other} and {path} would both be drawn to {overlay}; give them in two commands")
        if overlay.resolve() == path.resolve():
            raise DataError(f"{path}: its overlay would replace it; choose another output folder")
        read_image(path)
        overlays[path] = overlay
    return overlays


def whole_image(image: UInt8[np.ndarray, "height width 3"]) -> Sequence[float]:
    """The box of an image that shows one person."""
    return [0.0, 0.0, float(image.shape[1]), float(image.shape[0])]
