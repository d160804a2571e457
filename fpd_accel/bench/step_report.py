"""The measurements of `fpd-accel bench step` as tables and as one picture."""

import statistics
from collections.abc import Iterable
from itertools import chain, count
from typing import Any

import cv2
import numpy as np
from rich.table import Column, Table

from fpd_accel.bench import VARIANTS
from fpd_accel.bench.environment import describe
from fpd_accel.console import stdout
from fpd_accel.visualize import Picture

Report = dict[str, Any]  # as `step.bench_step` returns it, or one of its batch sizes
Color = tuple[int, int, int]  # RGB, 0-255
HEIGHT = 420  # of a panel's bars, pixels
MARGIN = 70  # left of a panel's bars, pixels
TOP = 60  # height of the titles above the bars, pixels
BAR = 34  # width of a bar, pixels
GAP = 26  # between groups of bars, pixels
LEGEND = 190  # width of the legend, pixels
GREYS = (90, 90, 90), (150, 150, 150)
COLORS = dict(zip(VARIANTS, (*GREYS, (222, 143, 5), (1, 115, 178), (2, 158, 115)), strict=True))
# One colour per stage in `variants.STAGES`, plus "host gap".
STAGE_COLORS: list[Color] = [(148, 148, 148), (86, 180, 233), (2, 158, 115), (1, 115, 178), (204, 120, 188)]
STAGE_COLORS += [(222, 143, 5), (202, 145, 97), (213, 94, 0)]
INK: Color = (30, 30, 30)  # of text and lines
PAPER = 255  # grey level of the background
HOST_GAP_MEANING = {
    "cuda": "time per step in which no kernel or copy runs",
    "cpu": "time of a step in the interleaved run minus the sum of its stages",
}


def show_step(report: Report) -> None:
    """Print the measurements."""
    stdout.print(_variants_table(report))
    if _staged(report):
        stdout.print(_stages_table(_staged(report)))
    for line in _notes(report):
        stdout.print(line, soft_wrap=True, markup=False)


def _variants_table(report: Report) -> Table:
    settings = report["settings"]
    size, work = "x".join(map(str, settings["input_size"])), "kernels" if settings["device"] == "cuda" else "operators"
    title = f"Step: {settings['teacher']} teaches {settings['student']}, {size}, "
    title += f"eager, ours and ours_cached in {settings['precision']}"
    compared = ("ours\n÷ this", "ours\n÷ this,\nquartiles", "ours_cached\n÷ this", "ours_cached\n÷ this,\nquartiles")
    names = ("batch", "variant", "images/s", "images/s,\nquartiles", *compared, work, "peak MB")
    columns = [Column(name, justify="left" if name == "variant" else "right", no_wrap=True) for name in names]
    table = Table(*columns, title=title, title_justify="left")
    for measured in report["batches"]:
        batch = str(measured["batch"])
        for name, result in measured["variants"].items():
            ratios = (measured["ratios"].get(f"{ours}/{name}") for ours in ("ours", "ours_cached"))
            table.add_row(
                batch, name, *_format_spread(result["images_per_second"], ".4g"),
                *chain.from_iterable(_format_spread(ratio, ".2f") for ratio in ratios),
                str(result["kernels"]), "-" if result["memory_mb"] is None else f"{result['memory_mb']:,.0f}",
            )  # fmt: skip
        for name in measured["no_room"]:
            table.add_row(batch, name, "out of memory")
        table.add_section()
    return table


def _format_spread(spread: dict[str, float] | None, digits: str) -> tuple[str, str]:
    """Return the median and the quartiles as text."""
    if spread is None:
        return "", ""
    return f"{spread['median']:{digits}}", f"{spread['low']:{digits}} - {spread['high']:{digits}}"


def _stages_table(batches: list[Report]) -> Table:
    columns = [Column(f"batch {each['batch']}", justify="right", no_wrap=True) for each in batches]
    title = "Stages of ours, timed apart: ms, and % of the sum of all stages"
    table = Table(Column("", no_wrap=True), *columns, title=title, title_justify="left")
    for stage in batches[0]["stages"]:
        cells = [(each["stages"][stage], sum(each["stages"].values())) for each in batches]
        table.add_row(stage, *(f"{1e3 * seconds:.2f}  {100 * seconds / total:4.1f} %" for seconds, total in cells))
    table.add_section()
    table.add_row("a step, ms", *(f"{1e3 * _step_seconds(each):.2f}        " for each in batches))
    reached = (f"{100 * each['roofline']['reached']:.1f} %" for each in batches)
    table.add_row("share of the fused roofline reached", *reached)
    table.add_row("fused roofline, images/s", *(f"{each['roofline']['images_per_second']:.4g}" for each in batches))
    return table


def _staged(report: Report) -> list[Report]:
    """Return the batch sizes that have stages."""
    return [measured for measured in report["batches"] if "stages" in measured]


def _step_seconds(measured: Report) -> float:
    """Return the median seconds of one step of `ours` in the interleaved timing."""
    return statistics.median(measured["variants"]["ours"]["seconds"])


