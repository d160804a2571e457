"""Published weights -> ours, tensor by tensor, with an account of each; and back.

:func:`convert` takes a pose network whole: it is complete only if every tensor of the network has its one tensor in the
file, of its shape, and nothing is left over. :func:`convert_backbone` takes a classification network's backbone for the
start of a training run: there the head stays fresh, and what only classification needs may be left over.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fpd_accel.errors import WeightsError
from fpd_accel.layouts import MMPRETRAIN, VISION_TRANSFORMER, Layout, Placed, place, recognise_layout, with_class_row
from fpd_accel.models import DEFAULT_INPUT_SIZE, PoseModel, is_model, model_names
from fpd_accel.models.hrnet import HRNet
from fpd_accel.models.pose_resnet import PoseResNet
from fpd_accel.models.recognise import PUBLISHED_INPUT_SIZES, cells, input_size_of, recognise
from fpd_accel.models.vitpose import SIZES, Attention, ViTPose
from fpd_accel.weights import COUNTER, model_shapes, read_tensors

POSITIONS = "backbone.pos_embed"
FINAL_LAYERS = ("final_layer.weight", "score.0.weight", "keypoint_head.final_layer.weight", "head.weight")
EXPORTED = ("hrnet_", "pose_resnet_", "hourglass_", "vitpose_")  # tiny networks are ours alone

# What stays fresh when a backbone is taken, and what a classification network has beside its backbone.
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
    """What became of one tensor."""

    kind: Kind
    name: str  # in the network; of a tensor that is left over or unread, in the file
    sources: tuple[str, ...] = ()  # in the file
    note: str = ""


@dataclass(frozen=True)
class Conversion:
    """Weights of a network under our names, and the account of every tensor of the file and of the network."""

    arch: str
    num_keypoints: int
    layout: str
    input_size: tuple[int, int] | None  # (height, width) that the weights are bound to, or None
    weights: dict[str, Tensor]
    entries: tuple[Entry, ...]

    @property
    def counts(self) -> Counter[Kind]:
        return Counter(entry.kind for entry in self.entries)

    @property
    def mistakes(self) -> tuple[Entry, ...]:
        """What is missing, of another shape or left over; empty for weights that can be used."""
        return tuple(entry for entry in self.entries if entry.kind in WRONG)


def convert(
    tensors: Mapping[str, Tensor], *, arch: str | None = None, input_size: tuple[int, int] | None = None
) -> Conversion:
    """Bring a published pose network's tensors under our names. Look at ``mistakes`` before using the result.

    Args:
        tensors: A state dict in any layout of :mod:`fpd_accel.layouts`.
        arch: One of `model_names()`; None recognises it by names and shapes.
        input_size: (height, width); only ViTPose depends on it, which says it by its number of positions too.

    Raises:
        WeightsError: The network is not recognised, is not one of ours, or names collide.
    """
    layout = recognise_layout(tensors)
    placed, unread = place(tensors, layout)
    if layout is MMPRETRAIN and POSITIONS in placed:
        placed[POSITIONS] = _with_class_row(placed[POSITIONS], input_size)
    shapes = {name: tuple(entry.tensor.shape) for name, entry in placed.items()}
    found = recognise(shapes)
    if arch is None and (found is None or not is_model(found.name)):
        what = "which this package does not have" if found else "so give --arch"
        looks = f"looks like {found.name}, " if found else "its names and shapes belong to no pose network known here, "
        raise WeightsError(f"{looks}{what}; choices: {', '.join(model_names())}")
    arch = arch or found.name  # type: ignore[union-attr]
    num_keypoints = next((shapes[name][0] for name in FINAL_LAYERS if shapes.get(name)), None)
    if num_keypoints is None:
        raise WeightsError(
            "no final layer, so not a pose network; a backbone alone can start a training run: set student.init"
        )
    bound = (input_size or input_size_of(shapes)) if arch.startswith("vitpose") else None
    wanted = model_shapes(arch, num_keypoints, input_size=bound or DEFAULT_INPUT_SIZE)
    weights, entries = _match(wanted, placed)
    entries += [Entry("unread", name, (name,), "the source's own network does not read it") for name in unread]
    return Conversion(arch, num_keypoints, layout.name, bound, weights, tuple(entries))


def convert_backbone(tensors: Mapping[str, Tensor], model: PoseModel) -> Conversion:
    """Bring a classification network's tensors under the names of a pose network's backbone.

    The positions of a vision transformer are resized to the grid of the model by bicubic interpolation, as ViTPose does
    with MAE's. The result has no tensor of the head.

    Raises:
        WeightsError: The model has no backbone of such a kind, names collide, or the network of the file has other
            attention heads, which names and shapes do not show.
    """
    kind = next((kind for kind in HEADS if isinstance(model, kind)), None)
    if kind is None:
        raise WeightsError(
            f"{type(model).__name__} has no backbone that is published apart; HRNet, PoseResNet and ViTPose have"
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


def load_backbone(model: PoseModel, path: str | Path) -> str:
    """Fill a pose network's backbone from a classification network's file; one line that says what was taken.

    Raises:
        WeightsError: The file cannot be read safely, or does not have every tensor of the backbone, or has others than
            classification needs. The model is unchanged.
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


