"""What a dataset costs by its size: to open, in memory, to resume in, and to read from.

Every number comes from a process of its own (see ``probe.py``), because memory that was once used is seldom given back.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.markup import escape
from rich.table import Table

from fpd_accel.bench.environment import describe, environment
from fpd_accel.bench.loaders import show_loaders
from fpd_accel.data.shards import Shards
from fpd_accel.errors import BenchError, DataError
from fpd_accel.log import results, track

OPENINGS = 3  # processes that open, of which the median counts
MEMORY_WORKERS = (0, 4, 8)
RATE_WORKERS = (0, 1, 2)
KILLED = -9  # by the system, as subprocess says it
Value = float | None  # None: not to be known on this system


def bench_data(
    datasets: Sequence[Shards],
    *,
    batch: int = 32,
    batches: int = 100,
    photographs: Sequence[Shards] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """The measurements of some datasets, for JSON and for :func:`show_data`.

    Our loader is compared with the published one on ``photographs``, whose images should be as large as real ones;
    None: on the datasets themselves. Its decoded cache lies in ``folder`` meanwhile; None: where temporary files do.

    Raises:
        DataError: a dataset cannot be read, the loaders do not give the same, or memory or disk do not suffice.
    """
    where = environment()  # before measuring, which is a load itself
    compared = datasets if photographs is None else photographs
    for shards in (*datasets, *compared):
        if not shards.description["counts"]["usable"]:  # opened here, files would stay in memory
            raise DataError(f"{shards.path}: has nobody that could be cropped, so there is nothing to measure")
    workers = sorted({*MEMORY_WORKERS, *RATE_WORKERS})
    measurements = [temperature for temperature in _temperatures() for _ in range(OPENINGS)]
    measurements += [[f"--workers={n}", f"--batch={batch}", f"--batches={batches}"] for n in workers]
    jobs = [  # each measurement of all datasets in a row: other work on the machine then disturbs all alike
        (number, [str(shards.path), *options]) for options in measurements for number, shards in enumerate(datasets)
    ]
    found: list[list[dict[str, Any]]] = [[] for _ in datasets]
    for number, arguments in track(jobs, "measuring", total=len(jobs)):
        found[number].append(_probe(arguments) | {"cold": "--cold" in arguments})
    options = [f"--batch={batch}", f"--batches={batches}"]
    loaders = [
        {"path": str(shards.path), "people": len(shards), "compared": _compare(shards, folder, options)}
        for shards in track(compared, "comparing loaders", total=len(compared))
    ]
    return {
        "bench": "data",
        "environment": where,
        "settings": {"batch": batch, "batches": batches, "openings": OPENINGS},
        "datasets": [_gathered(shards, own) for shards, own in zip(datasets, found, strict=True)],
        "loaders": loaders,
    }


def _temperatures() -> list[list[str]]:
    """Arguments for files that are in memory; where the system can be told to drop them, for such that are not too."""
    return [[], ["--cold"]] if hasattr(os, "posix_fadvise") else [[]]


def _compare(shards: Shards, folder: Path | None, options: Sequence[str]) -> dict[str, Any]:
    """What is decoded goes with this process, however the one that measures ends."""
    try:
        temporary = TemporaryDirectory(prefix="fpd-bench-", dir=folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}; choose another --cache") from None
    with temporary as decoded:
        return _probe([str(shards.path), f"--compare={decoded}", *options])


def _probe(arguments: Sequence[str]) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-m", "fpd_accel.bench.probe", *arguments], capture_output=True, text=True, check=False
    )
    if ran.returncode == 2:  # what it said before is no part of the mistake
        raise DataError(re.split(r"^error: ", ran.stderr, flags=re.MULTILINE)[-1].strip())
    if ran.returncode == KILLED:
        raise BenchError(f"{arguments[0]}: measuring was killed, as by a system without memory left; lower --batch")
    if ran.returncode:
        raise RuntimeError(f"fpd_accel.bench.probe {' '.join(arguments)} failed:\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def _gathered(shards: Shards, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    opened = [one for one in found if "seconds" in one]
    cold = [one["seconds"] for one in opened if one["cold"]]
    return {
        "path": str(shards.path),
        "people": opened[0]["people"],
        "images": opened[0]["images"],
        "open_seconds": statistics.median(one["seconds"] for one in opened if not one["cold"]),
        "open_cold_seconds": statistics.median(cold) if cold else None,
        "loading": {str(one["workers"]): one for one in found if "workers" in one},
    }


def show_data(report: dict[str, Any]) -> None:
    """Print the measurements: a column for each dataset, and how many times the first the last one is."""
    datasets, settings = report["datasets"], report["settings"]
    table = Table(title="Data: what it costs by its size", title_justify="left")
    table.add_column("", no_wrap=True)
    for dataset in datasets:
        table.add_column(f"{dataset['people']:,} people\n{dataset['images']:,} images", justify="right", no_wrap=True)
    if len(datasets) > 1:
        table.add_column("last / first", justify="right", no_wrap=True)
    for name, digits, value in _rows():
        values = [value(dataset) for dataset in datasets]
        shown = ["-" if number is None else f"{number:,.{digits}f}" for number in values]
        if len(values) > 1:
            first, last = values[0], values[-1]
            shown.append("-" if first is None or last is None or not first else f"{last / first:.2f}")
        table.add_row(name, *shown)
    results.print(table)
    results.print(
        f"batches of {settings['batch']}, {settings['batches']} of them; memory without the pages of files, which the "
        "system drops when it needs room; batches read ahead are in shared memory and come on top, at most as much as "
        "is said here",
        soft_wrap=True,
    )
    for one in report["loaders"]:
        show_loaders(one["path"], one["people"], one["compared"])
    results.print(escape(describe(report["environment"])), soft_wrap=True)


def _rows() -> list[tuple[str, int, Callable[[dict[str, Any]], Value]]]:
    """Name, digits and value of each row of the table."""
    rows: list[tuple[str, int, Callable[[dict[str, Any]], Value]]] = [
        ("open, s", 3, lambda dataset: dataset["open_seconds"]),
        ("open from files not in memory, s", 3, lambda dataset: dataset["open_cold_seconds"]),
    ]
    for n in RATE_WORKERS:
        for name, where in (("the start", "start"), ("90 % of an epoch", "far")):
            rows.append((f"first batch from {name}, {_workers(n)}, s", 3, _first_batch(n, where)))
    for n in MEMORY_WORKERS:
        rows.append((f"memory of all processes, {_workers(n)}, MB", 0, _memory(n)))
        if n:
            rows.append((f"memory of its own of each of {_workers(n)}, MB", 0, _worker_memory(n)))
            rows.append((f"batches read ahead, {_workers(n)}, MB", 0, _read_ahead(n)))
    rows += [(f"samples/s, {_workers(n)}", 0, _rate(n)) for n in RATE_WORKERS]
    return rows


def _workers(number: int) -> str:
    return f"{number or 'no'} worker{'s' * (number != 1)}"


def _first_batch(workers: int, where: str) -> Callable[[dict[str, Any]], Value]:
    return lambda dataset: dataset["loading"][str(workers)]["first_batch_seconds"][where]


def _rate(workers: int) -> Callable[[dict[str, Any]], Value]:
    return lambda dataset: dataset["loading"][str(workers)]["samples_per_second"]


def _read_ahead(workers: int) -> Callable[[dict[str, Any]], Value]:
    return lambda dataset: dataset["loading"][str(workers)]["read_ahead_bytes"] / 1e6


def _worker_memory(workers: int) -> Callable[[dict[str, Any]], Value]:
    def value(dataset: dict[str, Any]) -> Value:
        found = dataset["loading"][str(workers)]["worker_memory"]
        return statistics.median(one["private"] for one in found) if None not in found else None

    return value


def _memory(workers: int) -> Callable[[dict[str, Any]], Value]:
    def value(dataset: dict[str, Any]) -> Value:
        loading = dataset["loading"][str(workers)]
        found = [loading["main_memory"], *loading["worker_memory"]]
        return sum(one["anonymous"] for one in found) if None not in found else None

    return value
