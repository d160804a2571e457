"""What a training step costs beside the published one: same weights, same batches, rounds of all variants interleaved.

The variants are those of ``reference_step.py`` and, as ``c`` and ``d``, ours (``our_step.py``). A round is so many
steps of each variant, timed from an idle device to an idle device; ratios are taken within a round, so that whatever
disturbs the machine disturbs both. Data are made before: what the published loader makes on the host costs it nothing
here but the copy to the device.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch

from fpd_accel.bench.ceilings import copy_ceiling, matmul_ceiling, synchronize
from fpd_accel.bench.contestants import (
    DTYPES,
    OURS,
    VARIANTS,
    Contestant,
    Ground,
    StepBench,
    create_bench_accelerator,
    create_contestant,
    create_networks,
    make_people,
    with_lessons,
)
from fpd_accel.bench.environment import environment
from fpd_accel.bench.our_step import STAGES, OurStep
from fpd_accel.bench.roofline import Ceilings, Pass, step_passes, summary
from fpd_accel.bench.step_gate import check_as_timed, check_exactly
from fpd_accel.bench.step_inputs import JOINTS, choose_device, choose_precision
from fpd_accel.bench.step_probe import Memory, Stopwatch, count_kernels
from fpd_accel.codecs import HeatmapCodec, create_codec
from fpd_accel.config import Codec
from fpd_accel.data.batch import Batch
from fpd_accel.log import say, track
from fpd_accel.models import create_model

RATIOS = (("c", "a"), ("c", "a1"), ("c", "b"), ("d", "a"), ("d", "a1"), ("d", "c"))
WARM_UP = {"cpu": 1, "cuda": 5}  # steps that do not count
STEPS = {"cpu": 1, "cuda": 20}  # of a round
Result = TypeVar("Result")


def bench_step(bench: StepBench) -> dict[str, Any]:
    """The measurements, for JSON and for ``step_report.show_step``.

    Raises:
        ModelError: a network does not exist, or does not take images of this size.
        TrainingError: the device does not exist, or ours does not compute what the published step does.
    """
    device = choose_device(bench.device)
    precision, reason = choose_precision(bench.precision, device)
    say(f"precision of b, c and d: {precision} ({reason})")
    where = environment() | {"device": _describe(device), "threads": torch.get_num_threads()}  # before our own load
    batches = bench.batches or ((4, 8) if device.type == "cpu" else (24, 32, 64, 128, 256, 512))
    networks = create_networks(bench, min(batches))
    accelerator = create_bench_accelerator(device, precision)
    codec = create_codec(Codec(), bench.input_size)
    assert isinstance(codec, HeatmapCodec)
    ground = Ground(bench, networks, accelerator, precision, codec)
    exact = check_exactly(ground) if set(OURS) & set(bench.variants) else None
    measured, reached = [], [_ceilings(device, precision)]
    for batch in batches:
        measured.append(_measure(ground, batch))
        again = _if_room(partial(_ceilings, device, precision), device)
        if again is not None:
            reached.append(again)  # of which the best counts: a machine that others share is slow at times
    flops, fp32, copied = map(max, zip(*reached, strict=True))
    for result in measured:
        _add_roofline(result, ground, Ceilings(flops, copied))
    return {
        "bench": "step",
        "environment": where,
        "settings": asdict(bench) | {"device": device.type, "precision": precision, "precision_reason": reason},
        "variants": {name: VARIANTS[name] for name in bench.variants},
        "ceilings": {"matmul_tflops": flops / 1e12, "fp32_matmul_tflops": fp32 / 1e12, "copy_gbytes": copied / 1e9},
        "exact_gate": exact,
        "batches": measured,
    }


def _ceilings(device: torch.device, precision: str) -> tuple[float, float, float]:
    """FLOP/s of matrix products in this precision and in float32, and bytes/s of copies."""
    flops = matmul_ceiling(device, DTYPES[precision])
    fp32 = flops if precision == "fp32" else matmul_ceiling(device, torch.float32)
    return flops, fp32, copy_ceiling(device)


def _add_roofline(result: dict[str, Any], ground: Ground, ceilings: Ceilings) -> None:
    """To the measurements of one batch size."""
    batch, ours = result["batch"], result["variants"].get("c")
    result["roofline"] = roofline = summary(_passes(ground, batch), ceilings, batch)
    if ours is not None:
        roofline["reached"] = ours["images_per_second"]["median"] / roofline["images_per_second"]


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
    ours, theirs = make_people(ground, batch)
    contestants = {name: create_contestant(name, ground, batch) for name in bench.variants}
    inputs: dict[str, list[Any]] = {name: ours if name in OURS else theirs for name in contestants}
    if "d" in contestants:
        inputs["d"] = [with_lessons(one, ground) for one in ours]
    gates = {}
    for name in filter(contestants.__contains__, OURS):
        for other in ("a", "a1"):  # of which the second takes half the memory, for the same gradient of the student
            check = partial(check_as_timed, name, other, ground, contestants, inputs[name][0], theirs[0])
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
    mine = contestants.get("c")
    if isinstance(mine, OurStep):
        stages, result["host_ahead"] = _stages(mine, ours, device, rounds=bench.rounds)
        busy = found["c"]["busy_seconds"] or sum(stages.values())
        result["stages"] = stages | {"host gap": max(0.0, statistics.median(seconds["c"]) - busy)}
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
