"""The linear layers of a frozen transformer in 8-bit floating point, at which Hopper's matrix units are twice as fast.

FP8 Formats for Deep Learning (Micikevicius et al., 2022): E4M3, 1 sign, 4 exponent and 3 mantissa bits, largest finite
value 448. Each row of a weight and each token of an activation is divided by a scale of its own, so that its largest
value becomes 448; the products are summed in float32 and multiplied by both scales. Weights are converted once, tokens
each time. Normalisations, attention itself, the patches' convolution and the head keep the precision that they have.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fpd_accel.errors import ConfigError, TrainingError
from fpd_accel.models.base import PoseModel

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_SCALE = 1e-12  # of a row of zeros, by which nothing may be divided
CAPABILITY = (8, 9)  # of the GPU, from which on PyTorch multiplies in float8


def to_float8(values: Float[Tensor, "row channel"]) -> tuple[Tensor, Float[Tensor, "row 1"]]:
    """The values in float8 and the float32 scale of each row: their product is the values, to 2**-4 of each.

    Values below some 2**-15 of their row's largest lose more, and those below 2**-19 become zero.
    """
    scale = values.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST_SCALE) / LARGEST
    return (values / scale).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """What a linear layer computes, by a product of float8 values; bfloat16 comes out. Inference only.

    Its weight and bias have the names of the linear layer's, but are no parameters. Processors without float8 units do
    the same by way of float32, slowly.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = to_float8(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale, persistent=False)
        self.register_buffer("bias", linear.bias.detach().to(torch.bfloat16) if linear.bias is not None else None)

    def forward(self, values: Float[Tensor, "*place inputs"]) -> Float[Tensor, "*place outputs"]:
        rows, scale = to_float8(values.flatten(0, -2))
        product = F.scaled_mm(
            rows,
            self.weight.t(),
            scale,
            F.ScalingType.RowWise,
            self.weight_scale.t(),
            F.ScalingType.RowWise,
            bias=self.bias,
            output_dtype=torch.bfloat16,  # the one that GPUs give for scales of rows
            use_fast_accum=True,
        )
        return product.unflatten(0, values.shape[:-1])


def float8_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers inside a network's units (a transformer's blocks): parent, name in it, layer.

    Raises:
        ConfigError: there are none; the network is no transformer.
    """
    units = model.unit_modules() if isinstance(model, PoseModel) else []
    layers = [
        (parent, name, child)
        for unit in units
        for parent in unit.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    if not layers:
        raise ConfigError(
            "teacher.fp8: is for the linear layers in the blocks of a vision transformer (vitpose_s, _b, _l, _h), and "
            "this teacher has none; leave it out"
        )
    return layers


def to_float8_linears(model: nn.Module) -> None:
    """Put a :class:`Float8Linear` in the place of each of these layers; raises ConfigError where there are none."""
    for parent, name, linear in float8_layers(model):
        setattr(parent, name, Float8Linear(linear))


def require_float8(device: torch.device) -> None:
    """Raises TrainingError unless the device multiplies in float8."""
    if device.type != "cuda" or torch.version.hip is not None:
        found = f"there is none here, but {device.type}" if device.type != "cuda" else "this one is AMD's"
    elif torch.cuda.get_device_capability(device) < CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
    else:
        return
    raise TrainingError(
        f"teacher.fp8: needs an NVIDIA GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or later (Ada, "
        f"Hopper, Blackwell); {found}; leave it out"
    )
