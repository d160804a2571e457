"""How far our step and loader are from the published ones, as `fpd_accel.bench.published` has them.

Two forwards and backwards on the same samples from the same weights, in training mode, which leave the steps as they
were, are compared by

    each term of the loss       |ours - theirs| / |theirs|
    the gradient as a whole     ||ours - theirs|| / ||theirs||, over all parameters of the student together
    each parameter's gradient   the same for one parameter, divided by at least `FLOOR` of the average for its size,
                                because some gradients are zero but for rounding (a bias before a normalisation)

Float32 cannot show that two steps are equal to 1e-5: the last digits of a hundred layers' activations change an HRNet's
gradient by 1e-5 to 1e-2, because units close to zero change sides in ReLU and normalisation magnifies them. So:

    exact      both steps in float64, eager: losses, gradient and every parameter's to 1e-5 (our losses and targets are
               float32 still). It finds another formula
    as timed   ours as it is timed (bf16, compiled, ...) against the published float32: losses to 1e-5, in bf16 2e-2;
               the gradient as a whole to the same, or to `SLACK` times the difference of a plain eager step of that
               precision, in channels-last order for float32, if that is more. It finds other arithmetic
"""

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fpd_accel.bench.published.loader import PublishedDataset
from fpd_accel.bench.published.step import EagerStep, FloatBatch, PublishedStep, float_batch
from fpd_accel.bench.variants import JOINTS, OurStep, Setup, create_inputs, create_variant, draw_batch
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.schema import Train
from fpd_accel.data import batch as batches
from fpd_accel.data.batch import Batch

EXACT = 1e-5
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
SLACK = 4.0
FLOOR = 0.01
RESIDUAL_SCALE = 0.05  # initial weight of the last normalisation of a residual block
SAMPLES = 2  # of the comparison in float64


@dataclass(frozen=True)
class Outcome:
    """Losses and gradients of a step, on the CPU in float64."""

    terms: dict[str, float]
    gradients: dict[str, Tensor]


def init_stable(network: nn.Module) -> nn.Module:
    """Initialise a network in place with weights that magnify rounding less than usual; return it.

    Convolutions use He's rule, and the last normalisation of a residual block starts near zero, as is usual for deep
    networks (Goyal et al., Accurate, Large Minibatch SGD, 2017, section 5.1). The gradients of two float32 steps of an
    HRNet then differ by 1e-5, not by 1e-2, and in bf16 not by their whole size.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:  # not the head
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, BasicBlock | Bottleneck):
            last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
            nn.init.constant_(last.weight, RESIDUAL_SCALE)
    return network


class InDouble(nn.Module):
    """A network that computes in float64 whatever the precision of its input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, images: Tensor) -> Any:
        return self.network(images.double())


def exact_agreement(setup: Setup) -> dict[str, Any]:
    """Compare our step with the published one in float64; `problems` lists differences that are too large."""
    device, codec = setup.device, setup.codec
    batch = draw_batch(SAMPLES, JOINTS, setup.bench.input_size)
    student, teacher = (copy.deepcopy(network).double() for network in setup.networks)
    published = PublishedStep(student, teacher, device, teacher_gradients=True)
    theirs = published_outcome(published, float_batch(batch, codec).map(Tensor.double))
    student, teacher = (InDouble(copy.deepcopy(network)) for network in setup.networks)
    ours = OurStep(student, teacher, setup.accelerator, codec=codec, train=Train(global_batch=SAMPLES))
    found = compare_exactly(our_outcome(ours, batch), theirs)
    setup.accelerator.free_memory()
    return found


def timed_agreement(name: str, setup: Setup, batch: int) -> dict[str, Any]:
    """Compare `ours` or `ours_cached`, as it is timed, with the published step in float32."""
    inputs = create_inputs(setup, batch)
    ours, published = create_variant(name, setup, batch), create_variant("published", setup, batch)
    student, teacher = (copy.deepcopy(network) for network in setup.networks)
    if setup.precision == "fp32":  # another order of sums, without which there would be no difference to measure
        student, teacher = (network.to(memory_format=torch.channels_last) for network in (student, teacher))
    plain = EagerStep(student, teacher, setup.device, precision=setup.dtype)
    assert isinstance(ours, OurStep)
    assert isinstance(published, PublishedStep)
    return compare_as_timed(
        our_outcome(ours, inputs[name][0]),
        published_outcome(published, inputs["published"][0]),
        published_outcome(plain, inputs["published"][0]),
        "bf16" if name == "ours_cached" else setup.precision,  # the cache is bf16 in a float32 step too
    )


