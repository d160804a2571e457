"""Targets and evaluation as the published code computes them: per person, per joint, per pair, in NumPy.

Rewritten from the behaviour of the code of Zhang, Zhu, Ye (CVPR 2019), which builds on HRNet's: a plain and slow
reference for the speed and the results of ours. Heatmaps are float32 (batch, joint, height, width); keypoints (x, y);
`scales` are (width, height) of the region in units of 200 pixels.
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

from fpd_accel.bench.published.heatmaps import corresponding_points, draw_target, find_maxima

Result = dict[str, Any]
SOFT_LIMIT = 20  # people of an image that soft NMS keeps at most


def fuse_flip(output: Tensor, flipped: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Return the mean of both outputs; the mirrored one goes through NumPy and is shifted right by one cell."""
    heatmaps = flipped.cpu().numpy()[:, :, :, ::-1].copy()
    for left, right in pairs:
        held = heatmaps[:, left].copy()
        heatmaps[:, left] = heatmaps[:, right]
        heatmaps[:, right] = held
    mirrored = torch.from_numpy(heatmaps.copy()).to(output.device)
    mirrored[:, :, :, 1:] = mirrored.clone()[:, :, :, :-1]
    return (output + mirrored) * 0.5


def targets(
    keypoints: np.ndarray, visible: np.ndarray, input_size: tuple[int, int], heatmap_size: tuple[int, int], sigma: float
) -> tuple[Tensor, Tensor]:
    """Return the targets of a batch, collated as by a loader, and their weights (batch, joint, 1)."""
    people = zip(keypoints, visible, strict=True)
    pairs = [draw_target(own, shown, input_size, heatmap_size, sigma) for own, shown in people]
    heatmaps, weights = (torch.stack([torch.from_numpy(own) for own in arrays]) for arrays in zip(*pairs, strict=True))
    return heatmaps, weights


def decode(output: Tensor, centers: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return keypoints (batch, joint, 2) in image pixels and maxima (batch, joint, 1)."""
    heatmaps = output.clone().cpu().numpy()
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
        image, cells = corresponding_points(centers[n], scales[n], 0.0, (height, width))
        matrix = cv2.getAffineTransform(cells, image)
        for joint in range(coordinates.shape[1]):
            point = np.array([coordinates[n, joint, 0], coordinates[n, joint, 1], 1.0])
            found[n, joint] = np.dot(matrix, point)[:2]
    return found, maxima


def rescore_and_suppress(
    people: Sequence[Result], sigmas: Sequence[float], *, keypoint_threshold: float, threshold: float, soft: bool
) -> list[Result]:
    """Return the COCO results that remain after rescoring and OKS-NMS.

    Each person has `image`, `score` of the box, `area` and `keypoints` (joint, 3).
    """
    by_image: dict[int, list[Result]] = {}
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
        keep = _suppress(own, threshold, np.array(sigmas), soft=soft)
        kept_by_image[image] = [own[number] for number in keep] if len(keep) else own
    results = []
    for image, own in kept_by_image.items():
        keypoints = np.array([person["keypoints"] for person in own])
        flat = np.zeros((len(own), len(sigmas) * 3), dtype=np.float64)
        for joint in range(len(sigmas)):
            for value in range(3):
                flat[:, joint * 3 + value] = keypoints[:, joint, value]
        results += [
            {"image_id": image, "category_id": 1, "keypoints": list(flat[k]), "score": own[k]["score"]}
            for k in range(len(own))
        ]
    return results


def _oks(pose: np.ndarray, others: np.ndarray, area: float, areas: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Return the similarities of one flat pose to others, computed one after the other."""
    variances = (sigmas * 2) ** 2
    similarities = np.zeros(others.shape[0])
    for other in range(others.shape[0]):
        dx = others[other, 0::3] - pose[0::3]
        dy = others[other, 1::3] - pose[1::3]
        exponent = (dx**2 + dy**2) / variances / ((area + areas[other]) / 2 + np.spacing(1)) / 2
        similarities[other] = np.sum(np.exp(-exponent)) / exponent.shape[0]
    return similarities


def _suppress(people: Sequence[Result], threshold: float, sigmas: np.ndarray, *, soft: bool) -> list[int]:
    """Return the indices that hard or soft OKS-NMS keeps; ties, whose order the original leaves open, go by index."""
    scores = np.array([person["score"] for person in people])
    poses = np.array([person["keypoints"].flatten() for person in people])
    areas = np.array([person["area"] for person in people])
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    keep: list[int] = []
    while order.size > 0 and not (soft and len(keep) == SOFT_LIMIT):
        best, order, scores = order[0], order[1:], scores[1:]
        keep.append(int(best))
        overlap = _oks(poses[best], poses[order], areas[best], areas[order], sigmas)
        if soft:
            scores = scores * np.exp(-(overlap**2) / threshold)
            remaining = np.argsort(-scores, kind="stable")
        else:
            remaining = np.where(overlap <= threshold)[0]
        order, scores = order[remaining], scores[remaining]
    return keep


def read_truth(truth: dict[str, Any], folder: Path) -> Any:
    """Return the ground truth as a `pycocotools` dataset, read from a JSON file as the original does once."""
    from pycocotools.coco import COCO

    annotations = folder / "truth.json"
    annotations.write_text(json.dumps(truth), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(annotations))


def average_precision(truth: Any, results: list[Result], sigmas: Sequence[float], folder: Path) -> list[float]:
    """Return the ten numbers of `pycocotools`, passing the results through a JSON file as the original does."""
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
