"""`fpd-accel bench data`: the cost of a dataset by its size, in opening, memory, resuming and reading.

Every number comes from a fresh process (see `probe.py`), because memory that was once used is seldom given back.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Column, Table

from fpd_accel.bench.environment import describe, environment
from fpd_accel.bench.loaders import count_workers, show_loaders
from fpd_accel.console import stdout, track
from fpd_accel.data.shards import Shards
from fpd_accel.errors import BenchError, DataError

OPENINGS = 3  # processes that open the dataset, of which the median counts
MEMORY_WORKERS = (0, 4, 8)
RATE_WORKERS = (0, 1, 2)
KILLED = -9  # return code of subprocess for a process that the system killed


def bench_data(
    datasets: Sequence[Shards],
    *,
    batch: int = 32,
    batches: int = 100,
    photographs: Sequence[Shards] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Return the measurements of some datasets, over `batches` batches of `batch`, for JSON and for `show_data`.

    Our loader is compared with the published one on `photographs`, datasets with images of real size (None: on
    `datasets`); their images are decoded into `folder` meanwhile (None: the system's temporary folder). Raise a
    BenchError if the loaders do not agree or memory does not suffice, a DataError if data or disk cannot be used.
    """
    where = environment()  # before measuring, which is a load itself
    compared = datasets if photographs is None else photographs
    for shards in (*datasets, *compared):
        if not shards.description["counts"]["usable"]:  # opening the dataset would keep its files in memory
            raise DataError(f"{shards.path}: has no person that can be cropped, so there is nothing to measure")
    size = {"batch": batch, "batches": batches}
    openings = (False, True) if hasattr(os, "posix_fadvise") else (False,)  # cold: files not in memory
    jobs: list[tuple[str, dict[str, Any]]]
    jobs = [("probe:time_opening", {"cold": cold}) for cold in openings for _ in range(OPENINGS)]
    jobs += [("probe:time_loading", {"workers": n, **size}) for n in sorted({*MEMORY_WORKERS, *RATE_WORKERS})]
    found: list[list[dict[str, Any]]] = [[] for _ in datasets]
    for function, options in track(jobs, "measuring"):
        # All datasets in a row, so that other work on the machine disturbs all alike.
        for shards, own in zip(datasets, found, strict=True):
            own.append(_probe(function, path=str(shards.path), **options))
    loaders = [
        {"path": str(shards.path), "people": len(shards), "compared": _compare(shards, folder, size)}
        for shards in track(compared, "comparing loaders")
    ]
    return {
        "bench": "data",
        "environment": where,
        "settings": size | {"openings": OPENINGS},
        "datasets": [_summarize(shards, own) for shards, own in zip(datasets, found, strict=True)],
        "loaders": loaders,
    }


def _compare(shards: Shards, folder: Path | None, size: dict[str, int]) -> dict[str, Any]:
    """Compare the loaders; this process removes the decoded images, however the measuring one ends."""
    try:
        temporary = TemporaryDirectory(prefix="fpd-bench-", dir=folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}; choose another --cache") from None
    with temporary as decoded:
        return _probe("loaders:compare_loaders", path=str(shards.path), folder=decoded, **size)


def _probe(function: str, **options: Any) -> dict[str, Any]:
    """Call `module:function` of this package in a process of its own."""
    command = [sys.executable, "-m", "fpd_accel.bench.probe", function, json.dumps(options)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode == 2:  # keep the message alone, not the output before it
        raise DataError(re.split(r"^error: ", ran.stderr, flags=re.MULTILINE)[-1].strip())
    if ran.returncode == KILLED:
        raise BenchError(f"{options['path']}: the measuring process was killed, perhaps out of memory; lower --batch")
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def _summarize(shards: Shards, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
    """Print the measurements: a column for each dataset, and the last one divided by the first."""
    datasets, settings = report["datasets"], report["settings"]
    names = [f"{dataset['people']:,} people\n{dataset['images']:,} images" for dataset in datasets]
    names += ["last / first"] if len(datasets) > 1 else []
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("", no_wrap=True), *columns, title="Data: cost by size", title_justify="left")
    for cells in zip(*map(_rows, datasets), strict=True):
        (name, digits, first), last = cells[0], cells[-1][2]
        shown = ["-" if number is None else f"{number:,.{digits}f}" for _, _, number in cells]
        if len(cells) > 1:
            shown.append("-" if last is None or not first else f"{last / first:.2f}")
        table.add_row(name, *shown)
    stdout.print(table)
    stdout.print(
        f"batches of {settings['batch']}, {settings['batches']} of them; memory without file pages, which the system "
        "drops when it needs room; batches read ahead are in shared memory and come on top, at most the amount shown",
        soft_wrap=True,
    )
    for one in report["loaders"]:
        show_loaders(one["path"], one["people"], one["compared"])
    stdout.print(describe(report["environment"]), soft_wrap=True, markup=False)


def _rows(dataset: dict[str, Any]) -> list[tuple[str, int, float | None]]:
    """Return name, digits and value of each row of the table; the value is None if this system does not tell it."""
    loading = dataset["loading"]
    rows = [("open, s", 3, dataset["open_seconds"])]
    rows.append(("open from files not in memory, s", 3, dataset["open_cold_seconds"]))
    for n in RATE_WORKERS:
        for place, start in (("the start", "start"), ("90 % of an epoch", "far")):
            name = f"first batch from {place}, {count_workers(n)}, s"
            rows.append((name, 3, loading[str(n)]["first_batch_seconds"][start]))
    for n in MEMORY_WORKERS:
        measured, name = loading[str(n)], count_workers(n)
        processes = [measured["main_memory"], *measured["worker_memory"]]
        known = None not in processes
        total = sum(one["anonymous"] for one in processes) if known else None
        rows.append((f"memory of all processes, {name}, MB", 0, total))
        if n:
            private = statistics.median(one["private"] for one in processes[1:]) if known else None
            rows.append((f"memory of its own of each of {name}, MB", 0, private))
            rows.append((f"batches read ahead, {name}, MB", 0, measured["read_ahead_bytes"] / 1e6))
    return rows + [(f"samples/s, {count_workers(n)}", 0, loading[str(n)]["samples_per_second"]) for n in RATE_WORKERS]
