"""Our loader against the published one, in one process and taking turns: rates, start-up, bytes, and pixels.

Both give batches of the same people with the same random geometry, through PyTorch's loader with the same number of
worker processes, of which each has one thread. What ours leaves to the device (normalisation, targets) is not in its
time; on a GPU it is microseconds, and ``bench step`` has it in its.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from tempfile import TemporaryDirectory
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
from fpd_accel.data.decoded import open_decoded
from fpd_accel.data.stream import close_loader
from fpd_accel.log import results

WORKERS = (0, 1, 2)
ROUNDS = 5
NAMES = {
    "reference": "published",
    "ours": "ours",
    "grouped": "ours, data.group_by_image",
    "decoded": "ours, data.decoded_cache",
}
READ_AHEAD = 4  # batches per worker, of both


def compare_loaders(shards: Shards, *, input_size: tuple[int, int], batch: int, batches: int) -> dict[str, Any]:
    """Everything measured over ``ROUNDS`` rounds, in which both give some of ``batches`` batches of ``batch`` people.

    Raises:
        DataError: the dataset cannot be read.
    """
    use_one_thread()
    shards.open()
    create = partial(PoseStream, input_size=input_size, batch_size=batch, augment=Augment(), stop=sys.maxsize)
    stream, kept = create(shards), copy.copy(shards)
    per_round = max(1, batches // ROUNDS)
    samples = batch * (per_round + 1 + 2 * READ_AHEAD * max(WORKERS))
    reference = ReferenceDataset(stream, samples)
    found: dict[str, Any] = {
        "rounds": ROUNDS,
        "batches_per_round": per_round,
        "bytes_per_sample": {
            "ours": payload(stream.batch(range(batch))) / batch,
            "reference": payload(next(iter(_published(reference, batch, 0)))) / batch,
        },
        "error": compare_pixels(stream, reference),
    }

    with TemporaryDirectory(prefix="fpd-bench-") as folder:
        people = [stream.place(sample).row for sample in range(samples)]
        kept.decoded = decoded = open_decoded(
            kept, folder, rows=np.unique(shards.columns(["image_row"], people)["image_row"])
        )
        streams = {"ours": stream, "grouped": create(shards, group_by_image=True), "decoded": create(kept)}

        def loader(name: str, workers: int) -> DataLoader[Any]:
            if name == "reference":
                return _published(reference, batch, workers)
            return make_loader(streams[name], workers, torch.device("cpu"))

        measured = {str(n): _take_turns(partial(loader, workers=n), n, batch=batch, batches=per_round) for n in WORKERS}
        found["decoded_bytes"] = decoded.bytes
    return found | {"workers": measured}


def use_one_thread() -> None:
    """Of this process: a rate per process means little where one takes the cores of others."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


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


def _take_turns(create: Callable[[str], DataLoader[Any]], workers: int, *, batch: int, batches: int) -> dict[str, Any]:
    """Samples per second and seconds to the first batch, of each round; who begins alternates."""
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    first: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(ROUNDS):
        for name in list(NAMES)[:: 1 if number % 2 == 0 else -1]:
            began = time.perf_counter()
            loading = iter(create(name))
            next(loading)
            first[name].append(time.perf_counter() - began)
            for _ in range(READ_AHEAD * workers):  # what was read ahead is no measure of how fast it goes
                next(loading)
            began = time.perf_counter()
            for _ in range(batches):
                next(loading)
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
    for name in ("", *NAMES.values()):
        table.add_column(name, justify="right" if name else "left")
    for workers, measured in found["workers"].items():
        label = f"{workers if int(workers) else 'no'} worker{'s' * (int(workers) != 1)}"
        rates, first, ratios = (measured[key] for key in ("samples_per_second", "first_batch_seconds", "ratio"))
        table.add_row(f"samples/s, {label}", *(_shown(rates[name], 0) for name in NAMES))
        table.add_row("  times the published", *(_shown(ratios[name], 2) if name in ratios else "1" for name in NAMES))
        table.add_row(f"first batch, {label}, s", *(_shown(first[name], 3) for name in NAMES))
    sent = found["bytes_per_sample"]
    table.add_row("bytes per sample", *(f"{sent[name if name in sent else 'ours']:,.0f}" for name in NAMES))
    results.print(table)
    error = found["error"]
    results.print(
        f"medians of {found['rounds']} rounds of {found['batches_per_round']} batches (least to most); the cache is "
        f"{found['decoded_bytes'] / 1e6:,.0f} MB; crops of "
        f"{error['people']} people differ by {error['pixel_mean']:.4f} grey levels in the mean, "
        f"{error['pixel_max']:.0f} at most, their keypoints by {error['keypoint_max']:.1e} pixels at most",
        soft_wrap=True,
    )


def _shown(spread: dict[str, float], digits: int) -> str:
    median, least, most = (f"{spread[name]:,.{digits}f}" for name in ("median", "least", "most"))
    return f"{median} ({least} to {most})"
