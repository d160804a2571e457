"""Every architecture by name: its class, its arguments, and the input sizes it takes.

This module does not import torch, so that a recipe which names a network can be checked within milliseconds.

To add a network, write its file in this folder and one line in `MODELS`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

SIMCC_SUFFIX = "_simcc"  # ends the name of a network with a SimCC head
DEFAULT_INPUT_SIZE = (256, 192)  # (height, width) in pixels of most published COCO networks
PUBLISHED_HOURGLASSES = ("hourglass_4x128", "hourglass_8x256")
CUSTOM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:Class, an architecture outside this package
HOURGLASS = re.compile(r"hourglass_([0-9]{1,3})x([0-9]{1,4})")


@dataclass(frozen=True)
class Architecture:
    """The class of a network and the arguments that make one named variant of it."""

    target: str  # "module:Class"; the module is a file of this folder
    arguments: Mapping[str, Any] = field(default_factory=dict)
    multiple: int = 32  # height and width of the input must be multiples of this, in pixels
    fixed_input: bool = False  # the class is built for one input size, which it takes as `input_size`


MODELS: dict[str, Architecture] = {
    "hrnet_w18": Architecture("hrnet:HRNet", {"width": 18}),
    "hrnet_w32": Architecture("hrnet:HRNet", {"width": 32}),
    "hrnet_w40": Architecture("hrnet:HRNet", {"width": 40}),
    "hrnet_w48": Architecture("hrnet:HRNet", {"width": 48}),
    "pose_resnet_18": Architecture("pose_resnet:PoseResNet", {"depth": 18}),
    "pose_resnet_34": Architecture("pose_resnet:PoseResNet", {"depth": 34}),
    "pose_resnet_50": Architecture("pose_resnet:PoseResNet", {"depth": 50}),
    "pose_resnet_101": Architecture("pose_resnet:PoseResNet", {"depth": 101}),
    "pose_resnet_152": Architecture("pose_resnet:PoseResNet", {"depth": 152}),
    "tiny_w8": Architecture("tiny:TinyPose", {"width": 8}, multiple=16),
    "tiny_w16": Architecture("tiny:TinyPose", {"width": 16}, multiple=16),
    "tiny_w32": Architecture("tiny:TinyPose", {"width": 32}, multiple=16),
    "tiny_w48": Architecture("tiny:TinyPose", {"width": 48}, multiple=16),
    "vitpose_s": Architecture("vitpose:ViTPose", {"size": "s"}, multiple=16, fixed_input=True),
    "vitpose_b": Architecture("vitpose:ViTPose", {"size": "b"}, multiple=16, fixed_input=True),
    "vitpose_l": Architecture("vitpose:ViTPose", {"size": "l"}, multiple=16, fixed_input=True),
    "vitpose_h": Architecture("vitpose:ViTPose", {"size": "h"}, multiple=16, fixed_input=True),
    "vitpose_s_simple": Architecture("vitpose:ViTPose", {"size": "s", "head": "simple"}, multiple=16, fixed_input=True),
    "vitpose_b_simple": Architecture("vitpose:ViTPose", {"size": "b", "head": "simple"}, multiple=16, fixed_input=True),
    "vitpose_l_simple": Architecture("vitpose:ViTPose", {"size": "l", "head": "simple"}, multiple=16, fixed_input=True),
    "vitpose_h_simple": Architecture("vitpose:ViTPose", {"size": "h", "head": "simple"}, multiple=16, fixed_input=True),
}
"""Architectures by name. Stacked hourglasses of any size come from their name alone; see `find_architecture`."""


def find_architecture(name: str) -> Architecture | None:
    """Return the architecture of this name, without the suffix of a SimCC head; None if there is none.

    `hourglass_{stacks}x{features}` is any stacked hourglass of 1 to 999 stacks whose features are a multiple of 4 and
    at least 8.
    """
    name = name.removesuffix(SIMCC_SUFFIX)
    if name in MODELS:
        return MODELS[name]
    if sizes := HOURGLASS.fullmatch(name):
        stacks, features = (int(number) for number in sizes.groups())
        if stacks >= 1 and features >= 8 and features % 4 == 0:
            return Architecture("hourglass:StackedHourglass", {"stacks": stacks, "features": features}, multiple=64)
    return None


def is_model(name: str) -> bool:
    """Return whether `create_model` builds a network of this name."""
    return find_architecture(name) is not None


def is_custom(name: str) -> bool:
    """Return whether the name is that of a class outside this package, as `package.module:Class`."""
    return CUSTOM.fullmatch(name) is not None


def model_names() -> list[str]:
    """Return every name of `MODELS` and the patterns of the others, for messages and help texts."""
    return [
        *MODELS,
        "hourglass_{stacks}x{features}",
        f"any of them with {SIMCC_SUFFIX} for a SimCC head",
        "package.module:Class for a network of your own",
    ]


def unknown_model(name: str) -> str:
    """Return the message for a name that is no architecture, with the nearest one and all choices."""
    if sizes := HOURGLASS.fullmatch(name.removesuffix(SIMCC_SUFFIX)):
        stacks, features = (int(number) for number in sizes.groups())
        if stacks < 1:
            return f"{name!r}: an hourglass network needs at least 1 stack, not {stacks}"
        return f"{name!r}: the features of an hourglass must be a multiple of 4 and at least 8, not {features}"
    nearest = get_close_matches(name.lower(), [*MODELS, *PUBLISHED_HOURGLASSES], n=1)
    meant = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{name!r} is not an architecture; {meant}choose from {', '.join(model_names())}"


def input_problem(name: str, input_size: tuple[int, int]) -> str | None:
    """Return why a network of this name cannot take images of (height, width) pixels; None if it can."""
    architecture = find_architecture(name)
    if architecture is None or all(side > 0 and side % architecture.multiple == 0 for side in input_size):
        return None
    height, width = input_size
    return (
        f"{name} takes images whose height and width are multiples of {architecture.multiple}, not {height} x {width} "
        "(height x width)"
    )
