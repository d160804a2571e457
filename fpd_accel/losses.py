"""Losses as pure functions of tensors, computed in float32 whatever the precision of their arguments.

A loss here is a mean of half squared errors in which the weight multiplies prediction and target alike and so enters
squared, and in which joints of weight zero still count in the denominator: the conventions of Xiao et al. (Simple
Baselines, ECCV 2018), on which published learning rates depend.
"""

from dataclasses import dataclass

from jaxtyping import Float, Float32
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """The terms of the objective, and the heatmaps they compare, for accuracy and pictures."""

    total: Float[Tensor, ""]
    pose: Float[Tensor, ""]  # against the labels
    kd: Float[Tensor, ""]  # against the teacher; 0 without one
    predicted: Float[Tensor, "batch joint height width"]  # the student's last stage, detached
    target: Float[Tensor, "batch joint height width"]
    taught: Float[Tensor, "batch joint height width"] | None  # the teacher's; None without one


def heatmap_mse(
    predicted: Float[Tensor, "batch joint height width"],
    target: Float[Tensor, "batch joint height width"],
    weight: Float[Tensor, "batch joint"],
) -> Float32[Tensor, ""]:
    """Half the mean, over samples, joints and cells, of ``(weight * predicted - weight * target)²``.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    return _joint_errors(predicted, target, weight).mean()


def heatmap_ohkm(
    predicted: Float[Tensor, "batch joint height width"],
    target: Float[Tensor, "batch joint height width"],
    weight: Float[Tensor, "batch joint"],
    top_k: int = 8,
) -> Float32[Tensor, ""]:
    """:func:`heatmap_mse` of only the ``top_k`` joints of each sample that have the largest error.

    Online hard keypoint mining (Chen et al., Cascaded Pyramid Network, CVPR 2018, section 3.2).

    Raises:
        ValueError: the shapes do not fit each other, or ``top_k`` is not between 1 and the number of joints.
    """
    errors = _joint_errors(predicted, target, weight)
    if not 1 <= top_k <= errors.shape[1]:
        raise ValueError(f"top_k must be between 1 and the number of joints, {errors.shape[1]}, not {top_k}")
    return errors.topk(top_k, dim=1, sorted=False).values.mean()


def _joint_errors(
    predicted: Float[Tensor, "batch joint height width"],
    target: Float[Tensor, "batch joint height width"],
    weight: Float[Tensor, "batch joint"],
) -> Float32[Tensor, "batch joint"]:
    """Half the weighted mean squared error of each heatmap."""
    if predicted.shape != target.shape or predicted.shape[:2] != weight.shape:
        # Broadcasting would make a wrong number of them in silence.
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (predicted, target, weight))
        raise ValueError(f"expected shapes (B, K, h, w), (B, K, h, w) and (B, K), not {shapes}")
    # The weight is constant over a heatmap: applied after the mean it saves two passes over the cells.
    squared = (predicted.float() - target.float()).square().mean(dim=(2, 3))
    return 0.5 * weight.float().square() * squared
