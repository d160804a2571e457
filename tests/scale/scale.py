"""Measure how time grows with processes, keypoints, pixels and people.

    python tests/scale/scale.py --json scale.json
    python tests/scale/scale.py --help

Each row is one piece of work at several sizes, in turns, and the exponent of its growth: the slope of the logarithm of
time over that of size. 1 is linear; faster growth is marked. For processes the time is that of one sample of a tiny
distillation with as many samples per process, so -1 would be perfect.
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fpd_accel.bench.crowd import draw_crowd
from fpd_accel.bench.environment import describe, environment
from fpd_accel.bench.variants import draw_batch
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.schema import Evaluate
from fpd_accel.console import fail, stdout, track
from fpd_accel.data.batch import Batch
from fpd_accel.data.shards import Shards
from fpd_accel.decode import decode_heatmaps
from fpd_accel.errors import BenchError, DataError, UserError
from fpd_accel.evaluation.coco_results import Predictions, coco_results, ground_truth, ground_truth_predictions
from fpd_accel.files import prepare_file, write_whole
from fpd_accel.losses import heatmap_mse
from fpd_accel.metrics import average_precision
from fpd_accel.models.create import create_model
from fpd_accel.models.tiny import TinyPose
from fpd_accel.outputs import STRIDE
from fpd_accel.skeleton import COCO
from fpd_accel.training.distiller import Distiller
from fpd_accel.training.teacher import Teacher

STUDENT, TEACHER = "tiny_w8", "tiny_w16"
INPUT_SIZE = (256, 192)  # (height, width) of a crop, pixels
TIMEOUT = 600  # seconds after which training processes count as hanging
FASTER_THAN_LINEAR = 1.15  # exponent that exceeds 1 by more than noise and caches explain
NOISE = 2.0  # pixels, standard deviation between labels and predictions
PROCESS_ROUNDS = 3  # at most, since starting the processes takes ten seconds


@dataclass(frozen=True)
class Scale:
    """The sizes to measure."""

    processes: Sequence[int] = (1, 2)
    joints: Sequence[int] = (17, 133)  # COCO's body, COCO-WholeBody
    inputs: Sequence[tuple[int, int]] = ((256, 192), (384, 288))  # (height, width), pixels
    people: Sequence[int] = (10_000, 1_000_000)  # to open and to order
    scored: Sequence[int] = (10_000, 100_000)  # to evaluate
    batch: int = 8  # samples
    steps: int = 10  # of training, with each number of processes
    rounds: int = 5  # of processes at most PROCESS_ROUNDS, of evaluation one


@dataclass(frozen=True)
class Growth:
    """Seconds of one piece of work by its size."""

    work: str
    size: str  # the quantity that grows
    sizes: Sequence[int]
    seconds: Sequence[float]  # medians

    def summary(self) -> dict[str, Any]:
        values = {"sizes": list(self.sizes), "seconds": list(self.seconds)}
        return {"work": self.work, "size": self.size, **values, "exponent": growth(self.sizes, self.seconds)}


def growth(sizes: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Return the exponent of growth: the least-squares slope of log time over log size; None for a single size."""
    if len(set(sizes)) < 2:
        return None
    logarithms = ([math.log(value) for value in values] for values in (sizes, seconds))
    return float(statistics.linear_regression(*logarithms).slope)


