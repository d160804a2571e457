"""Parameters and multiply-adds of a network."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fpd_accel.models.create import probe_model
from fpd_accel.models.names import is_custom
from fpd_accel.weights.model_folder import ModelConfig

STUDENT_PASSES = 3  # cost of a training step of the student, in forwards: its backward pass costs about two


def model_cost(config: ModelConfig) -> tuple[int, int]:
    """Return (parameters, multiply-adds of one forward for one person), of convolutions and matrix products alone."""
    model, image = _probe(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def original_gflops(config: ModelConfig) -> float:
    """Return the "GFLOPs" of the published tables: the original code's count for one person, in units of 2^30.

    It multiplies the size of a layer's weight by the positions of its output, for convolutions and linear layers alone.
    For a transposed convolution of stride 2 that is four times its multiply-adds. With it HRNet-W32 has 7.1 "GFLOPs"
    and PoseResNet-50 has 8.9 at 256 x 192; `model_cost` returns multiply-adds.
    """
    counted: list[int] = []

    def count(module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        positions = output.shape[:-1] if isinstance(module, nn.Linear) else output.shape[2:]
        counted.append(module.weight.numel() * positions.numel())

    model, image = _probe(config)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(image)
    return sum(counted) / 2**30


def _probe(config: ModelConfig) -> tuple[nn.Module, Tensor]:
    """Return the network in evaluation mode, without memory if it can be built so, and one image for it."""
    if is_custom(config.arch):
        model = probe_model(config.arch, config.skeleton.num_keypoints, config.input_size, config.arguments).model
    else:
        with torch.device("meta"):
            model = config.create_model().eval()
    return model, torch.zeros(1, 3, *config.input_size, device=next(model.parameters()).device)


def describe_model(name: str, config: ModelConfig) -> str:
    """Return one line with a network's architecture and cost."""
    parameters, macs = model_cost(config)
    return f"{name}: {config.arch}, {parameters / 1e6:.3f} M parameters, {macs / 1e9:.3f} G multiply-adds per person"


def describe_teacher_share(teacher: ModelConfig, student: ModelConfig) -> str:
    """Return one line with the teacher's share of the multiply-adds of a training step.

    The share of the time is smaller where the loader is the slowest part.
    """
    of_teacher, of_student = model_cost(teacher)[1], STUDENT_PASSES * model_cost(student)[1]
    return (
        f"the teacher is {of_teacher / (of_teacher + of_student):.0%} of a step's multiply-adds "
        f"({of_teacher / 1e9:.3f} G per person; forward and backward of the student {of_student / 1e9:.3f} G)"
    )
