"""Our loader against the published one, in one process and taking turns: rates, start-up, bytes, and pixels.

Both give the same people in the same random geometry, through PyTorch's loader with the same number of worker
processes, of which each has one thread; that they do is shown first. Only with ``data.group_by_image`` a batch has
other people. What ours leaves to the device (normalisation, targets) is in the time of one variant alone, in which the
process that reads makes it, as training on a CPU does; on a GPU it is microseconds, and ``bench step`` has it in its.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.table import Table
from torch.utils.data import DataLoader

from fpd_accel.bench.batches import payload
from fpd_accel.bench.loader_gate import Preparation, check_agreement, compare_pixels, compare_prepared
from fpd_accel.bench.reference_loader import ReferenceDataset
from fpd_accel.config import Augment
from fpd_accel.data import PoseStream, Shards, make_loader
from fpd_accel.data.decoded import CHANNELS, open_decoded
from fpd_accel.data.stream import READ_AHEAD, close_loader
from fpd_accel.errors import BenchError
from fpd_accel.files import amount
from fpd_accel.log import results

WORKERS = (0, 1, 2)
ROUNDS = 5
NAMES = {
    "reference": "published",
    "ours": "ours",
    "prepared": "ours, with normalising and targets",
    "grouped": "ours, data.group_by_image",
    "decoded": "ours, data.decoded_cache",
}
CACHE_AT_MOST = 4 * 10**9  # bytes of the decoded cache


def compare_loaders(
    shards: Shards, folder: Path, *, input_size: tuple[int, int], batch: int, batches: int
) -> dict[str, Any]:
    """Everything measured over ``ROUNDS`` rounds, in which both give some of ``batches`` batches of ``batch`` people.

    The images of those people are decoded into ``folder`` for the variant that reads them there.

    Raises:
        BenchError: the loaders do not give the same, or the images of the fewest batches are too many to be decoded.
        DataError: the dataset cannot be read, or the folder not be written.
    """
    use_one_thread()
    shards.open()
    create = partial(PoseStream, input_size=input_size, batch_size=batch, augment=Augment(), stop=sys.maxsize)
    stream, kept, prepare = create(shards), copy.copy(shards), Preparation(input_size)
    per_round = batches_per_round(stream, max(1, batches // ROUNDS))
    samples = batch * (per_round + _beside())
    reference = ReferenceDataset(stream, samples)
    error = compare_pixels(stream, reference) | compare_prepared(prepare, reference)
    check_agreement(str(shards.path), error)

    people = [stream.place(sample).row for sample in range(samples)]
    rows = np.unique(shards.columns(["image_row"], people)["image_row"])
    kept.decoded = decoded = open_decoded(kept, folder, rows=rows)
    streams = {
        "ours": stream,
        "prepared": stream,
        "grouped": create(shards, group_by_image=True),
        "decoded": create(kept),
    }

    def loader(name: str, workers: int) -> DataLoader[Any]:
        if name == "reference":
            return _published(reference, batch, workers)
        return make_loader(streams[name], workers, torch.device("cpu"))

    def measure(workers: int) -> dict[str, Any]:
        return _take_turns(partial(loader, workers=workers), prepare, workers, batch=batch, batches=per_round)

    return {
        "rounds": ROUNDS,
        "batches_per_round": per_round,
        "bytes_per_sample": {
            "ours": payload(stream.batch(range(batch))) / batch,
            "reference": payload(next(iter(_published(reference, batch, 0)))) / batch,
        },
        "error": error,
        "workers": {str(workers): measure(workers) for workers in WORKERS},
        "decoded_bytes": decoded.bytes,
    }


def use_one_thread() -> None:
    """Of this process: a rate per process means little where one takes the cores of others."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _beside() -> int:
    """Batches that are read before and after those of a round, at most."""
    return 1 + 2 * READ_AHEAD * max(WORKERS)


