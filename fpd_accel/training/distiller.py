"""The objective of Fast Pose Distillation (Zhang, Zhu, Ye, CVPR 2019, section 3.2).

    loss = (1 - alpha) * sum_s mse(student_s, labels) + alpha * sum_s mse(student_s, teacher)

over the student's stages s; each is compared with the teacher's *last* stage, and both terms are weighted by the
labels' visibility, as in the published code. The `distill` section of a recipe has the choices beyond it: which
keypoints the teacher's term counts (so that people without labels can be learnt from, section 3.3), and the distance.
"""

import torch
from torch import Tensor, nn

from fpd_accel.codecs import HeatmapCodec, PoseCodec, SimCCCodec
from fpd_accel.config.schema import Distill
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.data.teacher_targets import unpack
from fpd_accel.decode import peak_scores
from fpd_accel.losses import Losses, heatmap_kl, heatmap_mse, heatmap_ohkm, marginals, simcc_kl
from fpd_accel.models.compile import compile_options
from fpd_accel.outputs import BINS_PER_PIXEL, STRIDE, Output, SimCC, each
from fpd_accel.training.teacher import Teacher

Terms = tuple[Tensor, Tensor, Tensor, Output, Output]
"""Before they are weighted: `pose`, `kd`, `kd_unlabelled`, `predicted` and `target` of `Losses`."""


