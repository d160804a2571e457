"""What a training step costs beside the published one: same weights, same batches, rounds of all variants interleaved.

The variants are those of ``reference_step.py`` and, as ``c`` and ``d``, ours (``our_step.py``). A round is so many
steps of each variant, timed from an idle device to an idle device; ratios are taken within a round, so that whatever
disturbs the machine disturbs both. Data are made before: what the published loader makes on the host costs it nothing
here but the copy to the device.
"""

import copy
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fpd_accel.bench import step_gate
from fpd_accel.bench.ceilings import copy_ceiling, matmul_ceiling, synchronize
from fpd_accel.bench.environment import environment
from fpd_accel.bench.our_step import STAGES, OurStep
from fpd_accel.bench.reference_step import FloatBatch, HostLoop, PlainStep, PublishedStep
from fpd_accel.bench.roofline import Ceilings, Pass, step_passes, summary
from fpd_accel.bench.step_inputs import JOINTS, calm, choose_device, choose_precision, host_made, make_batch
from fpd_accel.bench.step_probe import Memory, Stopwatch, count_kernels
from fpd_accel.codecs import HeatmapCodec, create_codec
from fpd_accel.config import Codec, Compile, Train
from fpd_accel.data.batch import Batch
from fpd_accel.data.lessons import pack
from fpd_accel.errors import ModelError
from fpd_accel.log import say, track
from fpd_accel.models import create_model
from fpd_accel.models.simcc import SUFFIX
from fpd_accel.processes import create_accelerator
from fpd_accel.teacher import Teacher

VARIANTS = {
    "a": "published: fp32, teacher with gradients, loss joint by joint, three .item(), accuracy on the host",
    "a1": "the same, teacher without gradients",
    "b": "eager autocast, teacher without gradients, loss at once, .item()",
    "c": "ours",
    "d": "ours, what the teacher says in memory, as its cache keeps it (teacher.cache, bf16)",
}
OURS = ("c", "d")
RATIOS = (("c", "a"), ("c", "a1"), ("c", "b"), ("d", "a"), ("d", "a1"), ("d", "c"))
EXACT_PEOPLE = 2  # of the comparison in float64
BATCHES = 2  # different ones, in turn
WARM_UP = {"cpu": 1, "cuda": 5}  # steps that do not count
STEPS = {"cpu": 1, "cuda": 20}  # of a round
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Contestant = HostLoop | OurStep
Result = TypeVar("Result")


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
    precision: Literal["auto", "fp32", "bf16"] = (
        "auto"  # of b, c and d: fp32, bf16, or bf16 where the hardware multiplies it
    )
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
    ceilings: Ceilings
    codec: HeatmapCodec


def bench_step(bench: StepBench) -> dict[str, Any]:
    """The measurements, for JSON and for ``step_report.show_step``.

    Raises:
        ModelError: a network does not exist, or does not take images of this size.
        TrainingError: the device does not exist, or ours does not compute what the published step does.
    """
    device = choose_device(bench.device)
    precision, reason = choose_precision(bench.precision, device)
    say(f"precision of b, c and d: {precision} ({reason})")
    where = environment() | {"device": _describe(device), "threads": torch.get_num_threads()}  # while others alone work
    batches = bench.batches or ((4, 8) if device.type == "cpu" else (24, 32, 64, 128, 256, 512))
    networks = _networks(bench, min(batches))
    accelerator = _accelerator(device, precision)
    ceilings = Ceilings(matmul_ceiling(device, DTYPES[precision]), copy_ceiling(device))
    fp32 = ceilings.flops if precision == "fp32" else matmul_ceiling(device, torch.float32)
    codec = create_codec(Codec(), bench.input_size)
    assert isinstance(codec, HeatmapCodec)
    ground = Ground(bench, networks, accelerator, precision, ceilings, codec)
    exact = _check_exactly(ground) if set(OURS) & set(bench.variants) else None
    measured = [_measure(ground, batch) for batch in batches]
    return {
        "bench": "step",
        "environment": where,
        "settings": asdict(bench) | {"device": device.type, "precision": precision, "precision_reason": reason},
        "variants": {name: VARIANTS[name] for name in bench.variants},
        "ceilings": {"matmul_tflops": ceilings.flops / 1e12, "fp32_matmul_tflops": fp32 / 1e12,
                     "copy_gbytes": ceilings.bytes / 1e9},
        "exact_gate": exact,
        "batches": measured,
    }  # fmt: skip


def _networks(bench: StepBench, people: int) -> tuple[nn.Module, nn.Module]:
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


def _accelerator(device: torch.device, precision: str) -> Accelerator:
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # where there is a GPU, Accelerate would take that
    return create_accelerator(precision)


