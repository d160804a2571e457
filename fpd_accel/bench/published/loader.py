"""The published data loader, to compare ours with: one person at a time, all of it in NumPy.

Rewritten from a description of fast-human-pose-estimation.pytorch (`JointsDataset.__getitem__` and the functions it
calls): read and convert the image; choose half body, scale and rotation; mirror the image as a view; warp it; normalise
it as a float image; draw a Gaussian for each joint; stack everything with the default collation. Two things differ, to
compare both loaders person by person, and cost it no time: image bytes come from the same shards as ours, and random
numbers are those that our stream draws for the same sample, drawn beforehand.
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

from fpd_accel.bench.published.heatmaps import PIXELS_PER_SCALE, corresponding_points, draw_target
from fpd_accel.data.augment import sample_generator
from fpd_accel.data.stream import Place, PoseStream

Item = tuple[Tensor, Tensor, Tensor, dict[str, Any]]  # image, target, target weight, meta


@dataclass(frozen=True)
class Record:
    """A person as the published database holds it, and the random numbers of one sample."""

    center: np.ndarray  # of the box, image pixels
    scale: np.ndarray  # (width, height) of the padded box, in units of 200 pixels
    joints: np.ndarray  # (joint, 3): x, y, 0
    visible: np.ndarray  # (joint, 3): 1 or 0 in the first two columns
    image_row: int
    file_name: str
    gates: np.ndarray  # uniform numbers that decide half body, upper body, rotation, flip
    normals: np.ndarray  # normal numbers that give scale and rotation


class PublishedDataset(Dataset[Item]):
    """Samples `range(count)` of a stream over one labelled dataset, made as by the published loader."""

    def __init__(self, stream: PoseStream, count: int) -> None:
        assert stream.augment is not None
        assert len(stream.sources) == 1
        self.shards, self.augment, self.skeleton = stream.sources[0].shards, stream.augment, stream.skeleton
        height, width = self.input_size = stream.input_size
        self.heatmap_size, self._aspect = (height // 4, width // 4), width / height
        self.transform = Compose([ToTensor(), Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])])
        self.records = self._records(stream, [stream.place(sample) for sample in range(count)])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Item:
        crop, joints, visible, meta = self.crop(self.records[index])
        image = self.transform(crop)
        target, target_weight = self.generate_target(joints, visible)
        return image, torch.from_numpy(target), torch.from_numpy(target_weight), meta

    def _records(self, stream: PoseStream, places: Sequence[Place]) -> list[Record]:
        """Return the annotations that the published loader reads before training starts."""
        people = self.shards.people[[place.row for place in places]]
        rows = people["image_row"].tolist()
        images = self.shards.images.select_columns(["file_name", "width", "height"])[rows]
        records = []
        for i, place in enumerate(places):
            width, height = images["width"][i], images["height"][i]
            x, y, w, h = map(float, self.shards.box_to_crop(people["box"][i], width=width, height=height))
            center = np.array([x + w * 0.5, y + h * 0.5], dtype=np.float32)
            scale = self._scale(w, h, stream.padding)
            keypoints = people["keypoints"][i].reshape(-1, 3)
            joints, visible = np.zeros((len(keypoints), 3)), np.zeros((len(keypoints), 3))
            joints[:, :2], visible[:, :2] = keypoints[:, :2], keypoints[:, 2:] > 0
            generator = sample_generator(stream.seed, place.epoch, place.row, source=place.source)
            gates, normals = generator.random(4), generator.standard_normal(2)
            records.append(Record(center, scale, joints, visible, rows[i], images["file_name"][i], gates, normals))
        return records

    def crop(self, record: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return the uint8 crop, joints in crop pixels and visibility, both (joint, 3), and the meta dictionary."""
        data = np.frombuffer(self.shards.images.data.column("bytes")[record.image_row].as_py(), dtype=np.uint8)
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        assert pixels is not None, f"{record.file_name} does not decode"
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        joints, visible = record.joints.copy(), record.visible.copy()
        center, scale = record.center.copy(), record.scale
        augment, gates, normals = self.augment, record.gates, record.normals
        if np.sum(visible[:, 0]) > augment.half_body_minimum and gates[0] < augment.half_body:
            half = self._half_body(joints, visible, upper=bool(gates[1] < augment.upper_body))
            center, scale = half or (center, scale)
        scale = scale * np.clip(normals[0] * augment.scale + 1, 1 - augment.scale, 1 + augment.scale)
        limit = 2 * augment.rotation
        angle = np.clip(normals[1] * augment.rotation, -limit, limit)
        rotation = float(angle) if gates[2] <= augment.rotation_probability else 0.0
        if gates[3] <= augment.flip:
            pixels = pixels[:, ::-1, :]
            joints[:, 0] = pixels.shape[1] - joints[:, 0] - 1
            for left, right in enumerate(self.skeleton.flip_index):
                if left < right:
                    joints[left, :], joints[right, :] = joints[right, :], joints[left, :].copy()
                    visible[left, :], visible[right, :] = visible[right, :], visible[left, :].copy()
            joints = joints * visible
            center[0] = pixels.shape[1] - center[0] - 1
        matrix = cv2.getAffineTransform(*corresponding_points(center, scale, rotation, self.input_size))
        crop = cv2.warpAffine(pixels, matrix, self.input_size[::-1], flags=cv2.INTER_LINEAR)
        for joint in range(len(joints)):
            if visible[joint, 0] > 0.0:
                joints[joint, 0:2] = np.dot(matrix, np.array([joints[joint, 0], joints[joint, 1], 1.0]))
        names = {"image": record.file_name, "filename": record.file_name, "imgnum": record.image_row}
        geometry = {"center": center, "scale": scale, "rotation": rotation}
        return crop, joints, visible, {**names, "joints": joints, "joints_vis": visible, **geometry, "score": 1}

    def _half_body(
        self, joints: np.ndarray, visible: np.ndarray, *, upper: bool
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return centre and scale of the half with enough joints, or None."""
        upper_joints, lower_joints = list[np.ndarray](), list[np.ndarray]()
        for joint in range(len(joints)):
            if visible[joint][0] > 0:
                own = upper_joints if joint in self.skeleton.upper_body_indices else lower_joints
                own.append(joints[joint])
        if upper and len(upper_joints) > 2:
            selected = upper_joints
        else:
            selected = lower_joints if len(lower_joints) > 2 else upper_joints
        if len(selected) < 2:
            return None
        points = np.array(selected, dtype=np.float32)
        first, last = np.amin(points, axis=0), np.amax(points, axis=0)
        width, height = float(last[0] - first[0]), float(last[1] - first[1])
        return points.mean(axis=0)[:2], self._scale(width, height, 1.5)

    def _scale(self, width: float, height: float, factor: float) -> np.ndarray:
        """Return the scale of a box whose shorter side grows to the crop's aspect ratio, then both by `factor`."""
        if width > self._aspect * height:
            height = width / self._aspect
        elif width < self._aspect * height:
            width = height * self._aspect
        return np.array([width / PIXELS_PER_SCALE, height / PIXELS_PER_SCALE], dtype=np.float32) * factor

    def generate_target(self, joints: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the heatmaps of all joints and their weights in the loss (joint, 1)."""
        return draw_target(joints, visible[:, 0], self.input_size, self.heatmap_size, sigma=2)
