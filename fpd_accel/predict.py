"""Predict keypoints of people in images with the network of a model folder."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8

from fpd_accel.data.coco import MAX_VALUE, is_usable
from fpd_accel.data.detections import PERSON, read_detections
from fpd_accel.data.images import decode_image
from fpd_accel.decode import decode, fuse
from fpd_accel.errors import DataError
from fpd_accel.geometry import box_to_region, crop_matrix
from fpd_accel.visualize import draw_skeleton
from fpd_accel.weights.model_folder import load_model, read_model_config


@dataclass(frozen=True)
class Poses:
    """The keypoints of N people in one image."""

    keypoints: Float[np.ndarray, "person joint 2"]  # (x, y), image pixels
    scores: Float[np.ndarray, "person joint"]  # confidence of each keypoint, about 0 to 1


class Predictor:
    """The network of a model folder, as a function from an image and boxes to keypoints.

    Args:
        folder: The model folder.
        device: A torch device.
        flip_test: Whether to average with the output for the mirrored crop, at twice the cost.

    Raises:
        WeightsError: `folder` is not a model folder.
        DataError: The device cannot be used.
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
        """Return the keypoints of the person in each (x, y, width, height) box, pixels, of an RGB image.

        Raises:
            DataError: A box has no area, or a number in it is not finite or too large.
        """
        skeleton, (height, width) = self.config.skeleton, self.config.input_size
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        if not len(boxes):
            return Poses(np.zeros((0, skeleton.num_keypoints, 2)), np.zeros((0, skeleton.num_keypoints)))
        if not (np.abs(boxes) <= MAX_VALUE).all() or (boxes[:, 2:] <= 0).any():
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
        regions = (torch.from_numpy(centers).to(self.device), torch.from_numpy(sizes).to(self.device))
        keypoints, scores = decode(output, self.codec, *regions)
        return Poses(keypoints.cpu().numpy(), scores.cpu().numpy())

    def draw(
        self, image: UInt8[np.ndarray, "height width 3"], poses: Poses, *, threshold: float = 0.2
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Return a copy of the image with the keypoints whose score is above `threshold`."""
        for keypoints, scores in zip(poses.keypoints, poses.scores, strict=True):
            image = draw_skeleton(image, keypoints, scores > threshold, self.config.skeleton)
        return image


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "height width 3"]:
    """Return the RGB pixels of an image file; its EXIF orientation is ignored.

    Raises:
        DataError: There is no such file, it cannot be read, or it is not an image.
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
    """Return the PNG in `folder` for each image, after checking that all images decode and no file is overwritten.

    Raises:
        DataError: An image cannot be read, two images would share an overlay, or an overlay would replace its image.
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


def read_boxes(path: Path) -> dict[str, list[list[float]]]:
    """Read the boxes of people by file name, as (x, y, width, height) in pixels.

    Args:
        path: JSON that `fpd-accel detect` wrote, or a mapping from file name to a list of boxes.

    Raises:
        DataError: The file is neither.
    """
    try:
        boxes = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    if isinstance(boxes, list):
        return _detected_boxes(path)
    if not isinstance(boxes, dict) or any(
        not isinstance(box, list) or len(box) != 4 or not all(map(is_usable, box))
        for entry in boxes.values()
        for box in (entry if isinstance(entry, list) else [None])
    ):
        raise DataError(f"{path}: wanted a mapping from file name to a list of [x, y, width, height]")
    return boxes


def _detected_boxes(path: Path) -> dict[str, list[list[float]]]:
    """Return the boxes of people in COCO's result format, by the file names that `fpd-accel detect` adds to it."""
    boxes: dict[str, list[list[float]]] = {}
    for detection in read_detections(path):
        if "file_name" not in detection:
            raise DataError(
                f"{path}: its boxes have no file_name, so nothing says of which image they are; `fpd-accel detect` "
                "writes it beside image_id"
            )
        if detection["category_id"] == PERSON and min(detection["bbox"][2:]) > 0:
            boxes.setdefault(Path(detection["file_name"]).name, []).append(detection["bbox"])
    return boxes