def _passes(ground: Ground, batch: int) -> list[Pass]:
    bench = ground.bench
    with torch.device("meta"):
        student, teacher = (
            create_model(name, JOINTS, input_size=bench.input_size) for name in (bench.student, bench.teacher)
        )
    element = DTYPES[ground.precision].itemsize
    return step_passes(student, teacher, batch=batch, input_size=bench.input_size, element=element)


def _measure(ground: Ground, batch: int) -> dict[str, Any]:
    """Everything about one batch size; ``no_room``: the variants for which the device's memory does not suffice."""
    device, bench = ground.accelerator.device, ground.bench
    ours, theirs = _people(ground, batch)
    contestants = {name: _contestant(name, ground, batch) for name in bench.variants}
    inputs: dict[str, list[Any]] = {name: ours if name in OURS else theirs for name in contestants}
    if "d" in contestants:
        inputs["d"] = [_with_lessons(one, ground) for one in ours]
    gates = {}
    for name in filter(contestants.__contains__, OURS):
        for other in ("a", "a1"):  # of which the second takes half the memory, for the same gradient of the student
            check = partial(_check_as_timed, name, other, ground, contestants, inputs[name][0], theirs[0])
            if (gate := _if_room(check, device)) is not None:
                gates[name] = gate
                break
    found: dict[str, dict[str, Any]] = {}
    for name in track(list(contestants), f"warming up, batch {batch}", total=len(contestants)):
        own = _if_room(partial(_warm_up, contestants[name], inputs[name], device), device)
        if own is None:
            del contestants[name]
        else:
            found[name] = own
    steps = bench.steps or STEPS[device.type]
    title = f"measuring, batch {batch}"
    timing = partial(_rounds, contestants, inputs, device, rounds=bench.rounds, steps=steps, title=title)
    seconds = _if_room(timing, device) if contestants else {}
    if seconds is None:
        seconds, found = {}, {}
        contestants.clear()
    rates = {name: [batch / each for each in own] for name, own in seconds.items()}
    for name, own in found.items():
        own |= {"images_per_second": spread(rates[name]), "seconds": seconds[name]}
    result: dict[str, Any] = {"batch": batch, "gates": gates, "variants": found, "ratios": _ratios(rates)}
    result["no_room"] = [name for name in bench.variants if name not in found]
    result["roofline"] = summary(_passes(ground, batch), ground.ceilings, batch)
    mine = contestants.get("c")
    if isinstance(mine, OurStep):
        stages, result["host_ahead"] = _stages(mine, ours, device, rounds=bench.rounds)
        busy = found["c"]["busy_seconds"] or sum(stages.values())
        result["stages"] = stages | {"host gap": max(0.0, statistics.median(seconds["c"]) - busy)}
        result["roofline"]["reached"] = statistics.median(rates["c"]) / result["roofline"]["images_per_second"]
    contestants.clear()
    del mine
    ground.accelerator.free_memory()  # it remembers what it has prepared
    gc.collect()
    return result