def published_outcome(step: PublishedStep, batch: FloatBatch) -> Outcome:
    """Return losses and gradients of a published or eager step, which is left as it was."""
    with _unchanged(step.student), _without_tf32(step.device):
        terms, _, _ = step.forward(batch)
        terms.total.backward()
        outcome = _outcome(step.student, total=terms.total, pose=terms.pose, kd=terms.kd)
    step.teacher.zero_grad()
    return outcome


def our_outcome(step: OurStep, batch: Batch) -> Outcome:
    """Return losses and gradients of our step, which is left as it was."""
    student, _ = step.networks
    with _unchanged(student), _without_tf32(step.accelerator.device):
        losses = step.forward(batch)
        step.backward(losses)
        return _outcome(student, total=losses.total, pose=losses.pose, kd=losses.kd)


def compare_exactly(ours: Outcome, theirs: Outcome) -> dict[str, Any]:
    """Return the differences of steps in float64; `problems` lists those that are too large."""
    found = differences(ours, theirs)
    worst, problems = found["worst"], _problems(found, EXACT, EXACT)
    if not worst["error"] <= EXACT:
        problems.append(f"the gradient of {worst['parameter']} by {worst['error']:.1e}")
    return found | {"problems": problems}


def compare_as_timed(ours: Outcome, theirs: Outcome, plain: Outcome, precision: str) -> dict[str, Any]:
    """Return the differences of a step as it is timed; `plain` is the outcome of an ordinary step of that precision."""
    found, noise = differences(ours, theirs), differences(plain, theirs)
    tolerance = TOLERANCE[precision]
    allowed = max(tolerance, SLACK * noise["gradient"])
    return found | {"allowed_gradient": allowed, "problems": _problems(found, tolerance, allowed)}


def differences(ours: Outcome, theirs: Outcome) -> dict[str, Any]:
    """Return relative differences of the terms, of the gradient, and of the parameter whose gradient differs most."""
    terms = {name: _relative(abs(ours.terms[name] - value), abs(value)) for name, value in theirs.terms.items()}
    off = {name: float((ours.gradients[name] - own).norm()) for name, own in theirs.gradients.items()}
    norms = {name: float(own.norm()) for name, own in theirs.gradients.items()}
    whole = math.hypot(*norms.values())
    average = whole / math.sqrt(sum(own.numel() for own in theirs.gradients.values()))  # root mean square of an element
    errors = {
        name: _relative(off[name], max(norms[name], FLOOR * average * math.sqrt(own.numel())))
        for name, own in theirs.gradients.items()
    }
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    gradient = _relative(math.hypot(*off.values()), whole)
    return {"losses": terms, "gradient": gradient, "worst": {"parameter": worst, "error": errors[worst]}}


def _problems(found: dict[str, Any], loss: float, gradient: float) -> list[str]:
    problems = [f"loss {name} by {error:.1e}" for name, error in found["losses"].items() if not error <= loss]
    if not found["gradient"] <= gradient:  # not-a-number is a problem too
        problems.append(f"the gradient by {found['gradient']:.1e}")
    return problems


def _relative(error: float, size: float) -> float:
    return error / size if size else (0.0 if error == 0 else math.inf)


def _outcome(student: nn.Module, **terms: Tensor) -> Outcome:
    gradients = {}
    network = student.network if isinstance(student, InDouble) else student
    for name, parameter in network.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        gradients[name] = gradient.detach().to("cpu", torch.float64)
    return Outcome({name: float(term.detach()) for name, term in terms.items()}, gradients)


@contextmanager
def _unchanged(student: nn.Module) -> Iterator[None]:
    """Restore running statistics afterwards and clear gradients."""
    before = [buffer.clone() for buffer in student.buffers()]
    try:
        yield
    finally:
        student.zero_grad()
        with torch.no_grad():
            for buffer, kept in zip(student.buffers(), before, strict=True):
                buffer.copy_(kept)


def _without_tf32(device: torch.device) -> AbstractContextManager[Any]:
    """Compute float32 without TF32, which rounds as coarsely as float16."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)


def compare_prepared(codec: HeatmapCodec, published: PublishedDataset, *, people: int = 32) -> dict[str, float]:
    """Return differences of normalised images (standard deviations) and of targets made from the same crops."""
    normalize, images, targets = batches.Normalization(), [], []
    for record in published.records[:people]:
        crop, joints, visible, _ = published.crop(record)
        target, weight = codec.encode(torch.from_numpy(joints[None, :, :2]), torch.from_numpy(visible[None, :, 0]))
        drawn, wanted = map(torch.from_numpy, published.generate_target(joints, visible))
        images.append(_largest(normalize(torch.from_numpy(crop[None]))[0], published.transform(crop)))
        targets += [_largest(target[0], drawn), _largest(weight[0], wanted[:, 0])]
    return {"image_max": max(images), "target_max": max(targets)}


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
