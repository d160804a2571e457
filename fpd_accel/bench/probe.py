"""One measurement in a fresh process: `python -m fpd_accel.bench.probe MODULE:FUNCTION KEYWORDS_AS_JSON`.

Prints the function's result as JSON. Times are in seconds and leave out imports; memory is in megabytes (10^6 bytes).
"""

import importlib
import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpd_accel.config.schema import Augment
from fpd_accel.console import fail
from fpd_accel.data.batch import Batch
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import READ_AHEAD, PoseStream, close_loader, make_loader
from fpd_accel.errors import BenchError, UserError
from fpd_accel.files import flush

REPEATS = 3  # first batches, of which the median counts
INPUT_SIZE = (256, 192)  # (height, width) of a crop, pixels
FAR = 0.9  # of an epoch: the place where a resumed run continues


def memory(pid: int | str = "self") -> dict[str, float] | None:
    """Return the memory of a process in megabytes; None without `/proc`.

    `private` is the memory of this process alone, without file pages that the system can drop and read again;
    `anonymous` adds its part of shared memory; `proportional` (PSS) adds its part of file pages.
    """
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    if not rollup.exists():
        return None
    kilobytes = dict(line.split()[:2] for line in rollup.read_text(encoding="utf-8").splitlines()[1:])
    fields = {"private": "Private_Dirty:", "anonymous": "Pss_Anon:", "proportional": "Pss:"}
    return {name: int(kilobytes[field]) * 1024 / 1e6 for name, field in fields.items()}


def time_opening(path: str, *, cold: bool) -> dict[str, Any]:
    """Measure the seconds until people can be read; if `cold`, from files that are not in memory."""
    for file in filter(Path.is_file, Path(path).rglob("*") if cold else ()):
        flush(file)  # only pages that are on the disk can be dropped
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    shards = Shards(path)
    shards.open()
    seconds = time.perf_counter() - began
    return {"cold": cold, "seconds": seconds, "people": len(shards), "images": len(shards.images)}


def time_loading(path: str, *, workers: int, batch: int, batches: int) -> dict[str, Any]:
    """Measure the first batches from the start and from far on, then rate and memory over `batches` more.

    A loader is closed after its time and memory are taken, because its processes take long to end.
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
    skip(loading, READ_AHEAD * workers)  # batches read ahead would make the rate too high
    sent = payload(next(loading))
    began = time.perf_counter()
    skip(loading, batches)
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


def skip(batches: Iterator[Any], number: int) -> None:
    """Read a number of batches and drop each at once."""
    deque(islice(batches, number), maxlen=0)


def payload(sent: Any) -> int:
    """Return the bytes of all tensors in a batch, which a worker sends to the training process."""
    if isinstance(sent, Tensor):
        return sent.nbytes
    if isinstance(sent, Batch):
        return payload(vars(sent))
    inner = sent.values() if isinstance(sent, Mapping) else sent if isinstance(sent, Sequence) else ()
    return sum(payload(one) for one in inner if not isinstance(one, str))


def main(arguments: Sequence[str] | None = None) -> int:
    """Call a function of `fpd_accel.bench`, print its result, and return the exit code."""
    name, keywords = sys.argv[1:] if arguments is None else arguments
    module, function = name.split(":")  # imported only when used, since imports count as memory
    options = json.loads(keywords)
    try:
        found = getattr(importlib.import_module(f"fpd_accel.bench.{module}"), function)(**options)
    except UserError as error:
        return fail(error)
    except MemoryError:
        name = f"{options['path']}: no memory for batches of {options['batch']} samples"
        return fail(BenchError(f"{name}; lower --batch"))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
