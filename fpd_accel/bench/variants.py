"""The variants that `fpd-accel bench step` times, and the device, networks and batches that they share."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fpd_accel.bench.published.step import ALPHA, RATE, EagerStep, PublishedStep, float_batch
from fpd_accel.codecs import HeatmapCodec, PoseCodec, create_codec
from fpd_accel.config.schema import Compile, Optim, Train
from fpd_accel.console import say
from fpd_accel.data.batch import Batch, DeviceCopy
from fpd_accel.data.teacher_targets import pack
from fpd_accel.decode import accuracy
from fpd_accel.distributed.accelerator import create_accelerator, multiplies_bf16
from fpd_accel.errors import ModelError, TrainingError
from fpd_accel.losses import Losses
from fpd_accel.models.create import create_model
from fpd_accel.models.names import SIMCC_SUFFIX
from fpd_accel.skeleton import COCO
from fpd_accel.training.distiller import Distiller
from fpd_accel.training.student import Student
from fpd_accel.training.teacher import Teacher

OURS = ("ours", "ours_cached")
BATCHES = {"cpu": (4, 8), "cuda": (24, 32, 64, 128, 256, 512)}  # samples of a step
INPUTS = 2  # distinct batches, in turn
JOINTS = COCO.num_keypoints
# Of a step, in order; `prologue` normalises the images and draws the targets.
STAGES = ("copy", "prologue", "teacher", "student", "loss", "backward", "optimizer")
Precision = Literal["fp32", "bf16"]


class OurStep:
    """The variants `ours` and `ours_cached`: the one place that repeats a step of `training/trainer.py`."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, accelerator: Accelerator, *, codec: PoseCodec, train: Train
    ) -> None:
        self.accelerator, device = accelerator, accelerator.device
        self.copy = DeviceCopy(device)
        self.student = Student(student, accelerator, train=train, optim=Optim(lr=RATE))
        precision = torch.bfloat16 if train.precision == "bf16" else torch.float32
        if train.channels_last:
            teacher = teacher.to(memory_format=torch.channels_last)
        self.teacher = Teacher(teacher, device=device, precision=precision, compile=train.compile, fold_norm=True)
        self.networks = self.student.network, self.teacher.model  # without wrappers
        self.distiller = Distiller(self.student.model, self.teacher, codec, ALPHA)
        if self.student.compiled != "none":
            self.distiller.compile(student=self.student.compiled == "whole")
        self.student.train()

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses of a batch."""
        return self.distiller(self.copy(batch))

    def backward(self, losses: Losses) -> None:
        """Compute the student's gradients."""
        self.accelerator.backward(losses.total)

    def losses(self, batch: Batch) -> list[float]:
        """Return total, pose and distillation loss after forward and backward, without a step."""
        losses = self.forward(batch)
        self.backward(losses)
        self.student.network.zero_grad()
        return self._logged(losses).tolist()[:3]

    def run(self, batches: Sequence[Batch]) -> list[float]:
        """Take one step per batch; return total, pose and distillation loss of the last, read from the device once."""
        values = torch.zeros(4)
        for batch in batches:
            losses = self.forward(batch)
            self.backward(losses)
            values = self._logged(losses)
            self.student.step(RATE)
        return values.tolist()[:3]

    @staticmethod
    def _logged(losses: Losses) -> Tensor:
        return torch.stack([losses.total.detach(), losses.pose, losses.kd, accuracy(losses.predicted, losses.target)])

    def staged(self, batch: Batch, mark: Callable[[str], None]) -> list[float]:
        """Take the same step piece by piece, calling `mark` with the name of each of `STAGES` when it ends.

        A graph of student and losses together cannot be split: where it is compiled, these stages run without it.
        """
        distiller, batch = self.distiller, self.copy(batch)
        mark("copy")
        images = distiller.normalization(batch.crops)
        encoded = distiller.codec.encode(batch.keypoints, batch.visible)
        mark("prologue")
        teacher_outputs = self.teacher(batch.crops)
        mark("teacher")
        outputs = distiller.student(images)
        mark("student")
        objective = Distiller(self.student.model, None, distiller.codec, ALPHA)
        objective.codec = cast(PoseCodec, SimpleNamespace(encode=lambda *_: encoded))
        objective.teacher = cast(Teacher, lambda _: teacher_outputs)
        losses = objective.compare(outputs, batch)
        values = self._logged(losses)
        mark("loss")
        self.backward(losses)
        mark("backward")
        self.student.step(RATE)
        mark("optimizer")
        return values.tolist()[:3]


@dataclass(frozen=True)
class StepBench:
    """The options of `fpd-accel bench step`; `auto` and None choose by the device."""

    student: str
    teacher: str
    input_size: tuple[int, int]  # (height, width), pixels
    batches: tuple[int, ...] | None  # samples of a step
    rounds: int
    steps: int | None  # of a round
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto"] | Precision  # of eager and ours
    variants: tuple[str, ...]
    compile: Compile  # of ours


@dataclass(frozen=True)
class Setup:
    """The parts that all batch sizes and variants share."""

    bench: StepBench
    batches: Sequence[int]  # samples of a step
    networks: tuple[nn.Module, nn.Module]  # student and teacher, of which each variant has copies
    accelerator: Accelerator
    device: torch.device
    precision: Precision  # of eager and ours
    precision_reason: str
    dtype: torch.dtype  # the same precision
    codec: HeatmapCodec


