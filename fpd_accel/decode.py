"""Outputs to keypoints, flip fusion, and the training accuracy: tensors only, no host synchronisation.

Keypoints are (x, y); heatmaps are (batch, joint, height, width). ``decode``, ``fuse`` and ``accuracy`` take the output
of any network with the codec it was trained by; the functions after them are theirs for heatmaps and for SimCC.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor
from torch.nn import functional as F

from fpd_accel.codecs import PoseCodec, SimCCCodec
from fpd_accel.errors import UserError
from fpd_accel.outputs import BINS_PER_PIXEL, Output, SimCC

Refinement = Literal["none", "quarter", "dark"]
Found = tuple[Float32[Tensor, "batch joint 2"], Float32[Tensor, "batch joint"]]
FlipIndex = Int[Tensor, " joint"] | Sequence[int]


def decode(
    output: Output,
    codec: PoseCodec,
    centers: Float[Tensor, "batch 2"],
    sizes: Float[Tensor, "batch 2"],
    *,
    refine: Refinement | None = None,
) -> Found:
    """Keypoints in image pixels and their scores; ``refine`` None is what belongs to the codec."""
    if isinstance(codec, SimCCCodec):
        assert isinstance(output, SimCC)
        return decode_simcc(output.softmax(), codec, centers, sizes)
    assert isinstance(output, Tensor)
    return decode_heatmaps(
        output,
        centers,
        sizes,
        refine=refine or ("quarter" if codec.kind == "heatmap" else "dark"),
        sigma=codec.sigma,
        unbiased=codec.unbiased,
    )


def fuse(output: Output, flipped: Output, codec: PoseCodec, flip_index: FlipIndex, *, shift: bool = True) -> Output:
    """The mean of the output for an image and, mapped back, that for its mirror image.

    ``shift=False`` leaves out the shift by one cell (:func:`flip_back`), which UDP and SimCC never have.
    """
    if isinstance(output, SimCC):
        assert isinstance(flipped, SimCC)
        return fuse_flip_simcc(output, flipped, flip_index)
    assert isinstance(flipped, Tensor)
    return fuse_flip(output, flipped, flip_index, shift=shift and not codec.unbiased)


def accuracy(predicted: Output, target: Output) -> Float32[Tensor, ""]:
    """The share of keypoints found near the target: :func:`heatmap_accuracy`, or its like for SimCC's bins."""
    if isinstance(predicted, SimCC):
        assert isinstance(target, SimCC)
        return simcc_accuracy(predicted, target)
    assert isinstance(target, Tensor)
    return heatmap_accuracy(predicted, target)


def peak_scores(output: Output, codec: PoseCodec) -> Float32[Tensor, "batch joint"]:
    """How sure a network is of each keypoint: the heatmap's maximum, or SimCC's score of :func:`decode_simcc`."""
    if isinstance(output, SimCC):
        assert isinstance(codec, SimCCCodec)
        return _simcc_scores(output.softmax(), codec)
    return output.amax(dim=(2, 3)).to(torch.float32)


def decode_heatmaps(
    heatmaps: Float[Tensor, "batch joint height width"],
    centers: Float[Tensor, "batch 2"],
    sizes: Float[Tensor, "batch 2"],
    refine: Refinement = "quarter",
    *,
    sigma: float = 2.0,
    unbiased: bool = False,
) -> Found:
    """Keypoints in image pixels and their scores, the heatmaps' maxima.

    ``centers`` (x, y) and ``sizes`` (w, h) describe in image pixels the crop region that the heatmap covers. As in
    the published code only the width sets the scale (the crop is a similarity), and the heatmap's centre, not that of
    its grid of cells, falls on the region's; ``unbiased`` puts the centres of the corner cells on the region's corners
    instead (Huang et al., UDP, CVPR 2020). ``refine`` names the sub-cell step: ``none``; ``quarter`` of a cell towards
    the higher neighbour along each axis (Newell et al., Stacked Hourglass, ECCV 2016); or ``dark``, a Taylor expansion
    of the logarithm about the maximum (Zhang et al., CVPR 2020), for Gaussians of ``sigma`` cells.

    Raises:
        UserError: ``refine`` is no known refinement.
    """
    coordinates, scores = argmax_2d(heatmaps)
    match refine:
        case "none":
            pass
        case "quarter":
            coordinates = _quarter_step(heatmaps, coordinates)
        case "dark":
            coordinates = _taylor_step(heatmaps, coordinates, sigma)
        case _:
            raise UserError(f"refine: {refine!r} is none of {', '.join(get_args(Refinement))}")
    height, width = heatmaps.shape[-2:]
    sizes = sizes.to(torch.float32)
    x, y = coordinates.unbind(-1)
    if unbiased:
        shares = torch.stack((x / (width - 1), y / (height - 1)), dim=-1)
        return (shares - 0.5) * sizes[:, None] + centers.to(torch.float32)[:, None], scores
    centered = torch.stack((x - width / 2, y - height / 2), dim=-1)
    pixels_per_cell = sizes[:, 0] / width
    return centered * pixels_per_cell[:, None, None] + centers.to(torch.float32)[:, None], scores


