"""One measurement of a loader, in a process that has done nothing else: ``python -m fpd_accel.bench.probe``.

Prints one JSON object. Times are seconds without that of importing; memory is megabytes (10^6 bytes).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fpd_accel.bench.batches import payload
from fpd_accel.config import Augment
from fpd_accel.data import Batch, PoseStream, Shards, make_loader
from fpd_accel.data.stream import READ_AHEAD, close_loader
from fpd_accel.errors import BenchError, UserError
from fpd_accel.log import fail

REPEATS = 3  # first batches, of which the median counts
INPUT_SIZE = (256, 192)  # (height, width) of a crop, pixels
FAR = 0.9  # of an epoch: where a run that is resumed goes on


def memory(pid: int | str = "self") -> dict[str, float] | None:
    """What a process has of the machine's memory; None where there is no ``/proc`` to say so.

    ``private``: what it has for itself, files that the system can drop and read again left out; ``anonymous`` the same
    with its part of what it shares; ``proportional`` (PSS): that with its part of the files in memory.
    """
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    if not rollup.exists():
        return None
    words = (line.split() for line in rollup.read_text(encoding="utf-8").splitlines()[1:])
    kilobytes = {word[0].rstrip(":"): int(word[1]) for word in words}
    fields = {"private": "Private_Dirty", "anonymous": "Pss_Anon", "proportional": "Pss"}
    return {name: kilobytes[field] * 1024 / 1e6 for name, field in fields.items()}


def time_opening(path: str, *, cold: bool) -> dict[str, Any]:
    """Seconds until people can be read; ``cold``: of files that are not in memory."""
    if cold:
        for file in filter(Path.is_file, Path(path).rglob("*")):
            evict(file)
    began = time.perf_counter()
    shards = Shards(path)
    shards.open()
    return {"seconds": time.perf_counter() - began, "people": len(shards), "images": len(shards.images)}


def evict(file: Path) -> None:
    """Let the system forget what it has of a file in memory, once that is on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_loading(path: str, *, workers: int, batch: int, batches: int) -> dict[str, Any]:
    """First batches of training from the start and from far on, then the rate and memory over ``batches`` more.

    A loader is closed when the clock has stopped and its memory is known: its processes take their time to end.
    """
    shards = Shards(path)
    shards.open()
    starts = {"start": 0, "far": int(FAR * len(shards))}
    first: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(REPEATS):
        for name, start in starts.items():
            began = time.perf_counter()
            loading = _batches(shards, start, workers=workers, batch=batch)
            next(loading)
            first[name].append(time.perf_counter() - began)
            close_loader(loading)
    loading = _batches(shards, starts["far"], workers=workers, batch=batch)
    for _ in range(READ_AHEAD * workers):  # what workers have read ahead is no measure of how fast they are
        next(loading)
    sent = payload(next(loading))
    began = time.perf_counter()
    for _ in range(batches):
        next(loading)
    rate = batches * batch / (time.perf_counter() - began)
    pids = [process.pid for process in torch.multiprocessing.active_children()]
    found = {
        "workers": workers,
        "first_batch_seconds": {name: statistics.median(seconds) for name, seconds in first.items()},
        "samples_per_second": rate,
        "main_memory": memory(),
        "worker_memory": [memory(pid) for pid in pids if pid is not None],
        "read_ahead_bytes": workers * READ_AHEAD * sent,
    }
    close_loader(loading)
    return found


def _batches(shards: Shards, start: int, *, workers: int, batch: int) -> Iterator[Batch]:
    stream = PoseStream(
        shards, input_size=INPUT_SIZE, batch_size=batch, augment=Augment(), start=start, stop=sys.maxsize
    )
    return iter(make_loader(stream, workers, torch.device("cpu")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fpd_accel.bench.probe")
    parser.add_argument("shards")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--workers", type=int, help="measure loading; default: opening")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="DIR",
        help="measure our loader against the published one; a decoded cache there",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=100)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.compare is not None:
            from fpd_accel.bench.loaders import compare_loaders  # what it imports would be counted as memory of ours

            found = compare_loaders(
                Shards(chosen.shards),
                chosen.compare,
                input_size=INPUT_SIZE,
                batch=chosen.batch,
                batches=chosen.batches,
            )
        elif chosen.workers is None:
            found = time_opening(chosen.shards, cold=chosen.cold)
        else:
            found = time_loading(chosen.shards, workers=chosen.workers, batch=chosen.batch, batches=chosen.batches)
    except UserError as error:
        return fail(error)
    except MemoryError:
        return fail(BenchError(f"{chosen.shards}: no memory for batches of {chosen.batch} people; lower --batch"))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
