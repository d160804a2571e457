"""Keypoints to training targets, vectorised on the device of the keypoints, without a host synchronisation.

Keypoints are (x, y) in pixels of the network's input; sizes are (height, width). `decode.py` converts outputs back to
keypoints. The codecs differ in how they keep the part of a coordinate that is smaller than a cell:

    heatmap   Gaussian at the nearest cell; decoded with a quarter step (Xiao et al., ECCV 2018; HRNet, CVPR 2019)
    dark      Gaussian at the exact place; decoded with a Taylor expansion (Zhang et al., DARK, CVPR 2020)
    udp       as dark, on a grid of pixel centres, so that mirroring is exact (Huang et al., UDP, CVPR 2020)
    simcc     two distributions over half pixels in place of a heatmap (Li et al., SimCC, ECCV 2022)
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor
from torch.nn import functional as F

from fpd_accel.errors import UserError
from fpd_accel.outputs import BINS_PER_PIXEL, STRIDE, SimCC

NOWHERE = -math.inf  # the centre of a Gaussian that is not drawn
LOWEST = math.exp(-4.5) * (1 - 1e-6)  # a Gaussian of peak 1 at 3 sigma, with a margin for rounding
HeatmapKind = Literal["heatmap", "dark", "udp"]
CodecName = Literal["heatmap", "dark", "udp", "simcc"]
Weights = Float32[Tensor, "batch joint"]


@dataclass(frozen=True)
class HeatmapCodec:
    """Gaussian heatmaps of peak 1, one per keypoint; values more than 3 sigma from the centre along an axis are 0.

    Raises:
        UserError: A size is not two positive integers, sigma is not a positive finite number, or the kind is unknown.
    """

    input_size: tuple[int, int] = (256, 192)  # (height, width) of a crop, pixels
    heatmap_size: tuple[int, int] = (64, 48)  # (height, width) of a heatmap, cells
    sigma: float = 2.0  # standard deviation of the Gaussian, cells
    kind: HeatmapKind = "heatmap"  # see the module; only `heatmap` rounds the centre to a whole cell

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
        self, keypoints: Float[Tensor, "batch joint 2"], visible: Shaped[Tensor, "batch joint"]
    ) -> tuple[Float32[Tensor, "batch joint height width"], Weights]:
        """Return heatmaps in [0, 1] and the weight of each in the loss.

        The weight is `visible`, but 0 where the whole patch of 6 sigma + 1 cells lies outside the heatmap. A keypoint
        is drawn only if its weight is above 0.5; otherwise its heatmap is zero. A coordinate that is not a number
        counts as outside.

        Args:
            keypoints: (x, y) in crop pixels.
            visible: Weight of each keypoint; 1 where it is labelled, else 0.
        """
        height, width = self.heatmap_size
        weight = visible.to(torch.float32)
        exact_x, exact_y = (self._to_cells(keypoints[..., axis], axis) for axis in (0, 1))
        column, row = _nearest(exact_x), _nearest(exact_y)
        inside = self._touches(column, width) & self._touches(row, height)
        weight = torch.where(inside, weight, 0.0)
        centers = torch.stack((column, row) if self.kind == "heatmap" else (exact_x, exact_y), dim=-1)
        # exp(-(dx² + dy²)) = exp(-dx²) exp(-dy²): two profiles and one outer product instead of an exp per cell.
        profiles = self._profiles(torch.where(weight[..., None] > 0.5, centers, NOWHERE))
        return profiles[:, :, 1, :height, None] * profiles[:, :, 0, None, :width], weight

    def _to_cells(self, coordinate: Float[Tensor, "batch joint"], axis: int) -> Float[Tensor, "batch joint"]:
        """Convert input pixels along an axis, 0 for x, to heatmap cells."""
        cells, pixels = self.heatmap_size[1 - axis], self.input_size[1 - axis]
        precise = coordinate if coordinate.dtype == torch.float64 else coordinate.to(torch.float32)
        return precise * ((cells - 1) / (pixels - 1) if self.unbiased else cells / pixels)

    def _touches(self, center: Float[Tensor, "batch joint"], cells: int) -> Shaped[Tensor, "batch joint"]:
        """Return whether the patch around each centre counts as touching an axis of `cells` cells.

        The published code compares the exclusive end of the patch with 0 by `<`: a patch that ends just before cell 0
        still counts, so that keypoint keeps its weight with an empty target. Published numbers depend on it.
        """
        return (center - 3 * self.sigma < cells) & (center + 3 * self.sigma + 1 >= 0)

    def _profiles(self, centers: Float[Tensor, "batch joint 2"]) -> Float32[Tensor, "batch joint 2 cell"]:
        """Return 1-D Gaussians of peak 1 around each centre along x and y, 0 beyond 3 sigma.

        Both axes get as many cells as the longer one: two calls of exact sizes would take longer. The exponent is
        clamped before the exponential, which is six times slower where the result underflows; values below the one at
        3 sigma are set to zero afterwards.
        """
        cell = torch.arange(max(self.heatmap_size), device=centers.device, dtype=centers.dtype)
        profiles = cell - centers[..., None]  # then in place: newly allocated memory is not in the caches
        profiles.square_().div_(-2 * self.sigma**2).clamp_(min=-5.0).exp_()
        return F.threshold(profiles, LOWEST, 0.0, inplace=True).to(torch.float32)


@dataclass(frozen=True)
class SimCCCodec:
    """Two Gaussian distributions per keypoint, over the bins of each axis; a pixel has two bins.

    Without `sigma` each axis gets sqrt(side / 8) bins, as in MMPose's SimCC recipes (4.9 for 192 pixels, 5.66 for 256).

    Raises:
        UserError: The size is not two positive integers, or sigma is not a positive finite number.
    """

    input_size: tuple[int, int] = (256, 192)  # (height, width) of a crop, pixels
    sigma: float | None = None  # standard deviation of both Gaussians, bins
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

    @property
    def peaks(self) -> tuple[float, float]:
        """Highest probability of the target along x and y: the peak of a normal density, 1 / (sigma sqrt(2 pi))."""
        x, y = (1 / (sigma * math.sqrt(2 * math.pi)) for sigma in self.sigmas)
        return x, y

    def encode(
        self, keypoints: Float[Tensor, "batch joint 2"], visible: Shaped[Tensor, "batch joint"]
    ) -> tuple[SimCC, Weights]:
        """Return probabilities along both axes, each summing to 1, and the weight of each keypoint in the loss.

        The Gaussian is centred on the nearest bin. The weight is `visible`, but 0 where the keypoint lies outside the
        input, because no bin stands for it. Where the weight is not above 0.5 all probabilities are zero. A coordinate
        that is not a number counts as outside.

        Args:
            keypoints: (x, y) in crop pixels.
            visible: Weight of each keypoint; 1 where it is labelled, else 0.
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


