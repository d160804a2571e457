"""Metrics of poses: PCK, PCKh and COCO's average precision; the functions of `oks.py` are available here too.

NumPy only, except for `heatmap_pck`. Keypoints are (x, y), with or without a score; lengths are in pixels, areas in
square pixels.
"""

import contextlib
import gc
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Real, Shaped

from fpd_accel.errors import DataError
from fpd_accel.oks import (
    Keypoints,
    PerPerson,
    Sigmas,
    oks,
    oks_nms,
    oks_nms_by_image,
    soft_oks_nms,
    soft_oks_nms_by_image,
)
from fpd_accel.skeleton import COCO, MPII

__all__ = [
    "AP_NAMES", "MPII_GROUPS", "MPII_THRESHOLDS", "PCK", "average_precision", "heatmap_pck", "mpii_scores", "oks",
    "oks_nms", "oks_nms_by_image", "pck", "pckh", "rescore", "soft_oks_nms", "soft_oks_nms_by_image",
]  # fmt: skip
MPII_GROUPS = {"Head": ("head_top",)} | {
    name: (f"left_{name.lower()}", f"right_{name.lower()}")
    for name in ("Shoulder", "Elbow", "Wrist", "Hip", "Knee", "Ankle")
}
MPII_THRESHOLDS = {"PCKh@0.5": 0.5, "PCKh@0.1": 0.1, "Mean@0.1 (original, 0.11)": 0.11}  # shares of the head size
AP_NAMES = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")


@dataclass(frozen=True, eq=False)
class PCK:
    """Percentages of correct keypoints, 0 to 100."""

    per_joint: Float[np.ndarray, " joint"]  # not-a-number for a joint that is never visible
    mean: float  # over joints, weighted by `counted`; not-a-number if no joint is counted
    counted: Int[np.ndarray, " joint"]  # number of people in whom the joint is visible


def rescore(
    keypoint_scores: Real[np.ndarray, "person joint"], box_scores: PerPerson, threshold: float = 0.2
) -> Float[np.ndarray, " person"]:
    """Return scores of poses: the score of the box times the mean of the keypoint scores above `threshold`.

    The mean is 0 if no keypoint score is above the threshold.
    """
    confident = keypoint_scores > threshold
    total = np.where(confident, keypoint_scores, 0.0).sum(axis=1, dtype=np.float64)
    return total / np.maximum(confident.sum(axis=1), 1) * box_scores


def heatmap_pck(
    predicted: Float[Any, "batch joint height width"],
    target: Float[Any, "batch joint height width"],
    reference_norm: bool = True,
) -> float:
    """Return `fpd_accel.decode.heatmap_accuracy` of arrays or tensors as a number, 0 to 1."""
    import torch  # only here: the rest of this module needs NumPy alone

    from fpd_accel.decode import heatmap_accuracy

    pair = [maps if isinstance(maps, torch.Tensor) else torch.tensor(maps) for maps in (predicted, target)]
    return float(heatmap_accuracy(*pair, reference_norm=reference_norm))


def pck(
    predicted: Keypoints,
    truth: Keypoints,
    lengths: PerPerson,
    visible: Shaped[np.ndarray, "person joint"],
    threshold: float,
    *,
    excluded: Sequence[int] = (),
) -> PCK:
    """Return the percentage of visible keypoints within `threshold * length` of the truth.

    PCK is the measure of Yang and Ramanan (TPAMI 2013).

    Args:
        predicted: Keypoints of a network.
        truth: Annotated keypoints.
        lengths: Normalising length of each person, pixels; people without a positive finite length are left out.
        visible: Above 0 where a keypoint counts.
        threshold: Share of the length.
        excluded: Joints that get their own percentage but do not count in the mean.
    """
    usable = np.isfinite(lengths) & (lengths > 0)
    shown = (visible > 0) & usable[:, None]
    scale = np.where(usable, lengths, 1.0)[:, None]
    distance = np.linalg.norm(predicted[..., :2].astype(np.float64) - truth[..., :2], axis=-1) / scale
    counted = shown.sum(axis=0)
    correct = (shown & (distance <= threshold)).sum(axis=0)
    per_joint = np.full(counted.shape, np.nan)
    np.divide(100.0 * correct, counted, out=per_joint, where=counted > 0)
    included = np.setdiff1d(np.arange(len(counted)), excluded)
    total = int(counted[included].sum())
    mean = 100.0 * float(correct[included].sum()) / total if total else float("nan")
    return PCK(per_joint=per_joint, mean=mean, counted=counted)


def pckh(
    predicted: Keypoints,
    truth: Keypoints,
    head_sizes: PerPerson,
    visible: Shaped[np.ndarray, "person joint"],
    threshold: float = 0.5,
    *,
    excluded: Sequence[int] | None = None,
) -> PCK:
    """Return PCK normalised by the length of the head segment (Andriluka et al., MPII Human Pose, CVPR 2014).

    Args:
        predicted: Keypoints of a network.
        truth: Annotated keypoints.
        head_sizes: Diagonals of the head boxes, already multiplied by MPII's factor of 0.6, pixels.
        visible: Above 0 where a keypoint counts.
        threshold: Share of the head size.
        excluded: Joints that do not count in the mean; None: pelvis and thorax (6 and 7) if there are 16 joints, as
            MPII has, else none.
    """
    if excluded is None:
        excluded = (6, 7) if predicted.shape[1] == 16 else ()
    return pck(predicted, truth, head_sizes, visible, threshold, excluded=excluded)


