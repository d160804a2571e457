"""Our loader against the published one, in one process and taking turns: rates, start-up, bytes, and pixels.

Both give batches of the same people with the same random geometry, through PyTorch's loader with the same number of
worker processes, of which each has one thread. What ours leaves to the device (normalisation, targets) is not in its
time; on a GPU it is microseconds, and ``bench step`` has it in its.
"""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from fpd_accel.bench.reference_loader import ReferenceDataset
from fpd_accel.config import Augment
from fpd_accel.data import Batch, PoseStream, Shards, make_loader
from fpd_accel.data.stream import close_loader
from fpd_accel.log import results

INPUT_SIZE = (256, 192)  # (height, width) of a crop, pixels
WORKERS = (0, 1, 2)
ROUNDS = 5
NAMES = ("ours", "reference")
READ_AHEAD = 4  # batches per worker, of both


def compare_loaders(shards: Shards, *, batch: int, batches: int) -> dict[str, Any]:
    """Everything measured over ``ROUNDS`` rounds, in which both give some of ``batches`` batches of ``batch`` people.

    Raises:
        DataError: the dataset cannot be read.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    shards.open()
    stream = PoseStream(shards, input_size=INPUT_SIZE, batch_size=batch, augment=Augment(), stop=sys.maxsize)
    per_round = max(1, batches // ROUNDS)
    reference = ReferenceDataset(stream, batch * (per_round + 1 + READ_AHEAD * max(WORKERS)))
    found = {
        "rounds": ROUNDS,
        "batches_per_round": per_round,
        "bytes_per_sample": {
            "ours": payload(stream.batch(range(batch))) / batch,
            "reference": payload(next(iter(_published(reference, batch, 0)))) / batch,
        },
        "error": compare_pixels(stream, reference),
    }
    return found | {"workers": {str(n): _take_turns(stream, reference, n, batches=per_round) for n in WORKERS}}


def payload(sent: Any) -> int:
    """Bytes of the tensors that go from a worker to the process that trains."""
    if isinstance(sent, Tensor):
        return sent.nbytes
    if isinstance(sent, Batch):
        return payload(vars(sent))
    inner = sent.values() if isinstance(sent, Mapping) else sent if isinstance(sent, Sequence) else ()
    return sum(payload(one) for one in inner if not isinstance(one, str))


def compare_pixels(stream: PoseStream, reference: ReferenceDataset, *, people: int = 128) -> dict[str, float]:
    """Differences of the same people's crops (grey levels of 256, before normalisation) and keypoints (crop pixels)."""
    people = min(people, len(reference))
    batch = stream.batch(range(people))
    pixels, keypoints = [], [0.0]
    for number in range(people):
        crop, joints, visible, _ = reference.crop(reference.records[number])
        pixels.append(np.abs(crop.astype(np.int16) - batch.crops[number].numpy()))
        ours, seen = batch.keypoints[number].numpy(), visible[:, 0] > 0
        if not np.array_equal(seen, batch.visible[number].numpy() > 0):
            raise RuntimeError(f"sample {number}: not the same keypoints are visible")
        keypoints += np.abs(joints[seen, :2] - ours[seen]).max(axis=1, initial=0).tolist()
    return {
        "people": people,
        "pixel_mean": float(np.mean(pixels)),
        "pixel_max": float(np.max(pixels)),
        "keypoint_max": max(keypoints),
    }


def _take_turns(stream: PoseStream, reference: ReferenceDataset, workers: int, *, batches: int) -> dict[str, Any]:
    """Samples per second and seconds to the first batch, of each round; the loader that begins alternates."""
    size = stream.batch_size
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    first: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(ROUNDS):
        for name in NAMES if number % 2 == 0 else reversed(NAMES):
            began = time.perf_counter()
            loader = (
                make_loader(stream, workers, torch.device("cpu"))
                if name == "ours"
                else _published(reference, size, workers)
            )
            loading = iter(loader)
            next(loading)
            first[name].append(time.perf_counter() - began)
            for _ in range(READ_AHEAD * workers):  # what was read ahead is no measure of how fast it goes
                next(loading)
            began = time.perf_counter()
            for _ in range(batches):
                next(loading)
            rates[name].append(batches * size / (time.perf_counter() - began))
            close_loader(loading)
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["reference"], strict=True)]
    return {
        "samples_per_second": {name: _spread(rates[name]) for name in NAMES},
        "first_batch_seconds": {name: _spread(first[name]) for name in NAMES},
        "ratio": _spread(ratios),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _published(reference: ReferenceDataset, batch: int, workers: int) -> DataLoader[Any]:
    return DataLoader(reference, batch_size=batch, num_workers=workers, prefetch_factor=READ_AHEAD if workers else None)


def show_loaders(path: str, people: int, found: dict[str, Any]) -> None:
    """Print a comparison as a table."""
    table = Table(title=f"Loader against the published one's: {path}, {people:,} people", title_justify="left")
    for name in ("", *NAMES, "ours / reference"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for workers, measured in found["workers"].items():
        label = f"{workers if int(workers) else 'no'} worker{'s' * (int(workers) != 1)}"
        rates, first = measured["samples_per_second"], measured["first_batch_seconds"]
        table.add_row(f"samples/s, {label}", *(_shown(rates[name], 0) for name in NAMES), _shown(measured["ratio"], 2))
        ratio = first["ours"]["median"] / first["reference"]["median"]
        table.add_row(f"first batch, {label}, s", *(_shown(first[name], 3) for name in NAMES), f"{ratio:.2f}")
    sent = found["bytes_per_sample"]
    ratio = sent["ours"] / sent["reference"]
    table.add_row("bytes per sample from a worker", *(f"{sent[name]:,.0f}" for name in NAMES), f"{ratio:.2f}")
    results.print(table)
    error = found["error"]
    results.print(
        f"medians of {found['rounds']} rounds of {found['batches_per_round']} batches (least to most); crops of "
        f"{error['people']} people differ by {error['pixel_mean']:.4f} grey levels in the mean, "
        f"{error['pixel_max']:.0f} at most, their keypoints by {error['keypoint_max']:.1e} pixels at most",
        soft_wrap=True,
    )


def _shown(spread: dict[str, float], digits: int) -> str:
    median, least, most = (f"{spread[name]:,.{digits}f}" for name in ("median", "least", "most"))
    return f"{median} ({least} to {most})"
