"""The measurements of `fpd-accel bench step` as tables and as one picture."""

import statistics
from collections.abc import Sequence
from itertools import chain
from typing import Any, NotRequired, TypedDict

import cv2
import numpy as np
from rich.markup import escape
from rich.table import Table

from fpd_accel.bench.environment import describe
from fpd_accel.console import stdout
from fpd_accel.visualize import Picture

Spread = dict[str, float]  # median, low and high (quartiles)
Color = tuple[int, int, int]  # RGB, 0-255


class VariantReport(TypedDict):
    """The measurements of one variant at one batch size."""

    seconds: list[float]  # seconds per step, one value per round
    images_per_second: Spread  # over the rounds
    kernels: int  # of one step; on a CPU operators
    busy_seconds: float | None  # of one step, in which the GPU runs kernels or copies; None on a CPU
    memory_mb: float | None  # peak of a step, 10^6 bytes; None if unknown


class BatchReport(TypedDict):
    """The measurements at one batch size."""

    batch: int  # samples per step
    variants: dict[str, VariantReport]
    no_room: list[str]  # variants that ran out of memory
    ratios: dict[str, Spread]  # images/s of `a` over those of `b`, within a round; by "a/b"
    loss_difference: dict[str, float]  # largest relative difference from the first variant, before the first step
    stages: NotRequired[dict[str, float]]  # seconds per stage of `ours`, and "host gap"; absent if it was not measured
    host_ahead: NotRequired[bool | None]  # whether the stages are free of host time; None on a CPU
    roofline: NotRequired[dict[str, float]]  # see `roofline.summary`; "reached": share that `ours` reaches, if measured


class StepReport(TypedDict):
    """The result of `bench_step`."""

    bench: str  # "step"
    environment: dict[str, Any]  # see `environment.environment`; also device and threads
    settings: dict[str, Any]  # the fields of `StepBench`, device, precision and its reason, and loss_tolerance
    variants: dict[str, str]  # descriptions by name
    ceilings: dict[str, float]  # matmul_tflops in the precision, fp32_matmul_tflops, copy_gbytes per second
    batches: list[BatchReport]


HEIGHT = 420  # of a panel's bars, pixels
MARGIN = 70  # left of a panel's bars, pixels
TOP = 60  # height of the titles above the bars, pixels
BAR = 34  # width of a bar, pixels
GAP = 26  # between groups of bars, pixels
LEGEND = 190  # width of the legend, pixels
COLORS: dict[str, Color] = {
    "published": (90, 90, 90),
    "published_no_grad": (150, 150, 150),
    "eager": (222, 143, 5),
    "ours": (1, 115, 178),
    "ours_cached": (2, 158, 115),
}
# One colour per stage in `variants.STAGES`, plus "host gap".
STAGE_COLORS: tuple[Color, ...] = (
    (148, 148, 148), (86, 180, 233), (2, 158, 115), (1, 115, 178), (204, 120, 188), (222, 143, 5), (202, 145, 97),
    (213, 94, 0),
)  # fmt: skip
INK: Color = (30, 30, 30)  # of text and lines
PAPER = 255  # grey level of the background
HOST_GAP_MEANING = {
    "cuda": "time per step in which no kernel or copy runs",
    "cpu": "time of a step in the interleaved run minus the sum of its stages",
}


def show_step(report: StepReport) -> None:
    """Print the measurements."""
    settings = report["settings"]
    size = "x".join(map(str, settings["input_size"]))
    title = f"Step: {settings['teacher']} teaches {settings['student']}, {size}, eager, ours and ours_cached in "
    stdout.print(_variants_table(report, title + settings["precision"]))
    if _staged(report):
        stdout.print(_stages_table(report))
    for line in _notes(report):
        stdout.print(escape(line), soft_wrap=True)


