"""`fpd-accel bench step`: the time of our training step beside the published one, from equal weights and batches.

The variants are in `variants.py`. A round takes some steps of each variant, timed
from an idle device to an idle device, and ratios are taken within a round, so that the machine's other load disturbs
both sides. Batches are made beforehand: host work of the published loader costs only its larger copy to the device.
Losses before the first step must agree before anything is timed; tests compare both steps exactly, gradients included.
"""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch

from fpd_accel.bench.environment import environment
from fpd_accel.bench.roofline import Ceilings, step_passes, summary
from fpd_accel.bench.step_probe import Memory, Stopwatch, copy_ceiling, count_kernels, matmul_ceiling, synchronize
from fpd_accel.bench.step_report import BatchReport, StepReport
from fpd_accel.bench.variants import (
    STAGES,
    VARIANTS,
    OurStep,
    Setup,
    StepBench,
    Variant,
    create_inputs,
    create_setup,
    create_variant,
)
from fpd_accel.console import track
from fpd_accel.data.batch import Batch
from fpd_accel.errors import BenchError

RATIOS = {
    "ours": ("published", "published_no_grad", "eager"),
    "ours_cached": ("published", "published_no_grad", "ours"),
}
WARM_UP = {"cpu": 1, "cuda": 5}  # untimed steps
STEPS = {"cpu": 1, "cuda": 20}  # of a round
LOSS_TOLERANCE = 2e-2  # relative; bf16 differs by 1e-3
Result = TypeVar("Result")


def bench_step(bench: StepBench) -> StepReport:
    """Return the measurements, for JSON and for `step_report.show_step`.

    Raises:
        BenchError: The variants do not compute the same losses.
        ModelError: A network does not exist, or does not take images of this size.
        TrainingError: The device does not exist.
    """
    where = environment()  # before measuring, which is a load itself
    setup = create_setup(bench)
    device = setup.device
    where |= {"device": _describe(device), "threads": torch.get_num_threads()}
    measured, reached = [], [_ceilings(setup)]
    for batch in setup.batches:
        measured.append(_measure(setup, batch))
        again = _if_room(partial(_ceilings, setup), device)
        if again is not None:
            reached.append(again)  # the best counts, since a shared machine is slow at times
    flops, fp32, copied = map(max, zip(*reached, strict=True))
    for result in measured:
        _add_roofline(result, setup, Ceilings(flops, copied))
    chosen = {"device": device.type, "precision": setup.precision, "precision_reason": setup.precision_reason}
    return {
        "bench": "step",
        "environment": where,
        "settings": asdict(bench) | chosen | {"loss_tolerance": LOSS_TOLERANCE},
        "variants": {name: VARIANTS[name] for name in bench.variants},
        "ceilings": {"matmul_tflops": flops / 1e12, "fp32_matmul_tflops": fp32 / 1e12, "copy_gbytes": copied / 1e9},
        "batches": measured,
    }


def _ceilings(setup: Setup) -> tuple[float, float, float]:
    """Return FLOP/s of matrix products in this precision and in float32, and bytes/s of copies."""
    flops = matmul_ceiling(setup.device, setup.dtype)
    fp32 = flops if setup.precision == "fp32" else matmul_ceiling(setup.device, torch.float32)
    return flops, fp32, copy_ceiling(setup.device)


def _add_roofline(result: BatchReport, setup: Setup, ceilings: Ceilings) -> None:
    """Add the roofline to the measurements of one batch size."""
    batch, ours = result["batch"], result["variants"].get("ours")
    networks = (copy.deepcopy(network).to("meta") for network in setup.networks)
    passes = step_passes(*networks, batch=batch, input_size=setup.bench.input_size, element=setup.dtype.itemsize)
    result["roofline"] = roofline = summary(passes, ceilings, batch)
    if ours is not None:
        roofline["reached"] = ours["images_per_second"]["median"] / roofline["images_per_second"]