def batches_per_round(stream: PoseStream, wanted: int) -> int:
    """So many batches, or fewer, that the images of all that are read take no more than ``CACHE_AT_MOST`` as pixels.

    Raises:
        BenchError: there is no room for those of a single batch and what is read beside it.
    """
    shards, batch, beside = stream.sources[0].shards, stream.batch_size, _beside()
    people = [stream.place(sample).row for sample in range(batch * (wanted + beside))]
    rows, first = np.unique(shards.columns(["image_row"], people)["image_row"], return_index=True)
    heights, widths = shards.image_sizes(rows)
    needed = np.zeros(len(people), dtype=np.int64)
    needed[first] = heights.astype(np.int64) * widths * CHANNELS
    fitting = int(np.searchsorted(np.cumsum(needed), CACHE_AT_MOST, side="right")) // batch - beside
    if fitting < 1:
        raise BenchError(
            f"{shards.path}: of {beside + 1} batches of {batch} people the images take more than "
            f"{amount(CACHE_AT_MOST)} as pixels; lower --batch"
        )
    return min(fitting, wanted)


def _take_turns(
    create: Callable[[str], DataLoader[Any]], prepare: Preparation, workers: int, *, batch: int, batches: int
) -> dict[str, Any]:
    """Samples per second and seconds to the first batch, of each round; who begins alternates."""
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    first: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(ROUNDS):
        for name in list(NAMES)[:: 1 if number % 2 == 0 else -1]:
            finish = prepare if name == "prepared" else None
            began = time.perf_counter()
            loading = iter(create(name))
            _read(loading, 1, finish)
            first[name].append(time.perf_counter() - began)
            _read(loading, READ_AHEAD * workers, finish)  # what was read ahead is no measure of how fast it goes
            began = time.perf_counter()
            _read(loading, batches, finish)
            rates[name].append(batches * batch / (time.perf_counter() - began))
            close_loader(loading)
    ratios = {
        name: [own / theirs for own, theirs in zip(rates[name], rates["reference"], strict=True)]
        for name in NAMES
        if name != "reference"
    }
    return {
        "samples_per_second": {name: _spread(rates[name]) for name in NAMES},
        "first_batch_seconds": {name: _spread(first[name]) for name in NAMES},
        "ratio": {name: _spread(ratios[name]) for name in ratios},
    }


def _read(loading: Iterator[Any], batches: int, finish: Preparation | None) -> None:
    for _ in range(batches):
        batch = next(loading)
        if finish is not None:
            finish(batch.crops, batch.keypoints, batch.visible)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _published(reference: ReferenceDataset, batch: int, workers: int) -> DataLoader[Any]:
    return DataLoader(
        reference,
        batch_size=batch,
        num_workers=workers,
        prefetch_factor=READ_AHEAD if workers else None,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    """OpenCV's threads do not survive the fork, and would be waited for."""
    cv2.setNumThreads(0)


def show_loaders(path: str, people: int, found: dict[str, Any]) -> None:
    """Print a comparison as a table."""
    table = Table(title=f"Loader against the published one's: {path}, {people:,} people", title_justify="left")
    for name in ("", "samples/s", "times the published", "first batch, s", "bytes per sample"):
        table.add_column(name, justify="right" if name else "left")
    sent = found["bytes_per_sample"]
    for workers, measured in found["workers"].items():
        rates, first, ratios = (measured[key] for key in ("samples_per_second", "first_batch_seconds", "ratio"))
        table.add_section()
        table.add_row(f"{workers if int(workers) else 'no'} worker{'s' * (int(workers) != 1)}")
        for key, name in NAMES.items():
            ratio = _shown(ratios[key], 2) if key in ratios else "1"
            amounts = f"{sent[key if key in sent else 'ours']:,.0f}"
            table.add_row(f"  {name}", _shown(rates[key], 0), ratio, _shown(first[key], 3), amounts)
    results.print(table)
    error = found["error"]
    results.print(
        f"medians of {found['rounds']} rounds of {found['batches_per_round']} batches (least to most); normalising and "
        "targets are made by the published loader's workers, by ours with them in the process that reads, as training "
        "on a CPU does, and left to the device by the others; data.group_by_image gives other people per batch; "
        f"the decoded cache, {amount(found['decoded_bytes'])}, has just been written and was read from memory; "
        f"crops of {error['people']} people differ by {error['pixel_mean']:.4f} grey levels in the mean, "
        f"{error['pixel_max']:.0f} at most, their keypoints by {error['keypoint_max']:.1e} pixels at most",
        soft_wrap=True,
    )


def _shown(spread: dict[str, float], digits: int) -> str:
    median, least, most = (f"{spread[name]:,.{digits}f}" for name in ("median", "least", "most"))
    return f"{median} ({least} to {most})"
