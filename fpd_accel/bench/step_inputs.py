"""On what a step is measured: device, precision, weights, and people that both steps see."""

from typing import Literal

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fpd_accel.bench.batches import draw_batch
from fpd_accel.bench.reference_step import FloatBatch
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.errors import TrainingError
from fpd_accel.processes import multiplies_bf16

JOINTS = 17
RESIDUAL_SCALE = 0.05


def choose_device(name: str) -> torch.device:
    """Raises TrainingError where a GPU is asked for and PyTorch sees none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: PyTorch sees no GPU here; leave it out, or take --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(
    name: Literal["auto", "fp32", "bf16"], device: torch.device
) -> tuple[Literal["fp32", "bf16"], str]:
    """A precision, and why."""
    if name != "auto":
        return name, "as asked for"
    what = "GPU" if device.type == "cuda" else f"processor ({torch.backends.cpu.get_cpu_capability()})"
    if multiplies_bf16(device):
        return "bf16", f"the {what} multiplies it"
    return "fp32", f"the {what} has no bf16 and would emulate it"


def calm(network: nn.Module) -> nn.Module:
    """Random weights that magnify rounding less than fresh ones do, so that gradients can be compared; in place.

    Rates do not hang on it. Convolutions are drawn by He's rule, and the last normalisation of a residual block begins
    near zero, as is usual for deep ones (Goyal et al., Accurate, Large Minibatch SGD, 2017, section 5.1). The gradient
    of two float32 steps of an HRNet then differs by 1e-5, not by 1e-2, and in bf16 not by its whole size.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:  # not the head
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, BasicBlock | Bottleneck):
            last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
            nn.init.constant_(last.weight, RESIDUAL_SCALE)
    return network


def make_batch(people: int, input_size: tuple[int, int], *, seed: int) -> Batch:
    """People of noise, with keypoints anywhere in the crop, of which seven in ten are visible."""
    return draw_batch(people, JOINTS, input_size, hidden=0.3, seed=seed)


def host_made(batch: Batch, codec: HeatmapCodec) -> FloatBatch:
    """The same people as the published loader gives them: normalised images and heatmaps, float32."""
    target, weight = codec.encode(batch.keypoints, batch.visible)
    return FloatBatch(Normalization()(batch.crops).contiguous(), target, weight[..., None])
