"""How fast a distillation step could be on a machine of which two ceilings are known: the fused roofline.

The ceilings are what large matrix products and large copies reach in the same run (``ceilings.py``). Work is counted on
meta tensors, where nothing is computed, from the layers that a forward goes through: convolutions, transposed
convolutions, linear layers and attention. Everything else (normalisation, activation, addition, upsampling, loss,
targets, images) is taken as fused into the layer before or after it and costs nothing, extra operands included.

FLOPs are two for each multiply-add: the teacher's forward, the student's forward, and as much again for the gradient of
a layer's input and for that of its weights (not for images, which need no gradient).

Bytes are those that have to go through the device's memory even so, with elements as large as the precision makes them:

    forward             reads input and weights once, writes the output once; where batch normalisation in training mode
                        follows, its statistics read the output once more before anything can use it
    gradient of input   reads the gradient of the output and the weights, and, to undo normalisation and activation, the
                        saved output, once each; writes the gradient of the input
    gradient of weights reads the input and the gradient of the output once each; writes the gradient, float32
    batch normalisation its backward sums are taken where the gradient is written: nothing
    attention           forward reads queries, keys and values and writes the output; backward reads these four and the
                        gradient of the output, and writes three gradients. No weights
    optimizer           Adam: reads weights, gradients and both moments, writes weights and both moments, float32

A pass of a layer takes the longer of FLOPs / matmul ceiling and bytes / copy ceiling, for one kernel does both at once;
the roofline is the sum over passes, for they come one after another. Caches that hold more than one layer's tensors
could beat it, and so could a convolution with fewer multiplications (Winograd, FFT): it is a yardstick, not a law.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MASTER = 4  # bytes of a weight, its gradient and each moment in the optimizer
ADAM_PASSES = 7  # over the weights: four reads, three writes


@dataclass
class Layer:
    """One layer of a forward: multiply-adds, and elements of its tensors."""

    kind: str
    macs: int
    inputs: int
    weights: int
    outputs: int
    input_gradient: bool  # whether what it reads is differentiated
    normalised: bool = False  # by the statistics of the batch


class Pass(NamedTuple):
    """What one kernel would do."""

    name: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best: FLOP/s of matrix products in the step's precision, and bytes/s of copies."""

    flops: float
    bytes: float


def count_layers(network: nn.Module, images: tuple[int, int, int, int]) -> list[Layer]:
    """The layers of a forward of this many images (B, 3, H, W), in order. The network is on the meta device."""
    with _Counter() as counter, torch.enable_grad():
        network(torch.empty(*images, device="meta"))
    return counter.layers


def inference_passes(layers: Sequence[Layer], element: int) -> list[Pass]:
    """A forward in evaluation mode, with elements of so many bytes."""
    return [_forward(layer, element, training=False) for layer in layers]


def training_passes(layers: Sequence[Layer], element: int) -> list[Pass]:
    """Forward and backward in training mode."""
    passes = [_forward(layer, element, training=True) for layer in layers]
    for layer in reversed(layers):
        if layer.kind == "attention":
            traffic = layer.inputs + layer.outputs + layer.outputs + layer.inputs
            passes.append(Pass("attention gradients", 4 * layer.macs, element * traffic))
            continue
        if layer.input_gradient:
            saved = layer.outputs if layer.normalised else 0
            traffic = layer.outputs + saved + layer.weights + layer.inputs
            passes.append(Pass(f"{layer.kind} gradient of input", 2 * layer.macs, element * traffic))
        traffic = element * (layer.inputs + layer.outputs) + MASTER * layer.weights
        passes.append(Pass(f"{layer.kind} gradient of weights", 2 * layer.macs, traffic))
    return passes


