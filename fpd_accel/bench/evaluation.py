"""`fpd-accel bench eval`: flip fusion, targets, decoding, suppression and AP against the published per-person loops.

Both sides get the same generated people. Their results are compared first, and only if they agree are they timed, in
turns in one process.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.table import Column, Table
from torch import Tensor

from fpd_accel.bench.environment import describe, environment
from fpd_accel.bench.poses import Boxes, draw_boxes, draw_heatmaps
from fpd_accel.bench.published import eval as published
from fpd_accel.bench.published.heatmaps import PIXELS_PER_SCALE
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.schema import Evaluate
from fpd_accel.console import stdout, track
from fpd_accel.decode import decode_heatmaps, fuse_flip
from fpd_accel.errors import BenchError
from fpd_accel.evaluation.coco_results import Predictions, select_poses
from fpd_accel.metrics import AP_NAMES, average_precision
from fpd_accel.skeleton import COCO

AP_ROUNDS = 3  # at most, since a round takes seconds
SUM = "decode + hard NMS"  # row of the table that adds up two others
SUMMED = ("decode", "rescore + hard NMS")
TARGETS = {"encode": 8.0, SUM: 2.5}  # ratios to reach
PAIRS = [(COCO.index(left), COCO.index(right)) for left, right in COCO.flip_pairs]
Seconds = Float[np.ndarray, "2 round"]  # of the reference and of ours


@dataclass(frozen=True)
class Comparison:
    """The same work done by the reference and by ours, and the tolerated difference of the results."""

    name: str
    reference: Callable[[], Any]
    ours: Callable[[], Any]
    difference: Callable[[Any, Any], float]  # the largest of two results; infinity if they have other shapes
    tolerance: float
    unit: str  # of the difference


def run_comparison(comparison: Comparison, *, rounds: int) -> tuple[Seconds, float]:
    """Return the seconds of each round and the difference of the results; both sides alternate in going first.

    The results compared are those of a first, untimed round, which also pays for lazy initialisation. Raise a
    BenchError if they differ by more than the tolerance.
    """
    difference = comparison.difference(comparison.reference(), comparison.ours())
    if not difference <= comparison.tolerance:
        raise BenchError(
            f"{comparison.name}: ours and the reference differ by {difference:.3g} {comparison.unit}, allowed are "
            f"{comparison.tolerance:.3g}; one of them is wrong, so nothing was timed"
        )
    seconds = np.zeros((2, rounds))
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            began = time.perf_counter()
            (comparison.reference, comparison.ours)[side]()
            seconds[side, number] = time.perf_counter() - began
    return seconds, difference


def summarize(seconds: Seconds) -> dict[str, Any]:
    """Return medians in seconds, and the median and range of the speed-up within a round, for JSON."""
    (reference, ours), ratios = seconds.tolist(), (seconds[0] / seconds[1]).tolist()
    return {
        "reference_seconds": statistics.median(reference),
        "ours_seconds": statistics.median(ours),
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "reference_rounds": reference,
        "ours_rounds": ours,
    }


def bench_eval(*, people: int = 2000, batch: int = 32, rounds: int = 5) -> dict[str, Any]:
    """Return the measurements, for JSON and `show_eval`; raise a BenchError if ours and the reference do not agree."""
    where = environment()  # before measuring, which is a load itself
    codec, boxes = HeatmapCodec(), draw_boxes(people, COCO.num_keypoints)
    seconds: dict[str, Seconds] = {}
    facts: dict[str, dict[str, Any]] = {}

    def run(comparisons: Iterable[Comparison], *, rounds: int) -> None:
        for one in comparisons:
            measured, difference = run_comparison(one, rounds=rounds)
            seconds[one.name] = seconds.get(one.name, 0) + measured
            own = facts.setdefault(one.name, {"difference": 0.0, "tolerance": one.tolerance, "unit": one.unit})
            own["difference"] = max(difference, own["difference"])

    decoded = []
    for rows, heatmaps in track(draw_heatmaps(boxes, codec, batch=batch), "heatmaps", total=-(-people // batch)):
        run(_heatmap_comparisons(boxes, rows, heatmaps, codec), rounds=rounds)
        decoded.append(decode_heatmaps(heatmaps, *boxes.regions(rows)))
    keypoints, scores = (torch.cat(parts).numpy() for parts in zip(*decoded, strict=True))
    predictions = Predictions(np.arange(people), keypoints, scores)
    run(_suppression_comparisons(boxes, predictions), rounds=rounds)
    with TemporaryDirectory(prefix="fpd-bench-") as folder:
        run([_precision_comparison(boxes, predictions, Path(folder))], rounds=min(rounds, AP_ROUNDS))
    seconds[SUM] = np.sum([seconds[name] for name in SUMMED], axis=0)
    facts[SUM] = {"difference": None, "tolerance": None, "unit": ""}
    return {
        "bench": "eval",
        "environment": where,
        "settings": {"people": people, "batch": batch, "rounds": rounds, "threads": torch.get_num_threads()},
        "steps": [
            {"name": name, **facts[name], **summarize(seconds[name]), "target": TARGETS.get(name)} for name in facts
        ],
    }


def _heatmap_comparisons(boxes: Boxes, rows: slice, heatmaps: Tensor, codec: HeatmapCodec) -> Iterator[Comparison]:
    """Compare flip fusion, encoding and decoding of one batch."""
    mirrored = heatmaps[:, list(COCO.flip_index)].flip(-1).roll(1, dims=1)  # any other heatmaps would do
    theirs: Callable[[], Any] = partial(published.fuse_flip, heatmaps, mirrored, PAIRS)
    ours: Callable[[], Any] = partial(fuse_flip, heatmaps, mirrored, COCO.flip_index)
    yield Comparison("flip fusion", theirs, ours, _largest, 0.0, "of a peak of 1")
    keypoints, visible = boxes.in_crop(codec.input_size)[rows], boxes.visible[rows]
    theirs = partial(published.targets, keypoints, visible, codec.input_size, codec.heatmap_size, codec.sigma)
    ours = partial(codec.encode, torch.from_numpy(keypoints), torch.from_numpy(visible))
    yield Comparison("encode", theirs, ours, _largest_of_pair, 1e-6, "of a peak of 1")
    centers, scales = boxes.centers[rows], boxes.sizes[rows] / PIXELS_PER_SCALE
    theirs = partial(published.decode, heatmaps, centers, scales)
    ours = partial(decode_heatmaps, heatmaps, *boxes.regions(rows))
    yield Comparison("decode", theirs, ours, _largest_of_pair, 2e-3, "pixels or of a peak of 1")


def _suppression_comparisons(boxes: Boxes, predictions: Predictions) -> Iterator[Comparison]:
    """Compare rescoring and NMS of all people of all images at once, as done after inference."""
    options = Evaluate()
    triples = np.concatenate([predictions.keypoints, predictions.scores[..., None]], axis=2, dtype=np.float64)
    people = [
        {"image": int(image), "score": float(score), "area": float(area), "keypoints": own}
        for image, score, area, own in zip(boxes.images, boxes.scores, boxes.areas, triples, strict=True)
    ]
    thresholds = {"keypoint_threshold": options.keypoint_threshold, "threshold": options.nms_threshold}
    for kind in ("hard", "soft"):
        theirs = partial(published.rescore_and_suppress, people, COCO.sigmas, **thresholds, soft=kind == "soft")
        ours = partial(
            select_poses, predictions, boxes.images, boxes.scores, boxes.areas,
            options=options.model_copy(update={"nms": kind}), sigmas=COCO.sigmas,
        )  # fmt: skip
        yield Comparison(f"rescore + {kind} NMS", theirs, ours, _results_differ, 1e-3, "pixels or of a score of 1")


def _precision_comparison(boxes: Boxes, predictions: Predictions, folder: Path) -> Comparison:
    """Compare AP by `pycocotools` with and without a file of results in between.

    The reference reads the ground truth once beforehand, as the published code does; ours indexes it every time.
    """
    noise = np.random.default_rng(0).normal(0, 3, predictions.keypoints.shape)  # an AP of 1 would hide differences
    moved = replace(predictions, keypoints=predictions.keypoints + noise)
    people = select_poses(moved, boxes.images, boxes.scores, boxes.areas, options=Evaluate(), sigmas=COCO.sigmas)
    truth = boxes.ground_truth()
    read, names = published.read_truth(truth, folder), f"of {len(AP_NAMES)} measures from 0 to 1"
    theirs = partial(published.average_precision, read, people, COCO.sigmas, folder)
    ours = partial(average_precision, truth, people, COCO.sigmas)
    return Comparison("AP, pycocotools", theirs, lambda: list(ours().values()), _largest, 1e-9, names)


def _largest(one: Any, other: Any) -> float:
    """Return the largest absolute difference, or infinity if the shapes differ."""
    one, other = (np.asarray(values, dtype=np.float64) for values in (one, other))
    return float(np.abs(one - other).max()) if one.shape == other.shape else math.inf


def _largest_of_pair(reference: Any, ours: Any) -> float:
    """Compare (heatmaps or keypoints, weights or maxima); the reference's second has a last axis of 1."""
    return max(_largest(reference[0], ours[0]), _largest(reference[1][..., 0], ours[1]))


