"""The loader of the published implementation, to be measured against: plain, one person at a time, all of it in numpy.

Written from its description (fast-human-pose-estimation.pytorch, ``JointsDataset.__getitem__`` and what it calls): the
image is read and converted, half body, scale and rotation are chosen, the image is mirrored as a view and warped, made
a normalised float image, and a Gaussian is drawn for each joint; the default collation stacks it all. What differs: the
image's bytes come from the same shards as ours, and the random numbers are those that our stream draws for the same
sample, so that the two can be compared person by person. Both are at hand beforehand, and cost it nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose, Normalize, ToTensor

from fpd_accel.augment import sample_generator
from fpd_accel.config import Augment
from fpd_accel.data.stream import Place, PoseStream
from fpd_accel.skeleton import Skeleton

PIXEL_STD = 200.0  # the published scale is in units of so many pixels
Item = tuple[Tensor, Tensor, Tensor, dict[str, Any]]  # image, target, target weight, meta


@dataclass(frozen=True)
class Record:
    """A person as the published database holds it, and the random numbers of its sample."""

    center: np.ndarray  # of the box, image pixels
    scale: np.ndarray  # (width, height) of the padded box, in units of 200 pixels
    joints: np.ndarray  # (joint, 3): x, y, 0
    visible: np.ndarray  # (joint, 3): 1 or 0 in the first two
    image_row: int
    file_name: str
    gates: np.ndarray  # uniform: half body, upper body, rotation, flip
    normals: np.ndarray  # scale, rotation


class ReferenceDataset(Dataset[Item]):
    """The people of samples ``range(count)`` of a stream over one dataset with labels, each made as published."""

    def __init__(self, stream: PoseStream, count: int, *, sigma: int = 2) -> None:
        assert stream.augment is not None
        assert len(stream.sources) == 1
        self.shards = stream.sources[0].shards
        self.augment: Augment = stream.augment
        self.skeleton: Skeleton = stream.skeleton
        self.image_size = np.array([stream.input_size[1], stream.input_size[0]])  # (width, height)
        self.heatmap_size, self.sigma = self.image_size // 4, sigma
        self._aspect = float(self.image_size[0] / self.image_size[1])
        self.transform = Compose([ToTensor(), Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])])
        self.records = self._records(stream, [stream.place(sample) for sample in range(count)])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Item:
        record = self.records[index]
        crop, joints, visible, meta = self.crop(record)
        image = self.transform(crop)
        target, target_weight = self.generate_target(joints, visible)
        return image, torch.from_numpy(target), torch.from_numpy(target_weight), meta

    def _records(self, stream: PoseStream, places: Sequence[Place]) -> list[Record]:
        """What the published loader reads of everybody before it begins."""
        people = self.shards.people[[place.row for place in places]]
        rows = people["image_row"].tolist()
        images = self.shards.images.select_columns(["file_name", "width", "height"])[rows]
        records = []
        for i, place in enumerate(places):
            width, height = images["width"][i], images["height"][i]
            x, y, w, h = map(float, self.shards.box_to_crop(people["box"][i], width=width, height=height))
            middle = np.array([x + w * 0.5, y + h * 0.5], dtype=np.float32)
            center, scale = _center_scale(middle, w, h, self._aspect, stream.padding)
            keypoints = people["keypoints"][i].reshape(-1, 3)
            joints, visible = np.zeros((len(keypoints), 3)), np.zeros((len(keypoints), 3))
            joints[:, :2], visible[:, :2] = keypoints[:, :2], keypoints[:, 2:] > 0
            generator = sample_generator(stream.seed, place.epoch, place.row, source=place.source)
            gates, normals = generator.random(4), generator.standard_normal(2)
            records.append(Record(center, scale, joints, visible, rows[i], images["file_name"][i], gates, normals))
        return records

    def crop(self, record: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """The uint8 crop, the joints in its pixels and their visibility (each (joint, 3)), and the meta dictionary."""
        data = np.frombuffer(self.shards.images.data.column("bytes")[record.image_row].as_py(), dtype=np.uint8)
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        assert pixels is not None, f"{record.file_name} does not decode"
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        joints, visible = record.joints.copy(), record.visible.copy()
        center, scale = record.center.copy(), record.scale
        augment, gates, normals = self.augment, record.gates, record.normals
        if np.sum(visible[:, 0]) > augment.half_body_minimum and gates[0] < augment.half_body:
            half_center, half_scale = self._half_body(joints, visible, upper=bool(gates[1] < augment.upper_body))
            if half_center is not None and half_scale is not None:
                center, scale = half_center, half_scale
        scale = scale * np.clip(normals[0] * augment.scale + 1, 1 - augment.scale, 1 + augment.scale)
        limit = 2 * augment.rotation
        angle = np.clip(normals[1] * augment.rotation, -limit, limit)
        rotation = float(angle) if gates[2] <= augment.rotation_probability else 0.0
        if gates[3] <= augment.flip:
            pixels = pixels[:, ::-1, :]
            joints, visible = self._mirror_joints(joints, visible, pixels.shape[1])
            center[0] = pixels.shape[1] - center[0] - 1
        matrix = self._affine(center, scale, rotation)
        width, height = (int(side) for side in self.image_size)
        crop = cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_LINEAR)
        for joint in range(len(joints)):
            if visible[joint, 0] > 0.0:
                joints[joint, 0:2] = np.dot(matrix, np.array([joints[joint, 0], joints[joint, 1], 1.0]))
        meta = {
            "image": record.file_name,
            "filename": record.file_name,
            "imgnum": record.image_row,
            "joints": joints,
            "joints_vis": visible,
            "center": center,
            "scale": scale,
            "rotation": rotation,
            "score": 1,
        }
        return crop, joints, visible, meta

    def _half_body(
        self, joints: np.ndarray, visible: np.ndarray, *, upper: bool
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        upper_joints: list[np.ndarray] = []
        lower_joints: list[np.ndarray] = []
        for joint in range(len(joints)):
            if visible[joint][0] > 0:
                own = upper_joints if joint in self.skeleton.upper_body_indices else lower_joints
                own.append(joints[joint])
        if upper and len(upper_joints) > 2:
            selected = upper_joints
        else:
            selected = lower_joints if len(lower_joints) > 2 else upper_joints
        if len(selected) < 2:
            return None, None
        points = np.array(selected, dtype=np.float32)
        first, last = np.amin(points, axis=0), np.amax(points, axis=0)
        width, height = float(last[0] - first[0]), float(last[1] - first[1])
        return _center_scale(points.mean(axis=0)[:2], width, height, self._aspect, 1.5)

    def _mirror_joints(
        self, joints: np.ndarray, visible: np.ndarray, image_width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        joints[:, 0] = image_width - joints[:, 0] - 1
        for left, right in enumerate(self.skeleton.flip_index):
            if left < right:
                joints[left, :], joints[right, :] = joints[right, :], joints[left, :].copy()
                visible[left, :], visible[right, :] = visible[right, :], visible[left, :].copy()
        return joints * visible, visible

    def _affine(self, center: np.ndarray, scale: np.ndarray, rotation: float) -> np.ndarray:
        """From three points: the centre, one above it, and the third corner of a square with them."""
        angle, source_width = np.pi * rotation / 180, scale[0] * PIXEL_STD
        width, height = self.image_size
        up = np.array([0, source_width * -0.5])
        direction = np.array(
            [up[0] * np.cos(angle) - up[1] * np.sin(angle), up[0] * np.sin(angle) + up[1] * np.cos(angle)]
        )
        source, target = np.zeros((3, 2), dtype=np.float32), np.zeros((3, 2), dtype=np.float32)
        source[0, :], source[1, :] = center, center + direction
        target[0, :] = [width * 0.5, height * 0.5]
        target[1, :] = np.array([width * 0.5, height * 0.5]) + np.array([0, width * -0.5])
        for points in (source, target):
            difference = points[0] - points[1]
            points[2, :] = points[1] + np.array([-difference[1], difference[0]], dtype=np.float32)
        return cv2.getAffineTransform(source, target)

    def generate_target(self, joints: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A Gaussian for each joint, drawn patch by patch, and its weight in the loss."""
        width, height = self.heatmap_size
        number, reach = len(joints), self.sigma * 3
        weight = np.ones((number, 1), dtype=np.float32)
        weight[:, 0] = visible[:, 0]
        target = np.zeros((number, height, width), dtype=np.float32)
        for joint in range(number):
            stride = self.image_size / self.heatmap_size
            column, row = int(joints[joint][0] / stride[0] + 0.5), int(joints[joint][1] / stride[1] + 0.5)
            first, last = [column - reach, row - reach], [column + reach + 1, row + reach + 1]
            if first[0] >= width or first[1] >= height or last[0] < 0 or last[1] < 0:
                weight[joint] = 0
                continue
            size = 2 * reach + 1
            x = np.arange(size, dtype=np.float32)
            y = x[:, np.newaxis]
            gaussian = np.exp(-((x - size // 2) ** 2 + (y - size // 2) ** 2) / (2 * self.sigma**2))
            patch_x = max(0, -first[0]), min(last[0], width) - first[0]
            patch_y = max(0, -first[1]), min(last[1], height) - first[1]
            cells_x, cells_y = (max(0, first[0]), min(last[0], width)), (max(0, first[1]), min(last[1], height))
            if weight[joint] > 0.5:
                target[joint][cells_y[0] : cells_y[1], cells_x[0] : cells_x[1]] = gaussian[
                    patch_y[0] : patch_y[1], patch_x[0] : patch_x[1]
                ]
        return target, weight


def _center_scale(
    center: np.ndarray, width: float, height: float, aspect: float, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """The shorter side grows to the crop's aspect ratio, then both by a factor; the scale in units of 200 pixels."""
    if width > aspect * height:
        height = width / aspect
    elif width < aspect * height:
        width = height * aspect
    return center, np.array([width / PIXEL_STD, height / PIXEL_STD], dtype=np.float32) * factor
