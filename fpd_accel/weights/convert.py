"""Convert published weights to the names of this package, tensor by tensor, with a record of each tensor.

`convert` takes a whole pose network: every tensor of the network must have one tensor of its shape in the file, and no
tensor may be left over. `convert_backbone` takes the backbone of a classification network for the start of a training
run: the head keeps its fresh weights, and tensors that only classification needs may be left over.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpd_accel.errors import WeightsError
from fpd_accel.models.base import PoseModel
from fpd_accel.models.hrnet import HRNet
from fpd_accel.models.names import DEFAULT_INPUT_SIZE, is_model, model_names
from fpd_accel.models.pose_resnet import PoseResNet
from fpd_accel.models.vitpose import SIZES, ViTPose
from fpd_accel.weights.load import COUNTER, listing, model_shapes, read_tensors, shapes_of
from fpd_accel.weights.naming import MMPRETRAIN, VISION_TRANSFORMER, NamingScheme, Placed, place, recognise_layout
from fpd_accel.weights.recognise import PUBLISHED_INPUT_SIZES, Shapes, cells, input_size_of, recognise

POSITIONS = "backbone.pos_embed"
FINAL_LAYERS = ("final_layer.weight", "score.0.weight", "keypoint_head.final_layer.weight", "head.weight")

# Tensors that keep their fresh weights when a backbone is loaded, and a pattern of those only classification needs.
CLASSIFIER = r"(?:fc|classifier|head|final_layer|deconv_layers|keypoint_head|incre_modules|downsamp_modules)\."
HEADS: dict[type[PoseModel], tuple[tuple[str, ...], str]] = {
    # Fusions into the coarser branches are of no use to the head; MAE keeps its decoder.
    HRNet: (("final_layer.",), rf"{CLASSIFIER}|stage4\.2\.fuse_layers\.[123]\."),
    PoseResNet: (("deconv_layers.", "final_layer."), CLASSIFIER),
    ViTPose: (("keypoint_head.",), rf"{CLASSIFIER}|(?:backbone\.)?(?:cls_token|mask_token)$|decoder_"),
}

Kind = Literal["matched", "renamed", "set to zero", "missing", "other shape", "left over", "unread"]
WRONG: tuple[Kind, ...] = ("missing", "other shape", "left over")


@dataclass(frozen=True)
class Entry:
    """The record of one tensor."""

    kind: Kind
    name: str  # in the network; for a tensor that is left over or unread, in the file
    sources: tuple[str, ...] = ()  # names in the file
    note: str = ""


@dataclass(frozen=True)
class Conversion:
    """The weights of a network under their names here, and a record of each tensor of the file and the network."""

    arch: str
    num_keypoints: int
    layout: str  # name of the file's naming scheme
    input_size: tuple[int, int] | None  # (height, width) that the weights are bound to, or None
    weights: dict[str, Tensor]
    entries: tuple[Entry, ...]

    @property
    def counts(self) -> Counter[Kind]:
        """The number of entries of each kind."""
        return Counter(entry.kind for entry in self.entries)

    @property
    def mistakes(self) -> tuple[Entry, ...]:
        """The tensors that are missing, of another shape or left over; none for weights that can be used."""
        return tuple(entry for entry in self.entries if entry.kind in WRONG)


def convert(
    tensors: Mapping[str, Tensor], *, arch: str | None = None, input_size: tuple[int, int] | None = None
) -> Conversion:
    """Convert the tensors of a published pose network; check `mistakes` before using the result.

    Args:
        tensors: A state dict in any naming scheme of `fpd_accel.weights.naming`.
        arch: One of `model_names()`; None recognises it by names and shapes.
        input_size: (height, width) in pixels, which only ViTPose depends on; None takes it from the number of
            positions.

    Raises:
        WeightsError: The network is not recognised, this package does not have it, or names collide.
    """
    layout = recognise_layout(tensors)
    placed, unread = place(tensors, layout)
    if layout is MMPRETRAIN and POSITIONS in placed:
        sizes = (input_size,) if input_size else PUBLISHED_INPUT_SIZES
        placed[POSITIONS] = _with_class_row(placed[POSITIONS], map(cells, sizes))
    shapes = {name: tuple(entry.tensor.shape) for name, entry in placed.items()}
    if arch is None:
        arch = recognise(shapes)
        if arch is None or not is_model(arch):
            problem = "its names and shapes belong to no pose network known here, so give --arch"
            if arch is not None:
                problem = f"looks like {arch}, which this package does not have"
            raise WeightsError(f"{problem}; choices: {', '.join(model_names())}")
    num_keypoints = next((shapes[name][0] for name in FINAL_LAYERS if shapes.get(name)), None)
    if num_keypoints is None:
        raise WeightsError(
            "no final layer, so not a pose network; to start a training run from a backbone alone, set student.init"
        )
    bound = (input_size or input_size_of(shapes)) if arch.startswith("vitpose") else None
    wanted = model_shapes(arch, num_keypoints, input_size=bound or DEFAULT_INPUT_SIZE)
    weights, entries = _match(wanted, placed, unread)
    return Conversion(arch, num_keypoints, layout.name, bound, weights, tuple(entries))


def convert_backbone(tensors: Mapping[str, Tensor], model: nn.Module) -> Conversion:
    """Convert the tensors of a classification network to a pose network's backbone; the head is left out.

    The positions of a vision transformer are resized to the grid of the model by bicubic interpolation, as ViTPose does
    with MAE's.

    Raises:
        WeightsError: No backbone is published for the model, names collide, or the network of the file has another
            number of attention heads, which names and shapes do not show.
    """
    kind = next((kind for kind in HEADS if isinstance(model, kind)), None)
    if kind is None or not isinstance(model, PoseModel):  # the second for the type checker
        raise WeightsError(
            f"no backbone of {type(model).__name__} is published apart; HRNet, PoseResNet and ViTPose have one"
        )
    layout = recognise_layout(tensors)
    if layout is VISION_TRANSFORMER and isinstance(model, ViTPose):
        _check_heads(model)
    placed, unread = place(tensors, layout)
    if isinstance(model, ViTPose) and POSITIONS in placed:
        placed[POSITIONS] = _resized(placed[POSITIONS], layout, model.backbone.grid)
    head, leftovers = HEADS[kind]
    wanted = {name: shape for name, shape in shapes_of(model.state_dict()).items() if not name.startswith(head)}
    weights, entries = _match(wanted, placed, unread)
    entries = [
        Entry("unread", entry.name, entry.sources, "not of the backbone")
        if entry.kind == "left over" and re.match(leftovers, layout.rename(entry.name))
        else entry
        for entry in entries
    ]
    size = model.input_size if isinstance(model, ViTPose) else None
    return Conversion(type(model).__name__, model.num_keypoints, layout.name, size, weights, tuple(entries))


def load_backbone(model: nn.Module, path: str | Path) -> str:
    """Load a pose network's backbone from a classification network's file; return one line that describes it.

    Raises:
        WeightsError: The file cannot be read safely, lacks a tensor of the backbone, or has tensors that neither the
            backbone nor classification needs. The model is unchanged.
    """
    tensors = read_tensors(Path(path))
    try:
        conversion = convert_backbone(tensors, model)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    refuse_mistakes(conversion, path)
    model.load_state_dict(conversion.weights, strict=False)  # the head alone is absent
    fresh = len(model.state_dict()) - len(conversion.weights)
    changed = "".join(f"; {POSITIONS} {e.note}" for e in conversion.entries if e.name == POSITIONS and e.note)
    return (
        f"{len(conversion.weights)} tensors of the backbone taken from {path} ({conversion.layout} layout), "
        f"{conversion.counts['unread']} of classification left out, {fresh} of the head start fresh{changed}"
    )


def refuse_mistakes(conversion: Conversion, source: str | Path) -> None:
    """Raise WeightsError, with counts and examples, if anything is missing, of another shape or left over."""
    if not conversion.mistakes:
        return
    lines = [f"{source}: not the weights of {conversion.arch} ({conversion.layout} layout), so nothing is taken"]
    for kind in WRONG:
        names = [f"{e.name} ({e.note})" if e.note else e.name for e in conversion.mistakes if e.kind == kind]
        if names:
            lines.append(f"  {len(names)} {kind}: {listing(names)}")
    raise WeightsError("\n".join(lines))


def _check_heads(model: ViTPose) -> None:
    """Refuse ViT-Small: its tensors fit, but timm, DeiT and DINO have 6 attention heads, ViTPose has 12."""
    if model.backbone.pos_embed.shape[-1] == SIZES["s"].width:
        raise WeightsError(
            "a ViT-Small of timm, DeiT or DINO has 6 attention heads, ViTPose-S has 12: the shapes fit, but the "
            "network would compute something else; ViT-Base and ViT-Large fit. Give the tensors of one that was "
            "trained with 12 heads ViTPose's names (backbone.blocks.0 and so on)"
        )


def _match(
    wanted: Shapes, placed: Mapping[str, Placed], unread: Iterable[str]
) -> tuple[dict[str, Tensor], list[Entry]]:
    """Return the tensors that fit, in float32, and an entry for each wanted name and each other tensor of the file."""
    weights: dict[str, Tensor] = {}
    entries: list[Entry] = []
    counted = any(name.endswith(COUNTER) for name in placed)
    for name, shape in wanted.items():
        if name not in placed:
            if name.endswith(COUNTER) and not counted:  # PyTorch before 0.4.1 and some libraries store none
                weights[name] = torch.zeros(shape, dtype=torch.int64)
                entries.append(Entry("set to zero", name, note="a counter that the file does not have"))
            else:
                entries.append(Entry("missing", name))
            continue
        entry = placed[name]
        if (note := _misfit(entry.tensor, shape)) is not None:
            entries.append(Entry("other shape", name, entry.sources, note))
            continue
        dtype = torch.int64 if name.endswith(COUNTER) else torch.float32
        weights[name] = entry.tensor.detach().to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        entries.append(Entry("matched" if entry.sources == (name,) else "renamed", name, entry.sources, entry.note))
    left = [source for name, entry in placed.items() if name not in wanted for source in entry.sources]
    entries += [Entry("left over", source, (source,)) for source in left]
    entries += [Entry("unread", name, (name,), "the source's own network does not read it") for name in unread]
    return weights, entries


def _misfit(tensor: Tensor, shape: tuple[int, ...]) -> str | None:
    """Return why a tensor cannot become one of this shape, or None."""
    if tuple(tensor.shape) != shape:
        return f"{tuple(tensor.shape)} in the file, {shape} in the network"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return "stored in a form that cannot be copied"
    return None


def _with_class_row(positions: Placed, numbers: Iterable[int]) -> Placed:
    """Return MMPose 1.x's position embedding with the row of ViTPose's class token, if a number of patches fits.

    MMPose has no such row, and drops one from a checkpoint. A row of zeros, which is added to every patch, is neutral.
    """
    tensor = positions.tensor
    if tensor.ndim != 3:
        return positions
    number = next((number for number in numbers if tensor.shape[1] in (number, number + 1)), None)
    if number is None:
        return positions
    note = "a row of zeros put first" if tensor.shape[1] == number else "first row, which MMPose drops, set to zero"
    own = tensor[:, -number:]
    return Placed(torch.cat([torch.zeros_like(own[:, :1]), own], dim=1), positions.sources, note)


def _resized(positions: Placed, layout: NamingScheme, grid: tuple[int, int]) -> Placed:
    """Return the position embedding of a square image, or of the same grid, for a grid of (down, across) patches."""
    tensor, number = positions.tensor, grid[0] * grid[1]
    if tensor.ndim != 3 or tensor.shape[1] < 2:
        return positions
    if layout is MMPRETRAIN and tensor.shape[1] == number:
        return _with_class_row(positions, [number])
    side = round((tensor.shape[1] - 1) ** 0.5)
    if tensor.shape[1] == 1 + number or side**2 != tensor.shape[1] - 1:
        return positions
    class_row, square = tensor.float().tensor_split([1], dim=1)
    maps = square.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    return Placed(torch.cat([class_row, resized], dim=1), positions.sources, f"resized from {side} x {side} patches")
