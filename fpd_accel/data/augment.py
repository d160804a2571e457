"""Random geometry of one training sample, as a pure function of (seed, view, person).

The distributions are those of the published implementation, including its quirks: scale and rotation are *clipped*
normals (31.7 % of the scales and 4.6 % of the angles lie on a bound), the angle is non-zero in 60 % of the draws, and
the upper body is preferred with the probability that a standard normal falls below 0.5. Every number is drawn whether
or not it is used, so that no branch shifts the draws after it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from fpd_accel.config.schema import Augment
from fpd_accel.skeleton import Skeleton


@dataclass(frozen=True)
class Geometry:
    """The region of the image that a crop shows, its rotation, and whether it is mirrored."""

    center: np.ndarray  # (x, y), image pixels
    size: np.ndarray  # (width, height), image pixels
    rotation: float = 0.0  # degrees
    flip: bool = False


def sample_generator(seed: int, view: int, person: int, *, source: int = 0) -> np.random.Generator:
    """Return the random generator of one view of a person; it is the same on every rank, worker and restart.

    The view has the number of the epoch, or is one of a few fixed ones (see `view_in_epoch`). `person` is a row of the
    dataset, which is number `source` of its mixture.
    """
    return np.random.Generator(np.random.Philox(key=[seed, view], counter=[0, 0, source, person]))


def view_in_epoch(seed: int, epoch: int, person: int, *, source: int = 0, views: int) -> int:
    """Return the view of a person that an epoch shows: each of `views` once in `views` epochs, in a random order."""
    cycle, turn = divmod(epoch, views)
    # The second word of the counter keeps this apart from the stream of `sample_generator` for the same person.
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
    """Draw a geometry around the region (`center`, `size`) of a person with `keypoints`, all in image pixels."""
    half_gate, upper_gate, rotation_gate, flip_gate = generator.random(4)
    scale_normal, rotation_normal = generator.standard_normal(2)
    if visible.sum() > augment.half_body_minimum and half_gate < augment.half_body:
        upper = bool(upper_gate < augment.upper_body)
        center, size = half_body(
            center, size, keypoints=keypoints, visible=visible, skeleton=skeleton, prefer_upper=upper
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
    """Return (center, size) of the upper or lower body: 1.5 times the box of its visible keypoints.

    The aspect ratio is that of `size`. A half is chosen only if it has three visible keypoints; if neither has, the
    upper one is taken. With fewer than two the region stays as it is. The augmentation is that of Wang et al., arXiv
    1901.00148.
    """
    is_upper = np.isin(np.arange(skeleton.num_keypoints), skeleton.upper_body_indices)
    upper, lower = keypoints[visible & is_upper], keypoints[visible & ~is_upper]
    chosen = upper if (prefer_upper and len(upper) > 2) or len(lower) <= 2 else lower
    if len(chosen) < 2:
        return center, size
    aspect = size[0] / size[1]
    width, height = chosen.max(axis=0) - chosen.min(axis=0)
    region = 1.5 * np.array([max(width, height * aspect), max(height, width / aspect)])
    if region[0] <= 0:  # all keypoints coincide
        return center, size
    return chosen.mean(axis=0), region
