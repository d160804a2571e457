"""The pose networks: `create_model(name, num_keypoints)` builds any of them. To add one, write a file and a line."""

import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from fpd_accel.errors import ModelError, WeightsError
from fpd_accel.models.base import PoseModel
from fpd_accel.models.hourglass import StackedHourglass
from fpd_accel.models.hrnet import HRNet
from fpd_accel.models.pose_resnet import PoseResNet
from fpd_accel.models.simcc import SUFFIX, SimCCModel
from fpd_accel.models.tiny import TinyPose
from fpd_accel.models.vitpose import ViTPose

MODELS: dict[str, Callable[..., PoseModel]] = {
    "hrnet_w18": partial(HRNet, width=18),
    "hrnet_w32": partial(HRNet, width=32),
    "hrnet_w40": partial(HRNet, width=40),
    "hrnet_w48": partial(HRNet, width=48),
    "pose_resnet_18": partial(PoseResNet, depth=18),
    "pose_resnet_34": partial(PoseResNet, depth=34),
    "pose_resnet_50": partial(PoseResNet, depth=50),
    "pose_resnet_101": partial(PoseResNet, depth=101),
    "pose_resnet_152": partial(PoseResNet, depth=152),
    "tiny_w8": partial(TinyPose, width=8),
    "tiny_w16": partial(TinyPose, width=16),
    "tiny_w32": partial(TinyPose, width=32),
    "tiny_w48": partial(TinyPose, width=48),
    "vitpose_s": partial(ViTPose, size="s"),
    "vitpose_b": partial(ViTPose, size="b"),
    "vitpose_l": partial(ViTPose, size="l"),
    "vitpose_h": partial(ViTPose, size="h"),
    "vitpose_s_simple": partial(ViTPose, size="s", head="simple"),
    "vitpose_b_simple": partial(ViTPose, size="b", head="simple"),
    "vitpose_l_simple": partial(ViTPose, size="l", head="simple"),
    "vitpose_h_simple": partial(ViTPose, size="h", head="simple"),
}
"""From name to a builder that takes the number of keypoints; hourglasses of any size come from their name alone."""

DEFAULT_INPUT_SIZE = (256, 192)  # (height, width)
SIZED = "vitpose"  # names that begin so belong to networks built for one input size

HOURGLASS_NAME = re.compile(r"hourglass_([0-9]{1,3})x([0-9]{1,4})")
PUBLISHED_HOURGLASSES = ("hourglass_4x128", "hourglass_8x256")


def model_names() -> list[str]:
    """Return every name of `MODELS` and the pattern of the hourglasses, for messages and help texts."""
    return [*MODELS, "hourglass_{stacks}x{features}", f"any of them with {SUFFIX} for a SimCC head"]


def is_model(name: str) -> bool:
    """Can `create_model` build a network of this name?"""
    network = name.removesuffix(SUFFIX)
    return network in MODELS or HOURGLASS_NAME.fullmatch(network) is not None


def create_model(name: str, num_keypoints: int, *, input_size: tuple[int, int] = DEFAULT_INPUT_SIZE) -> PoseModel:
    """Build a network with fresh weights.

    Args:
        name: One of `MODELS`, or `hourglass_{stacks}x{features}` with features a multiple of 4; with `_simcc` after it,
            the same network under a SimCC head.
        num_keypoints: Heatmaps per stage.
        input_size: (height, width) of the images, pixels. Vision transformers, whose positions are parameters, and
            SimCC heads depend on it; the other networks take any size that fits their downsampling.

    Raises:
        ModelError: The name is unknown (the message lists the choices and the nearest one), or a size makes no sense.
    """
    if name.endswith(SUFFIX):
        network = create_model(name.removesuffix(SUFFIX), num_keypoints, input_size=input_size)
        return SimCCModel(network, input_size=input_size)
    if name.startswith(SIZED) and name in MODELS:
        return MODELS[name](num_keypoints, input_size=input_size)
    if name in MODELS:
        return MODELS[name](num_keypoints)
    if hourglass := HOURGLASS_NAME.fullmatch(name):
        stacks, features = (int(number) for number in hourglass.groups())
        return StackedHourglass(num_keypoints, stacks=stacks, features=features)
    nearest = get_close_matches(name.lower(), [*MODELS, *PUBLISHED_HOURGLASSES], n=1)
    meant = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ModelError(f"{name!r} is not a model; {meant}choose from {', '.join(model_names())}")


__all__ = [
    "DEFAULT_INPUT_SIZE",
    "MODELS",
    "PUBLISHED_HOURGLASSES",
    "ModelError",
    "PoseModel",
    "WeightsError",
    "create_model",
    "is_model",
    "model_names",
]
