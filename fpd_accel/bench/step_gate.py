"""Before anything is timed: does our step compute what the published one computes?

Two forwards and backwards on the same people from the same weights, in training mode, which leave the steps as they
were, are compared by

    each term of the loss       |ours - theirs| / |theirs|
    the gradient as a whole     ||ours - theirs|| / ||theirs||, over all parameters of the student together
    each parameter's gradient   the same for one, divided by at least ``FLOOR`` of what a parameter of its size has on
                                average: some gradients are zero but for rounding (a bias before a normalisation)

Float32 cannot show that two steps are the same to 1e-5: of an HRNet's gradient, the last digits of a hundred layers'
activations change 1e-5 to 1e-2, because units close to zero change sides in ReLU and normalisation magnifies them. So:

    exact      both steps in float64, eager: losses, gradient and every parameter's to 1e-5 (our losses and lessons are
               float32 still). It finds whatever is another formula
    as timed   ours as it is timed (bf16, compiled, ...) against the published float32: losses to 1e-5, in bf16 2e-2;
               the gradient as a whole to the same, or to ``SLACK`` times what a plain eager step of that precision
               differs by, in channels-last order for float32, where that is more. It finds whatever is other arithmetic
"""

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fpd_accel.bench.contestants import DTYPES, Contestant, Ground, create_contestant
from fpd_accel.bench.our_step import OurStep
from fpd_accel.bench.reference_step import FloatBatch, HostLoop, PlainStep, PublishedStep
from fpd_accel.bench.step_inputs import host_made, make_batch
from fpd_accel.config import Train
from fpd_accel.data.batch import Batch
from fpd_accel.errors import TrainingError

EXACT = 1e-5
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
SLACK = 4.0
FLOOR = 0.01
EXACT_PEOPLE = 2  # of the comparison in float64


@dataclass(frozen=True)
class Outcome:
    """What a step gave, on the CPU in float64."""

    terms: dict[str, float]
    gradients: dict[str, Tensor]


class InDouble(nn.Module):
    """A network that computes in float64, whatever it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Any:
        return self.network(images.double())


def check_exactly(ground: Ground) -> dict[str, Any]:
    """Ours against the published step in float64."""
    device, codec = ground.accelerator.device, ground.codec
    batch = make_batch(EXACT_PEOPLE, ground.bench.input_size, seed=ground.bench.seed)
    student, teacher = (copy.deepcopy(network).double() for network in ground.networks)
    published = PublishedStep(student, teacher, device, teacher_gradients=True)
    theirs = outcome_of(published, host_made(batch, codec).to(torch.float64))
    student, teacher = (InDouble(copy.deepcopy(network)) for network in ground.networks)
    mine = OurStep(student, teacher, ground.accelerator, codec=codec, train=Train(global_batch=EXACT_PEOPLE))
    gate = compare_exactly(our_outcome(mine, batch), theirs)
    ground.accelerator.free_memory()
    require_agreement(gate, "in float64")
    return gate


def check_as_timed(
    name: str, other: str, ground: Ground, contestants: dict[str, Contestant], ours: Batch, theirs: FloatBatch
) -> dict[str, Any]:
    """One of ours as it is timed against the published step a or a1, which is made where it is not measured."""
    mine, published = contestants[name], contestants.get(other) or create_contestant(other, ground, len(ours))
    student, teacher = (copy.deepcopy(network) for network in ground.networks)
    if ground.precision == "fp32":  # another order of sums: else there would be no difference to measure
        student, teacher = (network.to(memory_format=torch.channels_last) for network in (student, teacher))
    plain = PlainStep(student, teacher, ground.accelerator.device, precision=DTYPES[ground.precision])
    assert isinstance(mine, OurStep)
    assert isinstance(published, PublishedStep)
    gate = compare_as_timed(
        our_outcome(mine, ours),
        outcome_of(published, theirs),
        outcome_of(plain, theirs),
        "bf16" if name == "d" else ground.precision,  # the cache is bf16, whatever the step
    )
    require_agreement(gate, f"at batch {len(ours)} in {ground.precision}, variant {name},")
    return gate


def outcome_of(step: HostLoop, batch: FloatBatch) -> Outcome:
    """Losses and gradients of a step that ours is compared with, which is left as it was."""
    with _unchanged(step.student), _without_tf32(step.device):
        terms, _, _ = step.forward(batch)
        terms.total.backward()
        outcome = _outcome(step.student, total=terms.total, pose=terms.pose, kd=terms.kd)
    step.teacher.zero_grad()
    return outcome


def our_outcome(step: OurStep, batch: Batch) -> Outcome:
    """Losses and gradients of ours, which is left as it was."""
    with _unchanged(step.student), _without_tf32(step.accelerator.device):
        losses = step.forward(batch)
        step.backward(losses)
        return _outcome(step.student, total=losses.total, pose=losses.pose, kd=losses.kd)


def compare_exactly(ours: Outcome, theirs: Outcome) -> dict[str, Any]:
    """The differences of steps in float64, for JSON; ``problems`` lists in words those that are too large."""
    found = differences(ours, theirs)
    worst = found["worst"]
    found |= {"allowed_loss": EXACT, "allowed_gradient": EXACT, "problems": _problems(found, EXACT, EXACT)}
    if not worst["error"] <= EXACT:
        found["problems"].append(f"the gradient of {worst['parameter']} by {worst['error']:.1e}")
    return found


def compare_as_timed(ours: Outcome, theirs: Outcome, plain: Outcome, precision: str) -> dict[str, Any]:
    """The same for a step as it is timed; ``plain`` is what an ordinary step of that precision gave."""
    found, noise = differences(ours, theirs), differences(plain, theirs)
    tolerance = TOLERANCE[precision]
    allowed = max(tolerance, SLACK * noise["gradient"])
    return found | {
        "allowed_loss": tolerance,
        "allowed_gradient": allowed,
        "plain_gradient": noise["gradient"],
        "problems": _problems(found, tolerance, allowed),
    }


def differences(ours: Outcome, theirs: Outcome) -> dict[str, Any]:
    """Relative differences of the terms, of the gradient, and of the parameter whose gradient differs most."""
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


def require_agreement(gate: dict[str, Any], where: str) -> None:
    """Raises TrainingError if a step that is to be timed computes something else than the published one."""
    if gate["problems"]:
        raise TrainingError(
            f"bench step: {where} ours differs from the published step, relative to it: {'; '.join(gate['problems'])} "
            f"(allowed: {gate['allowed_loss']:.0e} of losses, {gate['allowed_gradient']:.0e} of the gradient). Nothing "
            "was timed: find out why before believing any rate"
        )


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
    """Running statistics are as before afterwards, and there is no gradient."""
    before = [buffer.clone() for buffer in student.buffers()]
    try:
        yield
    finally:
        student.zero_grad()
        with torch.no_grad():
            for buffer, kept in zip(student.buffers(), before, strict=True):
                buffer.copy_(kept)


def _without_tf32(device: torch.device) -> AbstractContextManager[Any]:
    """float32 without TF32, which rounds as coarsely as float16 does."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
