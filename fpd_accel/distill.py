"""The objective of Fast Pose Distillation (Zhang, Zhu, Ye, CVPR 2019, section 3.2).

    loss = (1 - alpha) * sum_s mse(student_s, labels) + alpha * sum_s mse(student_s, teacher)

over the student's stages s; each is compared with the teacher's *last* stage, and both terms are weighted by the
labels' visibility, as the published code does it. What it left open is in ``distill.*`` of a recipe: which keypoints
the teacher's term counts (so that people without labels can be learnt from, section 3.3), and how outputs are compared.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fpd_accel.codecs import HeatmapCodec, PoseCodec, SimCCCodec
from fpd_accel.compilation import compile_options
from fpd_accel.config import Distill
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.data.lessons import unpack
from fpd_accel.decode import peak_scores
from fpd_accel.losses import Losses, heatmap_kl, heatmap_mse, heatmap_ohkm, marginals, simcc_kl
from fpd_accel.outputs import BINS_PER_PIXEL, STRIDE, Output, SimCC, each
from fpd_accel.teacher import Teacher


class Terms(NamedTuple):
    """The objective before its terms are weighed against each other."""

    pose: Tensor
    kd: Tensor
    kd_unlabelled: Tensor
    predicted: Output
    target: Output


class Distiller(nn.Module):
    """Owns both forwards. The student is its one submodule; the teacher is not registered.

    Args:
        student: from normalised images to a tuple of stage outputs; may be wrapped for data parallelism.
        teacher: a :class:`Teacher`, a network to be frozen as one, or None to learn from the labels alone.
        codec: of the student.
        alpha: weight of the teacher's term, 0 to 1; an attribute that a schedule may set between steps.
        mask: which keypoints the teacher's term counts: ``visible``, the labelled ones; ``all``; or ``confident``,
            those for which the teacher's peak is above ``options.confidence``.
        options: how outputs are compared; its ``mode``, ``mask`` and values of alpha are not looked at.
        teacher_codec: of the teacher, where it is not the student's.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None,
        codec: PoseCodec,
        alpha: float = 0.5,
        mask: str = "visible",
        *,
        normalization: Normalization | None = None,
        options: Distill | None = None,
        teacher_codec: PoseCodec | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}, but it is a share between 0 and 1")
        if mask not in ("visible", "all", "confident"):
            raise ValueError(f"mask is {mask!r}; choices: visible, all, confident")
        self.student = student
        # A plain attribute: Teacher is no module, so nothing that walks the modules comes to it.
        self.teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.codec, self.alpha, self.mask = codec, alpha, mask
        self.normalization = normalization or Normalization()
        self.options, self.teacher_codec = options or Distill(), teacher_codec or codec
        self._cuda_graphs = False

    def forward(self, batch: Batch) -> Losses:
        if self._cuda_graphs:  # what the graphs gave for the batch before may be written over
            torch.compiler.cudagraph_mark_step_begin()
        lessons = self._lessons(batch)
        return self._weighed(self._terms(batch, lessons), lessons)

    def compare(self, stages: tuple[Output, ...], batch: Batch) -> Losses:
        """The objective for stage outputs that the student gave for this batch."""
        lessons = self._lessons(batch)
        return self._weighed(self._compared(stages, batch, lessons), lessons)

    def compile(self, *, student: bool = True, cuda_graphs: bool = False) -> None:
        """Make one graph of normalisation, student, targets and losses; without ``student``, of all but the student.

        A student wrapped for data parallelism is cut into the graphs that its communication asks for. ``forward`` alone
        runs the graph; batches have one size. ``cuda_graphs`` replays all its kernels as one launch.
        """
        options, self._cuda_graphs = compile_options(cuda_graphs=cuda_graphs), cuda_graphs
        if student:
            self._terms = torch.compile(self._terms, **options)  # type: ignore[method-assign]
        else:
            self._compared = torch.compile(self._compared, **options)  # type: ignore[method-assign]

    def _terms(self, batch: Batch, lessons: tuple[Output, ...] | None) -> Terms:
        return self._compared(self.student(self.normalization(batch.crops)), batch, lessons)

    def _compared(self, stages: tuple[Output, ...], batch: Batch, lessons: tuple[Output, ...] | None) -> Terms:
        """Both terms without their weights, which a schedule may change: a graph would have to be compiled for each."""
        target, weight = self.codec.encode(batch.keypoints, batch.visible)
        pose = torch.stack([self._to_labels(stage, target, weight) for stage in stages]).sum()
        kd = kd_unlabelled = torch.zeros_like(pose)
        if lessons is not None:
            counted = self._counted(lessons[-1], weight)
            kd = self._to_teacher(stages, lessons, counted)
            if batch.labelled is not None:
                with torch.no_grad():
                    kd_unlabelled = self._to_teacher(stages, lessons, counted * (1 - batch.labelled)[:, None])
        return Terms(pose, kd, kd_unlabelled, each(stages[-1], Tensor.detach), target)

    def _weighed(self, terms: Terms, lessons: tuple[Output, ...] | None) -> Losses:
        pose, kd, kd_unlabelled, predicted, target = terms
        if lessons is None:
            return Losses(pose, pose.detach(), kd, kd_unlabelled, predicted, target, None)
        total = (1 - self.alpha) * pose + self.alpha * kd
        return Losses(total, pose.detach(), kd.detach(), kd_unlabelled, predicted, target, lessons[-1])

    def _lessons(self, batch: Batch) -> tuple[Output, ...] | None:
        """What the teacher says of these crops: as its cache has it, where the loader read that, or asked now."""
        if batch.lessons is not None:
            return unpack(batch.lessons, batch.scales)
        return self.teacher(batch.crops) if self.teacher is not None else None

    def _to_labels(self, stage: Output, target: Output, weight: Tensor) -> Tensor:
        if isinstance(stage, SimCC):
            assert isinstance(target, SimCC)
            return simcc_kl(stage, target, weight)
        assert isinstance(target, Tensor)
        if self.options.hard_keypoints is not None:
            return heatmap_ohkm(stage, target, weight, self.options.hard_keypoints)
        return heatmap_mse(stage, target, weight)

    def _to_teacher(self, stages: tuple[Output, ...], lessons: tuple[Output, ...], weight: Tensor) -> Tensor:
        """Each student stage against the teacher's last, or against the teacher's of the same number."""
        chosen = lessons if self.options.teacher_stage == "each" else lessons[-1:] * len(stages)
        pairs = zip(stages, chosen, strict=True)
        return torch.stack([self._distance(stage, lesson, weight) for stage, lesson in pairs]).sum()

    def _distance(self, stage: Output, lesson: Output, weight: Tensor) -> Tensor:
        temperature = self.options.temperature
        if isinstance(stage, SimCC):
            return simcc_kl(stage, self._as_simcc(stage, lesson), weight, temperature=temperature or 1.0)
        assert isinstance(lesson, Tensor)
        if self.options.distance == "kl":
            return heatmap_kl(stage, lesson, weight, temperature=temperature or 0.1)
        return heatmap_mse(stage, lesson, weight)

    def _as_simcc(self, stage: SimCC, lesson: Output) -> SimCC:
        """A SimCC teacher's distributions, or a heatmap teacher's marginals made as narrow as the student's labels.

        Either is tempered as the student is.
        """
        temperature = self.options.temperature or 1.0
        if isinstance(lesson, SimCC):
            return lesson.map(lambda logits: logits / temperature).softmax()
        assert isinstance(self.codec, SimCCCodec)
        assert isinstance(self.teacher_codec, HeatmapCodec)
        bins = stage.x.shape[-1], stage.y.shape[-1]
        spread = self.teacher_codec.sigma * STRIDE * BINS_PER_PIXEL  # of the teacher's Gaussian, bins
        along_x, along_y = ((spread / sigma) ** 2 / temperature for sigma in self.codec.sigmas)
        return marginals(lesson, bins, sharpness=(along_x, along_y))

    def _counted(self, lesson: Output, weight: Tensor) -> Tensor:
        """Weights (B, K) of the teacher's term."""
        if self.mask == "visible":
            return weight
        if self.mask == "all":
            return torch.ones_like(weight)
        return (peak_scores(lesson, self.teacher_codec) > self.options.confidence).to(weight.dtype)
