"""Before loaders are timed: does ours give what the published one gives?

Of the same people the crops, before normalisation, and the keypoints in them; then, of one and the same crop and its
keypoints, what is made of them for the network and for the loss.
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fpd_accel.bench.reference_loader import ReferenceDataset
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.data import PoseStream
from fpd_accel.data.batch import Normalization
from fpd_accel.errors import BenchError
from fpd_accel.outputs import STRIDE

TOLERANCE = {  # of what both give of a person
    "pixel_max": (2.0, "grey levels between crops"),
    "pixel_mean": (0.1, "grey levels between crops in the mean"),
    "keypoint_max": (0.01, "crop pixels between keypoints"),
    "image_max": (1e-4, "standard deviations between the same crop normalised"),
    "target_max": (1e-4, "between targets of the same keypoints"),
}


class Preparation:
    """What the published loader does and ours leaves to the device: normalised images, targets and their weights."""

    def __init__(self, input_size: tuple[int, int]) -> None:
        self.normalization = Normalization()
        self.codec = HeatmapCodec(input_size, (input_size[0] // STRIDE, input_size[1] // STRIDE))

    def __call__(
        self,
        crops: UInt8[Tensor, "batch height width 3"],
        keypoints: Float[Tensor, "batch joint 2"],
        visible: Float[Tensor, "batch joint"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.normalization(crops), *self.codec.encode(keypoints, visible)


def compare_pixels(stream: PoseStream, reference: ReferenceDataset, *, people: int = 128) -> dict[str, float]:
    """Differences of the same people's crops (grey levels of 256, before normalisation) and keypoints (crop pixels).

    Raises:
        BenchError: not the same keypoints are visible.
    """
    people = min(people, len(reference))
    batch = stream.batch(range(people))
    pixels, keypoints = [], [0.0]
    for number in range(people):
        crop, joints, visible, _ = reference.crop(reference.records[number])
        pixels.append(np.abs(crop.astype(np.int16) - batch.crops[number].numpy()))
        ours, seen = batch.keypoints[number].numpy(), visible[:, 0] > 0
        if not np.array_equal(seen, batch.visible[number].numpy() > 0):
            raise BenchError(f"{reference.shards.path}: sample {number}: not the same keypoints are visible")
        keypoints += np.abs(joints[seen, :2] - ours[seen]).max(axis=1, initial=0).tolist()
    return {
        "people": people,
        "pixel_mean": float(np.mean(pixels)),
        "pixel_max": float(np.max(pixels)),
        "keypoint_max": max(keypoints),
    }


def compare_prepared(prepare: Preparation, reference: ReferenceDataset, *, people: int = 32) -> dict[str, float]:
    """Differences of what is made of the same crops and keypoints: normalised images, targets with their weights."""
    images, targets = [], []
    for record in reference.records[:people]:
        crop, joints, visible, _ = reference.crop(record)
        one = (torch.from_numpy(array[None]) for array in (crop, joints[:, :2], visible[:, 0]))
        image, target, weight = prepare(*one)
        drawn, wanted = reference.generate_target(joints, visible)
        images.append(_difference(image[0], reference.transform(crop)))
        targets += [_difference(target[0], drawn), _difference(weight[0], wanted[:, 0])]
    return {"image_max": max(images), "target_max": max(targets)}


def _difference(ours: Tensor, theirs: Tensor | np.ndarray) -> float:
    return float((ours - torch.as_tensor(theirs)).abs().max())


def check_agreement(name: str, error: dict[str, float]) -> None:
    """Refuse to time loaders of which one must be wrong.

    Raises:
        BenchError: a difference is larger than its tolerance.
    """
    found = [
        f"{error[key]:.3g} {words} (allowed are {most:g})"
        for key, (most, words) in TOLERANCE.items()
        if not error[key] <= most
    ]
    if found:
        raise BenchError(
            f"{name}: our loader and the published one do not give the same, so their times say nothing: "
            + ", ".join(found)
        )