def step_passes(
    student: nn.Module, teacher: nn.Module, *, batch: int, input_size: tuple[int, int], element: int
) -> list[Pass]:
    """All passes of one distillation step. Both networks are on the meta device."""
    images = (batch, 3, *input_size)
    learnt = sum(parameter.numel() for parameter in student.parameters())
    return [
        *inference_passes(count_layers(teacher.eval(), images), element),
        *training_passes(count_layers(student.train(), images), element),
        Pass("optimizer", 0, ADAM_PASSES * MASTER * learnt),
    ]


def seconds(passes: Sequence[Pass], ceilings: Ceilings) -> float:
    """The time that the passes take at least."""
    return sum(max(one.flops / ceilings.flops, one.bytes / ceilings.bytes) for one in passes)


def summary(passes: Sequence[Pass], ceilings: Ceilings, batch: int) -> dict[str, float]:
    """The roofline of a step, for JSON."""
    total = seconds(passes, ceilings)
    bound = sum(one.bytes / ceilings.bytes for one in passes if one.bytes * ceilings.flops > one.flops * ceilings.bytes)
    return {
        "images_per_second": batch / total,
        "seconds": total,
        "memory_bound_share": bound / total,
        "gflops_per_image": sum(one.flops for one in passes) / batch / 1e9,
        "megabytes_per_image": sum(one.bytes for one in passes) / batch / 1e6,
    }


def _forward(layer: Layer, element: int, *, training: bool) -> Pass:
    statistics = layer.outputs if training and layer.normalised else 0
    traffic = layer.inputs + layer.weights + layer.outputs + statistics
    return Pass(f"{layer.kind} forward", 2 * layer.macs, element * traffic)


class _Counter(TorchFunctionMode):
    """Records the calls that do multiply-adds while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self._made_by: dict[int, Layer] = {}
        self._kept: list[Tensor] = []  # so that no id comes twice

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        if function is F.batch_norm:
            layer = self._made_by.get(id(arguments[0]))
            if layer is not None and (named or {}).get("training", arguments[5] if len(arguments) > 5 else False):
                layer.normalised = True
        elif function in COUNTED:
            kind, multiply_adds = COUNTED[function]
            layer = self._layer(kind, multiply_adds, arguments, result)
            self.layers.append(layer)
            self._made_by[id(result)] = layer
            self._kept.append(result)
        return result

    @staticmethod
    def _layer(
        kind: str, multiply_adds: Callable[[Tensor, Tensor, Tensor], int], arguments: Any, result: Tensor
    ) -> Layer:
        read, second = arguments[0], arguments[1]
        is_attention = kind == "attention"
        operands = read.numel() + second.numel() + arguments[2].numel() if is_attention else read.numel()
        return Layer(
            kind,
            multiply_adds(read, second, result),
            inputs=operands,
            weights=0 if is_attention else second.numel(),
            outputs=result.numel(),
            input_gradient=read.requires_grad,
        )


def _convolution(inputs: Tensor, weight: Tensor, result: Tensor) -> int:  # noqa: ARG001
    return result.numel() * weight[0].numel()  # weight: (outputs, inputs / groups, kernel...)


def _transposed(inputs: Tensor, weight: Tensor, result: Tensor) -> int:  # noqa: ARG001
    return inputs.numel() * weight[0].numel()  # weight: (inputs, outputs / groups, kernel...)


def _linear(inputs: Tensor, weight: Tensor, result: Tensor) -> int:  # noqa: ARG001
    return result.numel() * weight.shape[1]


def _attention(query: Tensor, key: Tensor, result: Tensor) -> int:
    rows = query.shape[:-1].numel()
    return rows * key.shape[-2] * (query.shape[-1] + result.shape[-1])


COUNTED: dict[Callable[..., Any], tuple[str, Callable[[Tensor, Tensor, Tensor], int]]] = {
    F.conv2d: ("convolution", _convolution),
    F.conv_transpose2d: ("transposed convolution", _transposed),
    F.linear: ("linear", _linear),
    F.scaled_dot_product_attention: ("attention", _attention),
}