def create_setup(bench: StepBench) -> Setup:
    """Return the setup for these options.

    Raise a ModelError if a network does not exist, has no heatmaps, or cannot be trained on images of this size; a
    TrainingError if a GPU is requested, but PyTorch sees none.
    """
    has_gpu = torch.cuda.is_available()
    if bench.device == "cuda" and not has_gpu:
        raise TrainingError("--device cuda: PyTorch sees no GPU here; leave it out, or take --device cpu")
    device = torch.device("cuda" if bench.device != "cpu" and has_gpu else "cpu")
    precision, reason = choose_precision(bench.precision, device)
    say(f"precision of eager, ours and ours_cached: {precision} ({reason})")
    batches = bench.batches or BATCHES[device.type]
    networks, codec = create_networks(bench, min(batches)), create_codec("heatmap", bench.input_size)
    assert isinstance(codec, HeatmapCodec)
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise Accelerate would take a GPU if there is one
    accelerator, dtype = create_accelerator(precision), torch.bfloat16 if precision == "bf16" else torch.float32
    return Setup(bench, batches, networks, accelerator, accelerator.device, precision, reason, dtype, codec)


def choose_precision(name: Literal["auto"] | Precision, device: torch.device) -> tuple[Precision, str]:
    """Return a precision and the reason for it."""
    if name != "auto":
        return name, "as requested"
    hardware = "GPU" if device.type == "cuda" else f"processor ({torch.backends.cpu.get_cpu_capability()})"
    if multiplies_bf16(device):
        return "bf16", f"the {hardware} multiplies it"
    return "fp32", f"the {hardware} has no bf16 and would emulate it"


def create_networks(bench: StepBench, samples: int) -> tuple[nn.Module, nn.Module]:
    """Return student and teacher, after a forward of `samples` images on the meta device."""
    names, size = (bench.student, bench.teacher), bench.input_size
    for name in names:
        if name.endswith(SIMCC_SUFFIX):
            raise ModelError(f"{name}: the published step supports heatmaps only, so there is nothing to compare with")
        try:
            with torch.device("meta"):
                network = create_model(name, JOINTS, input_size=size).train(name == bench.student)
                network(torch.empty(samples, 3, *size))
        except ModelError:
            raise
        except ValueError as error:
            raise ModelError(
                f"{name}: cannot be trained on {samples} images of {size[0]}x{size[1]} ({error}); take a larger "
                "--batch or --input"
            ) from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student, teacher = (create_model(name, JOINTS, input_size=size) for name in names)
    return student, teacher


def create_variant(name: str, setup: Setup, batch: int) -> PublishedStep | OurStep:
    """Return a variant with its own copy of the weights."""
    student, teacher = (copy.deepcopy(network) for network in setup.networks)
    if name in OURS:
        train = Train(global_batch=batch, precision=setup.precision, compile=setup.bench.compile)
        return OurStep(student, teacher, setup.accelerator, codec=setup.codec, train=train)
    if name == "eager":
        return EagerStep(student, teacher, setup.device, precision=setup.dtype)
    return PublishedStep(student, teacher, setup.device, teacher_gradients=name == "published")


def create_inputs(setup: Setup, batch: int) -> dict[str, list[Any]]:
    """Return the batches of each variant: the same samples as its loader would return them, pinned for a GPU."""
    bench = setup.bench
    ours = [draw_batch(batch, JOINTS, bench.input_size, seed=seed) for seed in range(INPUTS)]
    floats = [float_batch(one, setup.codec) for one in ours]
    by_name: dict[str, list[Any]] = {"ours": ours}
    if "ours_cached" in bench.variants:
        teacher = Teacher(copy.deepcopy(setup.networks[1]), device=setup.device)
        heatmaps = (cast(Tensor, teacher(one.crops.to(setup.device))[-1]) for one in ours)
        targets = (pack(own[:, None], "bf16")[0].clone().cpu() for own in heatmaps)  # as the cache stores them
        by_name["ours_cached"] = [replace(one, teacher_targets=own) for one, own in zip(ours, targets, strict=True)]
    if setup.device.type == "cuda":
        by_name = {name: [one.pin_memory() for one in own] for name, own in by_name.items()}
        floats = [one.map(Tensor.pin_memory) for one in floats]
    return {name: by_name.get(name, floats) for name in bench.variants}


def draw_batch(samples: int, joints: int, input_size: tuple[int, int], *, hidden: float = 0.3, seed: int = 0) -> Batch:
    """Return a batch of noise images with keypoints anywhere in the crop, a share `hidden` of them unlabelled."""
    height, width = input_size
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        crops=torch.randint(0, 256, (samples, height, width, 3), generator=generator, dtype=torch.uint8),
        keypoints=torch.rand(samples, joints, 2, generator=generator) * torch.tensor([width, height]),
        visible=(torch.rand(samples, joints, generator=generator) >= hidden).float(),
        centers=torch.rand(samples, 2, generator=generator) * 600,
        sizes=torch.tensor([[float(width), float(height)]]).expand(samples, 2) * 1.5,
        rows=torch.arange(samples),
    )
