"""Our loader against the published one, in one process and in turns: rates, time to the first batch, and bytes sent.

Both return the same people with the same random geometry through PyTorch's `DataLoader`, with the same number of
workers, each with one thread; crops are compared before anything is timed. Only with `data.group_by_image` do batches
hold other people. Ours leaves normalisation and targets to the device. One variant includes them, computed by the
process that reads the batches, as training on a CPU does; on a GPU they take microseconds and are part of `bench step`.
"""

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.table import Column, Table
from torch.utils.data import DataLoader

from fpd_accel.bench.probe import INPUT_SIZE, payload, skip
from fpd_accel.bench.published.loader import PublishedDataset
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.schema import Augment
from fpd_accel.console import stdout
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.data.pixel_cache import CHANNELS, open_decoded
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import READ_AHEAD, PoseStream, close_loader, make_loader, start_worker
from fpd_accel.errors import BenchError
from fpd_accel.files import amount
from fpd_accel.outputs import STRIDE

WORKERS = (0, 1, 2)
ROUNDS = 5
NAMES = {
    "reference": "published",
    "ours": "ours",
    "prepared": "ours, with normalising and targets",
    "grouped": "ours, data.group_by_image",
    "decoded": "ours, data.decoded_cache",
}
OURS = [name for name in NAMES if name != "reference"]
CACHE_AT_MOST = 4 * 10**9  # bytes of decoded images