def _variants_table(report: StepReport, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    work = "kernels" if report["settings"]["device"] == "cuda" else "operators"
    compared = ("ours\n÷ this", "ours\n÷ this,\nquartiles", "ours_cached\n÷ this", "ours_cached\n÷ this,\nquartiles")
    for name in ("batch", "variant", "images/s", "images/s,\nquartiles", *compared, work, "peak MB"):
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    for batch_report in report["batches"]:
        batch, batch_ratios = str(batch_report["batch"]), batch_report["ratios"]
        for name, result in batch_report["variants"].items():
            ratios = (batch_ratios.get(f"{ours}/{name}") for ours in ("ours", "ours_cached"))
            table.add_row(
                batch, name, *_format_spread(result["images_per_second"], ".4g"),
                *chain.from_iterable(_format_spread(ratio, ".2f") for ratio in ratios),
                str(result["kernels"]), "-" if result["memory_mb"] is None else f"{result['memory_mb']:,.0f}",
            )  # fmt: skip
        for name in batch_report["no_room"]:
            table.add_row(batch, name, "out of memory")
        table.add_section()
    return table


def _format_spread(spread: Spread | None, format_spec: str) -> tuple[str, str]:
    """Return the median and the quartiles as text."""
    if spread is None:
        return "", ""
    return f"{spread['median']:{format_spec}}", f"{spread['low']:{format_spec}} - {spread['high']:{format_spec}}"


def _stages_table(report: StepReport) -> Table:
    title = "Stages of ours, timed apart: ms, and % of the sum of all stages"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    batches = _staged(report)
    for batch_report in batches:
        table.add_column(f"batch {batch_report['batch']}", justify="right", no_wrap=True)
    for stage in batches[0]["stages"]:
        cells = [(each["stages"][stage], sum(each["stages"].values())) for each in batches]
        table.add_row(stage, *(f"{1e3 * seconds:.2f}  {100 * seconds / total:4.1f} %" for seconds, total in cells))
    table.add_section()
    table.add_row("a step, ms", *(f"{1e3 * _step_seconds(each):.2f}        " for each in batches))
    reached = (f"{100 * each['roofline']['reached']:.1f} %" for each in batches)
    table.add_row("share of the fused roofline reached", *reached)
    table.add_row("fused roofline, images/s", *(f"{each['roofline']['images_per_second']:.4g}" for each in batches))
    return table


def _staged(report: StepReport) -> list[BatchReport]:
    """Return the reports of batch sizes that have stages."""
    return [batch_report for batch_report in report["batches"] if "stages" in batch_report]


def _step_seconds(batch_report: BatchReport) -> float:
    """Return the median seconds of one step of `ours` in the interleaved timing."""
    return statistics.median(batch_report["variants"]["ours"]["seconds"])


def _notes(report: StepReport) -> list[str]:
    settings, ceilings = report["settings"], report["ceilings"]
    lines = [f"{name}: {description}" for name, description in report["variants"].items()]
    lines.append(f"precision of eager, ours and ours_cached: {settings['precision']} ({settings['precision_reason']})")
    fp32 = "" if settings["precision"] == "fp32" else f", {ceilings['fp32_matmul_tflops']:.4g} in fp32"
    lines.append(
        f"ceilings: matmul {ceilings['matmul_tflops']:.4g} TFLOP/s in {settings['precision']}{fp32}, "
        f"copy (read + written) {ceilings['copy_gbytes']:.4g} GB/s"
    )
    lines.append(
        "fused roofline: the step at these ceilings, if all other work were fused into layers and cost nothing"
    )
    for batch_report in report["batches"]:
        roofline = batch_report["roofline"]
        lines.append(
            f"batch {batch_report['batch']}: {roofline['gflops_per_image']:.4g} GFLOP and "
            f"{roofline['megabytes_per_image']:.4g} MB per image, "
            f"{100 * roofline['memory_bound_share']:.0f} % of the roofline time is memory-bound"
        )
    if _staged(report):
        lines.append(f"host gap: {HOST_GAP_MEANING[settings['device']]}")
        if settings["compile"] != "none":
            lines.append("stages are timed without the joint compiled graph of student and losses")
    for batch_report in report["batches"]:
        batch, differences = f"batch {batch_report['batch']}", batch_report["loss_difference"]
        if batch_report.get("host_ahead") is False:
            lines.append(f"{batch}: the GPU waited for the host, so stage times include host time")
        if batch_report["no_room"]:
            lines.append(f"{batch}: {', '.join(batch_report['no_room'])}: out of memory")
        if len(differences) > 1:
            reference, *others = differences
            largest = ", ".join(f"{name} {differences[name]:.1e}" for name in others)
            lines.append(
                f"{batch}: relative difference of first-step losses from {reference}: at most {largest} "
                f"(allowed {settings['loss_tolerance']:.0e})"
            )
    lines.append(describe(report["environment"]) + f"; {report['environment']['device']}")
    return lines


def draw_step(report: StepReport) -> Picture:
    """Draw bars of images/s for each variant and batch size and, beside them, the share of each stage of `ours`."""
    panels = [_rates_panel(report)]
    if _staged(report):
        panels.append(_stages_panel(report))
    return np.concatenate(panels, axis=1)


def _rates_panel(report: StepReport) -> Picture:
    names, settings = list(report["variants"]), report["settings"]
    width = len(names) * BAR + GAP  # of a group
    rates = [result["images_per_second"] for each in report["batches"] for result in each["variants"].values()]
    highest = max((rate["high"] for rate in rates), default=1.0)
    title = f"images/s, {settings['teacher']} teaches {settings['student']}, {settings['precision']}"
    canvas = _panel(len(report["batches"]) * width, title, f"{report['environment']['device']}")
    for number, batch_report in enumerate(report["batches"]):
        left = MARGIN + number * width + GAP // 2
        for place, name in enumerate(names):
            x = left + place * BAR
            if name not in batch_report["variants"]:
                _text(canvas, "OOM", (x, _level(0) - 6), 0.35)
                continue
            rate = batch_report["variants"][name]["images_per_second"]
            y, middle = _level(rate["median"] / highest), x + (BAR - 4) // 2
            cv2.rectangle(canvas, (x, y), (x + BAR - 4, _level(0)), COLORS[name], -1)
            cv2.line(canvas, (middle, _level(rate["low"] / highest)), (middle, _level(rate["high"] / highest)), INK, 1)
            _text(canvas, f"{rate['median']:.3g}", (x, y - 6), 0.35)
        _text(canvas, f"batch {batch_report['batch']}", (left, _level(0) + 18), 0.45)
    return _legend(canvas, [(name, COLORS[name]) for name in names])


def _stages_panel(report: StepReport) -> Picture:
    batches = _staged(report)
    width = BAR + 3 * GAP  # of a bar with its numbers
    subtitle = f"host gap: {HOST_GAP_MEANING[report['settings']['device']]}"
    canvas = _panel(len(batches) * width, "time per stage of ours, % of the sum of all stages", subtitle)
    colors = list(zip(batches[0]["stages"], STAGE_COLORS, strict=True))
    for number, batch_report in enumerate(batches):
        left = MARGIN + number * width + GAP
        total = sum(batch_report["stages"].values())
        below = 0.0
        for stage, color in colors:
            above = below + batch_report["stages"][stage] / total
            cv2.rectangle(canvas, (left, _level(above)), (left + BAR, _level(below)), color, -1)
            if above - below > 0.04:  # 16 pixels, enough for a number that does not overlap its neighbours
                _text(canvas, f"{100 * (above - below):.0f}", (left + BAR + 3, _level((above + below) / 2) + 4), 0.35)
            below = above
        _text(canvas, f"batch {batch_report['batch']}", (left - GAP // 2, _level(0) + 18), 0.45)
        _text(canvas, f"{1e3 * _step_seconds(batch_report):.4g} ms", (left - GAP // 2, _level(0) + 36), 0.4)
    return _legend(canvas, colors[::-1])


def _panel(width: int, title: str, subtitle: str) -> Picture:
    right = MARGIN + max(width, 9 * max(len(title), len(subtitle)) - LEGEND) + GAP
    canvas = np.full((TOP + HEIGHT + 50, right + LEGEND, 3), PAPER, np.uint8)
    _text(canvas, title, (MARGIN, 22), 0.5)
    _text(canvas, subtitle, (MARGIN, 42), 0.42)
    cv2.line(canvas, (MARGIN, _level(0)), (right, _level(0)), INK, 1)
    return canvas


def _level(share: float) -> int:
    """Return the pixel row for a height of `share` (0 to 1) of the highest bar; 24 px stay free above for its label."""
    return TOP + HEIGHT - round(share * (HEIGHT - 24))


def _legend(canvas: Picture, entries: Sequence[tuple[str, Color]]) -> Picture:
    """Draw a legend on the canvas, in place, and return the canvas."""
    left = canvas.shape[1] - LEGEND + 10
    for number, (name, color) in enumerate(entries):
        y = TOP + 20 + 22 * number
        cv2.rectangle(canvas, (left, y - 11), (left + 14, y + 3), color, -1)
        _text(canvas, name, (left + 22, y + 1), 0.45)
    return canvas


def _text(canvas: Picture, text: str, place: tuple[int, int], size: float) -> None:
    """Draw text on the canvas, in place, with its lower left corner at (x, y)."""
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, INK, 1, cv2.LINE_AA)
