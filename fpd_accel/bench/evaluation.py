"""``fpd-accel bench eval``: what is around the network, against the per-person loops of the published code.

For flip fusion, targets, decoding, suppression and AP on generated people: both are given the same, their results are
compared, and only if they agree are they timed, in turns in one process.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fpd_accel.bench import reference_eval as reference
from fpd_accel.bench.environment import describe, environment
from fpd_accel.bench.poses import Boxes, draw_boxes, draw_heatmaps
from fpd_accel.bench.reference_heatmaps import PIXELS_PER_SCALE
from fpd_accel.bench.rounds import Contest, Times, run_contest
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config import Evaluate
from fpd_accel.decode import decode_heatmaps, fuse_flip
from fpd_accel.log import results, track
from fpd_accel.metrics import AP_NAMES, average_precision
from fpd_accel.scoring import Predictions, chosen_people
from fpd_accel.skeleton import COCO

AP_ROUNDS = 3  # at most: one is seconds
SUMS = {"decode + hard NMS": ("decode", "rescore + hard NMS")}  # rows of the table that add others up
TARGETS = {"encode": 8.0, "decode + hard NMS": 2.5}  # ratios that we want to reach
PAIRS = [(COCO.index(left), COCO.index(right)) for left, right in COCO.flip_pairs]


def bench_eval(*, people: int = 2000, batch: int = 32, rounds: int = 5) -> dict[str, Any]:
    """The measurements, for JSON and for :func:`show_eval`.

    Raises:
        BenchError: ours and the reference do not agree.
    """
    where = environment()  # before measuring, which is a load itself
    codec = HeatmapCodec()
    boxes = draw_boxes(people, COCO.num_keypoints)
    steps: dict[str, Times] = {}
    facts: dict[str, dict[str, Any]] = {}

    def run(contest: Contest, *, rounds: int) -> None:
        times, difference = run_contest(contest, rounds=rounds)
        before = facts.get(contest.name, {"difference": 0.0})["difference"]
        steps[contest.name] = steps[contest.name] + times if contest.name in steps else times
        facts[contest.name] = {
            "difference": max(before, difference),
            "tolerance": contest.tolerance,
            "unit": contest.unit,
        }

    found, scores = [], []
    batches = -(-people // batch)
    for rows, heatmaps in track(draw_heatmaps(boxes, codec, batch=batch), "heatmaps", total=batches):
        for contest in _heatmap_contests(boxes, rows, heatmaps, codec):
            run(contest, rounds=rounds)
        keypoints, peaks = decode_heatmaps(heatmaps, *_regions(boxes, rows))
        found.append(keypoints.numpy())
        scores.append(peaks.numpy())
    predictions = Predictions(np.arange(people), np.concatenate(found), np.concatenate(scores))
    for contest in _suppression_contests(boxes, predictions):
        run(contest, rounds=rounds)
    with TemporaryDirectory(prefix="fpd-bench-") as folder:
        for contest in _precision_contests(boxes, predictions, Path(folder)):
            run(contest, rounds=min(rounds, AP_ROUNDS))
    reported = [{"name": name, **facts[name], **times.summary()} for name, times in steps.items()]
    for name, parts in SUMS.items():
        times = steps[parts[0]]
        for part in parts[1:]:
            times = times + steps[part]
        reported.append({"name": name, "difference": None, "tolerance": None, "unit": "", **times.summary()})
    return {
        "bench": "eval",
        "environment": where,
        "settings": {"people": people, "batch": batch, "rounds": rounds, "threads": torch.get_num_threads()},
        "steps": [{**step, "target": TARGETS.get(step["name"])} for step in reported],
    }


def _regions(boxes: Boxes, rows: slice) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(boxes.centers[rows]), torch.from_numpy(boxes.sizes[rows])


def _heatmap_contests(boxes: Boxes, rows: slice, heatmaps: Tensor, codec: HeatmapCodec) -> Iterator[Contest]:
    """What happens to one batch."""
    mirrored = heatmaps[:, list(COCO.flip_index)].flip(-1).roll(1, dims=1)  # any other heatmaps would do
    yield Contest(
        "flip fusion",
        lambda: reference.fuse_flip(heatmaps, mirrored, PAIRS),
        lambda: fuse_flip(heatmaps, mirrored, COCO.flip_index),
        _largest,
        0.0,
        "of a peak of 1",
    )
    keypoints, visible = boxes.in_crop(codec.input_size)[rows], boxes.visible[rows]
    tensors = torch.from_numpy(keypoints), torch.from_numpy(visible)
    yield Contest(
        "encode",
        lambda: reference.targets(keypoints, visible, codec.input_size, codec.heatmap_size, codec.sigma),
        lambda: codec.encode(*tensors),
        lambda one, other: max(_largest(one[0], other[0]), _largest(one[1][..., 0], other[1])),
        1e-6,
        "of a peak of 1",
    )
    centers, sizes = _regions(boxes, rows)
    scales = boxes.sizes[rows] / PIXELS_PER_SCALE
    yield Contest(
        "decode",
        lambda: reference.decode(heatmaps.clone().cpu().numpy(), boxes.centers[rows], scales),
        lambda: decode_heatmaps(heatmaps, centers, sizes),
        lambda one, other: max(_largest(one[0], other[0]), _largest(one[1][..., 0], other[1])),
        2e-3,
        "pixels or of a peak of 1",
    )


def _suppression_contests(boxes: Boxes, predictions: Predictions) -> Iterator[Contest]:
    """Of all people of all images at once, as both do it once the network has seen everybody."""
    options, areas = Evaluate(), boxes.areas
    triples = np.concatenate([predictions.keypoints, predictions.scores[..., None]], axis=2, dtype=np.float64)
    people = [
        {"image": int(image), "score": float(score), "area": float(area), "keypoints": own}
        for image, score, area, own in zip(boxes.images, boxes.scores, areas, triples, strict=True)
    ]
    threshold = options.nms_threshold
    slowly = partial(reference.rescore_and_suppress, people, COCO.sigmas, keypoint_threshold=options.keypoint_threshold)
    ours = partial(chosen_people, predictions, boxes.images, boxes.scores, areas, sigmas=COCO.sigmas)
    for kind in ("hard", "soft"):
        yield Contest(
            f"rescore + {kind} NMS",
            partial(slowly, threshold=threshold, soft=kind == "soft"),
            partial(ours, options=options.model_copy(update={"nms": kind})),
            _results_differ,
            1e-3,
            "pixels or of a score of 1",
        )


def _precision_contests(boxes: Boxes, predictions: Predictions, folder: Path) -> Iterator[Contest]:
    """AP by pycocotools with and without a file of results between; where faster-coco-eval is installed, by it.

    The reference has read the ground truth beforehand, as the published code has; ours looks at it every time.
    """
    noise = np.random.default_rng(0).normal(0, 3, predictions.keypoints.shape)  # an AP of 1 would say little
    moved = replace(predictions, keypoints=predictions.keypoints + noise)
    people = chosen_people(moved, boxes.images, boxes.scores, boxes.areas, options=Evaluate(), sigmas=COCO.sigmas)
    truth = boxes.ground_truth()
    read = reference.read_truth(truth, folder)
    contenders: dict[str, Callable[[], Sequence[float]]] = {
        "AP, pycocotools": lambda: list(average_precision(truth, people, COCO.sigmas).values())
    }
    if importlib.util.find_spec("faster_coco_eval") is not None:
        contenders["AP, faster-coco-eval"] = lambda: faster_precision(truth, people)
    for name, ours in contenders.items():
        yield Contest(
            name,
            lambda: reference.average_precision(read, people, COCO.sigmas, folder),
            ours,
            lambda one, other: float(np.abs(np.subtract(one, other)).max()),
            1e-9,
            f"of {len(AP_NAMES)} measures from 0 to 1",
        )


def faster_precision(truth: dict[str, Any], people: list[dict[str, Any]]) -> list[float]:
    """The ten measures of :func:`~fpd_accel.metrics.average_precision` by faster-coco-eval, which need not be there."""
    from faster_coco_eval import COCO as Dataset  # noqa: N811  (COCO is the skeleton here)
    from faster_coco_eval import COCOeval_faster

    with redirect_stdout(StringIO()):
        dataset = Dataset(truth, use_deepcopy=True)
        found = dataset.loadRes([dict(person) for person in people])
        evaluation = COCOeval_faster(dataset, found, iouType="keypoints", kpt_oks_sigmas=list(COCO.sigmas))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(number) for number in evaluation.stats[: len(AP_NAMES)]]


def _largest(one: Any, other: Any) -> float:
    one, other = (np.asarray(values, dtype=np.float64) for values in (one, other))
    return float(np.abs(one - other).max()) if one.shape == other.shape else math.inf


def _results_differ(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
    """The largest difference of a keypoint or score; infinity unless the same people are there in the same order."""
    if [person["image_id"] for person in one] != [person["image_id"] for person in other]:
        return math.inf
    return max(_largest([person[name] for person in one], [person[name] for person in other])
               for name in ("keypoints", "score"))  # fmt: skip


def show_eval(report: dict[str, Any]) -> None:
    """Print the measurements, a row for each step."""
    settings = report["settings"]
    title = f"Around the network: {settings['people']:,} people, {COCO.num_keypoints} keypoints"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("reference, ms", "ours, ms", "times as fast", "of rounds", "wanted", "differ by", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    for step in report["steps"]:
        compared = [step["difference"], step["tolerance"]]
        table.add_row(
            step["name"],
            f"{1e3 * step['reference_seconds']:,.1f}",
            f"{1e3 * step['ours_seconds']:,.1f}",
            f"{step['ratio']:.2f}",
            f"{step['ratio_lowest']:.2f}–{step['ratio_highest']:.2f}",  # noqa: RUF001
            f"{step['target']:g}" if step["target"] else "",
            *("" if value is None else f"{value:.1e}" for value in compared),
        )
    results.print(table)
    results.print(
        f"batches of {settings['batch']}, {settings['threads']} threads, medians of {settings['rounds']} rounds in "
        f"turns (AP: at most {AP_ROUNDS}); the reference is the published code's way of doing it, see "
        "fpd_accel/bench/reference_eval.py",
        soft_wrap=True,
    )
    results.print(escape(describe(report["environment"])), soft_wrap=True)