def decode_simcc(
    probabilities: SimCC,
    codec: SimCCCodec,
    centers: Float[Tensor, "batch 2"],
    sizes: Float[Tensor, "batch 2"],
) -> Found:
    """Keypoints in image pixels, at the most probable bin of each axis, and their scores.

    A score is the smaller of both axes' highest probabilities in units of the target's, at most 1: about 1 where the
    network is as sure as the labels were, like the maximum of a heatmap.
    """
    height, width = codec.input_size
    x, y = (axis.argmax(dim=-1).to(torch.float32) / BINS_PER_PIXEL for axis in probabilities)
    centered = torch.stack((x - width / 2, y - height / 2), dim=-1)
    image_pixels = sizes[:, 0].to(torch.float32) / width  # of one pixel of the crop
    keypoints = centered * image_pixels[:, None, None] + centers.to(torch.float32)[:, None]
    return keypoints, _simcc_scores(probabilities, codec)


def _simcc_scores(probabilities: SimCC, codec: SimCCCodec) -> Float32[Tensor, "batch joint"]:
    label_peaks = (1 / (sigma * math.sqrt(2 * math.pi)) for sigma in codec.sigmas)
    shares = [axis.amax(dim=-1) / peak for axis, peak in zip(probabilities, label_peaks, strict=True)]
    return torch.minimum(*shares).clamp(max=1.0).to(torch.float32)


