"""The fused roofline: how fast a distillation step could be on a machine with two known ceilings.

The ceilings are the rates of large matrix products and of large copies in the same run (`step_probe.py`). Work is
counted on meta tensors, from the convolutions, transposed convolutions, linear layers and attention of a forward.
Everything else (normalisation, activation, addition, upsampling, loss, targets, images) counts as fused into the layer
before or after it and costs nothing, extra operands included.

FLOPs are two per multiply-add: the teacher's forward, the student's forward, and as much again for the gradient of a
layer's input (images need none) and for that of its weights. Bytes are those that must go through the device's memory
even so, at the element size of the precision:

    forward             reads input and weights, writes the output; batch normalisation in training mode after it reads
                        the output once more, for its statistics
    gradient of input   reads the gradient of the output, the weights and, to undo normalisation and activation, the
                        saved output; writes the gradient of the input and, for nothing more, the sums of normalisation
    gradient of weights reads the input and the gradient of the output; writes the gradient in float32
    attention           reads queries, keys and values, writes the output; backward reads these four and the gradient of
                        the output, writes three gradients
    optimizer           Adam reads weights, gradients and both moments, writes weights and both moments, in float32

A pass takes the longer of FLOPs / matmul ceiling and bytes / copy ceiling, since one kernel does both at once; passes
run one after another. Caches that hold more than one layer's tensors could beat this roofline, and so could convolution
with fewer multiplications (Winograd, FFT): it is a yardstick, not a law.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MASTER = 4  # bytes of a weight, its gradient and each moment in the optimizer
ADAM_PASSES = 7  # over all weights: four reads, three writes


@dataclass
class Layer:
    """One layer of a forward: its multiply-adds and the elements of its tensors."""

    kind: str
    macs: int
    inputs: int
    weights: int
    outputs: int
    input_gradient: bool  # whether its input needs a gradient
    normalised: bool = False  # followed by batch normalisation in training mode


class Pass(NamedTuple):
    """The work of one kernel."""

    name: str
    flops: int
    bytes: int


class Ceilings(NamedTuple):
    """The best rates of a device: FLOP/s of matrix products in the step's precision, and bytes/s of copies."""

    flops: float
    bytes: float


def count_layers(network: nn.Module, images: tuple[int, int, int, int]) -> list[Layer]:
    """Return the layers of a forward of images (B, 3, H, W), in order. The network is on the meta device."""
    with _Counter() as counter, torch.enable_grad():
        network(torch.empty(*images, device="meta"))
    return counter.layers


def forward_passes(layers: Sequence[Layer], element: int) -> list[Pass]:
    """Return the passes of a forward, with elements of `element` bytes."""
    passes = []
    for layer in layers:
        elements = layer.inputs + layer.weights + layer.outputs * (1 + layer.normalised)
        passes.append(Pass(f"{layer.kind} forward", 2 * layer.macs, element * elements))
    return passes


def training_passes(layers: Sequence[Layer], element: int) -> list[Pass]:
    """Return the passes of forward and backward in training mode."""
    passes = forward_passes(layers, element)
    for layer in reversed(layers):
        both = layer.inputs + layer.outputs
        if layer.kind == "attention":
            passes.append(Pass("attention gradients", 4 * layer.macs, element * 2 * both))
            continue
        if layer.input_gradient:
            traffic = element * (both + layer.weights + layer.outputs * layer.normalised)
            passes.append(Pass(f"{layer.kind} gradient of input", 2 * layer.macs, traffic))
        traffic = element * both + MASTER * layer.weights
        passes.append(Pass(f"{layer.kind} gradient of weights", 2 * layer.macs, traffic))
    return passes


def step_passes(
    student: nn.Module, teacher: nn.Module, *, batch: int, input_size: tuple[int, int], element: int
) -> list[Pass]:
    """Return all passes of one distillation step. Both networks are on the meta device."""
    images = (batch, 3, *input_size)
    weights = sum(parameter.numel() for parameter in student.parameters())
    return [
        *forward_passes(count_layers(teacher.eval(), images), element),
        *training_passes(count_layers(student.train(), images), element),
        Pass("optimizer", 0, ADAM_PASSES * MASTER * weights),
    ]


def summary(passes: Sequence[Pass], ceilings: Ceilings, batch: int) -> dict[str, float]:
    """Return the roofline of a step, for JSON."""
    times = [(one.flops / ceilings.flops, one.bytes / ceilings.bytes) for one in passes]
    total = sum(map(max, times))
    return {
        "images_per_second": batch / total,
        "seconds": total,
        "memory_bound_share": sum(memory for compute, memory in times if memory > compute) / total,
        "gflops_per_image": sum(one.flops for one in passes) / batch / 1e9,
        "megabytes_per_image": sum(one.bytes for one in passes) / batch / 1e6,
    }


class _Counter(TorchFunctionMode):
    """Records the layers that are called inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self._made_by: dict[Tensor, Layer] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        if function is F.batch_norm:
            layer = self._made_by.get(arguments[0])
            if layer is not None and (named or {}).get("training", arguments[5] if len(arguments) > 5 else False):
                layer.normalised = True
        elif function in COUNTED:
            kind, multiply_adds = COUNTED[function]
            read, second = arguments[:2]
            attention = kind == "attention"
            layer = Layer(
                kind,
                multiply_adds(read, second, result),
                inputs=sum(operand.numel() for operand in arguments[: 3 if attention else 1]),
                weights=0 if attention else second.numel(),
                outputs=result.numel(),
                input_gradient=read.requires_grad,
            )
            self.layers.append(layer)
            self._made_by[result] = layer
        return result


# Kind of each counted function, and its multiply-adds by first operand, second operand (weights or keys) and result.
# Weights are (outputs, inputs / groups, kernel...), transposed (inputs, outputs / groups, kernel...).
COUNTED: dict[Callable[..., Any], tuple[str, Callable[[Tensor, Tensor, Tensor], int]]] = {
    F.conv2d: ("convolution", lambda _, weight, result: result.numel() * weight[0].numel()),
    F.conv_transpose2d: ("transposed convolution", lambda read, weight, _: read.numel() * weight[0].numel()),
    F.linear: ("linear", lambda _, weight, result: result.numel() * weight.shape[1]),
    F.scaled_dot_product_attention: (
        "attention",
        lambda query, key, result: query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + result.shape[-1]),
    ),
}