def read_inputs(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return sizes of crops, written as HEIGHTxWIDTH.

    Raises:
        BenchError: A text is not a size, the tiny network cannot take it, or two sizes have equally many pixels.
    """
    multiple = TinyPose.input_multiple
    found = []
    for text in texts:
        sides = [int(side) for side in text.split("x") if side.isdecimal()]
        if len(sides) != 2 or text.count("x") != 1 or any(side < 1 or side % multiple for side in sides):
            raise BenchError(f"--inputs {text}: wanted HEIGHTxWIDTH such as 256x192, both multiples of {multiple}")
        found.append((sides[0], sides[1]))
    pixels = [math.prod(size) for size in found]
    alike = [text for text, number in zip(texts, pixels, strict=True) if pixels.count(number) > 1]
    if alike:
        raise BenchError(f"--inputs {' '.join(alike)}: equally many pixels, by which times are told apart; keep one")
    return found


Works = dict[str, dict[int, Callable[[], Any]]]  # name -> size -> work to time


def bench_scale(scale: Scale, folder: Path) -> dict[str, Any]:
    """Return the measurements, for JSON and for `show_scale`; `folder` keeps or holds the generated people.

    Raises:
        BenchError: Processes that train together failed.
        DataError: The disk has no room for the people.
    """
    where = environment()  # before measuring, which is a load itself
    found = [_of_processes(scale)]
    for size, works, rounds in (
        ("joints", _of_joints(scale), scale.rounds),
        ("pixels", _of_pixels(scale), scale.rounds),
        ("people", _of_people(scale, folder), scale.rounds),
        ("people", _of_scored(scale, folder), 1),
    ):
        found += _measured(works, size, rounds=rounds)
    return {
        "bench": "scale",
        "environment": where,
        "settings": {"batch": scale.batch, "steps": scale.steps, "rounds": scale.rounds},
        "measurements": [measured.summary() for measured in found],
    }


def _measured(works: Works, size: str, *, rounds: int) -> Iterator[Growth]:
    """Measure each work at all its sizes in turns.

    An untimed round pays for imports and lazy initialisation; if a single round counts, at the smallest size alone.
    """
    for name, by_size in works.items():
        for number in by_size if rounds > 1 else [min(by_size)]:
            by_size[number]()
        yield _in_turns(name, size, {n: partial(_seconds, work) for n, work in by_size.items()}, rounds=rounds)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _in_turns(work: str, size: str, timed: Mapping[int, Callable[[], float]], *, rounds: int) -> Growth:
    """Measure a work at all its sizes in each round; `timed` returns its seconds by size."""
    seconds: dict[int, list[float]] = {number: [] for number in timed}
    for _ in track(range(rounds), work, total=rounds):
        for number, measure in timed.items():
            seconds[number].append(measure())
    return Growth(work, size, list(timed), [statistics.median(times) for times in seconds.values()])


def _of_processes(scale: Scale) -> Growth:
    def measure(number: int) -> float:
        return 1 / run_ranks(number, batch=scale.batch, steps=scale.steps)

    timed = {number: partial(measure, number) for number in scale.processes}
    rounds = min(scale.rounds, PROCESS_ROUNDS)
    return _in_turns("a sample of a tiny distillation", "processes", timed, rounds=rounds)


def run_ranks(processes: int, *, batch: int, steps: int) -> float:
    """Return samples per second of several processes that distil together on this machine's CPU, over gloo.

    Raises:
        BenchError: A process failed or all take too long; those that still run are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"steps": [steps], "batch": [batch], "input-size": INPUT_SIZE, "student": [STUDENT], "teacher": [TEACHER]}
    arguments = [word for name, values in options.items() for word in (f"--{name}", *map(str, values))]
    together = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    together |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
    environments = [together | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("scale_ranks.py")), *arguments],
            env=os.environ | {name: str(value) for name, value in own.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own in environments
    ]
    return float(json.loads(_outputs(ranks)[0].splitlines()[-1])["samples_per_second"])