def mpii_scores(
    predicted: Real[np.ndarray, "person 16 _"],
    truth: Real[np.ndarray, "person 16 _"],
    head_sizes: PerPerson,
    visible: Shaped[np.ndarray, "person 16"],
) -> dict[str, float]:
    """Return MPII's table in percent, by name: `pckh` of each group of joints, and of all joints.

    `PCKh_<group>@0.5` is the mean of left and right. `PCKh@0.5` and `PCKh@0.1` are means over joints, weighted by how
    often each is visible, without pelvis and thorax. The `Mean@0.1` of the published code is measured at 0.11, so it
    has a separate name here. A value is not-a-number where no joint is visible. The arguments are those of `pckh`.
    """
    measures = {
        name: pckh(predicted, truth, head_sizes, visible, threshold) for name, threshold in MPII_THRESHOLDS.items()
    }
    per_joint = measures["PCKh@0.5"].per_joint
    groups = {
        f"PCKh_{group}@0.5": float(per_joint[[MPII.index(name) for name in names]].mean())
        for group, names in MPII_GROUPS.items()
    }
    return groups | {name: measure.mean for name, measure in measures.items()}


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection: it would rescan 100,000 live dicts, two thirds of the evaluation time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@gc_paused()
def average_precision(
    ground_truth: dict[str, Any], results: list[dict[str, Any]], sigmas: Sigmas = COCO.sigmas
) -> dict[str, float]:
    """Return COCO's ten keypoint measures, 0 to 1, by name; -1 where no annotated person has that size.

    All measures are 0 without results. Neither argument is changed, and nothing is printed.

    Args:
        ground_truth: A COCO dataset.
        results: Dicts with `image_id`, `category_id`, `keypoints` (x, y, score of each joint, flat) and `score`; other
            entries, such as a box or an area, have no influence.
        sigmas: Standard deviation of each joint, see `Skeleton.sigmas`.

    Raises:
        DataError: A result names an unknown image, lacks an entry, or has another number of joints than `sigmas`; or an
            annotation has another number of joints, or neither area nor box.
    """
    if not results:
        return dict.fromkeys(AP_NAMES, 0.0)
    from pycocotools.coco import COCO as Dataset  # noqa: N811  (COCO is the skeleton here)
    from pycocotools.cocoeval import COCOeval

    annotations = _evaluation_annotations(ground_truth.get("annotations", ()), len(sigmas))
    detections = _evaluation_results(results, {image["id"] for image in ground_truth["images"]}, len(sigmas))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = Dataset()
        truth.dataset = {**ground_truth, "annotations": annotations}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.asarray(sigmas, dtype=np.float64)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(AP_NAMES, map(float, evaluation.stats), strict=True))


def _evaluation_annotations(annotations: Iterable[dict[str, Any]], joints: int) -> list[dict[str, Any]]:
    """Return copies that pycocotools may write to, with entries that it requires and custom datasets often leave out.

    Copies are numbered from 1, because pycocotools takes a match with annotation 0 for no match.
    """
    copies = []
    for number, annotation in enumerate(annotations, start=1):
        name, keypoints = f"annotation {annotation.get('id')}", annotation.get("keypoints", [])
        if len(keypoints) not in (0, 3 * joints):
            raise DataError(f"{name}: {len(keypoints)} keypoint values, not 3 for each of {joints} joints")
        if "area" not in annotation and "bbox" not in annotation:
            raise DataError(f"{name}: neither area nor bbox, so OKS has no scale")
        box = annotation.get("bbox", (0.0, 0.0, 0.0, 0.0))
        shown = int(np.count_nonzero(keypoints[2::3]))
        defaults = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0, "num_keypoints": shown}
        copies.append({**defaults, **annotation, "id": number})
    return copies


def _evaluation_results(results: Iterable[dict[str, Any]], images: set[Any], joints: int) -> list[dict[str, Any]]:
    """Return copies with only the entries by which pycocotools recognises keypoints and derives their area."""
    names = ("image_id", "category_id", "keypoints", "score")
    copies = []
    for number, result in enumerate(results):
        missing = [name for name in names if name not in result]
        if missing:
            raise DataError(f"result {number}: {', '.join(missing)} missing")
        if result["image_id"] not in images:
            raise DataError(f"result {number}: image_id {result['image_id']!r} is not an image of the ground truth")
        keypoints = [float(value) for value in result["keypoints"]]
        if len(keypoints) != 3 * joints:
            raise DataError(f"result {number}: {len(keypoints)} keypoint values, not 3 for each of {joints} joints")
        copies.append({**{name: result[name] for name in names}, "keypoints": keypoints})
    return copies