def _results_differ(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
    """Return the largest difference of a keypoint or score; infinity unless both list the same people in one order."""
    if [person["image_id"] for person in one] != [person["image_id"] for person in other]:
        return math.inf
    names = ("keypoints", "score")
    return max(_largest([person[name] for person in one], [person[name] for person in other]) for name in names)


def show_eval(report: dict[str, Any]) -> None:
    """Print the measurements, a row for each step."""
    settings = report["settings"]
    title = f"Around the network: {settings['people']:,} people, {COCO.num_keypoints} keypoints"
    names = ("reference, ms", "ours, ms", "times as fast", "of rounds", "wanted", "differ by", "allowed")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("", no_wrap=True), *columns, title=title, title_justify="left")
    for step in report["steps"]:
        table.add_row(
            step["name"],
            f"{1e3 * step['reference_seconds']:,.1f}",
            f"{1e3 * step['ours_seconds']:,.1f}",
            f"{step['ratio']:.2f}",
            f"{step['ratio_lowest']:.2f}–{step['ratio_highest']:.2f}",  # noqa: RUF001
            f"{step['target']:g}" if step["target"] else "",
            *("" if value is None else f"{value:.1e}" for value in (step["difference"], step["tolerance"])),
        )
    stdout.print(table)
    stdout.print(
        f"batches of {settings['batch']}, {settings['threads']} threads, medians of {settings['rounds']} rounds in "
        f"turns (AP: at most {AP_ROUNDS}); the reference is the published code's way of doing it, see "
        "fpd_accel/bench/published/eval.py",
        soft_wrap=True,
    )
    stdout.print(describe(report["environment"]), soft_wrap=True, markup=False)
