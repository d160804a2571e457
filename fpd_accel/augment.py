"""Random geometry of one training sample, as a pure function of a key.

The distributions are the published implementation's, quirks included: scale and rotation are *clipped* normals (31.7 %
of the scales and 4.6 % of the angles sit on a bound), the angle is non-zero in 60 % of the draws, and "upper body" is
chosen where a standard normal falls below 0.5. Each number is drawn whether or not it is used, so that no branch shifts
the draws after it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from fpd_accel.config import Augment
from fpd_accel.skeleton import Skeleton


@dataclass(frozen=True)
class Geometry:
    """What part of the image a crop shows, and how: centre and (width, height) in image pixels, degrees, mirrored."""

    center: np.ndarray
    size: np.ndarray
    rotation: float = 0.0
    flip: bool = False


def sample_generator(seed: int, view: int, person: int, *, source: int = 0) -> np.random.Generator:
    """The random stream of one view of a person of a dataset: the same on every rank, worker and restart.

    Views are as many as there are epochs, one in each, or fewer (see :func:`view_in_epoch`).
    """
    return np.random.Generator(np.random.Philox(key=[seed, view], counter=[0, 0, source, person]))


def view_in_epoch(seed: int, epoch: int, person: int, *, source: int = 0, views: int) -> int:
    """Which of a person's views an epoch shows: in ``views`` epochs each once, in an order of the person's own."""
    cycle, turn = divmod(epoch, views)
    # Apart from sample_generator's stream of the same person by the second word of the counter.
    generator = np.random.Generator(np.random.Philox(key=[seed, cycle], counter=[0, 1, source, person]))
    return int(generator.permutation(views)[turn])


def draw_geometry(
    generator: np.random.Generator,
    augment: Augment,
    *,
    skeleton: Skeleton,
    center: Float[np.ndarray, "2"],
    size: Float[np.ndarray, "2"],
    keypoints: Float[np.ndarray, "joint 2"],
    visible: Bool[np.ndarray, " joint"],
) -> Geometry:
    """Draw a geometry around the region (``center``, ``size``) of a person with ``keypoints`` in image pixels."""
    half_gate, upper_gate, rotation_gate, flip_gate = generator.random(4)
    scale_normal, rotation_normal = generator.standard_normal(2)
    if visible.sum() > augment.half_body_minimum and half_gate < augment.half_body:
        center, size = half_body(
            center,
            size,
            keypoints=keypoints,
            visible=visible,
            skeleton=skeleton,
            prefer_upper=bool(upper_gate < augment.upper_body),
        )
    factor = np.clip(1 + augment.scale * scale_normal, 1 - augment.scale, 1 + augment.scale)
    angle = np.clip(augment.rotation * rotation_normal, -2 * augment.rotation, 2 * augment.rotation)
    return Geometry(
        center=center,
        size=size * factor,
        rotation=float(angle) if rotation_gate <= augment.rotation_probability else 0.0,
        flip=bool(flip_gate <= augment.flip),
    )


def half_body(
    center: Float[np.ndarray, "2"],
    size: Float[np.ndarray, "2"],
    *,
    keypoints: Float[np.ndarray, "joint 2"],
    visible: Bool[np.ndarray, " joint"],
    skeleton: Skeleton,
    prefer_upper: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The region of the upper or lower body: 1.5 times the box of its visible keypoints, at the aspect of ``size``.

    The preferred half needs three visible keypoints, else the other is tried; with fewer than two in the end the
    region stays as it is (Wang et al., arXiv 1901.00148, introduced the augmentation).
    """
    is_upper = np.isin(np.arange(skeleton.num_keypoints), skeleton.upper_body_indices)
    upper, lower = keypoints[visible & is_upper], keypoints[visible & ~is_upper]
    chosen = upper if (prefer_upper and len(upper) > 2) or len(lower) <= 2 else lower
    if len(chosen) < 2:
        return center, size
    aspect = size[0] / size[1]
    width, height = chosen.max(axis=0) - chosen.min(axis=0)
    region = 1.5 * np.array([max(width, height * aspect), max(height, width / aspect)])
    if region[0] <= 0:  # all keypoints on one spot
        return center, size
    return chosen.mean(axis=0), region
