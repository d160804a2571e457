"""Evaluation and targets as the published code computes them: per person, per joint, per pair, on NumPy.

Written anew from its behaviour (the code of Zhang, Zhu, Ye, CVPR 2019, built on that of HRNet), plain and slow, to
measure ours against and to check ours by. Heatmaps are float32 (batch, joint, height, width); keypoints (x, y);
``scales`` are (width, height) of the region in units of 200 pixels. What its loader and its step do too is in
``reference_heatmaps.py``.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from fpd_accel.bench.reference_heatmaps import corresponding_points, draw_target, find_maxima

Person = dict[str, Any]


def fuse_flip(output: Tensor, flipped: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """The mean of both outputs; the mirrored one goes through NumPy and is moved right by one cell."""
    mirrored = torch.from_numpy(flip_back(flipped.cpu().numpy(), pairs).copy()).to(output.device)
    mirrored[:, :, :, 1:] = mirrored.clone()[:, :, :, :-1]
    return (output + mirrored) * 0.5


def flip_back(heatmaps: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    heatmaps = heatmaps[:, :, :, ::-1].copy()  # the original exchanges joints in the array that it was given
    for left, right in pairs:
        held = heatmaps[:, left].copy()
        heatmaps[:, left] = heatmaps[:, right]
        heatmaps[:, right] = held
    return heatmaps


def targets(
    keypoints: np.ndarray, visible: np.ndarray, input_size: tuple[int, int], heatmap_size: tuple[int, int], sigma: float
) -> tuple[Tensor, Tensor]:
    """A batch of targets, collated as a loader does it; weights (batch, joint, 1)."""
    people = zip(keypoints, visible, strict=True)
    pairs = [draw_target(own, shown, input_size, heatmap_size, sigma) for own, shown in people]
    return (
        torch.stack([torch.from_numpy(heatmaps) for heatmaps, _ in pairs]),
        torch.stack([torch.from_numpy(weights) for _, weights in pairs]),
    )


def decode(heatmaps: np.ndarray, centers: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (batch, joint, 2) in image pixels and maxima (batch, joint, 1)."""
    coordinates, maxima = find_maxima(heatmaps)
    height, width = heatmaps.shape[2], heatmaps.shape[3]
    for n in range(coordinates.shape[0]):
        for joint in range(coordinates.shape[1]):
            heatmap = heatmaps[n][joint]
            x = int(np.floor(coordinates[n][joint][0] + 0.5))
            y = int(np.floor(coordinates[n][joint][1] + 0.5))
            if 1 < x < width - 1 and 1 < y < height - 1:
                slope = np.array([heatmap[y][x + 1] - heatmap[y][x - 1], heatmap[y + 1][x] - heatmap[y - 1][x]])
                coordinates[n][joint] += np.sign(slope) * 0.25
    found = coordinates.copy()
    for n in range(coordinates.shape[0]):
        found[n] = _to_image(coordinates[n], centers[n], scales[n], (height, width))
    return found, maxima