def _outputs(ranks: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Return the output of each process. Wait for all at once, because the others wait in vain for one that failed."""
    together = f"{len(ranks)} processes that distil together"
    with ThreadPoolExecutor(len(ranks)) as threads:
        ends = {threads.submit(rank.communicate): rank for rank in ranks}
        try:
            for end in as_completed(ends, timeout=TIMEOUT):
                if ends[end].returncode:
                    raise BenchError(f"one of {together} failed:\n{end.result()[0][-2000:]}")
        except TimeoutError:
            raise BenchError(f"{together} did not finish within {TIMEOUT} s") from None
        finally:
            for rank in ranks:
                rank.kill()  # has no effect on one that has ended
    return [end.result()[0] for end in ends]


def _of_joints(scale: Scale) -> Works:
    works: Works = {"loss and its gradient": {}, "encode": {}, "decode": {}}
    for joints in scale.joints:
        batch, codec = draw_batch(scale.batch, joints, INPUT_SIZE, hidden=0), _codec(INPUT_SIZE)
        target, weight = codec.encode(batch.keypoints, batch.visible)
        works["loss and its gradient"][joints] = partial(_gradient, (target + 0.1).requires_grad_(), target, weight)
        works["encode"][joints] = partial(codec.encode, batch.keypoints, batch.visible)
        works["decode"][joints] = partial(decode_heatmaps, target, batch.centers, batch.sizes)
    return works


def _gradient(predicted: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(heatmap_mse(predicted, target, weight), predicted)


def _of_pixels(scale: Scale) -> Works:
    """Return training steps: both forwards, the loss, the backward and the optimizer."""
    steps: dict[int, Callable[[], Any]] = {}
    for input_size in scale.inputs:
        joints = COCO.num_keypoints
        student = create_model(STUDENT, joints).train()
        distiller = Distiller(student, Teacher(create_model(TEACHER, joints)), _codec(input_size))
        optimizer = torch.optim.Adam(student.parameters())
        batch = draw_batch(scale.batch, joints, input_size, hidden=0)
        steps[math.prod(input_size)] = partial(_step, distiller, optimizer, batch)
    return {"a step of a tiny distillation": steps}


def _step(distiller: Distiller, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    distiller(batch).total.backward()
    optimizer.step()
    optimizer.zero_grad()


def _codec(input_size: tuple[int, int]) -> HeatmapCodec:
    return HeatmapCodec(input_size, (input_size[0] // STRIDE, input_size[1] // STRIDE))


def _of_people(scale: Scale, folder: Path) -> Works:
    """Return the work before an epoch."""
    works: Works = {"open shards": {}, "order of an epoch": {}, "read boxes and keypoints": {}}
    for people in scale.people:
        shards = draw_crowd(folder, people)
        shards.open()
        works["open shards"][people] = partial(_open, shards.path)
        works["order of an epoch"][people] = partial(shards.order, 0, 0, source=0)
        works["read boxes and keypoints"][people] = partial(shards.columns, ("box", "keypoints"), shards.usable)
    return works


def _open(path: Path | str) -> None:
    Shards(path).open()


def _of_scored(scale: Scale, folder: Path) -> Works:
    """Return the work of evaluation after inference."""
    works: Works = {"ground truth for AP": {}, "rescore + NMS": {}, "AP": {}}
    for people in scale.scored:
        shards = draw_crowd(folder, people)
        labels = ground_truth_predictions(shards)
        noise = np.random.default_rng(0).normal(0, NOISE, labels.keypoints.shape).astype(np.float32)
        found = Predictions(labels.rows, labels.keypoints + noise, labels.scores)
        suppress = partial(coco_results, shards, found, options=Evaluate(), input_size=INPUT_SIZE)
        works["ground truth for AP"][people] = partial(ground_truth, shards)
        works["rescore + NMS"][people] = suppress
        works["AP"][people] = partial(average_precision, ground_truth(shards), suppress(), COCO.sigmas)
    return works


def show_scale(report: dict[str, Any]) -> None:
    """Print the measurements: a row for each work with its first and last size and its growth."""
    settings = report["settings"]
    table = Table(title="Scale: how time grows", title_justify="left")
    for name in ("", "with"):
        table.add_column(name, no_wrap=True)
    for name in ("from", "to", "ms", "ms", "times", "exponent", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for measured in report["measurements"]:
        sizes, seconds, exponent = measured["sizes"], measured["seconds"], measured["exponent"]
        steep = exponent is not None and exponent > FASTER_THAN_LINEAR
        table.add_row(
            measured["work"],
            measured["size"],
            f"{sizes[0]:,}",
            f"{sizes[-1]:,}",
            *(f"{1e3 * value:,.3f}" for value in (seconds[0], seconds[-1])),
            f"{seconds[-1] / seconds[0]:.2f}",
            "-" if exponent is None else f"{exponent:.2f}",
            "[red]faster than linear[/red]" if steep else "",
        )
    stdout.print(table)
    stdout.print(
        f"batches of {settings['batch']}, medians of {settings['rounds']} rounds in turns (processes: at most "
        f"{PROCESS_ROUNDS}; evaluation: one, after one of the smallest size); exponent: slope of log time over log "
        "size, 1 is linear, and -1 is perfect for processes, each with one thread and "
        f"{settings['batch']} samples of {settings['steps']} steps",
        soft_wrap=True,
    )
    stdout.print(escape(describe(report["environment"])), soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code, 2 for anything that a user can get wrong."""
    try:
        _run(_parse(arguments))
    except UserError as error:
        return fail(error)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    default, parser = Scale(), argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    for name, description in (
        ("processes", "numbers of processes that distil together"),
        ("joints", "keypoints per person"),
        ("people", "people to open and to order"),
        ("scored", "people to evaluate"),
    ):
        sizes = getattr(default, name)
        words = f"{description} (default: {' '.join(map(str, sizes))})"
        parser.add_argument(f"--{name}", type=int, nargs="+", metavar="N", default=sizes, help=words)
    inputs = [f"{height}x{width}" for height, width in default.inputs]
    words = f"sizes of crops (default: {' '.join(inputs)})"
    parser.add_argument("--inputs", nargs="+", metavar="HxW", default=inputs, help=words)
    for name, description in (
        ("batch", "samples per batch"),
        ("steps", "steps with each number of processes"),
        ("rounds", f"rounds of all sizes; of processes at most {PROCESS_ROUNDS}, of evaluation one"),
    ):
        number = getattr(default, name)
        parser.add_argument(f"--{name}", type=int, default=number, help=f"{description} (default: {number})")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep generated people in DIR (default: delete them)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON")
    return parser.parse_args(arguments)


def _run(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in Scale.__dataclass_fields__ if name != "inputs"}
    for name, values in given.items():
        for number in [values] if isinstance(values, int) else values:
            if number < 1:
                raise DataError(f"--{name} {number}: at least 1")
    scale = Scale(**given, inputs=read_inputs(arguments.inputs))
    if arguments.json is not None:
        prepare_file(arguments.json, option="--json")
    with TemporaryDirectory(prefix="fpd-bench-") as temporary:
        report = bench_scale(scale, arguments.cache or Path(temporary))
    show_scale(report)
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
