"""The measurements of ``fpd-accel bench step`` as tables and as one picture."""

import statistics
from collections.abc import Sequence
from itertools import chain
from typing import Any

import cv2
import numpy as np
from rich.markup import escape
from rich.table import Table

from fpd_accel.bench.environment import describe
from fpd_accel.log import results
from fpd_accel.visualize import Picture

HEIGHT, MARGIN, TOP = 420, 70, 60  # pixels of a panel, of the axis beside it, and of the titles above it
BAR, GAP = 34, 26  # pixels of a bar, and between groups of bars
LEGEND = 190
COLORS = ((90, 90, 90), (150, 150, 150), (222, 143, 5), (1, 115, 178), (2, 158, 115))  # of variants, RGB
STAGE_COLORS = (
    (148, 148, 148), (86, 180, 233), (2, 158, 115), (1, 115, 178), (204, 120, 188), (222, 143, 5), (202, 145, 97),
    (213, 94, 0),
)  # fmt: skip
INK, PAPER = (30, 30, 30), 255
HOST_GAP = {
    "cuda": "the device has nothing to do",
    "cpu": "a step timed among the other variants, minus its stages",
}


def show_step(report: dict[str, Any]) -> None:
    """Print what was measured."""
    settings = report["settings"]
    title = f"Step: {settings['teacher']} teaches {settings['student']}, {_by(settings['input_size'])}, b, c and d in "
    results.print(_variants_table(report, title + settings["precision"]))
    if _staged(report):
        results.print(_stages_table(report))
    for line in _notes(report):
        results.print(escape(line), soft_wrap=True)


