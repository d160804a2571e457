"""Convert published weights to the names of this package, tensor by tensor, with a record of each tensor.

`convert` takes a whole pose network: every tensor of the network must have one tensor of its shape in the file, and no
tensor may be left over. `convert_backbone` takes the backbone of a classification network for the start of a training
run: the head keeps its fresh weights, and tensors that only classification needs may be left over.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fpd_accel.errors import WeightsError
from fpd_accel.models.base import PoseModel
from fpd_accel.models.hrnet import HRNet
from fpd_accel.models.names import DEFAULT_INPUT_SIZE, is_model, model_names
from fpd_accel.models.pose_resnet import PoseResNet
from fpd_accel.models.vitpose import SIZES, Attention, ViTPose
from fpd_accel.weights.load import COUNTER, model_shapes, read_tensors
from fpd_accel.weights.naming import (
    MMPRETRAIN,
    VISION_TRANSFORMER,
    NamingScheme,
    Placed,
    place,
    recognise_layout,
    with_class_row,
)
from fpd_accel.weights.recognise import PUBLISHED_INPUT_SIZES, cells, input_size_of, recognise

POSITIONS = "backbone.pos_embed"
FINAL_LAYERS = ("final_layer.weight", "score.0.weight", "keypoint_head.final_layer.weight", "head.weight")

# Tensors that keep their fresh weights when a backbone is loaded, and tensors that only classification needs.
HEADS = {HRNet: ("final_layer.",), PoseResNet: ("deconv_layers.", "final_layer."), ViTPose: ("keypoint_head.",)}
CLASSIFIER = r"(?:fc|classifier|head|final_layer|deconv_layers|keypoint_head|incre_modules|downsamp_modules)\."
BACKBONE_LEFTOVERS = {
    HRNet: rf"{CLASSIFIER}|stage4\.2\.fuse_layers\.[123]\.",  # fusions into the coarser branches, which no head reads
    PoseResNet: CLASSIFIER,
    ViTPose: rf"{CLASSIFIER}|(?:backbone\.)?(?:cls_token|mask_token)$|decoder_",  # MAE keeps its decoder
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
        placed[POSITIONS] = _with_class_row(placed[POSITIONS], input_size)
    shapes = {name: tuple(entry.tensor.shape) for name, entry in placed.items()}
    if arch is None:
        found = recognise(shapes)
        if found is None or not is_model(found.name):
            problem = "its names and shapes belong to no pose network known here, so give --arch"
            if found is not None:
                problem = f"looks like {found.name}, which this package does not have"
            raise WeightsError(f"{problem}; choices: {', '.join(model_names())}")
        arch = found.name
    num_keypoints = next((shapes[name][0] for name in FINAL_LAYERS if shapes.get(name)), None)
    if num_keypoints is None:
        raise WeightsError(
            "no final layer, so not a pose network; to start a training run from a backbone alone, set student.init"
        )
    bound = (input_size or input_size_of(shapes)) if arch.startswith("vitpose") else None
    wanted = model_shapes(arch, num_keypoints, input_size=bound or DEFAULT_INPUT_SIZE)
    weights, entries = _match(wanted, placed)
    entries += [Entry("unread", name, (name,), "the source's own network does not read it") for name in unread]
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
    if kind is None or not isinstance(model, PoseModel):
        raise WeightsError(
            f"no backbone of {type(model).__name__} is published apart; HRNet, PoseResNet and ViTPose have one"
        )
    layout = recognise_layout(tensors)
    if layout is VISION_TRANSFORMER and isinstance(model, ViTPose):
        _check_heads(model)
    placed, unread = place(tensors, layout)
    if isinstance(model, ViTPose) and POSITIONS in placed:
        placed[POSITIONS] = _resized(placed[POSITIONS], layout, model.backbone.grid)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {name: shape for name, shape in state.items() if not name.startswith(HEADS[kind])}
    weights, entries = _match(wanted, placed)
    allowed = re.compile(BACKBONE_LEFTOVERS[kind])
    entries = [
        Entry("unread", entry.name, entry.sources, "not of the backbone")
        if entry.kind == "left over" and allowed.match(layout.rename(entry.name))
        else entry
        for entry in entries
    ]
    entries += [Entry("unread", name, (name,), "the source's own network does not read it") for name in unread]
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
    resized = [entry for entry in conversion.entries if entry.name == POSITIONS and entry.note]
    changed = "".join(f"; {entry.name} {entry.note}" for entry in resized)
    return (
        f"{len(conversion.weights)} tensors of the backbone taken from {path} ({conversion.layout} layout), "
        f"{conversion.counts['unread']} of classification left out, {fresh} of the head start fresh{changed}"
    )


def refuse_mistakes(conversion: Conversion, source: str | Path, *, shown: int = 4) -> None:
    """Raise WeightsError, with counts and examples, if anything is missing, of another shape or left over."""
    if not conversion.mistakes:
        return
    lines = [f"{source}: not the weights of {conversion.arch} ({conversion.layout} layout), so nothing is taken"]
    for kind in WRONG:
        entries = [entry for entry in conversion.mistakes if entry.kind == kind]
        if entries:
            examples = [f"{entry.name} ({entry.note})" if entry.note else entry.name for entry in entries[:shown]]
            dots = ["..."] if len(entries) > shown else []
            lines.append(f"  {len(entries)} {kind}: {', '.join(examples + dots)}")
    raise WeightsError("\n".join(lines))


def _check_heads(model: ViTPose) -> None:
    """Refuse ViT-Small: its tensors fit, but timm, DeiT and DINO have 6 attention heads, ViTPose has 12."""
    block = next(module for module in model.modules() if isinstance(module, Attention))
    width = block.qkv.in_features
    if width == SIZES["s"].width:
        raise WeightsError(
            f"a ViT-Small of timm, DeiT or DINO has {width // 64} attention heads, ViTPose-S has {block.heads}: the "
            "shapes fit, but the network would compute something else; ViT-Base and ViT-Large fit. Give the tensors of "
            f"one that was trained with {block.heads} heads ViTPose's names (backbone.blocks.0 and so on)"
        )


def _match(
    wanted: Mapping[str, tuple[int, ...]], placed: Mapping[str, Placed]
) -> tuple[dict[str, Tensor], list[Entry]]:
    """Return the tensors that fit, in float32, and an entry for each wanted name and each tensor left over."""
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
    return weights, entries + [Entry("left over", source, (source,)) for source in left]


def _misfit(tensor: Tensor, shape: tuple[int, ...]) -> str | None:
    """Return why a tensor cannot become one of this shape, or None."""
    if tuple(tensor.shape) != shape:
        return f"{tuple(tensor.shape)} in the file, {shape} in the network"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return "stored in a form that cannot be copied"
    return None


def _with_class_row(positions: Placed, input_size: tuple[int, int] | None) -> Placed:
    rows = positions.tensor.shape[1] if positions.tensor.ndim == 3 else 0
    for size in (input_size,) if input_size else PUBLISHED_INPUT_SIZES:
        if rows in (cells(size), cells(size) + 1):
            return with_class_row(positions, cells(size))
    return positions


def _resized(positions: Placed, layout: NamingScheme, grid: tuple[int, int]) -> Placed:
    """Return the position embedding of a square image, or of the same grid, for a grid of (down, across) patches."""
    tensor = positions.tensor
    if tensor.ndim != 3:
        return positions
    if layout is MMPRETRAIN and tensor.shape[1] == grid[0] * grid[1]:
        return with_class_row(positions, grid[0] * grid[1])
    side = round((tensor.shape[1] - 1) ** 0.5)
    if tensor.shape[1] == 1 + grid[0] * grid[1] or side**2 != tensor.shape[1] - 1:
        return positions
    note = f"resized from {side} x {side} patches"
    return Placed(resize_positions(tensor.float(), grid), positions.sources, note)


def resize_positions(
    positions: Float[Tensor, "1 rows channel"], grid: tuple[int, int]
) -> Float[Tensor, "1 new channel"]:
    """Interpolate the position embedding of a square grid bicubically to (down, across); keep the class token's row."""
    side = round((positions.shape[1] - 1) ** 0.5)
    square = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
