"""Heatmaps to keypoints, flip fusion, and the training accuracy: tensors only, no host synchronisation.

Keypoints are (x, y); heatmaps are (batch, joint, height, width).
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.nn import functional as F

from fpd_accel.errors import UserError

Refinement = Literal["none", "quarter"]


def decode_heatmaps(
    heatmaps: Float[Tensor, "batch joint height width"],
    centers: Float[Tensor, "batch 2"],
    sizes: Float[Tensor, "batch 2"],
    refine: Refinement = "quarter",
) -> tuple[Float32[Tensor, "batch joint 2"], Float32[Tensor, "batch joint"]]:
    """Keypoints in image pixels and their scores, the heatmaps' maxima.

    ``centers`` (x, y) and ``sizes`` (w, h) describe in image pixels the crop region that the heatmap covers. As in
    the published code only the width sets the scale (the crop is a similarity), and the heatmap's centre, not that of
    its grid of cells, falls on the region's. ``refine`` names the sub-cell step: ``none``, or ``quarter`` of a cell
    towards the higher neighbour along each axis (Newell et al., Stacked Hourglass, ECCV 2016).

    Raises:
        UserError: ``refine`` is no known refinement.
    """
    coordinates, scores = argmax_2d(heatmaps)
    match refine:
        case "none":
            pass
        case "quarter":
            coordinates = _quarter_step(heatmaps, coordinates)
        case _:
            raise UserError(f"refine: {refine!r} is none of {', '.join(get_args(Refinement))}")
    height, width = heatmaps.shape[-2:]
    x, y = coordinates.unbind(-1)
    centered = torch.stack((x - width / 2, y - height / 2), dim=-1)
    pixels_per_cell = sizes[:, 0].to(torch.float32) / width
    return centered * pixels_per_cell[:, None, None] + centers.to(torch.float32)[:, None], scores


def argmax_2d(
    heatmaps: Float[Tensor, "batch joint height width"],
) -> tuple[Float32[Tensor, "batch joint 2"], Float32[Tensor, "batch joint"]]:
    """The (x, y) cell of each heatmap's first maximum and its value; the cell is (0, 0) where no value is positive."""
    width = heatmaps.shape[-1]
    flat = heatmaps.flatten(2)
    index = flat.argmax(dim=2)  # the first of equal maxima, as torch documents
    scores = flat.gather(2, index[..., None])[..., 0]
    coordinates = torch.stack((index % width, index // width), dim=-1)
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


def flip_back(
    heatmaps: Float[Tensor, "batch joint height width"],
    flip_index: Int[Tensor, " joint"] | Sequence[int],
    *,
    shift: bool = True,
) -> Float[Tensor, "batch joint height width"]:
    """Heatmaps of the mirrored image as heatmaps of the original one.

    ``flip_index`` is the permutation that exchanges left and right joints. ``shift`` moves the result right by one
    cell, keeping column 0: with the biased grid a mirrored crop is displaced by about one cell (see Huang et al.,
    UDP, CVPR 2020). A tensor on the heatmaps' device avoids copying the permutation there on each call.
    """
    exchange = torch.as_tensor(flip_index, device=heatmaps.device)
    mirrored = heatmaps.index_select(1, exchange).flip(-1)
    return torch.cat((mirrored[..., :1], mirrored[..., :-1]), dim=-1) if shift else mirrored


def fuse_flip(
    heatmaps: Float[Tensor, "batch joint height width"],
    flipped: Float[Tensor, "batch joint height width"],
    flip_index: Int[Tensor, " joint"] | Sequence[int],
    *,
    shift: bool = True,
) -> Float32[Tensor, "batch joint height width"]:
    """The mean of the heatmaps of an image and, mapped back by :func:`flip_back`, those of its mirror image."""
    mirrored = flip_back(flipped, flip_index, shift=shift)
    return 0.5 * (heatmaps.to(torch.float32) + mirrored.to(torch.float32))


def fuse_scales(
    heatmaps: Sequence[Float[Tensor, "batch joint height width"]], scales: Sequence[float]
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
        # The centre of a region is at width / 2 of its cells, as in decode_heatmaps.
        x, y = ((torch.arange(side, device=maps.device) - side / 2) / scale + side / 2 for side in (width, height))
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
    samples = counts.sum(dim=0)
    share = right.sum(dim=0) / samples.clamp(min=1)
    return share.sum() / (samples > 0).sum().clamp(min=1)
