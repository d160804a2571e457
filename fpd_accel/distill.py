"""The objective of Fast Pose Distillation (Zhang, Zhu, Ye, CVPR 2019, section 3.2).

    loss = (1 - alpha) * sum_s mse(student_s, labels) + alpha * sum_s mse(student_s, teacher)

over the student's stages s; each is compared with the teacher's *last* stage, and both terms are weighted by the
labels' visibility, as the published code does it.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fpd_accel.codecs import HeatmapCodec
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.losses import Losses, heatmap_mse
from fpd_accel.teacher import Teacher

Heatmaps = Float[Tensor, "batch joint h w"]


class Distiller(nn.Module):
    """Owns both forwards. The student is its one submodule; the teacher is not registered.

    Args:
        student: from normalised images to a tuple of heatmaps; may be wrapped for data parallelism.
        teacher: a :class:`Teacher`, a network to be frozen as one, or None to learn from the labels alone.
        alpha: weight of the teacher's term, 0 to 1; an attribute that a schedule may set between steps.
        mask: which keypoints the teacher's term counts: ``visible``, the labelled ones.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None,
        codec: HeatmapCodec,
        alpha: float = 0.5,
        mask: Literal["visible"] = "visible",
        *,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}, but it is a share between 0 and 1")
        if mask != "visible":
            raise ValueError(f"mask is {mask!r}; choices: visible")
        self.student = student
        # A plain attribute: Teacher is no module, so nothing that walks the modules comes to it.
        self.teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.codec, self.alpha, self.mask = codec, alpha, mask
        self.normalization = normalization or Normalization()

    def forward(self, batch: Batch) -> Losses:
        return self.compare(self.student(self.normalization(batch.crops)), batch)

    def compare(self, stages: tuple[Heatmaps, ...], batch: Batch) -> Losses:
        """The objective for stage outputs that the student gave for this batch."""
        target, weight = self.codec.encode(batch.keypoints, batch.visible)
        pose = torch.stack([heatmap_mse(stage, target, weight) for stage in stages]).sum()
        if self.teacher is None:
            return Losses(pose, pose.detach(), torch.zeros_like(pose), stages[-1].detach(), target, None)
        taught = self.teacher(batch.crops)
        kd = torch.stack([heatmap_mse(stage, taught, weight) for stage in stages]).sum()
        total = (1 - self.alpha) * pose + self.alpha * kd
        return Losses(total, pose.detach(), kd.detach(), stages[-1].detach(), target, taught)