def argmax_2d(
    heatmaps: Float[Tensor, "batch joint height width"],
) -> tuple[Float32[Tensor, "batch joint 2"], Float32[Tensor, "batch joint"]]:
    """The (x, y) cell of each heatmap's first maximum and its value; the cell is (0, 0) where no value is positive."""
    # The band of rows with the highest cell, and that cell in it, each the first of equals as torch documents. On a CPU
    # that is five times as fast as one argmax of all cells: a plain maximum is vectorised, an argmax is not.
    batch, joints, height, width = heatmaps.shape
    rows = max(number for number in range(1, 5) if height % number == 0)
    bands = heatmaps.reshape(batch * joints, height // rows, rows * width)
    highest = bands.amax(dim=2).argmax(dim=1)
    first = torch.arange(batch * joints, device=heatmaps.device) * (height // rows)
    band = bands.flatten(0, 1).index_select(0, first + highest)
    index = band.argmax(dim=1)
    scores = band.gather(1, index[:, None]).view(batch, joints)
    coordinates = torch.stack((index % width, highest * rows + index // width), dim=-1).view(batch, joints, 2)
    return torch.where((scores > 0)[..., None], coordinates, 0).to(torch.float32), scores.to(torch.float32)


def _quarter_step(
    heatmaps: Float[Tensor, "batch joint height width"], coordinates: Float32[Tensor, "batch joint 2"]
) -> Float32[Tensor, "batch joint 2"]:
    """Whole cells moved by a quarter towards the higher neighbour; cells 0, 1 and the last of an axis stay."""
    height, width = heatmaps.shape[-2:]
    x, y = coordinates.to(torch.int64).unbind(-1)
    flat, index = heatmaps.flatten(2), y * width + x

    def neighbour(offset: int) -> Tensor:
        return flat.gather(2, (index + offset).clamp(0, height * width - 1)[..., None])[..., 0]

    def uphill(offset: int) -> Tensor:
        # Comparing, not subtracting: exact in half precision too.
        after, before = neighbour(offset), neighbour(-offset)
        return (after > before).to(torch.float32) - (after < before).to(torch.float32)

    inner = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    step = torch.stack((uphill(1), uphill(width)), dim=-1)
    return coordinates + 0.25 * torch.where(inner[..., None], step, 0.0)


def _taylor_step(
    heatmaps: Float[Tensor, "batch joint height width"], coordinates: Float32[Tensor, "batch joint 2"], sigma: float
) -> Float32[Tensor, "batch joint 2"]:
    """Whole cells moved to the maximum of the second-order expansion of the log of the smoothed heatmap.

    The heatmap is smoothed by a Gaussian of its own ``sigma``, but for maxima nearer than 2.5 sigma to the border:
    smoothing would miss what lies outside and pull them inwards by up to a tenth of a cell. A cell stays where it is
    at the border itself or where the surface is no hill, and moves by at most one cell along each axis: a network's
    heatmap may be anything.
    """
    height, width = heatmaps.shape[-2:]
    x, y = coordinates.to(torch.int64).unbind(-1)
    rough = heatmaps.to(torch.float32)
    surfaces = [maps.clamp(min=1e-10).log().flatten(2) for maps in (rough, _smooth(rough, sigma))]
    index = y * width + x
    to_border = torch.stack((x, width - 1 - x, y, height - 1 - y)).amin(dim=0)

    def at(dx: int, dy: int) -> Tensor:
        place = (index + dy * width + dx).clamp(0, height * width - 1)[..., None]
        near, far = (surface.gather(2, place)[..., 0] for surface in surfaces)
        return torch.where(to_border < 2.5 * sigma, near, far)

    slope_x, slope_y = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    # Second differences over two cells, as the paper's code takes them: less moved by noise than over one.
    curve_xx = (at(2, 0) - 2 * at(0, 0) + at(-2, 0)) / 4
    curve_yy = (at(0, 2) - 2 * at(0, 0) + at(0, -2)) / 4
    curve_xy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    determinant = curve_xx * curve_yy - curve_xy.square()
    inner = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
    hill = inner & (determinant > 1e-9) & (curve_xx < 0)
    divisor = torch.where(hill, determinant, 1.0)
    step_x = (curve_xy * slope_y - curve_yy * slope_x) / divisor
    step_y = (curve_xy * slope_x - curve_xx * slope_y) / divisor
    step = torch.stack((step_x, step_y), dim=-1).clamp(-1.0, 1.0)
    return coordinates + torch.where(hill[..., None], step, 0.0)


def _smooth(heatmaps: Float32[Tensor, "batch joint height width"], sigma: float) -> Tensor:
    """Convolution with a Gaussian, cut at 3 sigma, zeros around."""
    radius = max(1, math.ceil(3 * sigma) - 1)
    offset = torch.arange(-radius, radius + 1, device=heatmaps.device, dtype=torch.float32)
    kernel = torch.softmax(-offset.square() / (2 * sigma**2), dim=0)
    maps = heatmaps.flatten(0, 1)[:, None]
    maps = F.conv2d(maps, kernel.view(1, 1, -1, 1), padding=(radius, 0))
    return F.conv2d(maps, kernel.view(1, 1, 1, -1), padding=(0, radius))[:, 0].view_as(heatmaps)


def flip_back(
    heatmaps: Float[Tensor, "batch joint height width"],
    flip_index: FlipIndex,
    *,
    shift: bool = True,
) -> Float[Tensor, "batch joint height width"]:
    """Heatmaps of the mirrored image as heatmaps of the original one.

    ``flip_index`` is the permutation that exchanges left and right joints. ``shift`` moves the result right by one
    cell, keeping column 0: with the biased grid a mirrored crop is displaced by about one cell (see Huang et al.,
    UDP, CVPR 2020). A tensor on the heatmaps' device avoids copying the permutation there on each call.
    """
    mirrored = _mirrored(heatmaps, flip_index)
    return torch.cat((mirrored[..., :1], mirrored[..., :-1]), dim=-1) if shift else mirrored


def fuse_flip(
    heatmaps: Float[Tensor, "batch joint height width"],
    flipped: Float[Tensor, "batch joint height width"],
    flip_index: FlipIndex,
    *,
    shift: bool = True,
) -> Float32[Tensor, "batch joint height width"]:
    """The mean of the heatmaps of an image and, mapped back by :func:`flip_back`, those of its mirror image."""
    mirrored = _mirrored(flipped, flip_index).to(torch.float32)
    total = heatmaps.to(torch.float32, copy=True)  # and added to in place: memory, not arithmetic, takes the time
    if shift:
        total[..., 1:] += mirrored[..., :-1]
        total[..., :1] += mirrored[..., :1]
    else:
        total += mirrored
    return total.mul_(0.5)


def _mirrored(heatmaps: Tensor, flip_index: FlipIndex) -> Tensor:
    return heatmaps.index_select(1, torch.as_tensor(flip_index, device=heatmaps.device)).flip(-1)


def fuse_flip_simcc(output: SimCC, flipped: SimCC, flip_index: FlipIndex) -> SimCC:
    """The mean of the logits for an image and, mapped back, those for its mirror image.

    Mirroring puts pixel x at width - 1 - x, so bin b at 2 width - 2 - b: after reversing one bin too far to the right.
    """
    exchange = torch.as_tensor(flip_index, device=output.x.device)
    x, y = flipped.x.index_select(1, exchange).flip(-1), flipped.y.index_select(1, exchange)
    excess = BINS_PER_PIXEL - 1
    x = torch.cat((x[..., excess:], x[..., -1:].expand(*x.shape[:-1], excess)), dim=-1)
    return SimCC(0.5 * (output.x.float() + x.float()), 0.5 * (output.y.float() + y.float()))


def fuse_scales(
    heatmaps: Sequence[Float[Tensor, "batch joint height width"]], scales: Sequence[float], *, unbiased: bool = False
) -> Float32[Tensor, "batch joint height width"]:
    """The mean, in the cells of the region at scale 1, of heatmaps of regions ``scales`` times as large, of one centre.

    As multi-scale testing of networks for one person goes (Yang et al., Learning Feature Pyramids, ICCV 2017). A cell
    that a smaller region does not show is the mean of those that do.
    """
    if tuple(scales) == (1.0,):
        return heatmaps[0].to(torch.float32)
    total = torch.zeros_like(heatmaps[0], dtype=torch.float32)
    covered = torch.zeros_like(total)
    for maps, scale in zip(heatmaps, scales, strict=True):
        height, width = maps.shape[-2:]
        # Where the centre of a region falls among its cells, as in decode_heatmaps.
        middles = [(side - 1) / 2 if unbiased else side / 2 for side in (width, height)]
        x, y = (
            (torch.arange(side, device=maps.device) - middle) / scale + middle
            for side, middle in zip((width, height), middles, strict=True)
        )
        grid = torch.stack(torch.meshgrid(2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1, indexing="xy"), dim=-1)
        sampled = F.grid_sample(
            maps.to(torch.float32), grid.expand(len(maps), -1, -1, -1), padding_mode="border", align_corners=True
        )
        shown = ((x >= -0.5) & (x <= width - 0.5)) & ((y >= -0.5) & (y <= height - 0.5))[:, None]
        total += sampled * shown
        covered += shown
    return total / covered


def heatmap_accuracy(
    predicted: Float[Tensor, "batch joint height width"],
    target: Float[Tensor, "batch joint height width"],
    *,
    reference_norm: bool = True,
) -> Float32[Tensor, ""]:
    """The share in [0, 1] of keypoints whose maximum lies near the target's: the accuracy logged in training.

    A joint of a sample counts if its target's maximum is beyond cell 1 along both axes. It is right if the distance,
    divided by a tenth of the heatmap's size, is below 0.5. The result is the mean over joints of each joint's share,
    leaving out joints that never count; 0 if none does. The published code divides x by the height and y by the
    width, which matters unless the heatmap is square; ``reference_norm=False`` divides each axis by its own size.
    """
    height, width = predicted.shape[-2:]
    norm_x, norm_y = (height / 10, width / 10) if reference_norm else (width / 10, height / 10)
    found, _ = argmax_2d(predicted)
    wanted, _ = argmax_2d(target)
    offset_x, offset_y = (found - wanted).unbind(-1)
    counts = (wanted > 1).all(dim=-1)
    right = counts & (torch.hypot(offset_x / norm_x, offset_y / norm_y) < 0.5)
    return _mean_share(right, counts)


def simcc_accuracy(predicted: SimCC, target: SimCC) -> Float32[Tensor, ""]:
    """:func:`heatmap_accuracy` for bins: right is a distance below a twentieth of the side, each axis by its own.

    A keypoint counts if the target's most probable bin is beyond the first pixel along both axes.
    """
    pairs = [(found.argmax(dim=-1), wanted.argmax(dim=-1)) for found, wanted in zip(predicted, target, strict=True)]
    offsets = [(place - truth) / (bins.shape[-1] / 10) for (place, truth), bins in zip(pairs, predicted, strict=True)]
    counts = (pairs[0][1] > BINS_PER_PIXEL) & (pairs[1][1] > BINS_PER_PIXEL)
    return _mean_share(counts & (torch.hypot(*offsets) < 0.5), counts)


def _mean_share(right: Bool[Tensor, "batch joint"], counts: Bool[Tensor, "batch joint"]) -> Float32[Tensor, ""]:
    """The mean over joints of each joint's share, leaving out joints that never count; 0 if none does."""
    samples = counts.sum(dim=0)
    share = right.sum(dim=0) / samples.clamp(min=1)
    return share.sum() / (samples > 0).sum().clamp(min=1)
