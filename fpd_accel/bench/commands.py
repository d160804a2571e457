"""Command line of `fpd-accel bench`. Heavy modules are imported only when a command runs."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fpd_accel.bench import VARIANTS
from fpd_accel.errors import BenchError, DataError
from fpd_accel.files import prepare_file, write_whole


def add_commands(bench: argparse.ArgumentParser) -> None:
    """Add `data`, `eval`, `step` and `scale`; each sets `run`, a function of the parsed arguments."""
    commands = bench.add_subparsers(dest="benchmark", required=True, metavar="benchmark")
    for add in (_add_data, _add_eval, _add_step):
        add(commands).add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON")
    # Accept all of its former options without naming them: no prefix makes an option of them.
    scale = commands.add_parser("scale", help="moved to tests/scale/scale.py", prefix_chars="\0", add_help=False)
    scale.add_argument("options", nargs="*", help="options that the script takes")
    scale.set_defaults(run=_scale)


def _add_data(commands: Any) -> argparse.ArgumentParser:
    data = commands.add_parser("data", help="opening, memory, resuming and rates of a dataset, by its size")
    add = data.add_argument
    add("--people", type=int, nargs="+", metavar="N", help="sizes to generate (default: 10000 1000000)")
    add("--data", nargs="+", metavar="SHARDS", help="datasets of `fpd-accel prepare` to measure instead")
    add("--cache", type=Path, metavar="DIR", help="keep generated data in DIR (default: delete them)")
    add("--batch", type=int, default=32, help="samples per batch (default: 32)")
    add("--batches", type=int, default=100, help="batches to measure rates over (default: 100)")
    data.set_defaults(run=_data)
    return data


def _add_eval(commands: Any) -> argparse.ArgumentParser:
    evaluation = commands.add_parser("eval", help="flip, targets, decoding, NMS and AP, against the published loops")
    add = evaluation.add_argument
    add("--people", type=int, default=2000, metavar="N", help="boxes to generate (default: 2000)")
    add("--batch", type=int, default=32, help="samples per batch of heatmaps (default: 32)")
    add("--rounds", type=int, default=5, help="rounds that time both in turns (default: 5)")
    evaluation.set_defaults(run=_eval)
    return evaluation


def _add_step(commands: Any) -> argparse.ArgumentParser:
    step = commands.add_parser("step", help="our training step beside the published one: rates, stages, roofline")
    add, size = step.add_argument, ("HEIGHT", "WIDTH")
    devices, precisions, compiled = ("auto", "cpu", "cuda"), ("auto", "fp32", "bf16"), ("none", "units", "whole")
    add("--student", default="hrnet_w32", metavar="ARCH", help="network to train (default: hrnet_w32)")
    add("--teacher", default="hrnet_w48", metavar="ARCH", help="network to learn from (default: hrnet_w48)")
    add("--input", type=int, nargs=2, default=(256, 192), metavar=size, help="pixels (default: 256 192)")
    add("--batch", type=int, nargs="+", metavar="N", help="samples of a step (default: 4 8; on a GPU 24 to 512)")
    add("--rounds", type=int, default=5, help="rounds of all variants (default: 5)")
    add("--steps", type=int, help="steps of each variant in a round (default: 1; on a GPU 20)")
    add("--device", choices=devices, default="auto", help="device (default: auto, a GPU if there is one)")
    words = "precision of eager and ours (default: auto, bf16 if the hardware multiplies it)"
    add("--precision", choices=precisions, default="auto", help=words)
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="variants to time (default: all)")
    words = "torch.compile of student and teacher in ours (default: none)"
    add("--compile", choices=compiled, default="none", help=words)
    add("--picture", type=Path, metavar="FILE.png", help="draw rates and stages as bars")
    step.set_defaults(run=_step)
    return step


def _data(arguments: argparse.Namespace) -> None:
    from fpd_accel.bench.crowd import PHOTOGRAPHED, PHOTOGRAPHS, draw_crowd
    from fpd_accel.bench.data import bench_data, show_data
    from fpd_accel.data.shards import Shards

    if arguments.data and (arguments.people or arguments.cache):
        raise DataError("--data does not go with --people and --cache, which are for generated people; leave them out")
    _check(arguments, "people", "batch", "batches")
    with TemporaryDirectory(prefix="fpd-bench-") as temporary:
        folder, size = arguments.cache or Path(temporary), {"batch": arguments.batch, "batches": arguments.batches}
        if arguments.data:
            report = bench_data([Shards(path) for path in arguments.data], **size, folder=folder)
        else:
            datasets = [draw_crowd(folder, number) for number in arguments.people or [10_000, 1_000_000]]
            photographs = [draw_crowd(folder, PHOTOGRAPHED, pictures=PHOTOGRAPHS)]
            report = bench_data(datasets, **size, photographs=photographs, folder=folder)
    _finish(arguments, report, show_data)


def _eval(arguments: argparse.Namespace) -> None:
    from fpd_accel.bench.evaluation import bench_eval, show_eval

    _check(arguments, "people", "batch", "rounds")
    report = bench_eval(people=arguments.people, batch=arguments.batch, rounds=arguments.rounds)
    _finish(arguments, report, show_eval)


def _scale(arguments: argparse.Namespace) -> None:  # noqa: ARG001
    raise BenchError(
        "bench scale: moved out of the package; in a checkout of the repository run "
        "`python tests/scale/scale.py` with the same options (--help lists them)"
    )


def _step(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise PyTorch's profiler prints when it starts and stops
    from fpd_accel.bench.step import bench_step
    from fpd_accel.bench.step_report import draw_step, show_step
    from fpd_accel.bench.variants import StepBench
    from fpd_accel.visualize import save_picture

    picture = arguments.picture
    _check(arguments, "batch", "rounds", "steps")
    if picture is not None:
        if picture.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise DataError(f"{picture}: a picture is a .png or .jpg file")
        prepare_file(picture, option="--picture")
    same = ("student", "teacher", "rounds", "steps", "device", "precision", "compile")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in same}
    options |= {"input_size": tuple(arguments.input), "variants": tuple(dict.fromkeys(arguments.variants))}
    report = bench_step(StepBench(**options, batches=tuple(arguments.batch) if arguments.batch else None))
    _finish(arguments, report, show_step)
    if picture is not None:
        save_picture(picture, draw_step(report))


def _check(arguments: argparse.Namespace, *names: str) -> None:
    """Check, before anything is measured, that these numbers are positive and that the JSON file can be written."""
    for name in names:
        given = getattr(arguments, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise DataError(f"--{name} {number}: at least 1")
    if arguments.json is not None:
        prepare_file(arguments.json, option="--json")


def _finish(arguments: argparse.Namespace, report: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
    show(report)
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(report, indent=2) + "\n")
