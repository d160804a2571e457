"""Build a network by its name, and check what it returns."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from fpd_accel.errors import ModelError
from fpd_accel.models.base import PoseModel, SimCCModel, check_outputs
from fpd_accel.models.names import (
    DEFAULT_INPUT_SIZE,
    SIMCC_SUFFIX,
    find_architecture,
    input_problem,
    is_custom,
    unknown_model,
)
from fpd_accel.outputs import Output

PROBE_BATCH = 2


class Probe(NamedTuple):
    """A network without memory for its weights, and its outputs for a batch of images."""

    model: nn.Module
    outputs: tuple[Output, ...]


def create_model(
    name: str,
    num_keypoints: int,
    *,
    input_size: tuple[int, int] = DEFAULT_INPUT_SIZE,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """Build a network with fresh weights.

    Args:
        name: One of `MODELS`, or `hourglass_{stacks}x{features}` with features a multiple of 4; with `_simcc` after it,
            the same network under a SimCC head. Or `package.module:Class`, an `nn.Module` of the user's own that Python
            can import; its `forward` must return a tuple of stage outputs as that of `PoseModel` does.
        num_keypoints: Heatmaps per stage.
        input_size: (height, width) of the images, pixels. Vision transformers, whose positions are parameters, and
            SimCC heads depend on it; the other networks take any size that fits their downsampling.
        arguments: Keyword arguments of the user's own class. It gets `num_keypoints` and `input_size` too if its
            constructor has parameters of these names.

    Returns:
        A `PoseModel`, or an instance of the user's own class.

    Raises:
        ModelError: The name is unknown (the message lists the choices and the nearest one), a size makes no sense, or
            the user's own class cannot be imported or built.
    """
    arguments = arguments or {}
    if is_custom(name):
        return _create_custom(name, {"num_keypoints": num_keypoints, "input_size": input_size}, arguments)
    architecture = find_architecture(name)
    if architecture is None:
        raise ModelError(unknown_model(name))
    if arguments:
        raise ModelError(f"{name} takes no arguments, but got {', '.join(arguments)}; only package.module:Class does")
    module, _, class_name = architecture.target.partition(":")
    network_class = getattr(import_module(f"fpd_accel.models.{module}"), class_name)
    fixed: dict[str, Any] = {"input_size": input_size} if architecture.fixed_input else {}
    network: PoseModel = network_class(num_keypoints, **architecture.arguments, **fixed)
    return SimCCModel(network, input_size=input_size) if name.endswith(SIMCC_SUFFIX) else network


def _create_custom(name: str, offered: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
    """Import and build the class of `package.module:Class`, with those of the `offered` arguments that it takes."""
    module_name, _, class_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ModelError(
            f"{name}: {module_name} cannot be imported: {error}; install its package, or put the folder that holds it "
            "on PYTHONPATH"
        ) from error
    network_class = getattr(module, class_name, None)
    if network_class is None:
        raise ModelError(f"{name}: {module_name} has no {class_name}; name a class that it defines")
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise ModelError(f"{name}: {class_name} is not a class derived from torch.nn.Module; name one that is")
    try:
        accepted = inspect.signature(network_class).parameters
        taken = {key: value for key, value in offered.items() if key in accepted}
        return network_class(**{**taken, **arguments})
    except TypeError as error:
        raise ModelError(f"{name}: cannot be built: {error}; change its arguments") from error


def probe_model(
    name: str,
    num_keypoints: int,
    input_size: tuple[int, int] = DEFAULT_INPUT_SIZE,
    arguments: Mapping[str, Any] | None = None,
) -> Probe:
    """Build a network in evaluation mode without memory for its weights, and check its outputs for a batch of images.

    The network is built on the meta device. A network of the user's own that needs numbers there, as one that calls
    `Tensor.item` does, is built on the CPU. PyTorch's random state stays as it is.

    Raises:
        ModelError: The network cannot be built, cannot take images of this (height, width), or returns something other
            than a tuple of stage outputs of the right shapes.
    """
    if (problem := input_problem(name, input_size)) is not None:
        raise ModelError(problem)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            model, outputs = _run_once("meta", name, num_keypoints, input_size, arguments)
        except Exception:
            if not is_custom(name):
                raise
            model, outputs = _run_once("cpu", name, num_keypoints, input_size, arguments)
    check_outputs(outputs, arch=name, num_keypoints=num_keypoints, input_size=input_size, batch=PROBE_BATCH)
    return Probe(model, outputs)


def _run_once(
    device: str, name: str, num_keypoints: int, input_size: tuple[int, int], arguments: Mapping[str, Any] | None
) -> tuple[nn.Module, Any]:
    """Return a new network in evaluation mode, and its outputs for black images."""
    with torch.device(device):
        model = create_model(name, num_keypoints, input_size=input_size, arguments=arguments).eval()
        images = torch.zeros(PROBE_BATCH, 3, *input_size)
        try:
            return model, model(images)
        except Exception as error:
            reason = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
            height, width = input_size
            raise ModelError(f"{name}: fails on images of {height} x {width} (height x width): {reason}") from error
