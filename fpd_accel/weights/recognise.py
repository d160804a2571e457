"""Recognise a network by the names and shapes of its parameters, from the few that differ between networks."""

import re
from collections.abc import Mapping

from fpd_accel.models.vitpose import PATCH, SIZES

Shapes = Mapping[str, tuple[int, ...]]

# By (blocks of each layer, whether they are bottlenecks).
RESNET_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
PUBLISHED_INPUT_SIZES = ((256, 192), (384, 288), (256, 256), (384, 384), (512, 384))  # (height, width) in pixels


def recognise(shapes: Shapes) -> str | None:
    """Return the name of the network that these names and shapes indicate, or None.

    A few missing or unknown tensors are ignored. The name may be of a size that `create_model` does not build.
    """
    for final, name_of in (
        ("score.0.weight", _hourglass),
        ("keypoint_head.final_layer.weight", _vitpose),
        ("final_layer.weight", _hrnet),
        ("final_layer.weight", _pose_resnet),
        ("head.weight", _tiny),
    ):
        if len(shapes.get(final, ())) == 4 and (name := name_of(shapes)):
            return name
    return None


def input_size_of(shapes: Shapes) -> tuple[int, int] | None:
    """Return the (height, width) that a ViTPose's positions are for if it is a published one, else None."""
    positions = shapes.get("backbone.pos_embed", ())
    if len(positions) != 3:
        return None
    return next((size for size in PUBLISHED_INPUT_SIZES if cells(size) + 1 == positions[1]), None)


def cells(input_size: tuple[int, int]) -> int:
    """Return the number of patches of an image of this (height, width)."""
    return (input_size[0] // PATCH) * (input_size[1] // PATCH)


def _hourglass(shapes: Shapes) -> str | None:
    stacks = _count(shapes, r"score\.(\d+)\.weight$")
    return f"hourglass_{stacks}x{shapes['score.0.weight'][1]}" if "hg.0.hg.0.0.0.conv1.weight" in shapes else None


def _vitpose(shapes: Shapes) -> str | None:
    positions = shapes.get("backbone.pos_embed", ())
    letters = {size.width: letter for letter, size in SIZES.items()}
    size = letters.get(positions[-1]) if positions else None
    if size is None or _count(shapes, r"backbone\.blocks\.(\d+)\.") != SIZES[size].depth:
        return None
    classic = "keypoint_head.deconv_layers.0.weight" in shapes
    return f"vitpose_{size}" if classic else f"vitpose_{size}_simple"


def _hrnet(shapes: Shapes) -> str | None:
    finest = shapes.get("stage4.0.branches.0.0.conv1.weight")
    return f"hrnet_w{finest[0]}" if finest else None


def _pose_resnet(shapes: Shapes) -> str | None:
    blocks = tuple(_count(shapes, rf"layer{layer}\.(\d+)\.") for layer in (1, 2, 3, 4))
    depth = RESNET_DEPTHS.get((blocks, "layer1.0.conv3.weight" in shapes))
    return f"pose_resnet_{depth}" if depth and "deconv_layers.0.weight" in shapes else None


def _tiny(shapes: Shapes) -> str | None:
    return f"tiny_w{shapes['head.weight'][1]}" if "down8.0.weight" in shapes else None


def _count(shapes: Shapes, pattern: str) -> int:
    """Return one more than the largest number that matches the pattern's group, or 0."""
    return max((int(found[1]) + 1 for name in shapes if (found := re.match(pattern, name))), default=0)
