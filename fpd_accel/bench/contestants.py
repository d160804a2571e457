"""Who takes part in ``fpd-accel bench step``: the variants, the networks they start from, and the people they see."""

import copy
import os
from dataclasses import dataclass, replace
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fpd_accel.bench.our_step import OurStep
from fpd_accel.bench.reference_step import FloatBatch, HostLoop, PlainStep, PublishedStep
from fpd_accel.bench.step_inputs import JOINTS, calm, host_made, make_batch
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config import Compile, Train
from fpd_accel.data.batch import Batch
from fpd_accel.data.lessons import pack
from fpd_accel.errors import ModelError
from fpd_accel.models import create_model
from fpd_accel.models.simcc import SUFFIX
from fpd_accel.processes import create_accelerator
from fpd_accel.teacher import Teacher

VARIANTS = {
    "a": "published: fp32, teacher with gradients, loss joint by joint, three .item(), accuracy on the host",
    "a1": "the same, teacher without gradients",
    "b": "eager (autocast in bf16), teacher without gradients, loss at once, .item()",
    "c": "ours",
    "d": "ours, what the teacher says in memory, as its cache keeps it (teacher.cache, bf16)",
}
OURS = ("c", "d")
BATCHES = 2  # different ones, in turn
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Contestant = HostLoop | OurStep


@dataclass(frozen=True)
class StepBench:
    """What to measure."""

    student: str = "hrnet_w32"
    teacher: str = "hrnet_w48"
    input_size: tuple[int, int] = (256, 192)  # (height, width), pixels
    batches: tuple[int, ...] | None = None  # people of a step; None: what suits the device
    rounds: int = 5
    steps: int | None = None  # of a round; None: what suits the device
    device: str = "auto"
    # Of b, c and d; auto: bf16 where the hardware multiplies it.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    variants: tuple[str, ...] = tuple(VARIANTS)
    compile: Compile = "none"  # of ours
    seed: int = 0


@dataclass(frozen=True)
class Ground:
    """What all batch sizes and variants share."""

    bench: StepBench
    networks: tuple[nn.Module, nn.Module]  # student and teacher, of which each variant has copies
    accelerator: Accelerator
    precision: Literal["fp32", "bf16"]
    codec: HeatmapCodec


def create_networks(bench: StepBench, people: int) -> tuple[nn.Module, nn.Module]:
    """Student and teacher, whose copies all variants start from; checked by a forward of so many on the meta device."""
    for name in (bench.student, bench.teacher):
        if name.endswith(SUFFIX):
            raise ModelError(f"{name}: the published step knows heatmaps alone, so there is nothing to compare it with")
        try:
            with torch.device("meta"):
                network = create_model(name, JOINTS, input_size=bench.input_size).train(name == bench.student)
                network(torch.empty(people, 3, *bench.input_size))
        except ValueError as error:
            if isinstance(error, ModelError):
                raise
            size = "x".join(map(str, bench.input_size))
            raise ModelError(
                f"{name}: cannot be trained on {people} of {size} ({error}); take a larger --batch or --input"
            ) from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.seed)
        student, teacher = (
            calm(create_model(name, JOINTS, input_size=bench.input_size)) for name in (bench.student, bench.teacher)
        )
    return student, teacher


def create_bench_accelerator(device: torch.device, precision: str) -> Accelerator:
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # where there is a GPU, Accelerate would take that
    return create_accelerator(precision)


def create_contestant(name: str, ground: Ground, batch: int) -> Contestant:
    """A variant with its own copy of the weights."""
    student, teacher = (copy.deepcopy(network) for network in ground.networks)
    device = ground.accelerator.device
    if name in OURS:
        train = Train(global_batch=batch, precision=ground.precision, compile=ground.bench.compile)
        return OurStep(student, teacher, ground.accelerator, codec=ground.codec, train=train)
    if name == "b":
        return PlainStep(student, teacher, device, precision=DTYPES[ground.precision])
    return PublishedStep(student, teacher, device, teacher_gradients=name == "a")


def make_people(ground: Ground, batch: int) -> tuple[list[Batch], list[FloatBatch]]:
    """The same people for ours and for the others, as their loaders give them."""
    ours = [make_batch(batch, ground.bench.input_size, seed=ground.bench.seed + number) for number in range(BATCHES)]
    theirs = [host_made(one, ground.codec) for one in ours]
    if ground.accelerator.device.type == "cpu":
        return ours, theirs
    return [one.pin_memory() for one in ours], [one.pin_memory() for one in theirs]


def with_lessons(batch: Batch, ground: Ground) -> Batch:
    """The same people with what the teacher says of them, as its cache keeps it."""
    _, network = ground.networks
    device = ground.accelerator.device
    teacher = Teacher(copy.deepcopy(network), device=device)
    heatmaps = teacher(batch.crops.to(device))[-1]
    assert isinstance(heatmaps, Tensor)
    lessons, _ = pack(heatmaps[:, None], "bf16")
    taught = replace(batch, lessons=lessons.clone().cpu())
    return taught if device.type == "cpu" else taught.pin_memory()
