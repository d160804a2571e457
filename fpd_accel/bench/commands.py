"""``fpd-accel bench``: its commands and their options. Nothing heavy is imported before one is chosen."""

import argparse
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fpd_accel.bench.scale_options import PROCESS_ROUNDS, Scale
from fpd_accel.errors import DataError
from fpd_accel.files import prepare_file, write_whole

VARIANTS = ("a", "a1", "b", "c", "d")  # of a step; see contestants.py


def add_commands(bench: argparse.ArgumentParser) -> None:
    """``data``, ``eval``, ``scale`` and ``step``, each with ``run``, which takes the parsed arguments."""
    whats = bench.add_subparsers(dest="what", required=True, metavar="what")
    for add in (_add_data, _add_eval, _add_scale, _add_step):
        add(whats).add_argument("--json", type=Path, metavar="FILE", help="the measurements to write, for programs")


def _add_data(whats: Any) -> argparse.ArgumentParser:
    data = whats.add_parser("data", help="opening, memory, resuming and rates of a dataset, by its size")
    data.add_argument(
        "--people", type=int, nargs="+", metavar="N", help="sizes of the datasets to generate (default: 10000 1000000)"
    )
    data.add_argument("--data", nargs="+", metavar="SHARDS", help="your own instead, written by fpd-accel prepare")
    data.add_argument("--cache", type=Path, metavar="DIR", help="keep what is generated there (default: nowhere)")
    data.add_argument("--batch", type=int, default=32, help="people per batch (default: 32)")
    data.add_argument("--batches", type=int, default=100, help="batches to measure rates over (default: 100)")
    data.set_defaults(run=_data)
    return data


def _add_eval(whats: Any) -> argparse.ArgumentParser:
    around = whats.add_parser("eval", help="flip, targets, decoding, NMS and AP, against the published loops")
    around.add_argument("--people", type=int, default=2000, metavar="N", help="boxes to generate (default: 2000)")
    around.add_argument("--batch", type=int, default=32, help="people per batch of heatmaps (default: 32)")
    around.add_argument("--rounds", type=int, default=5, help="of both in turns (default: 5)")
    around.set_defaults(run=_eval)
    return around


def _add_scale(whats: Any) -> argparse.ArgumentParser:
    scale = whats.add_parser("scale", help="how time grows with processes, keypoints, pixels and people")
    default = Scale()
    for name, sizes, what in (
        ("processes", default.processes, "that distil together"),
        ("joints", default.joints, "keypoints of a person"),
        ("people", default.people, "to open and to order"),
        ("scored", default.scored, "people to evaluate"),
    ):
        words = f"{what} (default: {' '.join(map(str, sizes))})"
        scale.add_argument(f"--{name}", type=int, nargs="+", metavar="N", default=sizes, help=words)
    inputs = [f"{height}x{width}" for height, width in default.inputs]
    words = f"sizes of crops (default: {' '.join(inputs)})"
    scale.add_argument("--inputs", nargs="+", metavar="HxW", default=inputs, help=words)
    for name, number, what in (
        ("batch", default.batch, "people per batch"),
        ("steps", default.steps, "of each number of processes"),
        ("rounds", default.rounds, f"of all sizes in turns; of processes at most {PROCESS_ROUNDS}, of evaluation one"),
    ):
        scale.add_argument(f"--{name}", type=int, default=number, help=f"{what} (default: {number})")
    scale.add_argument("--cache", type=Path, metavar="DIR", help="keep the people generated there (default: nowhere)")
    scale.set_defaults(run=_scale)
    return scale


def _add_step(whats: Any) -> argparse.ArgumentParser:
    step = whats.add_parser("step", help="a training step of ours beside the published one: rates, stages, roofline")
    step.add_argument("--student", default="hrnet_w32", metavar="ARCH", help="(default: hrnet_w32)")
    step.add_argument("--teacher", default="hrnet_w48", metavar="ARCH", help="(default: hrnet_w48)")
    step.add_argument(
        "--input", type=int, nargs=2, default=(256, 192), metavar=("HEIGHT", "WIDTH"), help="pixels (default: 256 192)"
    )
    step.add_argument(
        "--batch", type=int, nargs="+", metavar="N", help="people of a step (default: 4 8; on a GPU 24 to 512)"
    )
    step.add_argument("--rounds", type=int, default=5, help="of all variants (default: 5)")
    step.add_argument("--steps", type=int, help="of each variant in a round (default: 1; on a GPU 20)")
    step.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    step.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of b, c and d (default: what is fast)"
    )
    step.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    step.add_argument(
        "--compile",
        choices=("none", "units", "whole"),
        default="none",
        help="in c and d, of both networks (default: none)",
    )
    step.add_argument("--picture", type=Path, metavar="FILE.png", help="bars of rates and stages to write")
    step.set_defaults(run=_step)
    return step


