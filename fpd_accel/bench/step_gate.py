"""Before anything is timed: does our step compute what the published one computes?

Both make one forward and backward on the same batch from the same weights, in training mode, and are put back. Compared
with the published step, which is float32 whatever ours is, are

    each term of the loss       |ours - theirs| / |theirs|
    the gradient as a whole     ||ours - theirs|| / ||theirs||, over all parameters of the student together
    in float32 each parameter   the same, but over at least ``FLOOR`` of what a parameter of its size has on average:
                                some gradients are zero but for rounding (a bias before a normalisation)

Rounding grows through some hundred layers and their normalisations, so each parameter alone is given
``PARAMETER_SLACK`` times the tolerance. In bfloat16 a single small parameter says nothing, for every mixed-precision
step errs there (see ``worst``); the whole must still agree.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpd_accel.bench.our_step import OurStep
from fpd_accel.bench.reference_step import FloatBatch, PublishedStep
from fpd_accel.data.batch import Batch
from fpd_accel.errors import TrainingError

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
PARAMETER_SLACK = 10.0
FLOOR = 0.01


@dataclass(frozen=True)
class Outcome:
    """What a step gave, on the CPU in float64."""

    terms: dict[str, float]
    gradients: dict[str, Tensor]


def published_outcome(step: PublishedStep, batch: FloatBatch) -> Outcome:
    """Losses and gradients of a published step, which is left as it was."""
    with _unchanged(step.student), _exact(step.device):
        terms, _, _ = step.forward(batch)
        terms.total.backward()
        outcome = _outcome(step.student, total=terms.total, pose=terms.pose, kd=terms.kd)
    step.teacher.zero_grad()
    return outcome


def our_outcome(step: OurStep, batch: Batch) -> Outcome:
    """Losses and gradients of ours, which is left as it was."""
    with _unchanged(step.student), _exact(step.accelerator.device):
        losses = step.forward(batch)
        step.backward(losses)
        return _outcome(step.student, total=losses.total, pose=losses.pose, kd=losses.kd)


def compare(ours: Outcome, theirs: Outcome, precision: str) -> dict[str, Any]:
    """The differences, for JSON; ``problems`` lists in words those that are too large."""
    tolerance = TOLERANCE[precision]
    terms = {name: _relative(abs(ours.terms[name] - value), abs(value)) for name, value in theirs.terms.items()}
    off = {name: float((ours.gradients[name] - own).norm()) for name, own in theirs.gradients.items()}
    norms = {name: float(own.norm()) for name, own in theirs.gradients.items()}
    whole = math.hypot(*norms.values())
    count = sum(own.numel() for own in theirs.gradients.values())
    floors = {name: FLOOR * whole * math.sqrt(own.numel() / count) for name, own in theirs.gradients.items()}
    errors = {name: _relative(error, max(norms[name], floors[name])) for name, error in off.items()}
    gradient = _relative(math.hypot(*off.values()), whole)
    worst = max(errors, key=lambda name: errors[name])
    problems = [f"loss {name} by {error:.1e}" for name, error in terms.items() if not error <= tolerance]
    if not gradient <= tolerance:
        problems.append(f"the gradient by {gradient:.1e}")
    if precision == "fp32" and not errors[worst] <= PARAMETER_SLACK * tolerance:
        problems.append(f"the gradient of {worst} by {errors[worst]:.1e}")
    return {
        "tolerance": tolerance,
        "losses": terms,
        "gradient": gradient,
        "worst": {"parameter": worst, "error": errors[worst]},
        "problems": problems,
    }


def require_agreement(gate: dict[str, Any], batch: int) -> None:
    """Raises TrainingError if a step that is to be timed computes something else than the published one."""
    if gate["problems"]:
        raise TrainingError(
            f"bench step: at batch {batch} ours differs from the published step by more than {gate['tolerance']:.0e} "
            f"(relative): {'; '.join(gate['problems'])}. Nothing was timed: find out why before believing any rate"
        )


def _relative(error: float, size: float) -> float:
    return error / size if size else (0.0 if error == 0 else math.inf)


def _outcome(student: nn.Module, **terms: Tensor) -> Outcome:
    gradients = {}
    for name, parameter in student.named_parameters():
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


def _exact(device: torch.device) -> Any:
    """float32 without TF32, which rounds as coarsely as float16 does."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
