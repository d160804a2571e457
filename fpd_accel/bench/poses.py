"""Generated people, each with two detected boxes, and the heatmaps that a network would output for them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fpd_accel.codecs import HeatmapCodec

PEOPLE_PER_IMAGE = 3
BOXES_PER_PERSON = 2  # near-duplicates, so that suppression has something to do
IMAGE_SIDE = 600.0  # pixels
NOISE = 0.05  # standard deviation of heatmaps whose peaks are 1


@dataclass(frozen=True, eq=False)
class Boxes:
    """N boxes of generated images, one row each; image pixels, float32."""

    images: Int[np.ndarray, " box"]  # ids, ascending
    centers: Float[np.ndarray, "box 2"]
    sizes: Float[np.ndarray, "box 2"]  # (width, height) of the region that is cropped
    scores: Float[np.ndarray, " box"]
    keypoints: Float[np.ndarray, "box joint 2"]  # of the person in the box
    visible: Float[np.ndarray, "box joint"]

    def __len__(self) -> int:
        return len(self.images)

    def regions(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return centers and sizes of some boxes."""
        return torch.from_numpy(self.centers[rows]), torch.from_numpy(self.sizes[rows])

    @property
    def areas(self) -> Float[np.ndarray, " box"]:
        """Areas of the boxes, square pixels."""
        return self.sizes.prod(axis=1)

    def in_crop(self, input_size: tuple[int, int]) -> Float[np.ndarray, "box joint 2"]:
        """Return the keypoints in pixels of the crops."""
        middle = np.array(input_size[::-1], dtype=np.float32) / 2
        scale = input_size[1] / self.sizes[:, :1, None]
        return ((self.keypoints - self.centers[:, None]) * scale + middle).astype(np.float32)

    def ground_truth(self) -> dict[str, Any]:
        """Return COCO annotations, one for each person."""
        triples = np.concatenate([self.keypoints, 2 * self.visible[..., None]], axis=2, dtype=np.float64)
        boxes = np.concatenate([self.centers - self.sizes / 2, self.sizes], axis=1)
        annotations = [
            {
                "id": number,
                "image_id": int(self.images[row]),
                "category_id": 1,
                "bbox": boxes[row].tolist(),
                "area": float(self.areas[row]) / 2,
                "iscrowd": 0,
                "keypoints": triples[row].ravel().tolist(),
                "num_keypoints": int(self.visible[row].sum()),
            }
            for number, row in enumerate(range(0, len(self), BOXES_PER_PERSON), start=1)
        ]
        images = [{"id": image} for image in np.unique(self.images).tolist()]
        return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


def draw_boxes(number: int, joints: int) -> Boxes:
    """Return boxes of people at random places and sizes; a fifth of the keypoints are unlabelled."""
    generator = np.random.default_rng(0)
    persons = -(-number // BOXES_PER_PERSON)
    width = generator.uniform(60, 250, persons)
    centers = generator.uniform(0, IMAGE_SIDE, (persons, 2))
    size = np.stack([width, width / 0.75], axis=1)
    keypoints = centers[:, None] + generator.uniform(-0.45, 0.45, (persons, joints, 2)) * size[:, None]
    visible = generator.random((persons, joints)) > 0.2
    visible[:, 0] = True
    owner = np.repeat(np.arange(persons), BOXES_PER_PERSON)[:number]
    shift = generator.normal(0, 0.02, (number, 2)) * size[owner]
    return Boxes(
        images=owner // PEOPLE_PER_IMAGE,
        centers=(centers[owner] + shift).astype(np.float32),
        sizes=(size[owner] * generator.uniform(0.95, 1.05, (number, 1))).astype(np.float32),
        scores=generator.uniform(0.3, 1.0, number).astype(np.float32),
        keypoints=keypoints[owner].astype(np.float32),
        visible=visible[owner].astype(np.float32),
    )


def draw_heatmaps(boxes: Boxes, codec: HeatmapCodec, *, batch: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and noisy heatmaps, batch by batch; unlabelled keypoints have a peak too, as from a network."""
    generator = torch.Generator().manual_seed(0)
    keypoints = torch.from_numpy(boxes.in_crop(codec.input_size))
    for first in range(0, len(boxes), batch):
        rows = slice(first, first + batch)
        heatmaps, _ = codec.encode(keypoints[rows], torch.ones(keypoints[rows].shape[:2]))
        yield rows, heatmaps + NOISE * torch.randn(heatmaps.shape, generator=generator)
