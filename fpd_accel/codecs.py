"""Keypoints to training targets, vectorised on the device of the keypoints, without a host synchronisation.

Keypoints are (x, y) in pixels of the network's input; sizes are (height, width). How an output becomes keypoints again
is in ``decode.py``. The codecs differ in what they do with the part of a keypoint that is smaller than a cell:

    heatmap   Gaussian on the nearest cell; read back by a quarter step (Xiao et al., ECCV 2018; HRNet, CVPR 2019)
    dark      Gaussian on the exact place; read back by a Taylor expansion (Zhang et al., DARK, CVPR 2020)
    udp       as dark, with pixels counted by their centres, so that mirroring is exact (Huang et al., UDP, CVPR 2020)
    simcc     two distributions over half pixels instead of heatmaps (Li et al., SimCC, ECCV 2022)
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor
from torch.nn import functional as F

from fpd_accel.config import Codec
from fpd_accel.errors import UserError
from fpd_accel.outputs import BINS_PER_PIXEL, STRIDE, SimCC

NOWHERE = -math.inf  # the centre of a joint that is not drawn
LOWEST = math.exp(-4.5) * (1 - 1e-6)  # of a Gaussian of peak 1 within 3 sigma, but for rounding
HeatmapKind = Literal["heatmap", "dark", "udp"]
Weights = Float32[Tensor, "batch joint"]


@dataclass(frozen=True)
class HeatmapCodec:
    """Gaussian heatmaps of peak 1, one per joint; values farther than 3 sigma from the centre along an axis are 0.

    ``kind`` is ``heatmap``, ``dark`` or ``udp`` (see the module). Of ``heatmap`` the centre is rounded to a whole cell.

    Raises:
        UserError: a size is not two positive integers, sigma is not a positive finite number, or the kind is unknown.
    """

    input_size: tuple[int, int] = (256, 192)
    heatmap_size: tuple[int, int] = (64, 48)
    sigma: float = 2.0  # heatmap cells
    kind: HeatmapKind = "heatmap"

    def __post_init__(self) -> None:
        for name in ("input_size", "heatmap_size"):
            _check_size(self, name)
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise UserError(f"codec: sigma must be a positive number of heatmap cells, not {self.sigma}")
        if self.kind not in get_args(HeatmapKind):
            raise UserError(f"codec: {self.kind!r} is none of {', '.join(get_args(HeatmapKind))}")

    @property
    def unbiased(self) -> bool:
        """Whether crops and heatmaps are aligned by the centres of their corner pixels (UDP)."""
        return self.kind == "udp"

    def encode(
        self,
        keypoints: Float[Tensor, "batch joint 2"],
        visible: Shaped[Tensor, "batch joint"],
    ) -> tuple[Float32[Tensor, "batch joint height width"], Weights]:
        """Heatmaps in [0, 1] and the weight of each in the loss.

        The weight is ``visible``, but 0 where the whole patch of 6 sigma + 1 cells lies outside the heatmap. A joint
        is drawn only if its weight is above 0.5; the heatmap of any other is zero. Not-a-number counts as outside.
        """
        height, width = self.heatmap_size
        weight = visible.to(torch.float32)
        exact_x, exact_y = (self._cells(keypoints[..., axis], axis) for axis in (0, 1))
        column, row = _nearest(exact_x), _nearest(exact_y)
        inside = self._touches(column, width) & self._touches(row, height)
        weight = torch.where(inside, weight, 0.0)
        centers = torch.stack((column, row) if self.kind == "heatmap" else (exact_x, exact_y), dim=-1)
        # exp(-(dx² + dy²)) = exp(-dx²) exp(-dy²): two profiles and one outer product instead of an exp per cell.
        profiles = self._profiles(torch.where(weight[..., None] > 0.5, centers, NOWHERE))
        return profiles[:, :, 1, :height, None] * profiles[:, :, 0, None, :width], weight

    def _cells(self, coordinate: Float[Tensor, "batch joint"], axis: int) -> Float[Tensor, "batch joint"]:
        """Pixels of the input as heatmap cells; axis 0 is x."""
        cells, pixels = self.heatmap_size[1 - axis], self.input_size[1 - axis]
        precise = coordinate if coordinate.dtype == torch.float64 else coordinate.to(torch.float32)
        return precise * ((cells - 1) / (pixels - 1) if self.unbiased else cells / pixels)

    def _touches(self, center: Float[Tensor, "batch joint"], cells: int) -> Shaped[Tensor, "batch joint"]:
        """Whether the patch around a centre counts as touching an axis of so many cells.

        The published code compares the patch's exclusive end with 0 by ``<``: a patch that ends just before cell 0
        still counts, so that joint keeps its weight with an empty target. Published numbers depend on it.
        """
        return (center - 3 * self.sigma < cells) & (center + 3 * self.sigma + 1 >= 0)

    def _profiles(self, centers: Float[Tensor, "batch joint 2"]) -> Float32[Tensor, "batch joint 2 cell"]:
        """One-dimensional Gaussians of peak 1 around each centre, cut at 3 sigma, along x and y in one go.

        Both have as many cells as the longer axis: two calls for the exact number would take longer. The exponent is
        cut before the exponential, which is six times as slow where its result vanishes, and what is less than the
        value at 3 sigma after it.
        """
        cell = torch.arange(max(self.heatmap_size), device=centers.device, dtype=centers.dtype)
        profiles = cell - centers[..., None]  # and all that follows in its place: new memory is new to the caches
        profiles.square_().div_(-2 * self.sigma**2).clamp_(min=-5.0).exp_()
        return F.threshold(profiles, LOWEST, 0.0, inplace=True).to(torch.float32)


@dataclass(frozen=True)
class SimCCCodec:
    """Two Gaussian distributions per joint, over the bins of each axis, of which a pixel has two.

    ``sigma`` is in bins, the same along both axes; None takes sqrt(side / 8) along each, as MMPose's SimCC recipes do
    (4.9 bins for 192 pixels, 5.66 for 256).

    Raises:
        UserError: the size is not two positive integers, or sigma is not a positive finite number.
    """

    input_size: tuple[int, int] = (256, 192)
    sigma: float | None = None
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_size(self, "input_size")
        if self.sigma is not None and not (math.isfinite(self.sigma) and self.sigma > 0):
            raise UserError(f"codec: sigma must be a positive number of bins, not {self.sigma}")

    @property
    def sigmas(self) -> tuple[float, float]:
        """Standard deviations along x and y, bins."""
        height, width = self.input_size
        return self.sigma or math.sqrt(width / 8), self.sigma or math.sqrt(height / 8)

    def encode(
        self, keypoints: Float[Tensor, "batch joint 2"], visible: Shaped[Tensor, "batch joint"]
    ) -> tuple[SimCC, Weights]:
        """Probabilities along both axes, each summing to 1, and the weight of each joint in the loss.

        The Gaussian stands on the nearest bin. The weight is ``visible``, but 0 where the keypoint lies outside the
        input: no bin could name it. Not-a-number counts as outside. Where the weight is not above 0.5 all are zero.
        """
        height, width = self.input_size
        bins = torch.round(keypoints.to(torch.float32) * BINS_PER_PIXEL)
        column, row = bins.unbind(-1)
        inside = (column >= 0) & (column < BINS_PER_PIXEL * width) & (row >= 0) & (row < BINS_PER_PIXEL * height)
        bins = torch.where(inside[..., None], bins, 0.0)
        sides = zip(bins.unbind(-1), (width, height), self.sigmas, strict=True)
        weight = torch.where(inside, visible.to(torch.float32), 0.0)
        target = SimCC(*(_distribution(center, side * BINS_PER_PIXEL, sigma) for center, side, sigma in sides))
        return target.map(lambda axis: torch.where((weight > 0.5)[..., None], axis, 0.0)), weight


PoseCodec = HeatmapCodec | SimCCCodec


def create_codec(codec: Codec, input_size: tuple[int, int]) -> PoseCodec:
    """The codec that a recipe or a model folder describes."""
    if codec.name == "simcc":
        return SimCCCodec(input_size, codec.sigma)
    heatmap_size = (input_size[0] // STRIDE, input_size[1] // STRIDE)
    return HeatmapCodec(input_size, heatmap_size, 2.0 if codec.sigma is None else codec.sigma, codec.name)


def _distribution(center: Float[Tensor, "batch joint"], bins: int, sigma: float) -> Float32[Tensor, "batch joint bin"]:
    offset = torch.arange(bins, device=center.device, dtype=torch.float32) - center[..., None]
    return torch.softmax(-offset.square() / (2 * sigma**2), dim=-1)


def _nearest(cells: Float[Tensor, "batch joint"]) -> Float[Tensor, "batch joint"]:
    """Rounded half up, as C rounds by truncation: (-1.5, 0.5) becomes 0, -1.5 becomes -1."""
    return torch.trunc(cells + 0.5)


def _check_size(codec: object, name: str) -> None:
    size = tuple(getattr(codec, name))
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UserError(f"codec: {name} must be two positive integers (height, width), not {size}")
    object.__setattr__(codec, name, size)  # a list, as JSON and YAML give it, would leave the codec unhashable
