"""Outputs to keypoints, flip fusion and training accuracy: tensors only, without a host synchronisation.

Keypoints are (x, y); heatmaps are (batch, joint, height, width). `decode`, `fuse` and `accuracy` take the output of any
network together with the codec that it was trained with; the other functions implement them for heatmaps and for SimCC.
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
from fpd_accel.outputs import BINS_PER_PIXEL, Heatmaps, Output, Scalar, SimCC

Refinement = Literal["none", "quarter", "dark"]
Places = Float32[Tensor, "batch joint 2"]
Decoded = tuple[Places, Float32[Tensor, "batch joint"]]
OfRegion = Float[Tensor, "batch 2"]  # (x, y) or (width, height) of the region of each crop, image pixels
FlipIndex = Int[Tensor, " joint"] | Sequence[int]


def decode(
    output: Output, codec: PoseCodec, centers: OfRegion, sizes: OfRegion, *, refine: Refinement | None = None
) -> Decoded:
    """Return keypoints in image pixels and their scores, from the output of any network.

    Args:
        output: Heatmaps, or SimCC's logits.
        codec: The codec that the network was trained with.
        centers: (x, y) of each crop's region, image pixels.
        sizes: (width, height) of each crop's region, image pixels.
        refine: Refinement of heatmaps below a cell, see `decode_heatmaps`; None: the one of the codec.
    """
    if isinstance(codec, SimCCCodec):
        assert isinstance(output, SimCC)
        return decode_simcc(output.softmax(), codec, centers, sizes)
    assert isinstance(output, Tensor)
    refine = refine or ("quarter" if codec.kind == "heatmap" else "dark")
    return decode_heatmaps(output, centers, sizes, refine=refine, sigma=codec.sigma, unbiased=codec.unbiased)


def fuse(output: Output, flipped: Output, codec: PoseCodec, flip_index: FlipIndex, *, shift: bool = True) -> Output:
    """Average the output for an image with the output for its mirror image, mapped back.

    The permutation `flip_index` exchanges left and right keypoints. With `shift` mirrored heatmaps are shifted by one
    cell, see `flip_back`; UDP and SimCC never shift.
    """
    if isinstance(output, SimCC):
        assert isinstance(flipped, SimCC)
        return fuse_flip_simcc(output, flipped, flip_index)
    assert isinstance(flipped, Tensor)
    return fuse_flip(output, flipped, flip_index, shift=shift and not codec.unbiased)


def accuracy(predicted: Output, target: Output) -> Scalar:
    """Return the share of keypoints found near the target, 0 to 1: `heatmap_accuracy` or `simcc_accuracy`."""
    if isinstance(predicted, SimCC):
        assert isinstance(target, SimCC)
        return simcc_accuracy(predicted, target)
    assert isinstance(target, Tensor)
    return heatmap_accuracy(predicted, target)


def peak_scores(output: Output, codec: PoseCodec) -> Float32[Tensor, "batch joint"]:
    """Return the confidence of each keypoint: the maximum of its heatmap, or the score of `decode_simcc`."""
    if isinstance(output, SimCC):
        assert isinstance(codec, SimCCCodec)
        return _simcc_scores(output.softmax(), codec)
    return output.amax(dim=(2, 3)).to(torch.float32)


def decode_heatmaps(
    heatmaps: Heatmaps,
    centers: OfRegion,
    sizes: OfRegion,
    refine: Refinement = "quarter",
    *,
    sigma: float = 2.0,
    unbiased: bool = False,
) -> Decoded:
    """Return keypoints in image pixels and their scores, the maxima of the heatmaps.

    As in the published code only the width sets the scale (a crop is a similarity transform), and the centre of the
    heatmap, not of its grid of cells, maps to the centre of the region.

    Args:
        heatmaps: One heatmap per keypoint.
        centers: (x, y) of the region that each heatmap covers, image pixels.
        sizes: (width, height) of the region, image pixels.
        refine: `none`; `quarter` of a cell towards the higher neighbour along each axis (Newell et al., Stacked
            Hourglass, ECCV 2016); or `dark`, a Taylor expansion of the log-heatmap around the maximum (Zhang et al.,
            CVPR 2020).
        sigma: Standard deviation of the Gaussians in cells, for `dark`.
        unbiased: Whether the centres of the corner cells map to the corners of the region (Huang et al., UDP, CVPR
            2020).

    Raises:
        UserError: `refine` is not a known refinement.
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
    if unbiased:
        x, y = coordinates.unbind(-1)
        shares = torch.stack((x / (width - 1), y / (height - 1)), dim=-1)
        return (shares - 0.5) * sizes.to(torch.float32)[:, None] + centers.to(torch.float32)[:, None], scores
    return _to_image(coordinates, (height, width), centers, sizes), scores