def export_original(weights: Mapping[str, Tensor], path: str | Path, *, arch: str) -> None:
    """Write weights for the original code (HRNet, FPD and ViTPose repositories), whose names ours are.

    A ``.safetensors`` file; there, ``model.load_state_dict(safetensors.torch.load_file(path))`` takes it.

    Raises:
        WeightsError: A network that the original does not have, another suffix, or a folder that does not exist.
    """
    path = Path(path)
    if not arch.startswith(EXPORTED):
        raise WeightsError(f"{arch} is a network of this package alone: the original code cannot take its weights")
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: weights are written as .safetensors, never as a pickle")
    if not path.parent.is_dir():
        raise WeightsError(f"{path}: there is no such folder to write it to")
    staged = path.with_name(f".{path.name}")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, staged)
    staged.replace(path)


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
    """Refuse ViT-Small: its tensors fit, but timm, DeiT and DINO split them among 6 heads, ViTPose among 12."""
    block = next(module for module in model.modules() if isinstance(module, Attention))
    width = block.qkv.in_features
    if width == SIZES["s"].width:
        raise WeightsError(
            f"a ViT-Small of timm, DeiT or DINO has {width // 64} attention heads, ViTPose-S has {block.heads}: the "
            "shapes fit, but the network would compute something else; ViT-Base and ViT-Large fit. One trained with "
            f"{block.heads} heads is taken under ViTPose's names, backbone.blocks.0 and so on"
        )


def _match(
    wanted: Mapping[str, tuple[int, ...]], placed: Mapping[str, Placed]
) -> tuple[dict[str, Tensor], list[Entry]]:
    """The tensors that fit, in single precision, and an entry for each name wanted and each tensor left over."""
    weights: dict[str, Tensor] = {}
    entries: list[Entry] = []
    counted = any(name.endswith(COUNTER) for name in placed)
    for name, shape in wanted.items():
        if name not in placed:
            if name.endswith(COUNTER) and not counted:  # PyTorch before 0.4.1 and some libraries keep none
                weights[name] = torch.zeros(shape, dtype=torch.int64)
                entries.append(Entry("set to zero", name, note="a counter that the file does not have"))
            else:
                entries.append(Entry("missing", name))
            continue
        entry = placed[name]
        if (note := _unfit(entry.tensor, shape)) is not None:
            entries.append(Entry("other shape", name, entry.sources, note))
            continue
        weights[name] = _own(entry.tensor, torch.int64 if name.endswith(COUNTER) else torch.float32)
        entries.append(Entry("matched" if entry.sources == (name,) else "renamed", name, entry.sources, entry.note))
    left = [source for name, entry in placed.items() if name not in wanted for source in entry.sources]
    return weights, entries + [Entry("left over", source, (source,)) for source in left]


def _unfit(tensor: Tensor, shape: tuple[int, ...]) -> str | None:
    if tuple(tensor.shape) != shape:
        return f"{tuple(tensor.shape)} in the file, {shape} in the network"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return "stored in a form that cannot be copied"
    return None


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this precision, with memory of its own."""
    return tensor.detach().to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)


def _with_class_row(positions: Placed, input_size: tuple[int, int] | None) -> Placed:
    rows = positions.tensor.shape[1] if positions.tensor.ndim == 3 else 0
    for size in (input_size,) if input_size else PUBLISHED_INPUT_SIZES:
        if rows in (cells(size), cells(size) + 1):
            return with_class_row(positions, cells(size))
    return positions


def _resized(positions: Placed, layout: Layout, grid: tuple[int, int]) -> Placed:
    """The position embedding of a square image, or of the same grid, for a grid of (down, across) patches."""
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
    """Position embedding of a square grid, interpolated bicubically to (down, across); the class token's row stays."""
    side = round((positions.shape[1] - 1) ** 0.5)
    square = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
