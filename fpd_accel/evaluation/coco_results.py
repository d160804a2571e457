"""Convert predicted keypoints to COCO's result format and compare them with the annotations.

This is the part of the evaluation after the network: score each person by box score times mean score of the confident
keypoints, drop near-duplicates of an image by OKS, and measure the rest against the annotations.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, Real

from fpd_accel.config.schema import Evaluate
from fpd_accel.data.arrow_columns import read_columns
from fpd_accel.data.detections import Detections
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.geometry import box_to_region
from fpd_accel.metrics import gc_paused, mpii_scores, pck, rescore
from fpd_accel.oks import Sigmas, oks_nms_by_image, soft_oks_nms_by_image

CATEGORY = 1  # COCO's category id of "person"
PCK_THRESHOLDS = {"torso": 0.2, "box": 0.1}  # share of the torso's length, or of the box's longer side


@dataclass(frozen=True)
class Predictions:
    """Keypoints of N people, as arrays that share their first axis."""

    rows: Int[np.ndarray, " person"]  # row of each person in the shards
    keypoints: Float[np.ndarray, "person joint 2"]  # (x, y), image pixels
    scores: Float[np.ndarray, "person joint"]  # heatmap maxima


def coco_results(
    shards: Shards, predictions: Predictions, *, options: Evaluate, input_size: tuple[int, int], padding: float = 1.25
) -> list[dict[str, Any]]:
    """Return people in COCO's result format: rescored, without near-duplicates, best person of an image first.

    `input_size` is (height, width) of a crop in pixels, `padding` the factor on each person's box.
    """
    people = shards.columns(("image_id", "score"), predictions.rows)
    areas = regions(shards, predictions.rows, input_size, padding)[1].prod(axis=1)
    sigmas = shards.skeleton.sigmas
    return select_poses(predictions, people["image_id"], people["score"], areas, options=options, sigmas=sigmas)


@gc_paused()
def select_poses(
    predictions: Predictions,
    images: Integer[np.ndarray, " person"],
    box_scores: Real[np.ndarray, " person"],
    areas: Real[np.ndarray, " person"],
    *,
    options: Evaluate,
    sigmas: Sigmas,
) -> list[dict[str, Any]]:
    """Rescore poses, suppress near-duplicates in each image by OKS, and return the rest in COCO's result format.

    As in the published code the `areas` are those of the padded regions, in square pixels, and soft suppression selects
    people by decayed scores, but results have the undecayed scores. `images` are their ids.
    """
    scores = rescore(predictions.scores, box_scores, options.keypoint_threshold)
    poses = (images, predictions.keypoints, scores, areas)
    match options.nms:
        case "hard":
            kept = oks_nms_by_image(*poses, options.nms_threshold, sigmas)
        case "soft":
            kept = soft_oks_nms_by_image(*poses, options.nms_threshold, sigmas)
        case "none":
            kept = np.lexsort((-scores, images))
    triples = np.concatenate([predictions.keypoints[kept], predictions.scores[kept, :, None]], axis=2)
    # Rounding in float64 equals decimal rounding: a float32 times 1000 is exact there.
    rounded = np.round(triples.reshape(len(kept), -1).astype(np.float64), 3)
    return [
        {"image_id": image, "category_id": CATEGORY, "keypoints": keypoints, "score": score}
        for image, keypoints, score in zip(images[kept].tolist(), rounded.tolist(), scores[kept].tolist(), strict=True)
    ]


def detection_stats(shards: Shards, predictions: Predictions, people: list[dict[str, Any]]) -> dict[str, float]:
    """Return the number of people per image with people, before and after NMS, and the range of their scores."""
    images = len(np.unique(shards.columns(("image_id",), predictions.rows)["image_id"]))
    scores = [person["score"] for person in people]
    return {
        "people_per_image_before_nms": len(predictions.rows) / images,
        "people_per_image": len(people) / images,
        "score_min": min(scores),
        "score_max": max(scores),
    }


def regions(
    shards: Shards, rows: np.ndarray, input_size: tuple[int, int], padding: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return centres (x, y) and sizes (width, height) of the crops of the people in `rows`, image pixels."""
    people = shards.columns(("box", "image_row"), rows)
    image_sizes = read_columns(shards.images, ("width", "height"), people["image_row"])
    return box_to_region(shards.box_to_crop(people["box"], **image_sizes), input_size, padding=padding)