def _data(arguments: argparse.Namespace) -> None:
    from fpd_accel.bench.crowd import PHOTOGRAPHED, PHOTOGRAPHS, draw_crowd
    from fpd_accel.bench.data import bench_data, show_data
    from fpd_accel.data.shards import Shards

    if arguments.data and (arguments.people or arguments.cache):
        raise DataError("--data does not go with --people and --cache, which are for generated people; leave them out")
    people = arguments.people or [10_000, 1_000_000]
    for option, least in (("--people", min(people)), ("--batch", arguments.batch), ("--batches", arguments.batches)):
        if least < 1:
            raise DataError(f"{option} {least}: at least 1")
    _prepare_json(arguments)
    with TemporaryDirectory(prefix="fpd-bench-") as temporary:
        folder = arguments.cache or Path(temporary)
        photographs = None
        if arguments.data:
            datasets = [Shards(path) for path in arguments.data]
        else:
            datasets = [draw_crowd(folder, number) for number in people]
            photographs = [draw_crowd(folder, PHOTOGRAPHED, pictures=PHOTOGRAPHS)]
        report = bench_data(
            datasets, batch=arguments.batch, batches=arguments.batches, photographs=photographs, folder=folder
        )
    show_data(report)
    _write_json(arguments, report)


def _eval(arguments: argparse.Namespace) -> None:
    from fpd_accel.bench.evaluation import bench_eval, show_eval

    numbers = {name: getattr(arguments, name) for name in ("people", "batch", "rounds")}
    _at_least_one(numbers)
    _prepare_json(arguments)
    report = bench_eval(**numbers)
    show_eval(report)
    _write_json(arguments, report)


def _scale(arguments: argparse.Namespace) -> None:
    from fpd_accel.bench.scale import bench_scale, read_inputs, show_scale

    sizes = {name: getattr(arguments, name) for name in ("processes", "joints", "people", "scored")}
    numbers = {name: getattr(arguments, name) for name in ("batch", "steps", "rounds")}
    _at_least_one(numbers | {name: min(values) for name, values in sizes.items()})
    scale = Scale(**sizes, **numbers, inputs=read_inputs(arguments.inputs))
    _prepare_json(arguments)
    with TemporaryDirectory(prefix="fpd-bench-") as temporary:
        report = bench_scale(scale, arguments.cache or Path(temporary))
    show_scale(report)
    _write_json(arguments, report)


def _at_least_one(numbers: dict[str, int]) -> None:
    for option, number in numbers.items():
        if number < 1:
            raise DataError(f"--{option} {number}: at least 1")


def _step(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, else, prints that it starts and stops
    from fpd_accel.bench.contestants import StepBench
    from fpd_accel.bench.step import bench_step
    from fpd_accel.bench.step_report import draw_step, show_step
    from fpd_accel.visualize import save_picture

    batches, steps = tuple(arguments.batch or ()), arguments.steps
    counts = (("--batch", min(batches, default=1)), ("--rounds", arguments.rounds), ("--steps", steps))
    for option, given in counts:
        if given is not None and given < 1:
            raise DataError(f"{option} {given}: at least 1")
    if arguments.picture is not None and arguments.picture.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise DataError(f"{arguments.picture}: a picture is a .png or .jpg file")
    _prepare_json(arguments)
    if arguments.picture is not None:
        prepare_file(arguments.picture, option="--picture")
    bench = StepBench(
        student=arguments.student,
        teacher=arguments.teacher,
        input_size=tuple(arguments.input),
        batches=batches or None,
        rounds=arguments.rounds,
        steps=steps,
        device=arguments.device,
        precision=arguments.precision,
        variants=tuple(dict.fromkeys(arguments.variants)),
        compile=arguments.compile,
    )
    report = bench_step(bench)
    show_step(report)
    _write_json(arguments, report)
    if arguments.picture is not None:
        save_picture(arguments.picture, draw_step(report))


def _prepare_json(arguments: argparse.Namespace) -> None:
    """Before anything is measured: the file can be written."""
    if arguments.json is not None:
        prepare_file(arguments.json, option="--json")


def _write_json(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(report, indent=2) + "\n")