def decode_simcc(probabilities: SimCC, codec: SimCCCodec, centers: OfRegion, sizes: OfRegion) -> Decoded:
    """Return keypoints in image pixels, at the most probable bin of each axis, and their scores.

    A score is the smaller of both axes' highest probabilities in units of the target's peak, at most 1: near 1 for a
    network as confident as its labels, like the maximum of a heatmap. Centres and sizes are those of `decode`.
    """
    pixels = [axis.argmax(dim=-1).to(torch.float32) / BINS_PER_PIXEL for axis in probabilities]
    keypoints = _to_image(torch.stack(pixels, dim=-1), codec.input_size, centers, sizes)
    return keypoints, _simcc_scores(probabilities, codec)


def _to_image(coordinates: Places, grid: tuple[int, int], centers: OfRegion, sizes: OfRegion) -> Places:
    """Map (x, y) of a biased grid of (height, width) cells or pixels to image pixels."""
    height, width = grid
    x, y = coordinates.unbind(-1)
    centered = torch.stack((x - width / 2, y - height / 2), dim=-1)
    image_pixels = sizes[:, 0].to(torch.float32) / width  # per cell
    return centered * image_pixels[:, None, None] + centers.to(torch.float32)[:, None]


def _simcc_scores(probabilities: SimCC, codec: SimCCCodec) -> Float32[Tensor, "batch joint"]:
    shares = [axis.amax(dim=-1) / peak for axis, peak in zip(probabilities, codec.peaks, strict=True)]
    return torch.minimum(*shares).clamp(max=1.0).to(torch.float32)


def argmax_2d(heatmaps: Heatmaps) -> Decoded:
    """Return the (x, y) cell of each heatmap's first maximum and its value; (0, 0) where no value is positive."""
    # First the band of rows with the highest cell, then that cell in it; torch returns the first of equal maxima. On a
    # CPU this is five times as fast as one argmax over all cells, because a plain maximum is vectorised.
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


def _quarter_step(heatmaps: Heatmaps, coordinates: Places) -> Places:
    """Move whole cells by a quarter towards the higher neighbour; cells 0, 1 and the last of an axis stay."""
    height, width = heatmaps.shape[-2:]
    x, y = coordinates.to(torch.int64).unbind(-1)
    flat, index = heatmaps.flatten(2), y * width + x

    def neighbour(offset: int) -> Tensor:
        return flat.gather(2, (index + offset).clamp(0, height * width - 1)[..., None])[..., 0]

    def uphill(offset: int) -> Tensor:
        # Comparison instead of subtraction: exact in half precision too.
        after, before = neighbour(offset), neighbour(-offset)
        return (after > before).to(torch.float32) - (after < before).to(torch.float32)

    inner = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    step = torch.stack((uphill(1), uphill(width)), dim=-1)
    return coordinates + 0.25 * torch.where(inner[..., None], step, 0.0)


