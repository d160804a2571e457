"""Losses as pure functions of tensors, computed in float32 whatever the precision of their arguments.

They raise ValueError if the shapes of prediction, target and weight do not fit each other.

The squared losses are means of half squared errors. The weight multiplies both prediction and target, so it enters
squared; keypoints of weight zero still count in the denominator. These are the conventions of Xiao et al. (Simple
Baselines, ECCV 2018), on which published learning rates depend.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fpd_accel.outputs import Heatmaps, Output, PerJoint, Scalar, SimCC


@dataclass(frozen=True)
class Losses:
    """The terms of the objective, and the outputs that they compare, for accuracy and pictures."""

    total: Float[Tensor, ""]
    pose: Float[Tensor, ""]  # loss against the labels
    kd: Float[Tensor, ""]  # loss against the teacher; 0 without one
    kd_unlabelled: Float[Tensor, ""]  # the part of `kd` from people without labels
    predicted: Output  # the student's last stage, detached
    target: Output  # the codec's encoding of the labels
    teacher_output: Output | None  # the teacher's last stage; None without a teacher


def heatmap_mse(predicted: Heatmaps, target: Heatmaps, weight: PerJoint) -> Scalar:
    """Return half the mean over samples, joints and cells of `(weight * predicted - weight * target)²`."""
    return _joint_errors(predicted, target, weight).mean()


def heatmap_ohkm(predicted: Heatmaps, target: Heatmaps, weight: PerJoint, top_k: int = 8) -> Scalar:
    """Return `heatmap_mse` over the `top_k` joints of each sample with the largest errors.

    This is online hard keypoint mining (Chen et al., Cascaded Pyramid Network, CVPR 2018, section 3.2).

    Raises:
        ValueError: `top_k` is not between 1 and the number of joints.
    """
    errors = _joint_errors(predicted, target, weight)
    if not 1 <= top_k <= errors.shape[1]:
        raise ValueError(f"top_k must be between 1 and the number of joints, {errors.shape[1]}, not {top_k}")
    return errors.topk(top_k, dim=1, sorted=False).values.mean()


def _joint_errors(predicted: Heatmaps, target: Heatmaps, weight: PerJoint) -> Float32[Tensor, "batch joint"]:
    """Return half the weighted mean squared error of each heatmap."""
    _check_shapes(predicted, target, weight)
    # The weight is constant over a heatmap: applying it after the mean saves two passes over the cells.
    squared = (predicted.float() - target.float()).square().mean(dim=(2, 3))
    return 0.5 * weight.float().square() * squared


def heatmap_kl(predicted: Heatmaps, target: Heatmaps, weight: PerJoint, *, temperature: float = 0.1) -> Scalar:
    """Return the mean over samples and joints of `weight * temperature² * KL(target || predicted)`, in nats.

    A heatmap becomes a distribution over its cells by a softmax of its values divided by `temperature`: at 0.1 a peak
    of height 1 outweighs the 3,072 cells of a flat 64 x 48 map. The factor `temperature²` makes the size of the
    gradient independent of the temperature (Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015,
    section 2.1).
    """
    _check_shapes(predicted, target, weight)
    log_predicted, log_target = (
        (maps.float().flatten(2) / temperature).log_softmax(dim=-1) for maps in (predicted, target)
    )
    divergence = (log_target.exp() * (log_target - log_predicted)).sum(dim=-1)
    return temperature**2 * (weight.float() * divergence).mean()


def simcc_kl(predicted: SimCC, target: SimCC, weight: PerJoint, *, temperature: float = 1.0) -> Scalar:
    """Return the mean of `weight * temperature² * KL(target || softmax(predicted / temperature))`, in nats.

    The mean is over samples, joints and both axes (Li et al., SimCC, ECCV 2022, section 3.3; for a teacher's target
    Yang et al., DWPose, ICCVW 2023).

    Args:
        predicted: Logits.
        target: Probabilities; all zero for a joint that does not count.
        weight: Weight of each joint.
        temperature: Divisor of the logits.
    """
    divergence = torch.zeros_like(weight, dtype=torch.float32)
    for logits, probabilities in zip(predicted, target, strict=True):
        _check_shapes(logits, probabilities, weight)
        log_predicted = (logits.float() / temperature).log_softmax(dim=-1)
        divergence = divergence + (torch.xlogy(probabilities, probabilities) - probabilities * log_predicted).sum(-1)
    return temperature**2 * (weight.float() * divergence).mean() / len(predicted)


def marginals(heatmaps: Heatmaps, bins: tuple[int, int], *, sharpness: tuple[float, float] = (1.0, 1.0)) -> SimCC:
    """Return the marginal distributions of heatmaps along each axis, as probabilities over SimCC's bins.

    The positive part of a heatmap is summed along the other axis and normalised. A heatmap without a positive value
    gives zeros.

    Args:
        heatmaps: Heatmaps of a teacher.
        bins: Number of bins along x and along y; bin 0 and cell 0 both lie at the first pixel of the input.
        sharpness: Exponents along x and along y, applied before normalising: a Gaussian becomes narrower by the square
            root of the exponent.
    """
    positive = heatmaps.float().clamp(min=0)
    axes = []
    for profile, count, power in zip((positive.sum(dim=2), positive.sum(dim=3)), bins, sharpness, strict=True):
        peak = profile.amax(dim=-1, keepdim=True)
        # Interpolate logarithms: those of a Gaussian are a parabola, so it stays a Gaussian between the cells.
        logs = (profile / peak.clamp(min=1e-12)).clamp(min=1e-4).log()
        powers = power * (logs @ _cubic_weights(profile.shape[-1], count, profile.device))
        axes.append(torch.where(peak > 0, powers.softmax(dim=-1), 0.0))
    return SimCC(*axes)


def _cubic_weights(cells: int, bins: int, device: torch.device) -> Float32[Tensor, "cells bins"]:
    """Return the matrix that interpolates from cells to bins, which lie `cells / bins` cells apart.

    Cubic convolution (Keys, 1981) is exact for parabolas.
    """
    place = torch.arange(bins, device=device) * (cells / bins)
    left = place.floor()
    t = place - left
    weights = torch.zeros(cells, bins, device=device)
    # Weights of the four cells from one left of `left` to two right of it.
    taps = (
        (-t + 2 * t**2 - t**3) / 2,
        (2 - 5 * t**2 + 3 * t**3) / 2,
        (t + 4 * t**2 - 3 * t**3) / 2,
        (t**3 - t**2) / 2,
    )
    for offset, tap in enumerate(taps, start=-1):
        cell = (left.long() + offset).clamp(0, cells - 1)  # the border cell is repeated outside
        weights.scatter_add_(0, cell[None], tap[None])
    return weights


def _check_shapes(predicted: Tensor, target: Tensor, weight: Tensor) -> None:
    """Refuse shapes that broadcasting would combine into a wrong result without an error."""
    if predicted.shape != target.shape or predicted.shape[:2] != weight.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (predicted, target, weight))
        raise ValueError(f"expected shapes (B, K, ...), the same again and (B, K), not {shapes}")
