"""Evaluation and targets as the published code computes them: per person, per joint, per pair, on NumPy.

Written anew from its behaviour (the code of Zhang, Zhu, Ye, CVPR 2019, built on that of HRNet), plain and slow, to
measure ours against and to check ours by. Heatmaps are float32 (batch, joint, height, width); keypoints (x, y);
``scales`` are (width, height) of the region in units of 200 pixels.
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

Person = dict[str, Any]
PIXELS_PER_SCALE = 200.0


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


def target(
    joints: np.ndarray, visible: np.ndarray, input_size: tuple[int, int], heatmap_size: tuple[int, int], sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Heatmaps and weights (joint, 1) of one person: a patch of 6 sigma + 1 cells for each joint."""
    height, width = heatmap_size
    stride = np.array([input_size[1] / width, input_size[0] / height])
    weights = np.ones((len(joints), 1), dtype=np.float32)
    weights[:, 0] = visible
    heatmaps = np.zeros((len(joints), height, width), dtype=np.float32)
    reach = sigma * 3
    for joint in range(len(joints)):
        column = int(joints[joint][0] / stride[0] + 0.5)
        row = int(joints[joint][1] / stride[1] + 0.5)
        start = [int(column - reach), int(row - reach)]
        end = [int(column + reach + 1), int(row + reach + 1)]
        if start[0] >= width or start[1] >= height or end[0] < 0 or end[1] < 0:
            weights[joint] = 0
            continue
        size = 2 * reach + 1
        x = np.arange(0, size, 1, dtype=np.float32)
        y = x[:, np.newaxis]
        middle = size // 2
        patch = np.exp(-((x - middle) ** 2 + (y - middle) ** 2) / (2 * sigma**2))
        patch_x = max(0, -start[0]), min(end[0], width) - start[0]
        patch_y = max(0, -start[1]), min(end[1], height) - start[1]
        cells_x = max(0, start[0]), min(end[0], width)
        cells_y = max(0, start[1]), min(end[1], height)
        if weights[joint] > 0.5:
            heatmaps[joint][cells_y[0] : cells_y[1], cells_x[0] : cells_x[1]] = patch[
                patch_y[0] : patch_y[1], patch_x[0] : patch_x[1]
            ]
    return heatmaps, weights


def targets(
    keypoints: np.ndarray, visible: np.ndarray, input_size: tuple[int, int], heatmap_size: tuple[int, int], sigma: float
) -> tuple[Tensor, Tensor]:
    """A batch of targets, collated as a loader does it; weights (batch, joint, 1)."""
    pairs = [target(own, shown, input_size, heatmap_size, sigma) for own, shown in zip(keypoints, visible, strict=True)]
    return (
        torch.stack([torch.from_numpy(heatmaps) for heatmaps, _ in pairs]),
        torch.stack([torch.from_numpy(weights) for _, weights in pairs]),
    )


def decode(heatmaps: np.ndarray, centers: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (batch, joint, 2) in image pixels and maxima (batch, joint, 1)."""
    coordinates, maxima = _maxima(heatmaps)
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
        found[n] = _to_image(coordinates[n], centers[n], scales[n], (width, height))
    return found, maxima


def _maxima(heatmaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    batch, joints, _, width = heatmaps.shape
    flat = heatmaps.reshape((batch, joints, -1))
    index = np.argmax(flat, 2).reshape((batch, joints, 1))
    maxima = np.amax(flat, 2).reshape((batch, joints, 1))
    coordinates = np.tile(index, (1, 1, 2)).astype(np.float32)
    coordinates[:, :, 0] = coordinates[:, :, 0] % width
    coordinates[:, :, 1] = np.floor(coordinates[:, :, 1] / width)
    return coordinates * np.tile(np.greater(maxima, 0.0), (1, 1, 2)).astype(np.float32), maxima


def _to_image(coordinates: np.ndarray, center: np.ndarray, scale: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cells of one person as image pixels, point by point through the inverse affine map."""
    found = np.zeros(coordinates.shape)
    matrix = _to_image_matrix(center, scale, size)
    for joint in range(coordinates.shape[0]):
        point = np.array([coordinates[joint, 0], coordinates[joint, 1], 1.0])
        found[joint, 0:2] = np.dot(matrix, point)[:2]
    return found


def _to_image_matrix(center: np.ndarray, scale: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """From three points of the region and of the heatmap: the middle, the middle of the upper side, one beside it."""
    region_width = scale[0] * PIXELS_PER_SCALE
    width, height = size
    region, cells = np.zeros((3, 2), dtype=np.float32), np.zeros((3, 2), dtype=np.float32)
    region[0], region[1] = center, center + np.array([0, region_width * -0.5], np.float32)
    cells[0] = [width * 0.5, height * 0.5]
    cells[1] = cells[0] + np.array([0, width * -0.5], np.float32)
    for points in (region, cells):
        across = points[0] - points[1]
        points[2] = points[1] + np.array([-across[1], across[0]], dtype=np.float32)
    return cv2.getAffineTransform(np.float32(cells), np.float32(region))


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


def average_precision(
    truth: dict[str, Any], results: list[Person], sigmas: Sequence[float], folder: Path
) -> list[float]:
    """The ten numbers of pycocotools, by way of two JSON files as the original goes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, found = folder / "truth.json", folder / "results.json"
    annotations.write_text(json.dumps(truth), encoding="utf-8")
    found.write_text(json.dumps(results, sort_keys=True, indent=4), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO(str(annotations))
        evaluation = COCOeval(dataset, dataset.loadRes(str(found)), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.params.useSegm = None
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(number) for number in evaluation.stats]