class Distiller(nn.Module):
    """The objective with both forward passes. The student is its one submodule; the teacher is not registered.

    Args:
        student: From normalised images to a tuple of stage outputs; may be wrapped for data parallelism.
        teacher: A `Teacher`, a network to freeze as one, or None to learn from the labels alone.
        codec: Of the student.
        alpha: Weight of the teacher's term, 0 to 1; an attribute that a schedule may set between steps.
        mask: Keypoints that the teacher's term counts: `visible`, the labelled ones; `all`; or `confident`, those for
            which the teacher's peak is above `options.confidence`.
        normalization: Of the student's crops; by default ImageNet's, RGB.
        options: How outputs are compared; its `mode`, `mask` and alphas are not used.
        teacher_codec: Of the teacher, where it differs from the student's.

    Raises:
        ValueError: `alpha` or `mask` is not one of these.
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
        # A plain attribute: `Teacher` is no module, so that optimizers and checkpoints do not find its parameters.
        self.teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.codec, self.alpha, self.mask = codec, alpha, mask
        self.normalization = normalization or Normalization()
        self.options, self.teacher_codec = options or Distill(), teacher_codec or codec
        self._cuda_graphs = False

    def forward(self, batch: Batch) -> Losses:
        """Return the losses of a batch, after running teacher and student on it."""
        if self._cuda_graphs:  # results for the batch before may be overwritten from here on
            torch.compiler.cudagraph_mark_step_begin()
        teacher_outputs = self._teacher_outputs(batch)
        return self._weighted(self._terms(batch, teacher_outputs), teacher_outputs)

    def compare(self, stages: tuple[Output, ...], batch: Batch) -> Losses:
        """Return the losses for outputs that the student computed for this batch."""
        teacher_outputs = self._teacher_outputs(batch)
        return self._weighted(self._compared(stages, batch, teacher_outputs), teacher_outputs)

    def compile(self, *, student: bool = True, cuda_graphs: bool = False) -> None:
        """Compile normalisation, targets, losses and, unless told otherwise, student to one graph for one batch size.

        A student wrapped for data parallelism is split where it communicates. With `cuda_graphs` all kernels are
        replayed as one launch.
        """
        options, self._cuda_graphs = compile_options(cuda_graphs=cuda_graphs), cuda_graphs
        if student:
            self._terms = torch.compile(self._terms, **options)  # type: ignore[method-assign]
        else:
            self._compared = torch.compile(self._compared, **options)  # type: ignore[method-assign]

    def _terms(self, batch: Batch, teacher_outputs: tuple[Output, ...] | None) -> Terms:
        return self._compared(self.student(self.normalization(batch.crops)), batch, teacher_outputs)

    def _compared(self, stages: tuple[Output, ...], batch: Batch, teacher_outputs: tuple[Output, ...] | None) -> Terms:
        """Return both terms without alpha: a schedule changes alpha, and each value would need a graph of its own."""
        target, weight = self.codec.encode(batch.keypoints, batch.visible)
        pose = torch.stack([self._to_labels(stage, target, weight) for stage in stages]).sum()
        kd = kd_unlabelled = torch.zeros_like(pose)
        if teacher_outputs is not None:
            counted = self._counted(teacher_outputs[-1], weight)
            kd = self._to_teacher(stages, teacher_outputs, counted)
            if batch.labelled is not None:
                with torch.no_grad():
                    kd_unlabelled = self._to_teacher(stages, teacher_outputs, counted * (1 - batch.labelled)[:, None])
        return pose, kd, kd_unlabelled, each(stages[-1], Tensor.detach), target

    def _weighted(self, terms: Terms, teacher_outputs: tuple[Output, ...] | None) -> Losses:
        pose, kd, kd_unlabelled, predicted, target = terms
        if teacher_outputs is None:
            return Losses(pose, pose.detach(), kd, kd_unlabelled, predicted, target, None)
        total = (1 - self.alpha) * pose + self.alpha * kd
        return Losses(total, pose.detach(), kd.detach(), kd_unlabelled, predicted, target, teacher_outputs[-1])

    def _teacher_outputs(self, batch: Batch) -> tuple[Output, ...] | None:
        """Return the teacher's outputs for this batch: from its cache if the loader read it, else computed now."""
        if batch.teacher_targets is not None:
            return unpack(batch.teacher_targets, batch.scales)
        return self.teacher(batch.crops) if self.teacher is not None else None

    def _to_labels(self, stage: Output, target: Output, weight: Tensor) -> Tensor:
        if isinstance(stage, SimCC):
            assert isinstance(target, SimCC)
            return simcc_kl(stage, target, weight)
        assert isinstance(target, Tensor)
        if self.options.hard_keypoints is not None:
            return heatmap_ohkm(stage, target, weight, self.options.hard_keypoints)
        return heatmap_mse(stage, target, weight)

    def _to_teacher(self, stages: tuple[Output, ...], teacher_outputs: tuple[Output, ...], weight: Tensor) -> Tensor:
        """Compare each student stage with the teacher's last stage, or with its stage of the same number."""
        chosen = teacher_outputs if self.options.teacher_stage == "each" else teacher_outputs[-1:] * len(stages)
        pairs = zip(stages, chosen, strict=True)
        return torch.stack([self._distance(stage, teacher_output, weight) for stage, teacher_output in pairs]).sum()

    def _distance(self, stage: Output, teacher_output: Output, weight: Tensor) -> Tensor:
        temperature = self.options.temperature
        if isinstance(stage, SimCC):
            return simcc_kl(stage, self._as_simcc(stage, teacher_output), weight, temperature=temperature or 1.0)
        assert isinstance(teacher_output, Tensor)
        if self.options.distance == "kl":
            return heatmap_kl(stage, teacher_output, weight, temperature=temperature or 0.1)
        return heatmap_mse(stage, teacher_output, weight)

    def _as_simcc(self, stage: SimCC, teacher_output: Output) -> SimCC:
        """Return a SimCC teacher's distributions, or a heatmap teacher's marginals as narrow as the student's labels.

        Both are divided by the student's temperature.
        """
        temperature = self.options.temperature or 1.0
        if isinstance(teacher_output, SimCC):
            return teacher_output.map(lambda logits: logits / temperature).softmax()
        assert isinstance(self.codec, SimCCCodec)
        assert isinstance(self.teacher_codec, HeatmapCodec)
        bins = stage.x.shape[-1], stage.y.shape[-1]
        spread = self.teacher_codec.sigma * STRIDE * BINS_PER_PIXEL  # of the teacher's Gaussian, bins
        along_x, along_y = ((spread / sigma) ** 2 / temperature for sigma in self.codec.sigmas)
        return marginals(teacher_output, bins, sharpness=(along_x, along_y))

    def _counted(self, teacher_output: Output, weight: Tensor) -> Tensor:
        """Return the weights (B, K) of the teacher's term."""
        if self.mask == "visible":
            return weight
        if self.mask == "all":
            return torch.ones_like(weight)
        return (peak_scores(teacher_output, self.teacher_codec) > self.options.confidence).to(weight.dtype)