def _notes(report: Report) -> list[str]:
    settings, ceilings = report["settings"], report["ceilings"]
    fp32 = "" if settings["precision"] == "fp32" else f", {ceilings['fp32_matmul_tflops']:.4g} in fp32"
    lines = [
        *(f"{name}: {description}" for name, description in report["variants"].items()),
        f"precision of eager, ours and ours_cached: {settings['precision']} ({settings['precision_reason']})",
        f"ceilings: matmul {ceilings['matmul_tflops']:.4g} TFLOP/s in {settings['precision']}{fp32}, "
        f"copy (read + written) {ceilings['copy_gbytes']:.4g} GB/s",
        "fused roofline: the step at these ceilings, if all other work were fused into layers and cost nothing",
    ]
    for measured in report["batches"]:
        roofline = measured["roofline"]
        work = f"{roofline['gflops_per_image']:.4g} GFLOP and {roofline['megabytes_per_image']:.4g} MB per image"
        bound = f"{100 * roofline['memory_bound_share']:.0f} % of the roofline time is memory-bound"
        lines.append(f"batch {measured['batch']}: {work}, {bound}")
    if _staged(report):
        lines.append(f"host gap: {HOST_GAP_MEANING[settings['device']]}")
        if settings["compile"] != "none":
            lines.append("stages are timed without the joint compiled graph of student and losses")
    for measured in report["batches"]:
        batch, differences = f"batch {measured['batch']}", measured["loss_difference"]
        if measured.get("host_ahead") is False:
            lines.append(f"{batch}: the GPU waited for the host, so stage times include host time")
        if measured["no_room"]:
            lines.append(f"{batch}: {', '.join(measured['no_room'])}: out of memory")
        if len(differences) > 1:
            reference, *others = differences
            largest = ", ".join(f"{name} {differences[name]:.1e}" for name in others)
            compared = f"{batch}: relative difference of first-step losses from {reference}"
            lines.append(f"{compared}: at most {largest} (allowed {settings['loss_tolerance']:.0e})")
    return [*lines, describe(report["environment"]) + f"; {report['environment']['device']}"]


def draw_step(report: Report) -> Picture:
    """Draw bars of images/s for each variant and batch size and, beside them, the share of each stage of `ours`."""
    panels = [_rates_panel(report), *([_stages_panel(report)] if _staged(report) else [])]
    return np.concatenate(panels, axis=1)


def _rates_panel(report: Report) -> Picture:
    names, settings, batches = list(report["variants"]), report["settings"], report["batches"]
    width = len(names) * BAR + GAP  # of a group
    rates = [result["images_per_second"] for measured in batches for result in measured["variants"].values()]
    highest = max((rate["high"] for rate in rates), default=1.0)
    title = f"images/s, {settings['teacher']} teaches {settings['student']}, {settings['precision']}"
    legend = ((name, COLORS[name]) for name in names)
    canvas = _panel(len(batches) * width, title, report["environment"]["device"], legend)
    for left, measured in zip(count(MARGIN + GAP // 2, width), batches, strict=False):
        for x, name in zip(count(left, BAR), names, strict=False):
            if name not in measured["variants"]:
                _text(canvas, "OOM", (x, _level(0) - 6), 0.35)
                continue
            rate = measured["variants"][name]["images_per_second"]
            y, middle = _level(rate["median"] / highest), x + (BAR - 4) // 2
            cv2.rectangle(canvas, (x, y), (x + BAR - 4, _level(0)), COLORS[name], -1)
            cv2.line(canvas, (middle, _level(rate["low"] / highest)), (middle, _level(rate["high"] / highest)), INK, 1)
            _text(canvas, f"{rate['median']:.3g}", (x, y - 6), 0.35)
        _text(canvas, f"batch {measured['batch']}", (left, _level(0) + 18), 0.45)
    return canvas


def _stages_panel(report: Report) -> Picture:
    batches, width = _staged(report), BAR + 3 * GAP  # of a bar with its numbers
    subtitle = f"host gap: {HOST_GAP_MEANING[report['settings']['device']]}"
    colors = list(zip(batches[0]["stages"], STAGE_COLORS, strict=True))
    title = "time per stage of ours, % of the sum of all stages"
    canvas = _panel(len(batches) * width, title, subtitle, reversed(colors))
    for left, measured in zip(count(MARGIN + GAP, width), batches, strict=False):
        total, below = sum(measured["stages"].values()), 0.0
        for stage, color in colors:
            above = below + measured["stages"][stage] / total
            cv2.rectangle(canvas, (left, _level(above)), (left + BAR, _level(below)), color, -1)
            if above - below > 0.04:  # 16 pixels, enough for a number that does not overlap its neighbours
                _text(canvas, f"{100 * (above - below):.0f}", (left + BAR + 3, _level((above + below) / 2) + 4), 0.35)
            below = above
        _text(canvas, f"batch {measured['batch']}", (left - GAP // 2, _level(0) + 18), 0.45)
        _text(canvas, f"{1e3 * _step_seconds(measured):.4g} ms", (left - GAP // 2, _level(0) + 36), 0.4)
    return canvas


def _panel(width: int, title: str, subtitle: str, legend: Iterable[tuple[str, Color]]) -> Picture:
    """Return a panel with titles, base line and legend, and room for bars of this width in all."""
    right = MARGIN + max(width, 9 * max(len(title), len(subtitle)) - LEGEND) + GAP
    canvas = np.full((TOP + HEIGHT + 50, right + LEGEND, 3), PAPER, np.uint8)
    _text(canvas, title, (MARGIN, 22), 0.5)
    _text(canvas, subtitle, (MARGIN, 42), 0.42)
    cv2.line(canvas, (MARGIN, _level(0)), (right, _level(0)), INK, 1)
    for y, (name, color) in enumerate(legend):
        _text(canvas, name, (right + 32, TOP + 21 + 22 * y), 0.45)
        cv2.rectangle(canvas, (right + 10, TOP + 9 + 22 * y), (right + 24, TOP + 23 + 22 * y), color, -1)
    return canvas


def _level(share: float) -> int:
    """Return the pixel row for a height of `share` (0 to 1) of the highest bar; 24 px stay free above for its label."""
    return TOP + HEIGHT - round(share * (HEIGHT - 24))


def _text(canvas: Picture, text: str, place: tuple[int, int], size: float) -> None:
    """Draw text on the canvas, in place, with its lower left corner at (x, y)."""
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, INK, 1, cv2.LINE_AA)