def _to_image(coordinates: np.ndarray, center: np.ndarray, scale: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cells of one person's heatmaps of ``size`` as image pixels, point by point through the inverse affine map."""
    found = np.zeros(coordinates.shape)
    image, cells = corresponding_points(center, scale, 0.0, size)
    matrix = cv2.getAffineTransform(cells, image)
    for joint in range(coordinates.shape[0]):
        point = np.array([coordinates[joint, 0], coordinates[joint, 1], 1.0])
        found[joint, 0:2] = np.dot(matrix, point)[:2]
    return found


def rescore_and_suppress(
    people: Sequence[Person], sigmas: Sequence[float], *, keypoint_threshold: float, threshold: float, soft: bool
) -> list[Person]:
    """COCO results of people with ``image``, ``score`` of the box, ``area`` and ``keypoints`` (joint, 3)."""
    by_image: dict[int, list[Person]] = {}
    for person in people:
        by_image.setdefault(person["image"], []).append(dict(person))
    kept_by_image = {}
    for image, own in by_image.items():
        for person in own:
            total, valid = 0.0, 0
            for joint in range(len(sigmas)):
                score = person["keypoints"][joint][2]
                if score > keypoint_threshold:
                    total = total + score
                    valid = valid + 1
            if valid != 0:
                total = total / valid
            person["score"] = total * person["score"]
        suppress = _soft_nms if soft else _nms
        keep = suppress(own, threshold, np.array(sigmas))
        kept_by_image[image] = [own[number] for number in keep] if len(keep) else own
    return _coco_results(kept_by_image, len(sigmas))


def _coco_results(by_image: dict[int, list[Person]], joints: int) -> list[Person]:
    results = []
    for image, own in by_image.items():
        keypoints = np.array([person["keypoints"] for person in own])
        flat = np.zeros((len(own), joints * 3), dtype=np.float64)
        for joint in range(joints):
            for value in range(3):
                flat[:, joint * 3 + value] = keypoints[:, joint, value]
        results += [
            {"image_id": image, "category_id": 1, "keypoints": list(flat[k]), "score": own[k]["score"]}
            for k in range(len(own))
        ]
    return results


def _oks(pose: np.ndarray, others: np.ndarray, area: float, areas: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Similarities of one flat pose to others, one after the other."""
    variances = (sigmas * 2) ** 2
    similarities = np.zeros(others.shape[0])
    for other in range(others.shape[0]):
        dx = others[other, 0::3] - pose[0::3]
        dy = others[other, 1::3] - pose[1::3]
        exponent = (dx**2 + dy**2) / variances / ((area + areas[other]) / 2 + np.spacing(1)) / 2
        similarities[other] = np.sum(np.exp(-exponent)) / exponent.shape[0]
    return similarities


def _nms(people: Sequence[Person], threshold: float, sigmas: np.ndarray) -> list[int]:
    scores = np.array([person["score"] for person in people])
    poses = np.array([person["keypoints"].flatten() for person in people])
    areas = np.array([person["area"] for person in people])
    order = np.argsort(-scores, kind="stable")  # the original leaves open which of equals is the first
    keep = []
    while order.size > 0:
        best = order[0]
        keep.append(int(best))
        overlap = _oks(poses[best], poses[order[1:]], areas[best], areas[order[1:]], sigmas)
        order = order[np.where(overlap <= threshold)[0] + 1]
    return keep


def _soft_nms(people: Sequence[Person], threshold: float, sigmas: np.ndarray, limit: int = 20) -> list[int]:
    scores = np.array([person["score"] for person in people])
    poses = np.array([person["keypoints"].flatten() for person in people])
    areas = np.array([person["area"] for person in people])
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    keep: list[int] = []
    while order.size > 0 and len(keep) < limit:
        best = order[0]
        overlap = _oks(poses[best], poses[order[1:]], areas[best], areas[order[1:]], sigmas)
        order = order[1:]
        scores = scores[1:] * np.exp(-(overlap**2) / threshold)
        again = np.argsort(-scores, kind="stable")
        order, scores = order[again], scores[again]
        keep.append(int(best))
    return keep


def read_truth(truth: dict[str, Any], folder: Path) -> Any:
    """The ground truth as a pycocotools COCO, read from a JSON file: the original does so once, for its dataset."""
    from pycocotools.coco import COCO

    annotations = folder / "truth.json"
    annotations.write_text(json.dumps(truth), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(annotations))


def average_precision(truth: Any, results: list[Person], sigmas: Sequence[float], folder: Path) -> list[float]:
    """The ten numbers of pycocotools, by way of a JSON file of the results, as the original gets them each time.

    ``truth`` is what :func:`read_truth` gives.
    """
    from pycocotools.cocoeval import COCOeval

    found = folder / "results.json"
    found.write_text(json.dumps(results, sort_keys=True, indent=4), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(str(found)), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.params.useSegm = None
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(number) for number in evaluation.stats]