def create_codec(name: CodecName, input_size: tuple[int, int], *, sigma: float | None = None) -> PoseCodec:
    """Return the codec with this name.

    Args:
        name: `simcc`, or a kind of heatmap.
        input_size: (height, width) of a crop, pixels.
        sigma: In cells of 4 pixels (None: 2), or for SimCC in bins (None: sqrt(side / 8) along each axis).
    """
    if name == "simcc":
        return SimCCCodec(input_size, sigma)
    heatmap_size = (input_size[0] // STRIDE, input_size[1] // STRIDE)
    return HeatmapCodec(input_size, heatmap_size, 2.0 if sigma is None else sigma, name)


def _distribution(center: Float[Tensor, "batch joint"], bins: int, sigma: float) -> Float32[Tensor, "batch joint bin"]:
    """Return Gaussians of `sigma` bins around each centre, as probabilities over `bins` bins."""
    offset = torch.arange(bins, device=center.device, dtype=torch.float32) - center[..., None]
    return torch.softmax(-offset.square() / (2 * sigma**2), dim=-1)


def _nearest(cells: Float[Tensor, "batch joint"]) -> Float[Tensor, "batch joint"]:
    """Add a half and truncate towards zero, as the published code rounds: -1.5 < x < 0.5 gives 0, -1.5 gives -1."""
    return torch.trunc(cells + 0.5)


def _check_size(codec: object, name: str) -> None:
    """Check that a field is two positive integers, and store it as a tuple: JSON and YAML give lists, unhashable."""
    size = tuple(getattr(codec, name))
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UserError(f"codec: {name} must be two positive integers (height, width), not {size}")
    object.__setattr__(codec, name, size)
