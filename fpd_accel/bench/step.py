"""`fpd-accel bench step`: the time of our training step beside the published one, from equal weights and batches.

The variants are in `variants.py`. A round takes some steps of each variant, timed from an idle device to an idle
device, and ratios are taken within a round, so that the machine's other load disturbs both sides. Batches are made
beforehand: host work of the published loader costs only its larger copy to the device. Losses before the first step
must agree before anything is timed; tests compare both steps exactly, gradients included.
"""

import copy
import gc
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import cycle, islice
from typing import Any, TypeVar

import torch

from fpd_accel.bench import VARIANTS
from fpd_accel.bench.environment import environment
from fpd_accel.bench.published.step import PublishedStep
from fpd_accel.bench.roofline import Ceilings, step_passes, summary
from fpd_accel.bench.step_probe import Memory, Stopwatch, copy_ceiling, count_kernels, matmul_ceiling, time_work
from fpd_accel.bench.variants import STAGES, OurStep, Setup, StepBench, create_inputs, create_setup, create_variant
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
Variants = dict[str, OurStep | PublishedStep]  # by name


def bench_step(bench: StepBench) -> dict[str, Any]:
    """Return the measurements, for JSON and for `step_report.show_step`.

    Of each batch size: `variants` by name, without those in `no_room`, which ran out of memory; `ratios` of images/s of
    `a` over those of `b` within a round, by "a/b"; `loss_difference` from the first variant before the first step,
    relative; `stages` of `ours` and "host gap", seconds, with `host_ahead`, whether the stages are free of host time
    (None on a CPU), all absent without `ours`; `roofline`, see `roofline.summary`, with the share that `ours` reaches.
    Spreads are median, low and high (quartiles) over the rounds.

    Raise a BenchError if the variants do not compute the same losses, and the errors of `variants.create_setup`.
    """
    where = environment()  # before measuring, which is a load itself
    setup = create_setup(bench)
    device = setup.device
    where |= {"device": _describe(device), "threads": torch.get_num_threads()}
    measured, reached = [], [_ceilings(setup)]
    for batch in setup.batches:
        measured.append(_measure(setup, batch))
        if (again := _if_room(partial(_ceilings, setup))) is not None:
            reached.append(again)  # the best counts, since a shared machine is slow at times
    flops, fp32, copied = map(max, zip(*reached, strict=True))
    for result in measured:
        networks = (copy.deepcopy(network).to("meta") for network in setup.networks)
        size = {"batch": result["batch"], "input_size": bench.input_size}
        passes = step_passes(*networks, **size, element=setup.dtype.itemsize)
        result["roofline"] = roofline = summary(passes, Ceilings(flops, copied), result["batch"])
        if "ours" in result["variants"]:
            rate = result["variants"]["ours"]["images_per_second"]["median"]
            roofline["reached"] = rate / roofline["images_per_second"]
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


def _measure(setup: Setup, batch: int) -> dict[str, Any]:
    """Measure one batch size; `no_room` lists the variants that the device's memory does not hold."""
    bench, inputs = setup.bench, create_inputs(setup, batch)
    variants = {name: create_variant(name, setup, batch) for name in bench.variants}
    found, losses = dict[str, Any](), dict[str, list[float]]()
    for name in track(bench.variants, f"warming up, batch {batch}"):
        warm = _if_room(partial(_warm_up, variants[name], inputs[name], setup.device))
        if warm is None:
            del variants[name]
        else:
            losses[name], found[name] = warm
    differences = compare_losses(losses)
    seconds = _if_room(partial(_rounds, variants, inputs, setup, f"measuring, batch {batch}"))
    if seconds is None:
        seconds, found = {}, {}
        variants.clear()
    rates = {name: [batch / each for each in own] for name, own in seconds.items()}
    for name, own in found.items():
        own |= {"images_per_second": spread(rates[name]), "seconds": seconds[name]}
    pairs = [(one, other) for one, others in RATIOS.items() for other in others if {one, other} <= rates.keys()]
    result: dict[str, Any] = {
        "batch": batch,
        "variants": found,
        "ratios": {f"{a}/{b}": spread([x / y for x, y in zip(rates[a], rates[b], strict=True)]) for a, b in pairs},
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


def _if_room(work: Callable[[], Result]) -> Result | None:
    """Return the result of `work`, or None, with its memory freed, if the device's memory does not suffice."""
    with suppress(torch.OutOfMemoryError):  # tensors in its frames are freed only after this block
        return work()
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
    return None


def _warm_up(
    variant: OurStep | PublishedStep, batches: Sequence[Any], device: torch.device
) -> tuple[list[float], dict[str, Any]]:
    """Return the losses before the first step and, after some untimed steps, memory and kernels of one."""
    losses = variant.losses(batches[0])  # loads libraries too, whose memory is not the variant's
    memory = Memory(device)
    variant.run(list(islice(cycle(batches), WARM_UP[device.type])))
    if device.type == "cuda":  # while cuDNN chooses its algorithms it takes more memory than a step does
        torch.cuda.reset_peak_memory_stats(device)
        variant.run(batches[:1])
    peak = memory.peak_mb(*variant.networks)
    return losses, {"memory_mb": peak, **count_kernels(partial(variant.run, batches[:1]), device)}


def compare_losses(losses: dict[str, list[float]]) -> dict[str, float]:
    """Return each variant's largest relative difference of losses from the first's; raise BenchError if too large."""
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


def _rounds(variants: Variants, inputs: dict[str, list[Any]], setup: Setup, title: str) -> dict[str, list[float]]:
    """Return the seconds of a step of each variant in each round; each round starts with another variant."""
    names, seconds = list(variants), {name: list[float]() for name in variants}
    steps = setup.bench.steps or STEPS[setup.device.type]
    order = [names[(n + k) % len(names)] for n in range(setup.bench.rounds) for k in range(len(names))]
    for name in track(order, title):
        work = partial(variants[name].run, list(islice(cycle(inputs[name]), steps)))
        seconds[name].append(time_work(setup.device, work) / steps)
    return seconds


def _stages(ours: OurStep, batches: Sequence[Batch], setup: Setup) -> tuple[dict[str, float], bool | None]:
    """Return median seconds of each stage of our step, and whether they are a GPU's alone (see `Stopwatch`)."""
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    ahead: list[bool | None] = []
    for batch in islice(cycle(batches), setup.bench.rounds):
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
