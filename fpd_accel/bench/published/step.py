"""The published training step, and an eager rewrite of it as most training loops would have it.

Source: ilovepose/fast-human-pose-estimation.pytorch at c4722f8, lib/core/function.py (lines 98-160), loss.py (21-39)
and evaluate.py (16-71), rewritten from a description of their behaviour. `bench.VARIANTS` lists the variants. All get
float tensors in NCHW, since the published loader's workers normalise images and draw targets, and train with Adam. The
published teacher is in evaluation mode but records gradients: its graph is kept, the loss is differentiated with
respect to the teacher's output, and the teacher's gradients accumulate because they are never zeroed.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fpd_accel.bench.published.heatmaps import find_maxima
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.decode import heatmap_accuracy

ALPHA = 0.5  # weight of the teacher's term
RATE = 1e-3  # learning rate
Maps = Float[Tensor, "batch joint height width"]
Weights = Float[Tensor, "batch joint 1"]


class FloatBatch(NamedTuple):
    """A batch as the published loader returns it: normalised float images and drawn targets."""

    images: Float[Tensor, "batch 3 height width"]
    target: Float[Tensor, "batch joint heatmap_height heatmap_width"]
    weight: Weights

    def map(self, function: Callable[[Tensor], Tensor]) -> "FloatBatch":
        """Return the batch with `function` applied to each tensor."""
        return FloatBatch(*map(function, self))


def float_batch(batch: Batch, codec: HeatmapCodec) -> FloatBatch:
    """Return one of our batches as the published loader would have returned it."""
    target, weight = codec.encode(batch.keypoints, batch.visible)
    return FloatBatch(Normalization()(batch.crops).contiguous(), target, weight[..., None])


class Terms(NamedTuple):
    """The loss of a step and its parts against labels and teacher, on the device."""

    total: Float[Tensor, ""]
    pose: Float[Tensor, ""]
    kd: Float[Tensor, ""]


def per_joint_mse(predicted: Maps, target: Maps, weight: Weights) -> Float[Tensor, ""]:
    """Return the published loss: half the mean square error of each joint's weighted heatmaps, averaged over joints."""
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
    """Return the accuracy that the published loop computes on the host; see `decode.heatmap_accuracy`."""
    people, joints, height, width = predicted.shape
    (found, _), (wanted, _) = find_maxima(predicted), find_maxima(target)
    norm = np.array([height, width]) / 10  # divides (x, y) in this order, as published
    distances = np.full((joints, people), -1.0)
    for person in range(people):
        for joint in range(joints):
            if wanted[person, joint, 0] > 1 and wanted[person, joint, 1] > 1:
                distances[joint, person] = np.linalg.norm(found[person, joint] / norm - wanted[person, joint] / norm)
    shares = [float((own[own >= 0] < 0.5).mean()) for own in distances if (own >= 0).any()]
    return sum(shares) / len(shares) if shares else 0.0


class PublishedStep:
    """The variants `published` and, without `teacher_gradients`, `published_no_grad`."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, device: torch.device, *, teacher_gradients: bool
    ) -> None:
        self.student, self.teacher, self.device = student.to(device).train(), teacher.to(device).eval(), device
        self.networks = self.student, self.teacher
        self.teacher_gradients = teacher_gradients
        self.teacher.requires_grad_(teacher_gradients)
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=RATE)

    def run(self, batches: Sequence[FloatBatch]) -> list[float]:
        """Take one step per batch; return total, pose and distillation loss of the last one."""
        values: list[float] = []
        for batch in batches:
            terms, predicted, target = self.forward(batch)
            self.optimizer.zero_grad()
            terms.total.backward()
            self.optimizer.step()
            values = [term.item() for term in terms]
            self.measure(predicted.detach(), target)
        return values

    def losses(self, batch: FloatBatch) -> list[float]:
        """Return total, pose and distillation loss after forward and backward, without a step."""
        terms, _, _ = self.forward(batch)
        terms.total.backward()
        for network in self.networks:
            network.zero_grad()
        return [term.item() for term in terms]

    def forward(self, batch: FloatBatch) -> tuple[Terms, Maps, Maps]:
        """Return the loss terms, joint by joint, the student's last heatmaps and the target, on the device."""
        images = self._copy(batch.images)
        outputs, taught = self.student(images), self._teach(images)
        target, weight = self._copy(batch.target), self._copy(batch.weight)
        pose = kd = torch.zeros((), device=self.device)
        for output in outputs:
            pose = pose + per_joint_mse(output, target, weight)
            kd = kd + per_joint_mse(output, taught, weight)
        return Terms((1 - ALPHA) * pose + ALPHA * kd, pose, kd), outputs[-1], target

    def measure(self, predicted: Maps, target: Maps) -> float:
        """Return the accuracy of a batch, computed on the host."""
        return host_accuracy(predicted.cpu().numpy(), target.cpu().numpy())

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _teach(self, images: Tensor) -> Maps:
        """Return the last output of the teacher."""
        with nullcontext() if self.teacher_gradients else torch.no_grad():
            return self.teacher(images)[-1]


class EagerStep(PublishedStep):
    """The variant `eager`: autocast to bf16 unless `precision` is float32, and the loss of all joints at once."""

    def __init__(self, student: nn.Module, teacher: nn.Module, device: torch.device, *, precision: torch.dtype) -> None:
        super().__init__(student, teacher, device, teacher_gradients=False)
        self.precision = precision

    def forward(self, batch: FloatBatch) -> tuple[Terms, Maps, Maps]:
        """Return the loss terms, the student's last heatmaps and the target, on the device."""
        images, target, weight = batch.map(self._copy)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            outputs, taught = self.student(images), self._teach(images).float()
        pose = torch.stack([self._mse(output, target, weight) for output in outputs]).sum()
        kd = torch.stack([self._mse(output, taught, weight) for output in outputs]).sum()
        return Terms((1 - ALPHA) * pose + ALPHA * kd, pose, kd), outputs[-1], target

    @staticmethod
    def _mse(predicted: Maps, target: Maps, weight: Weights) -> Float[Tensor, ""]:
        return 0.5 * F.mse_loss(predicted.float() * weight[..., None], target * weight[..., None])

    def measure(self, predicted: Maps, target: Maps) -> float:
        """Return the accuracy of a batch, computed on the device and waited for."""
        return float(heatmap_accuracy(predicted.float(), target))
