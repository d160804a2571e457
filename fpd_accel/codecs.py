"""Keypoints to training targets, vectorised on the device of the keypoints, without a host synchronisation.

Keypoints are (x, y) in pixels of the network's input; sizes are (height, width).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from fpd_accel.errors import UserError


@dataclass(frozen=True)
class HeatmapCodec:
    """Gaussian heatmaps, one per joint, centred on the heatmap cell nearest to the keypoint.

    The encoding of Xiao et al. (Simple Baselines, ECCV 2018) and Sun et al. (HRNet, CVPR 2019): the centre is rounded
    to a whole cell, the peak is 1, and values farther than 3 sigma from the centre along an axis are cut to 0.

    Raises:
        UserError: a size is not two positive integers, or sigma is not a positive finite number.
    """

    input_size: tuple[int, int] = (256, 192)
    heatmap_size: tuple[int, int] = (64, 48)
    sigma: float = 2.0  # heatmap cells

    def __post_init__(self) -> None:
        for name in ("input_size", "heatmap_size"):
            size = tuple(getattr(self, name))
            if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
                raise UserError(f"codec: {name} must be two positive integers (height, width), not {size}")
            object.__setattr__(self, name, size)  # a list, as JSON and YAML give it, would leave the codec unhashable
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise UserError(f"codec: sigma must be a positive number of heatmap cells, not {self.sigma}")

    def encode(
        self,
        keypoints: Float[Tensor, "batch joint 2"],
        visible: Shaped[Tensor, "batch joint"],
    ) -> tuple[Float32[Tensor, "batch joint height width"], Float32[Tensor, "batch joint"]]:
        """Heatmaps in [0, 1] and the weight of each in the loss.

        The weight is ``visible``, but 0 where the whole patch of 6 sigma + 1 cells lies outside the heatmap. A joint
        is drawn only if its weight is above 0.5; the heatmap of any other is zero. Not-a-number counts as outside.
        """
        height, width = self.heatmap_size
        weight = visible.to(torch.float32)
        column = _nearest_cell(keypoints[..., 0], width / self.input_size[1])
        row = _nearest_cell(keypoints[..., 1], height / self.input_size[0])
        inside = self._touches(column, width) & self._touches(row, height)
        weight = torch.where(inside, weight, 0.0)
        # exp(-(dx² + dy²)) = exp(-dx²) exp(-dy²): two profiles and one outer product instead of an exp per cell.
        profile_x, profile_y = self._profile(column, width), self._profile(row, height)
        profile_y = torch.where((weight > 0.5)[..., None], profile_y, 0.0)
        return profile_y[..., :, None] * profile_x[..., None, :], weight

    def _touches(self, center: Float[Tensor, "batch joint"], cells: int) -> Shaped[Tensor, "batch joint"]:
        """Whether the patch around a centre counts as touching an axis of so many cells.

        The published code compares the patch's exclusive end with 0 by ``<``: a patch that ends just before cell 0
        still counts, so that joint keeps its weight with an empty target. Published numbers depend on it.
        """
        return (center - 3 * self.sigma < cells) & (center + 3 * self.sigma + 1 >= 0)

    def _profile(self, center: Float[Tensor, "batch joint"], cells: int) -> Float32[Tensor, "batch joint cell"]:
        """The one-dimensional Gaussian of peak 1 around each centre, cut at 3 sigma."""
        cell = torch.arange(cells, device=center.device, dtype=center.dtype)
        offset = cell - center[..., None]
        profile = torch.exp(-offset.square() / (2 * self.sigma**2))
        return torch.where(offset.abs() <= 3 * self.sigma, profile, 0.0).to(torch.float32)


def _nearest_cell(coordinate: Float[Tensor, "batch joint"], scale: float) -> Float[Tensor, "batch joint"]:
    """``coordinate * scale`` rounded half up, as C rounds by truncation: (-1.5, 0.5) becomes 0, -1.5 becomes -1."""
    precise = coordinate if coordinate.dtype == torch.float64 else coordinate.to(torch.float32)
    return torch.trunc(precise * scale + 0.5)
