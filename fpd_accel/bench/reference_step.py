"""The steps that ours is compared with: the published one, and what a careful rewrite of it would be.

The published step is that of ilovepose/fast-human-pose-estimation.pytorch at c4722f8, lib/core/function.py (lines
98-160), loss.py (21-39) and evaluate.py (16-71), written anew from a description of what they do:

    a   float32, NCHW; images normalised and targets drawn by the loader's processes, so that floats are copied to the
        device; the teacher in evaluation mode, but with gradients: its graph is kept, the loss differentiates its
        target, and the teacher's gradients pile up, for nobody sets them to zero; a loss that goes joint by joint;
        Adam; three ``.item()`` and an accuracy in NumPy, person by person, in every iteration
    a1  the same with a teacher that has no gradients (a')
    b   the same inputs, mixed precision by autocast, a teacher without gradients, the loss over all joints at once;
        NCHW and ``.item()`` in every iteration as most training loops have them, and an accuracy on the device
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fpd_accel.bench.reference_heatmaps import find_maxima
from fpd_accel.decode import heatmap_accuracy

ALPHA = 0.5  # weight of the teacher's term
Maps = Float[Tensor, "batch joint height width"]


@dataclass(frozen=True)
class FloatBatch:
    """What the published loader hands over: everything made on the host."""

    images: Float[Tensor, "batch 3 height width"]  # normalised
    target: Float[Tensor, "batch joint heatmap_height heatmap_width"]
    weight: Float[Tensor, "batch joint 1"]

    def pin_memory(self) -> "FloatBatch":
        return FloatBatch(self.images.pin_memory(), self.target.pin_memory(), self.weight.pin_memory())

    def to(self, precision: torch.dtype) -> "FloatBatch":
        return FloatBatch(self.images.to(precision), self.target.to(precision), self.weight.to(precision))


class Terms(NamedTuple):
    """Loss of a step, and its parts against the labels and against the teacher, still on the device."""

    total: Float[Tensor, ""]
    pose: Float[Tensor, ""]
    kd: Float[Tensor, ""]


def per_joint_mse(predicted: Maps, target: Maps, weight: Float[Tensor, "batch joint 1"]) -> Float[Tensor, ""]:
    """The published loss: joint by joint, the weight times prediction and times target, half a mean square of each."""
    people, joints = predicted.shape[:2]
    outputs = predicted.reshape(people, joints, -1).split(1, dim=1)
    truths = target.reshape(people, joints, -1).split(1, dim=1)
    loss = torch.zeros((), device=predicted.device)
    for joint, (output, truth) in enumerate(zip(outputs, truths, strict=True)):
        own = weight[:, joint]
        loss = loss + 0.5 * F.mse_loss(output.squeeze(1) * own, truth.squeeze(1) * own)
    return loss / joints


def host_accuracy(
    predicted: Float[np.ndarray, "batch joint h w"], target: Float[np.ndarray, "batch joint h w"]
) -> float:
    """The accuracy that the published loop computes on the host in every iteration; see ``decode.heatmap_accuracy``."""
    people, joints, height, width = predicted.shape
    (found, _), (wanted, _) = find_maxima(predicted), find_maxima(target)
    norm = np.array([height, width]) / 10  # of (x, y): as published
    distances = np.full((joints, people), -1.0)
    for person in range(people):
        for joint in range(joints):
            if wanted[person, joint, 0] > 1 and wanted[person, joint, 1] > 1:
                distances[joint, person] = np.linalg.norm(found[person, joint] / norm - wanted[person, joint] / norm)
    shares = [float((own[own >= 0] < 0.5).mean()) for own in distances if (own >= 0).any()]
    return sum(shares) / len(shares) if shares else 0.0


class HostLoop(ABC):
    """Training as most loops have it: each step waits for its losses and for its accuracy."""

    def __init__(self, student: nn.Module, teacher: nn.Module, device: torch.device, *, rate: float) -> None:
        self.student, self.teacher, self.device = student.to(device).train(), teacher.to(device).eval(), device
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=rate)
        self.accuracy = 0.0  # of the last iteration

    @abstractmethod
    def forward(self, batch: FloatBatch) -> tuple[Terms, Maps, Maps]:
        """The terms, the student's last heatmaps and the target, on the device."""

    @abstractmethod
    def measure(self, predicted: Maps, target: Maps) -> float:
        """The accuracy of one batch."""

    def run(self, batches: Sequence[FloatBatch]) -> list[float]:
        """A step for each batch; the losses of the last one."""
        values: list[float] = []
        for batch in batches:
            terms, predicted, target = self.forward(batch)
            self.optimizer.zero_grad()
            terms.total.backward()
            self.optimizer.step()
            values = [term.item() for term in terms]
            self.accuracy = self.measure(predicted.detach(), target)
        return values


class PublishedStep(HostLoop):
    """Variants a and a1. ``teacher_gradients``: as published, the teacher is differentiated too."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        device: torch.device,
        *,
        teacher_gradients: bool,
        rate: float = 1e-3,
    ) -> None:
        super().__init__(student, teacher, device, rate=rate)
        self.teacher_gradients = teacher_gradients
        self.teacher.requires_grad_(teacher_gradients)

    def forward(self, batch: FloatBatch) -> tuple[Terms, Maps, Maps]:
        images = batch.images.to(self.device, non_blocking=True)
        outputs = self.student(images)
        with nullcontext() if self.teacher_gradients else torch.no_grad():
            lesson = self.teacher(images)[-1]
        target = batch.target.to(self.device, non_blocking=True)
        weight = batch.weight.to(self.device, non_blocking=True)
        pose = kd = torch.zeros((), device=self.device)
        for output in outputs:
            pose = pose + per_joint_mse(output, target, weight)
            kd = kd + per_joint_mse(output, lesson, weight)
        return Terms((1 - ALPHA) * pose + ALPHA * kd, pose, kd), outputs[-1], target

    def measure(self, predicted: Maps, target: Maps) -> float:
        return host_accuracy(predicted.cpu().numpy(), target.cpu().numpy())


class PlainStep(HostLoop):
    """Variant b: eager, autocast to ``precision``, and a loss that is vectorised."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        device: torch.device,
        *,
        precision: torch.dtype,
        rate: float = 1e-3,
    ) -> None:
        super().__init__(student, teacher, device, rate=rate)
        self.teacher.requires_grad_(False)
        self.precision = precision

    def forward(self, batch: FloatBatch) -> tuple[Terms, Maps, Maps]:
        images, target, weight = (
            tensor.to(self.device, non_blocking=True) for tensor in (batch.images, batch.target, batch.weight)
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            outputs = self.student(images)
            with torch.no_grad():
                lesson = self.teacher(images)[-1].float()
        pose = torch.stack([self._mse(output, target, weight) for output in outputs]).sum()
        kd = torch.stack([self._mse(output, lesson, weight) for output in outputs]).sum()
        return Terms((1 - ALPHA) * pose + ALPHA * kd, pose, kd), outputs[-1], target

    @staticmethod
    def _mse(predicted: Maps, target: Maps, weight: Float[Tensor, "batch joint 1"]) -> Float[Tensor, ""]:
        return 0.5 * F.mse_loss(predicted.float() * weight[..., None], target * weight[..., None])

    def measure(self, predicted: Maps, target: Maps) -> float:
        return float(heatmap_accuracy(predicted.float(), target))