def _taylor_step(heatmaps: Heatmaps, coordinates: Places, sigma: float) -> Places:
    """Move whole cells to the maximum of the second-order expansion of the smoothed log-heatmap.

    The heatmap is smoothed with a Gaussian of its own `sigma`, except for maxima less than 2.5 sigma from the border:
    the smoothing lacks the cells outside, which would pull such maxima inwards by up to a tenth of a cell. A cell stays
    where it is on the border itself or where the surface is not concave, and moves by at most one cell along each axis,
    because the heatmap of a network can have any shape.
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
    # Second differences over two cells, as in the paper's code: less sensitive to noise than over one.
    curve_xx = (at(2, 0) - 2 * at(0, 0) + at(-2, 0)) / 4
    curve_yy = (at(0, 2) - 2 * at(0, 0) + at(0, -2)) / 4
    curve_xy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    determinant = curve_xx * curve_yy - curve_xy.square()
    inner = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
    concave = inner & (determinant > 1e-9) & (curve_xx < 0)
    divisor = torch.where(concave, determinant, 1.0)
    step_x = (curve_xy * slope_y - curve_yy * slope_x) / divisor
    step_y = (curve_xy * slope_x - curve_xx * slope_y) / divisor
    step = torch.stack((step_x, step_y), dim=-1).clamp(-1.0, 1.0)
    return coordinates + torch.where(concave[..., None], step, 0.0)


def _smooth(heatmaps: Float32[Tensor, "batch joint height width"], sigma: float) -> Tensor:
    """Convolve heatmaps with a Gaussian of `sigma` cells, cut at 3 sigma, with zeros outside."""
    radius = max(1, math.ceil(3 * sigma) - 1)
    offset = torch.arange(-radius, radius + 1, device=heatmaps.device, dtype=torch.float32)
    kernel = torch.softmax(-offset.square() / (2 * sigma**2), dim=0)
    maps = heatmaps.flatten(0, 1)[:, None]
    maps = F.conv2d(maps, kernel.view(1, 1, -1, 1), padding=(radius, 0))
    return F.conv2d(maps, kernel.view(1, 1, 1, -1), padding=(0, radius))[:, 0].view_as(heatmaps)


def flip_back(heatmaps: Heatmaps, flip_index: FlipIndex, *, shift: bool = True) -> Heatmaps:
    """Map the heatmaps of a mirrored image back to the original image.

    Args:
        heatmaps: Heatmaps of the mirrored image.
        flip_index: Permutation that exchanges left and right keypoints. A tensor on the device of the heatmaps avoids
            copying it there in every call.
        shift: Whether to move the result right by one cell, keeping column 0: on the biased grid a mirrored crop is
            displaced by about one cell (Huang et al., UDP, CVPR 2020).
    """
    mirrored = _mirrored(heatmaps, flip_index)
    return torch.cat((mirrored[..., :1], mirrored[..., :-1]), dim=-1) if shift else mirrored


def fuse_flip(
    heatmaps: Heatmaps, flipped: Heatmaps, flip_index: FlipIndex, *, shift: bool = True
) -> Float32[Tensor, "batch joint height width"]:
    """Average the heatmaps of an image with those of its mirror image, mapped back as by `flip_back`."""
    mirrored = _mirrored(flipped, flip_index).to(torch.float32)
    total = heatmaps.to(torch.float32, copy=True)  # then added to in place: memory traffic dominates the time
    if shift:
        total[..., 1:] += mirrored[..., :-1]
        total[..., :1] += mirrored[..., :1]
    else:
        total += mirrored
    return total.mul_(0.5)


def _mirrored(heatmaps: Tensor, flip_index: FlipIndex) -> Tensor:
    return heatmaps.index_select(1, torch.as_tensor(flip_index, device=heatmaps.device)).flip(-1)


def fuse_flip_simcc(output: SimCC, flipped: SimCC, flip_index: FlipIndex) -> SimCC:
    """Average the logits for an image with those for its mirror image, mapped back.

    Mirroring moves pixel x to width - 1 - x, and so bin b to 2 width - 2 - b: the reversed bins lie one bin too far to
    the right.
    """
    exchange = torch.as_tensor(flip_index, device=output.x.device)
    x, y = _mirrored(flipped.x, exchange), flipped.y.index_select(1, exchange)
    excess = BINS_PER_PIXEL - 1
    x = torch.cat((x[..., excess:], x[..., -1:].expand(*x.shape[:-1], excess)), dim=-1)
    return SimCC(0.5 * (output.x.float() + x.float()), 0.5 * (output.y.float() + y.float()))


def fuse_scales(
    heatmaps: Sequence[Heatmaps], scales: Sequence[float], *, unbiased: bool = False
) -> Float32[Tensor, "batch joint height width"]:
    """Average heatmaps of regions of several scales around one centre, in the cells of the region at scale 1.

    This is multi-scale testing (Yang et al., Learning Feature Pyramids, ICCV 2017). A cell that a smaller region does
    not show is the mean over the regions that show it.

    Args:
        heatmaps: Heatmaps of each region, all of one shape.
        scales: Size of each region, as a factor on the region at scale 1.
        unbiased: Whether the cells are on UDP's grid.
    """
    if tuple(scales) == (1.0,):
        return heatmaps[0].to(torch.float32)
    total = torch.zeros_like(heatmaps[0], dtype=torch.float32)
    covered = torch.zeros_like(total)
    for maps, scale in zip(heatmaps, scales, strict=True):
        height, width = maps.shape[-2:]
        # The cell coordinates of the region's centre, as in decode_heatmaps.
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


def heatmap_accuracy(predicted: Heatmaps, target: Heatmaps, *, reference_norm: bool = True) -> Scalar:
    """Return the share of keypoints whose maximum lies near the target's, 0 to 1: the accuracy logged in training.

    A keypoint counts if the maximum of its target is beyond cell 1 along both axes. It is correct if its distance,
    divided by a tenth of the heatmap's size, is below 0.5. The result is the mean of the keypoints' shares, without
    keypoints that never count; 0 if none counts.

    Args:
        predicted: Heatmaps of a network.
        target: Heatmaps of the labels.
        reference_norm: Whether to divide x by the height and y by the width, as the published code does, which matters
            unless heatmaps are square. False: divide each axis by its own size.
    """
    height, width = predicted.shape[-2:]
    norm_x, norm_y = (height / 10, width / 10) if reference_norm else (width / 10, height / 10)
    found, _ = argmax_2d(predicted)
    truth, _ = argmax_2d(target)
    offset_x, offset_y = (found - truth).unbind(-1)
    counted = (truth > 1).all(dim=-1)
    correct = counted & (torch.hypot(offset_x / norm_x, offset_y / norm_y) < 0.5)
    return _mean_share(correct, counted)


def simcc_accuracy(predicted: SimCC, target: SimCC) -> Scalar:
    """Return `heatmap_accuracy` for bins: correct is a distance below a twentieth of the side, axis by axis.

    A keypoint counts if the most probable bin of its target is beyond the first pixel along both axes.
    """
    pairs = [(found.argmax(dim=-1), truth.argmax(dim=-1)) for found, truth in zip(predicted, target, strict=True)]
    offsets = [(found - truth) / (bins.shape[-1] / 10) for (found, truth), bins in zip(pairs, predicted, strict=True)]
    counted = (pairs[0][1] > BINS_PER_PIXEL) & (pairs[1][1] > BINS_PER_PIXEL)
    return _mean_share(counted & (torch.hypot(*offsets) < 0.5), counted)


def _mean_share(correct: Bool[Tensor, "batch joint"], counted: Bool[Tensor, "batch joint"]) -> Scalar:
    """Return the mean over joints of each joint's share, without joints that are never counted; 0 if none is."""
    samples = counted.sum(dim=0)
    share = correct.sum(dim=0) / samples.clamp(min=1)
    return share.sum() / (samples > 0).sum().clamp(min=1)
