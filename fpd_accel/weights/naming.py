"""Tensor names of other libraries for the networks of this package. Names and joins only: no file, no model.

The names here are those of the original checkpoints: HRNet, PoseResNet and Hourglass as in the HRNet and FPD
repositories, ViTPose as in its own. Each `NamingScheme` is a list of renamings; the first that matches is applied.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fpd_accel.errors import WeightsError


@dataclass(frozen=True)
class Placed:
    """A tensor of a file under its name here."""

    tensor: Tensor
    sources: tuple[str, ...]  # its name in the file, or the names of the tensors that were joined
    note: str = ""  # how it was changed, if it was


@dataclass(frozen=True)
class NamingScheme:
    """The tensor names of one library."""

    name: str
    renamings: tuple[tuple[str, str], ...] = ()  # (pattern at the start of a name, replacement)
    unread: tuple[str, ...] = ()  # patterns of tensors that the library's own network does not read

    def rename(self, name: str) -> str:
        """Return the name here of a tensor of that library; the same name if no renaming matches."""
        for pattern, replacement in self.renamings:
            renamed, count = re.subn(f"^(?:{pattern})", replacement, name)
            if count:
                return renamed
        return name


# The heads of further datasets in multi-dataset training, and a class token that no forward pass uses.
VITPOSE_UNREAD = (r"associate_keypoint_heads\.\d+\.", r"backbone\.cls_token$")

ORIGINAL = NamingScheme("HRNet and FPD repositories")
MMPOSE = NamingScheme("MMPose", renamings=((r"backbone\.", ""), (r"(?:keypoint_)?head\.", "")))
VITPOSE = NamingScheme("ViTPose", renamings=((r"head\.", "keypoint_head."),), unread=VITPOSE_UNREAD)
MMPRETRAIN = NamingScheme(
    "MMPose 1.x ViTPose",
    renamings=(
        (r"backbone\.patch_embed\.projection\.", "backbone.patch_embed.proj."),
        (r"backbone\.layers\.(\d+)\.ln([12])\.", r"backbone.blocks.\1.norm\2."),
        (r"backbone\.layers\.(\d+)\.attn\.(qkv|proj)\.", r"backbone.blocks.\1.attn.\2."),
        (r"backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.", r"backbone.blocks.\1.mlp.fc1."),
        (r"backbone\.layers\.(\d+)\.ffn\.layers\.1\.", r"backbone.blocks.\1.mlp.fc2."),
        (r"backbone\.ln1\.", "backbone.last_norm."),
        (r"head\.", "keypoint_head."),
    ),
    unread=VITPOSE_UNREAD,
)
TRANSFORMERS = NamingScheme(
    "transformers ViTPose",
    renamings=(
        (r"backbone\.embeddings\.position_embeddings$", "backbone.pos_embed"),
        (r"backbone\.embeddings\.patch_embeddings\.projection\.", "backbone.patch_embed.proj."),
        (r"backbone\.encoder\.layer\.(\d+)\.layernorm_before\.", r"backbone.blocks.\1.norm1."),
        (r"backbone\.encoder\.layer\.(\d+)\.layernorm_after\.", r"backbone.blocks.\1.norm2."),
        (r"backbone\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"backbone.blocks.\1.attn.proj."),
        (r"backbone\.encoder\.layer\.(\d+)\.mlp\.(fc[12])\.", r"backbone.blocks.\1.mlp.\2."),
        (r"backbone\.layernorm\.", "backbone.last_norm."),
        (r"head\.deconv1\.", "keypoint_head.deconv_layers.0."),
        (r"head\.batchnorm1\.", "keypoint_head.deconv_layers.1."),
        (r"head\.deconv2\.", "keypoint_head.deconv_layers.3."),
        (r"head\.batchnorm2\.", "keypoint_head.deconv_layers.4."),
        (r"head\.conv\.", "keypoint_head.final_layer."),
    ),
)
# A bare backbone of MAE or timm, whose names have no prefix.
VISION_TRANSFORMER = NamingScheme(
    "vision transformer (MAE, timm)",
    renamings=((r"norm\.", "backbone.last_norm."), (r"(pos_embed$|patch_embed\.proj\.|blocks\.)", r"backbone.\1")),
)

QUERY_KEY_VALUE = re.compile(
    r"backbone\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)$"
)


def recognise_layout(names: Iterable[str]) -> NamingScheme:
    """Return the naming scheme of these names; the original one if nothing indicates another.

    Raises:
        WeightsError: The names are those of a known network that this package does not have.
    """
    names = list(names)

    def any_starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if any(".mlp.experts." in name for name in names):
        raise WeightsError(
            "a ViTPose+ checkpoint: its blocks have one MLP part per dataset (mlp.experts), plain ViTPose has none"
        )
    if any_starts("backbone.hourglass_modules."):
        raise WeightsError(
            "MMPose's hourglass: its blocks differ from those of the FPD repository's Hourglass, so its weights fit no "
            "network here"
        )
    if any_starts("backbone.embeddings."):
        return TRANSFORMERS
    if any_starts("backbone.layers."):
        return MMPRETRAIN
    if any_starts("backbone.blocks."):
        return VITPOSE
    if any_starts("backbone."):
        return MMPOSE
    if any_starts("blocks.") and any_starts("patch_embed."):
        return VISION_TRANSFORMER
    return ORIGINAL


def place(tensors: Mapping[str, Tensor], layout: NamingScheme) -> tuple[dict[str, Placed], list[str]]:
    """Return the tensors by their names here, and the names of those that the source's own network does not read.

    transformers stores query, key and value apart; here they are one tensor, in this order.

    Raises:
        WeightsError: Two tensors of the file have the same name here.
    """
    placed: dict[str, Placed] = {}
    unread: list[str] = []
    parts: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        if any(re.match(pattern, name) for pattern in layout.unread):
            unread.append(name)
            continue
        if layout is TRANSFORMERS and (part := QUERY_KEY_VALUE.match(name)):
            block, kind, role = part.groups()
            parts.setdefault(f"backbone.blocks.{block}.attn.qkv.{role}", {})[kind] = name
            continue
        ours = layout.rename(name)
        if ours in placed:
            raise WeightsError(f"{placed[ours].sources[0]} and {name} would both be named {ours}")
        placed[ours] = Placed(tensor, (name,))
    for ours, sources in parts.items():
        if set(sources) == {"query", "key", "value"}:
            ordered = tuple(sources[kind] for kind in ("query", "key", "value"))
            joined = torch.cat([tensors[source] for source in ordered])
            placed[ours] = Placed(joined, ordered, note="query, key and value joined")
        else:  # incomplete: the parts keep their own names, and are reported as left over
            placed |= {source: Placed(tensors[source], (source,)) for source in sources.values()}
    return placed, unread