def _name(variant: str) -> str:
    return "a'" if variant == "a1" else variant


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _variants_table(report: dict[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    work = "kernels" if report["settings"]["device"] == "cuda" else "operators"
    compared = ("c / it", "quartiles", "d / it", "quartiles")
    for name in ("batch", "variant", "images/s", "quartiles", *compared, work, "peak MB"):
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)
    for one in report["batches"]:
        for name, found in one["variants"].items():
            ratios = (one["ratios"].get(f"{ours}/{name}") for ours in "cd")
            table.add_row(
                str(one["batch"]), _name(name), *_shown(found["images_per_second"], ".4g"),
                *chain.from_iterable(_shown(ratio, ".2f") for ratio in ratios),
                str(found["kernels"]), "-" if found["memory_mb"] is None else f"{found['memory_mb']:,.0f}",
            )  # fmt: skip
        for name in one["no_room"]:
            table.add_row(str(one["batch"]), _name(name), "no room")
        table.add_section()
    return table


def _shown(found: dict[str, float] | None, form: str) -> tuple[str, str]:
    if found is None:
        return "", ""
    return f"{found['median']:{form}}", f"{found['low']:{form}} - {found['high']:{form}}"


def _stages_table(report: dict[str, Any]) -> Table:
    table = Table(title="Stages of c, timed apart: ms, and % of a step", title_justify="left")
    table.add_column("", no_wrap=True)
    batches = _staged(report)
    for one in batches:
        table.add_column(f"batch {one['batch']}", justify="right", no_wrap=True)
    for stage in batches[0]["stages"]:
        cells = [(one["stages"][stage], _seconds(one)) for one in batches]
        table.add_row(stage, *(f"{1e3 * seconds:.2f}  {100 * seconds / whole:4.1f} %" for seconds, whole in cells))
    table.add_section()
    table.add_row("a step, ms", *(f"{1e3 * _seconds(one):.2f}        " for one in batches))
    table.add_row("reached of the fused roofline", *(f"{100 * one['roofline']['reached']:.1f} %" for one in batches))
    table.add_row("roofline, images/s", *(f"{one['roofline']['images_per_second']:.4g}" for one in batches))
    return table


def _staged(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The batch sizes for which there are stages."""
    return [one for one in report["batches"] if "stages" in one]


def _seconds(one: dict[str, Any]) -> float:
    """Of a whole step of c, as it was timed beside the others."""
    return statistics.median(one["variants"]["c"]["seconds"])


def _notes(report: dict[str, Any]) -> list[str]:
    settings, ceilings = report["settings"], report["ceilings"]
    lines = [f"{_name(name)}: {what}" for name, what in report["variants"].items()]
    lines.append(f"precision of b, c and d {settings['precision']}: {settings['precision_reason']}")
    lines.append(
        f"ceilings: {ceilings['matmul_tflops']:.4g} TFLOP/s of matrix products in {settings['precision']}, "
        f"{ceilings['fp32_matmul_tflops']:.4g} in fp32, {ceilings['copy_gbytes']:.4g} GB/s of copies"
    )
    for one in report["batches"]:
        roofline = one["roofline"]
        lines.append(
            f"batch {one['batch']}: {roofline['gflops_per_image']:.4g} GFLOP and {roofline['megabytes_per_image']:.4g} "
            f"MB per image, {100 * roofline['memory_bound_share']:.0f} % of the roofline's time bound by memory"
        )
    if _staged(report):
        lines.append(f"host gap: {HOST_GAP[settings['device']]}")
    if _staged(report) and settings["compile"] != "none":
        lines.append("stages are those of the step without the graphs of student and losses")
    lines += [
        f"batch {one['batch']}: the device caught up with the host, whose time is in the stages"
        for one in _staged(report)
        if one["host_ahead"] is False
    ]
    for one in report["batches"]:
        if one["no_room"]:
            names = ", ".join(map(_name, one["no_room"]))
            lines.append(f"batch {one['batch']}: {names}: the device's memory does not suffice")
        unchecked = [name for name in one["variants"] if name in "cd" and name not in one["gates"]]
        if unchecked:
            lines.append(
                f"batch {one['batch']}: {', '.join(unchecked)}: no room to compare with a; compared in float64 alone"
            )
    gates = [("c against a in float64", report["exact_gate"])]
    gates += [
        (f"{name} against a at batch {one['batch']}, as timed", gate)
        for one in report["batches"]
        for name, gate in one["gates"].items()
    ]
    lines += [f"{which}, relative: {_agreement(gate)}" for which, gate in gates if gate is not None]
    lines.append(describe(report["environment"]) + f"; {report['environment']['device']}")
    return lines


def _agreement(gate: dict[str, Any]) -> str:
    loss, worst = max(gate["losses"].values()), gate["worst"]
    text = (
        f"loss {loss:.1e} (allowed {gate['allowed_loss']:.0e}), gradient {gate['gradient']:.1e} (allowed "
        f"{gate['allowed_gradient']:.1e}), of {worst['parameter']} {worst['error']:.1e}"
    )
    return text + (f"; gradient of a plain step {gate['plain_gradient']:.1e}" if "plain_gradient" in gate else "")


def draw_step(report: dict[str, Any]) -> Picture:
    """Bars of images/s for each variant and batch; beside them the stages of ours, stacked."""
    panels = [_rates_panel(report)]
    if _staged(report):
        panels.append(_stages_panel(report))
    return np.concatenate(panels, axis=1)


def _rates_panel(report: dict[str, Any]) -> Picture:
    names = list(report["variants"])
    nothing = {"median": 0.0, "low": 0.0, "high": 0.0}  # of a variant for which there was no room
    groups = [
        [one["variants"].get(name, {"images_per_second": nothing})["images_per_second"] for name in names]
        for one in report["batches"]
    ]
    highest = max((rate["high"] for group in groups for rate in group), default=0.0) or 1.0
    settings = report["settings"]
    title = f"images/s, {settings['teacher']} teaches {settings['student']}, {settings['precision']}"
    canvas = _panel(len(groups) * (len(names) * BAR + GAP), title, f"{report['environment']['device']}")
    for number, (group, one) in enumerate(zip(groups, report["batches"], strict=True)):
        left = MARGIN + number * (len(names) * BAR + GAP) + GAP // 2
        for place, (name, rate) in enumerate(zip(names, group, strict=True)):
            x, y = left + place * BAR, _level(rate["median"] / highest)
            cv2.rectangle(canvas, (x, y), (x + BAR - 4, _level(0)), _color(name), -1)
            middle = x + (BAR - 4) // 2
            cv2.line(canvas, (middle, _level(rate["low"] / highest)), (middle, _level(rate["high"] / highest)), INK, 1)
            _text(canvas, f"{rate['median']:.3g}", (x, y - 6), 0.35)
        _text(canvas, f"batch {one['batch']}", (left, _level(0) + 18), 0.45)
    return _legend(canvas, [(_name(name), _color(name)) for name in names])


def _stages_panel(report: dict[str, Any]) -> Picture:
    bars = [(one["batch"], one["stages"], _seconds(one)) for one in _staged(report)]
    wide, gap = BAR + 3 * GAP, HOST_GAP[report["settings"]["device"]]
    canvas = _panel(len(bars) * wide, "where the time of c goes, % of all stages", f"host gap: {gap}")
    stages = list(bars[0][1])
    for number, (batch, seconds, whole) in enumerate(bars):
        left, total, below = MARGIN + number * wide + GAP, sum(seconds.values()), 0.0
        for stage, color in zip(stages, STAGE_COLORS, strict=True):
            above = below + seconds[stage] / total
            cv2.rectangle(canvas, (left, _level(above)), (left + BAR, _level(below)), color, -1)
            if above - below > 0.04:
                _text(canvas, f"{100 * (above - below):.0f}", (left + BAR + 3, _level((above + below) / 2) + 4), 0.35)
            below = above
        _text(canvas, f"batch {batch}", (left - GAP // 2, _level(0) + 18), 0.45)
        _text(canvas, f"{1e3 * whole:.4g} ms", (left - GAP // 2, _level(0) + 36), 0.4)
    return _legend(canvas, list(zip(stages, STAGE_COLORS, strict=True))[::-1])


def _panel(width: int, title: str, subtitle: str) -> Picture:
    least = MARGIN + max(width, 9 * max(len(title), len(subtitle)) - LEGEND) + GAP
    canvas = np.full((TOP + HEIGHT + 50, least + LEGEND, 3), PAPER, np.uint8)
    _text(canvas, title, (MARGIN, 22), 0.5)
    _text(canvas, subtitle, (MARGIN, 42), 0.42)
    cv2.line(canvas, (MARGIN, _level(0)), (least, _level(0)), INK, 1)
    return canvas


def _level(share: float) -> int:
    """The row of a share of the highest bar; there is room for a number above it."""
    return TOP + HEIGHT - round(share * (HEIGHT - 24))


def _color(variant: str) -> tuple[int, int, int]:
    return COLORS[("a", "a1", "b", "c", "d").index(variant)]


def _legend(canvas: Picture, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> Picture:
    left = canvas.shape[1] - LEGEND + 10
    for number, (name, color) in enumerate(entries):
        y = TOP + 20 + 22 * number
        cv2.rectangle(canvas, (left, y - 11), (left + 14, y + 3), color, -1)
        _text(canvas, name, (left + 22, y + 1), 0.45)
    return canvas


def _text(canvas: Picture, text: str, place: tuple[int, int], size: float) -> None:
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, INK, 1, cv2.LINE_AA)