def compare_loaders(
    path: str | Path, folder: str | Path, *, batch: int, batches: int, input_size: tuple[int, int] = INPUT_SIZE
) -> dict[str, Any]:
    """Measure both loaders over `ROUNDS` rounds, which share `batches` batches of `batch` samples of some shards.

    The images of these samples are decoded into `folder` for the variant with `data.decoded_cache`.

    Raise a BenchError if the loaders do not agree, or the images of the fewest batches exceed `CACHE_AT_MOST`; a
    DataError if the dataset cannot be read, or the folder cannot be written.
    """
    use_one_thread()
    shards = Shards(path)
    shards.open()
    create = partial(PoseStream, input_size=input_size, batch_size=batch, augment=Augment(), stop=sys.maxsize)
    stream, kept = create(shards), copy.copy(shards)
    per_round = batches_per_round(stream, max(1, batches // ROUNDS))
    samples = batch * (per_round + _beside())
    published = PublishedDataset(stream, samples)
    error = compare_crops(stream, published)
    kept.decoded = decoded = open_decoded(kept, folder, rows=np.unique(_image_rows(stream, samples)))
    streams = dict(zip(OURS, (stream, stream, create(shards, group_by_image=True), create(kept)), strict=True))

    def loader(name: str, workers: int) -> DataLoader[Any]:
        if name != "reference":
            return make_loader(streams[name], workers, torch.device("cpu"))
        ahead = READ_AHEAD if workers else None
        return DataLoader(published, batch, num_workers=workers, prefetch_factor=ahead, worker_init_fn=start_worker)

    codec = HeatmapCodec(input_size, (input_size[0] // STRIDE, input_size[1] // STRIDE))
    size = {"batch": batch, "batches": per_round}
    sent = {"ours": payload(stream.batch(range(batch))), "reference": payload(next(iter(loader("reference", 0))))}
    return {
        "rounds": ROUNDS,
        "batches_per_round": per_round,
        "bytes_per_sample": {name: size / batch for name, size in sent.items()},
        "error": error,
        "workers": {str(n): _time_rounds(loader, codec, workers=n, **size) for n in WORKERS},
        "decoded_bytes": decoded.bytes,
    }


def use_one_thread() -> None:
    """Give this process one thread, so that its rate does not depend on cores that other processes leave idle."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def compare_crops(stream: PoseStream, published: PublishedDataset, *, people: int = 128) -> dict[str, float]:
    """Return how far crops (grey levels of 256) and keypoints (crop pixels) differ; raise BenchError if too far."""
    people = min(people, len(published))
    batch = stream.batch(range(people))
    pixels, keypoints = [], [0.0]
    for number in range(people):
        crop, joints, visible, _ = published.crop(published.records[number])
        pixels.append(np.abs(crop.astype(np.int16) - batch.crops[number].numpy()))
        ours, seen = batch.keypoints[number].numpy(), visible[:, 0] > 0
        if not np.array_equal(seen, batch.visible[number].numpy() > 0):
            keypoints.append(math.inf)
        keypoints += np.abs(joints[seen, :2] - ours[seen]).max(axis=1, initial=0).tolist()
    mean, most, keypoint = float(np.mean(pixels)), float(np.max(pixels)), max(keypoints)
    if not (mean <= 0.1 and most <= 2 and keypoint <= 0.01):
        raise BenchError(
            f"{published.shards.path}: our loader and the published one differ, so nothing was timed: crops by "
            f"{most:.3g} grey levels at most and {mean:.3g} in the mean, keypoints by {keypoint:.3g} crop pixels "
            "(allowed are 2, 0.1 and 0.01)"
        )
    return {"people": people, "pixel_mean": mean, "pixel_max": most, "keypoint_max": keypoint}


def _beside() -> int:
    """Return the most batches that are read before and after those of a round."""
    return 1 + 2 * READ_AHEAD * max(WORKERS)


def batches_per_round(stream: PoseStream, wanted: int) -> int:
    """Return the number of batches per round, at most `wanted`, whose decoded images fit in `CACHE_AT_MOST`."""
    shards, batch, beside = stream.sources[0].shards, stream.batch_size, _beside()
    samples = batch * (wanted + beside)
    rows, first = np.unique(_image_rows(stream, samples), return_index=True)
    heights, widths = shards.image_sizes(rows)
    needed = np.zeros(samples, dtype=np.int64)
    needed[first] = heights.astype(np.int64) * widths * CHANNELS
    fitting = int(np.searchsorted(np.cumsum(needed), CACHE_AT_MOST, side="right")) // batch - beside
    if fitting < 1:
        raise BenchError(
            f"{shards.path}: the decoded images of {beside + 1} batches of {batch} samples take more than "
            f"{amount(CACHE_AT_MOST)}; lower --batch"
        )
    return min(fitting, wanted)


def _image_rows(stream: PoseStream, samples: int) -> np.ndarray:
    """Return the image of each of the first samples."""
    people = [stream.place(sample).row for sample in range(samples)]
    return stream.sources[0].shards.columns(["image_row"], people)["image_row"]


def _time_rounds(
    create: Callable[[str, int], DataLoader[Any]], codec: HeatmapCodec, *, workers: int, batch: int, batches: int
) -> dict[str, Any]:
    """Measure samples per second and seconds to the first batch of each round; the order alternates."""
    rates, first = ({name: list[float]() for name in NAMES} for _ in range(2))
    for number in range(ROUNDS):
        for name in list(NAMES)[:: 1 if number % 2 == 0 else -1]:
            began = time.perf_counter()
            loading = iter(create(name, workers))
            read = map(partial(prepare, codec=codec), loading) if name == "prepared" else loading
            next(read)
            first[name].append(time.perf_counter() - began)
            skip(read, READ_AHEAD * workers)  # batches read ahead would make the rate too high
            began = time.perf_counter()
            skip(read, batches)
            rates[name].append(batches * batch / (time.perf_counter() - began))
            close_loader(loading)
    ratios = {name: [a / b for a, b in zip(rates[name], rates["reference"], strict=True)] for name in OURS}
    measured = {"samples_per_second": rates, "first_batch_seconds": first, "ratio": ratios}
    return {key: {name: _range(values) for name, values in own.items()} for key, own in measured.items()}


def prepare(batch: Batch, codec: HeatmapCodec) -> object:
    """Normalise images and draw targets, which ours leaves to the device."""
    return Normalization()(batch.crops), codec.encode(batch.keypoints, batch.visible)


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def show_loaders(path: str, people: int, found: dict[str, Any]) -> None:
    """Print a comparison as a table."""
    names = ("samples/s", "times the published", "first batch, s", "bytes per sample")
    title = f"Loader against the published one's: {path}, {people:,} people"
    table = Table("", *(Column(name, justify="right") for name in names), title=title, title_justify="left")
    sent = found["bytes_per_sample"]
    for workers, measured in found["workers"].items():
        rates, first, ratios = (measured[key] for key in ("samples_per_second", "first_batch_seconds", "ratio"))
        table.add_section()
        table.add_row(count_workers(int(workers)))
        for key, name in NAMES.items():
            ratio = _shown(ratios[key], 2) if key in ratios else "1"
            amounts = f"{sent[key if key in sent else 'ours']:,.0f}"
            table.add_row(f"  {name}", _shown(rates[key], 0), ratio, _shown(first[key], 3), amounts)
    stdout.print(table)
    error = found["error"]
    stdout.print(
        f"medians of {found['rounds']} rounds of {found['batches_per_round']} batches (least to most); normalising and "
        "targets are computed by the published loader's workers, by ours with them in the reading process, as in "
        "training on a CPU, and left to the device by the others; data.group_by_image has other people per batch; "
        f"the decoded cache, {amount(found['decoded_bytes'])}, had just been written and was read from memory; "
        f"crops of {error['people']} people differ by {error['pixel_mean']:.4f} grey levels in the mean, "
        f"{error['pixel_max']:.0f} at most, their keypoints by {error['keypoint_max']:.1e} pixels at most",
        soft_wrap=True,
    )


def count_workers(number: int) -> str:
    """Return a number of workers in words."""
    return f"{number or 'no'} worker{'s' * (number != 1)}"


def _shown(spread: dict[str, float], digits: int) -> str:
    median, least, most = (f"{spread[name]:,.{digits}f}" for name in ("median", "least", "most"))
    return f"{median} ({least} to {most})"