def _if_room(work: Callable[[], Result], device: torch.device) -> Result | None:
    """What it gives; None where the device's memory does not suffice, and what it took is given back."""
    with suppress(torch.OutOfMemoryError):  # what its frames hold is freed only after this block
        return work()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _warm_up(contestant: Contestant, batches: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """The first steps of a variant, which do not count, and what one of those after them needs."""
    memory = Memory(device)
    contestant.run(_turns(batches, WARM_UP[device.type]))
    if device.type == "cuda":  # while cuDNN chooses its algorithms it takes more than a step does
        torch.cuda.reset_peak_memory_stats(device)
        contestant.run(batches[:1])
    peak = memory.peak_mb(contestant.student, contestant.teacher)
    return {"memory_mb": peak, **count_kernels(partial(contestant.run, batches[:1]), device)}


def _people(ground: Ground, batch: int) -> tuple[list[Batch], list[FloatBatch]]:
    """The same people for ours and for the others, as their loaders give them."""
    ours = [make_batch(batch, ground.bench.input_size, seed=ground.bench.seed + number) for number in range(BATCHES)]
    theirs = [host_made(one, ground.codec) for one in ours]
    if ground.accelerator.device.type == "cpu":
        return ours, theirs
    return [one.pin_memory() for one in ours], [one.pin_memory() for one in theirs]


def _with_lessons(batch: Batch, ground: Ground) -> Batch:
    """The same people with what the teacher says of them, as its cache keeps it."""
    _, network = ground.networks
    device = ground.accelerator.device
    teacher = Teacher(copy.deepcopy(network), device=device)
    heatmaps = teacher(batch.crops.to(device))[-1]
    assert isinstance(heatmaps, Tensor)
    lessons, _ = pack(heatmaps[:, None], "bf16")
    taught = replace(batch, lessons=lessons.clone().cpu())
    return taught if device.type == "cpu" else taught.pin_memory()


def _contestant(name: str, ground: Ground, batch: int) -> Contestant:
    """A variant with its own copy of the weights."""
    student, teacher = (copy.deepcopy(network) for network in ground.networks)
    device = ground.accelerator.device
    if name in OURS:
        train = Train(global_batch=batch, precision=ground.precision, compile=ground.bench.compile)
        return OurStep(student, teacher, ground.accelerator, codec=ground.codec, train=train)
    if name == "b":
        return PlainStep(student, teacher, device, precision=DTYPES[ground.precision])
    return PublishedStep(student, teacher, device, teacher_gradients=name == "a")


def _check_exactly(ground: Ground) -> dict[str, Any]:
    """Ours against the published step in float64; see ``step_gate.py``."""
    device, codec = ground.accelerator.device, ground.codec
    batch = make_batch(EXACT_PEOPLE, ground.bench.input_size, seed=ground.bench.seed)
    student, teacher = (copy.deepcopy(network).double() for network in ground.networks)
    published = PublishedStep(student, teacher, device, teacher_gradients=True)
    theirs = step_gate.outcome_of(published, host_made(batch, codec).to(torch.float64))
    student, teacher = (step_gate.InDouble(copy.deepcopy(network)) for network in ground.networks)
    mine = OurStep(student, teacher, ground.accelerator, codec=codec, train=Train(global_batch=EXACT_PEOPLE))
    gate = step_gate.compare_exactly(step_gate.our_outcome(mine, batch), theirs)
    ground.accelerator.free_memory()
    step_gate.require_agreement(gate, "in float64")
    return gate


def _check_as_timed(
    name: str, other: str, ground: Ground, contestants: dict[str, Contestant], ours: Batch, theirs: FloatBatch
) -> dict[str, Any]:
    """One of ours as it is timed against the published step a or a1, which is made where it is not measured."""
    mine, published = contestants[name], contestants.get(other) or _contestant(other, ground, len(ours))
    student, teacher = (copy.deepcopy(network) for network in ground.networks)
    if ground.precision == "fp32":  # another order of sums: else there would be no difference to measure
        student, teacher = (network.to(memory_format=torch.channels_last) for network in (student, teacher))
    plain = PlainStep(student, teacher, ground.accelerator.device, precision=DTYPES[ground.precision])
    assert isinstance(mine, OurStep)
    assert isinstance(published, PublishedStep)
    gate = step_gate.compare_as_timed(
        step_gate.our_outcome(mine, ours),
        step_gate.outcome_of(published, theirs),
        step_gate.outcome_of(plain, theirs),
        "bf16" if name == "d" else ground.precision,  # the cache is bf16, whatever the step
    )
    step_gate.require_agreement(gate, f"at batch {len(ours)} in {ground.precision}, variant {name},")
    return gate


def _ratios(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        f"{one}/{other}": spread([a / b for a, b in zip(rates[one], rates[other], strict=True)])
        for one, other in RATIOS
        if one in rates and other in rates
    }


def _rounds(
    contestants: dict[str, Contestant],
    inputs: dict[str, list[Any]],
    device: torch.device,
    *,
    rounds: int,
    steps: int,
    title: str,
) -> dict[str, list[float]]:
    """Seconds of a step in each round of each variant; the one that begins is another in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    order = [name for n in range(rounds) for name in names[n % len(names) :] + names[: n % len(names)]]
    for name in track(order, title, total=len(order)):
        turns = _turns(inputs[name], steps)
        synchronize(device)
        began = time.perf_counter()
        contestants[name].run(turns)
        synchronize(device)
        seconds[name].append((time.perf_counter() - began) / steps)
    return seconds


def _turns(batches: Sequence[Any], steps: int) -> list[Any]:
    return [batches[number % len(batches)] for number in range(steps)]


def _stages(
    ours: OurStep, batches: Sequence[Batch], device: torch.device, *, rounds: int
) -> tuple[dict[str, float], bool | None]:
    """Median seconds of each stage of a step of ours, and whether they are a GPU's own (see :class:`Stopwatch`)."""
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    ahead: list[bool | None] = []
    for batch in _turns(batches, rounds):
        watch = Stopwatch(device)
        ours.staged(batch, watch.mark)
        ahead.append(watch.host_is_ahead())
        for stage, seconds in watch.seconds().items():
            found[stage].append(seconds)
    medians = {stage: statistics.median(seconds) for stage, seconds in found.items()}
    return medians, None if None in ahead else all(ahead)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": middle, "low": low, "high": high}


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