def _measure(setup: Setup, batch: int) -> BatchReport:
    """Measure one batch size; `no_room` lists the variants that the device's memory does not hold."""
    device, bench = setup.device, setup.bench
    inputs = create_inputs(setup, batch)
    variants = {name: create_variant(name, setup, batch) for name in bench.variants}
    found: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    for name in track(list(variants), f"warming up, batch {batch}", total=len(variants)):
        warm = _if_room(partial(_warm_up, variants[name], inputs[name], device), device)
        if warm is None:
            del variants[name]
        else:
            losses[name], found[name] = warm
    differences = compare_losses(losses)
    seconds = _if_room(partial(_rounds, variants, inputs, setup, f"measuring, batch {batch}"), device)
    if seconds is None:
        seconds, found = {}, {}
        variants.clear()
    rates = {name: [batch / each for each in own] for name, own in seconds.items()}
    for name, own in found.items():
        own |= {"images_per_second": spread(rates[name]), "seconds": seconds[name]}
    result: BatchReport = {
        "batch": batch,
        "variants": found,
        "ratios": _ratios(rates),
        "loss_difference": differences,
        "no_room": [name for name in bench.variants if name not in found],
    }
    ours = variants.get("ours")
    if isinstance(ours, OurStep):
        stages, result["host_ahead"] = _stages(ours, inputs["ours"], setup)
        busy = found["ours"]["busy_seconds"] or sum(stages.values())
        result["stages"] = stages | {"host gap": max(0.0, statistics.median(seconds["ours"]) - busy)}
    variants.clear()
    del ours
    setup.accelerator.free_memory()  # it keeps references to all that it has prepared
    gc.collect()
    return result


def _if_room(work: Callable[[], Result], device: torch.device) -> Result | None:
    """Return the result of `work`, or None, with its memory freed, if the device's memory does not suffice."""
    with suppress(torch.OutOfMemoryError):  # tensors in its frames are freed only after this block
        return work()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _warm_up(variant: Variant, batches: Sequence[Any], device: torch.device) -> tuple[list[float], dict[str, Any]]:
    """Return the losses before the first step and, after some untimed steps, memory and kernels of one."""
    losses = variant.losses(batches[0])  # loads libraries too, whose memory is not the variant's
    memory = Memory(device)
    variant.run(_turns(batches, WARM_UP[device.type]))
    if device.type == "cuda":  # while cuDNN chooses its algorithms it takes more memory than a step does
        torch.cuda.reset_peak_memory_stats(device)
        variant.run(batches[:1])
    peak = memory.peak_mb(*variant.networks)
    return losses, {"memory_mb": peak, **count_kernels(partial(variant.run, batches[:1]), device)}


def compare_losses(losses: dict[str, list[float]]) -> dict[str, float]:
    """Return the largest relative difference of each variant's losses from those of the first variant.

    Raises:
        BenchError: A difference exceeds `LOSS_TOLERANCE`.
    """
    reference = next(iter(losses.values()), [])
    differences = {
        name: max(abs(value - right) / max(abs(right), 1e-12) for value, right in zip(own, reference, strict=True))
        for name, own in losses.items()
    }
    wrong = [f"{name} by {found:.1e}" for name, found in differences.items() if not found <= LOSS_TOLERANCE]
    if wrong:
        raise BenchError(
            f"bench step: losses before the first step differ from those of {next(iter(losses))}: {', '.join(wrong)} "
            f"(relative, allowed {LOSS_TOLERANCE:.0e}); one of them is wrong, so nothing was timed"
        )
    return differences


def _ratios(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        f"{one}/{other}": spread([a / b for a, b in zip(rates[one], rates[other], strict=True)])
        for one, others in RATIOS.items()
        for other in others
        if one in rates and other in rates
    }


def _rounds(
    variants: dict[str, Variant], inputs: dict[str, list[Any]], setup: Setup, title: str
) -> dict[str, list[float]]:
    """Return the seconds of a step of each variant in each round; each round starts with another variant."""
    device, names, seconds = setup.device, list(variants), {name: list[float]() for name in variants}
    steps = setup.bench.steps or STEPS[device.type]
    order = [names[(n + k) % len(names)] for n in range(setup.bench.rounds) for k in range(len(names))]
    for name in track(order, title, total=len(order)):
        turns = _turns(inputs[name], steps)
        synchronize(device)
        began = time.perf_counter()
        variants[name].run(turns)
        synchronize(device)
        seconds[name].append((time.perf_counter() - began) / steps)
    return seconds


def _turns(batches: Sequence[Any], steps: int) -> list[Any]:
    return [batches[number % len(batches)] for number in range(steps)]


def _stages(ours: OurStep, batches: Sequence[Batch], setup: Setup) -> tuple[dict[str, float], bool | None]:
    """Return median seconds of each stage of our step, and whether they are a GPU's alone (see `Stopwatch`)."""
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    ahead: list[bool | None] = []
    for batch in _turns(batches, setup.bench.rounds):
        watch = Stopwatch(setup.device)
        ours.staged(batch, watch.mark)
        ahead.append(watch.host_is_ahead())
        for stage, seconds in watch.seconds().items():
            found[stage].append(seconds)
    medians = {stage: statistics.median(seconds) for stage, seconds in found.items()}
    return medians, None if None in ahead else all(ahead)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": middle, "low": low, "high": high}


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
