"""Ours, as variant c of ``fpd-accel bench step``: the one place that repeats how ``trainer.py`` makes a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fpd_accel.bench.reference_step import ALPHA
from fpd_accel.codecs import PoseCodec
from fpd_accel.config import Optim, Train
from fpd_accel.data.batch import Batch, DeviceCopy
from fpd_accel.decode import accuracy
from fpd_accel.distill import Distiller
from fpd_accel.losses import Losses
from fpd_accel.student import Student
from fpd_accel.teacher import Teacher

STAGES = ("copy", "prologue", "teacher", "student", "loss", "backward", "optimizer")
"""Of a step, in order; ``prologue`` is normalising the images and drawing the targets."""


class OurStep:
    """The step of a recipe with these options, on batches as the loader gives them."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        accelerator: Accelerator,
        *,
        codec: PoseCodec,
        train: Train,
        rate: float = 1e-3,
    ) -> None:
        self.accelerator, self.rate = accelerator, rate
        self.learner = Student(student, accelerator, train=train, optim=Optim(lr=rate))
        precision = torch.bfloat16 if train.precision == "bf16" else torch.float32
        if train.channels_last:
            teacher = teacher.to(memory_format=torch.channels_last)
        lecturer = Teacher(
            teacher, device=accelerator.device, precision=precision, compile=train.compile, fold_norm=True
        )
        self.distiller = Distiller(self.learner.model, lecturer, codec, ALPHA)
        if self.learner.compiled != "none":
            self.distiller.compile(student=self.learner.compiled == "whole")
        self.copy = DeviceCopy(accelerator.device)
        self.learner.train()

    @property
    def student(self) -> nn.Module:
        """The network without wrappers."""
        return self.learner.network

    @property
    def teacher(self) -> nn.Module:
        assert self.distiller.teacher is not None
        return self.distiller.teacher.model

    def forward(self, batch: Batch) -> Losses:
        return self.distiller(self.copy(batch))

    def backward(self, losses: Losses) -> None:
        self.accelerator.backward(losses.total)

    def run(self, batches: Sequence[Batch]) -> list[float]:
        """A step for each batch; the losses of the last one, which leave the device after it, as in training."""
        values = torch.zeros(4)
        for batch in batches:
            losses = self.forward(batch)
            self.backward(losses)
            values = self._logged(losses)
            self.learner.step(self.rate)
        return values.tolist()[:3]

    @staticmethod
    def _logged(losses: Losses) -> Tensor:
        return torch.stack([losses.total.detach(), losses.pose, losses.kd, accuracy(losses.predicted, losses.target)])

    def staged(self, batch: Batch, mark: Callable[[str], None]) -> list[float]:
        """The same step piece by piece: ``mark`` is called with the name of each of ``STAGES`` when it is over.

        A graph of student and losses together has no pieces: where that is compiled, those stages are run without it.
        """
        distiller, teacher = self.distiller, self.distiller.teacher
        assert teacher is not None
        batch = self.copy(batch)
        mark("copy")
        images = distiller.normalization(batch.crops)
        encoded = distiller.codec.encode(batch.keypoints, batch.visible)
        mark("prologue")
        lessons = teacher(batch.crops)
        mark("teacher")
        outputs = distiller.student(images)
        mark("student")
        judge = Distiller(self.learner.model, None, distiller.codec, ALPHA)
        judge.teacher, judge.codec = _Given(lessons), _Given(encoded)  # type: ignore[assignment]
        losses = judge.compare(outputs, batch)
        values = self._logged(losses)
        mark("loss")
        self.backward(losses)
        mark("backward")
        self.learner.step(self.rate)
        mark("optimizer")
        return values.tolist()[:3]


@dataclass(frozen=True)
class _Given:
    """Stands in for a teacher or a codec whose answer is known already."""

    answer: Any

    def __call__(self, *asked: object) -> Any:  # noqa: ARG002
        return self.answer

    encode = __call__