@gc_paused()
def ground_truth(shards: Shards, *, rows: np.ndarray | None = None) -> dict[str, Any]:
    """Return the annotations of the shards as a COCO dataset, including crowds and people without keypoints.

    `rows` restricts it to these people and their images.
    """
    people = shards.annotated.columns(("id", "image_id", "box", "area", "crowd", "keypoints"), rows)
    columns = {
        "id": people["id"],
        "image_id": people["image_id"],
        "category_id": np.full_like(people["id"], CATEGORY),
        "bbox": people["box"],
        "area": people["area"],
        "iscrowd": people["crowd"].astype(int),
        "keypoints": people["keypoints"],
        "num_keypoints": (people["keypoints"][:, 2::3] > 0).sum(axis=1),
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    annotations = [dict(zip(columns, of_person, strict=True)) for of_person in values]
    listed = read_columns(shards.images, ("id",))["id"] if rows is None else np.unique(people["image_id"])
    images = [{"id": image} for image in listed.tolist()]
    return {"images": images, "annotations": annotations, "categories": [{"id": CATEGORY, "name": "person"}]}


def ground_truth_predictions(shards: Shards, *, rows: np.ndarray | None = None) -> Predictions:
    """Return the labels as predictions, to test the evaluation after the network: they must score 1.0.

    A network predicts every keypoint, so unlabelled ones are placed in the middle of the box. `rows` restricts the
    predictions to these usable people.
    """
    rows = shards.usable if rows is None else rows
    people = shards.columns(("keypoints", "box"), rows)
    triples = people["keypoints"].reshape(len(rows), -1, 3)
    middle = (people["box"][:, :2] + people["box"][:, 2:] / 2)[:, None]
    labelled = triples[..., 2] > 0
    keypoints = np.where(labelled[..., None], triples[..., :2], middle)
    return Predictions(rows, keypoints, labelled.astype(np.float32))


def keypoint_accuracy(shards: Shards, predictions: Predictions) -> dict[str, float]:
    """Return PCK in percent: labelled keypoints found within 0.2 torso lengths, or 0.1 of the box's longer side.

    The skeleton names the ends of the torso (0.2 is from Sapp and Taskar, CVPR 2013); people without both ends do not
    count. The box is used if the skeleton has no torso. First comes the PCK of all joints, then that of each joint
    which is labelled at all, as `joint/<name>`.
    """
    people = shards.columns(("keypoints", "box"), predictions.rows)
    triples = people["keypoints"].reshape(len(predictions.rows), -1, 3)
    truth, visible = triples[..., :2], triples[..., 2] > 0
    if shards.skeleton.torso is not None:
        kind, (a, b) = "torso", (shards.skeleton.index(name) for name in shards.skeleton.torso)
        lengths = np.linalg.norm(truth[:, a] - truth[:, b], axis=-1)
        lengths = np.where(visible[:, a] & visible[:, b], lengths, np.nan)
    else:
        kind, lengths = "box", people["box"][:, 2:].max(axis=1)
    scores = pck(predictions.keypoints, truth, lengths, visible, PCK_THRESHOLDS[kind])
    joints = zip(shards.skeleton.keypoints, scores.per_joint.tolist(), strict=True)
    of_joints = {f"joint/{name}": score for name, score in joints if math.isfinite(score)}
    return {f"PCK_{kind}@{PCK_THRESHOLDS[kind]}": scores.mean} | of_joints


def head_accuracy(shards: Shards, predictions: Predictions) -> dict[str, float]:
    """Return `mpii_scores` of the people with a head size; empty if the shards have no head sizes."""
    if not shards.has_head_sizes:
        return {}
    people = shards.columns(("keypoints", "head_size"), predictions.rows)
    triples = people["keypoints"].reshape(len(predictions.rows), -1, 3)
    return mpii_scores(predictions.keypoints, triples[..., :2], people["head_size"], triples[..., 2] > 0)


def selection_metric(shards: Shards | Mixture) -> str:
    """Return the name of the metric that selects the best network on these people."""
    return "PCKh@0.5" if shards.has_head_sizes and not isinstance(shards, Detections) else "AP"
