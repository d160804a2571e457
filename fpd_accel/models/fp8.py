"""The linear layers of a frozen transformer in 8-bit floating point, which Hopper multiplies twice as fast as bfloat16.

FP8 Formats for Deep Learning (Micikevicius et al., 2022): E4M3, 1 sign, 4 exponent and 3 mantissa bits, largest finite
value 448. Each row of a weight and each token of an activation is divided by its own scale, so that its largest value
becomes 448; the products are summed in float32 and multiplied by both scales. Weights are converted once, tokens in
each forward. Normalisations, attention itself, the patch convolution and the head keep their precision.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fpd_accel.errors import ConfigError, TrainingError
from fpd_accel.models.base import PoseModel

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_MAXIMUM = 1e-12  # assumed for the largest value of a row of zeros, which avoids a division by zero
CAPABILITY = (8, 9)  # lowest compute capability of a GPU on which PyTorch multiplies in float8


def to_float8(values: Float[Tensor, "row channel"]) -> tuple[Tensor, Float[Tensor, "row 1"]]:
    """Return the values in float8 and the float32 scale of each row; their product is within 2**-4 of each value.

    Values below about 2**-15 of the largest of their row lose more, and values below 2**-19 of it become zero.
    """
    scale = values.abs().amax(dim=1, keepdim=True).float().clamp(min=SMALLEST_MAXIMUM) / LARGEST
    return (values / scale).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """A linear layer that multiplies in float8 and returns bfloat16, for inference only.

    Weight and bias keep the names of the linear layer's, but are buffers. A processor without float8 units computes
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
        """Return the layer's outputs in bfloat16."""
        rows, scale = to_float8(values.flatten(0, -2))
        product = F.scaled_mm(
            rows,
            self.weight.t(),
            scale,
            F.ScalingType.RowWise,
            self.weight_scale.t(),
            F.ScalingType.RowWise,
            bias=self.bias,
            output_dtype=torch.bfloat16,  # the only one that GPUs support for row scales
            use_fast_accum=True,
        )
        return product.unflatten(0, values.shape[:-1])


def float8_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Return the linear layers inside a network's units (a transformer's blocks) as (parent, name in it, layer).

    Raises:
        ConfigError: There are none, so the network is not a transformer.
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
            "teacher.fp8: is for the linear layers in the blocks of a vision transformer (vitpose_s, _b, _l, _h), but "
            "this teacher has none; leave it out"
        )
    return layers


def to_float8_linears(model: nn.Module) -> None:
    """Replace each layer of `float8_layers` by a `Float8Linear`; raise ConfigError if there are none."""
    for parent, name, linear in float8_layers(model):
        setattr(parent, name, Float8Linear(linear))


def require_float8(device: torch.device) -> None:
    """Raise TrainingError unless the device multiplies in float8."""
    if device.type != "cuda":
        found = f"this run uses {device.type}"
    elif torch.version.hip is not None:
        found = "this one is AMD's"
    elif torch.cuda.get_device_capability(device) < CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
    else:
        return
    raise TrainingError(
        f"teacher.fp8: needs an NVIDIA GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or later (Ada, "
        f"Hopper, Blackwell); {found}; leave it out"
    )
