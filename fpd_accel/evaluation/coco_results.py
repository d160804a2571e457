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
from fpd_accel.metrics import PCK, gc_paused, mpii_scores, pck, rescore
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

    Args:
        shards: The people that were evaluated on.
        predictions: Their keypoints.
        options: The evaluation protocol.
        input_size: (height, width) of a crop, pixels.
        padding: Factor on each person's box.
    """
    people = shards.columns(("image_id", "score"), predictions.rows)
    sizes = regions(shards, predictions.rows, input_size, padding)[1]
    areas = sizes.prod(axis=1)  # of the padded region, as in the published code
    return select_poses(
        predictions, people["image_id"], people["score"], areas, options=options, sigmas=shards.skeleton.sigmas
    )


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

    Soft suppression selects people by decayed scores, but as in the published code results have the undecayed scores.

    Args:
        predictions: Keypoints of the people.
        images: Image id of each person.
        box_scores: Score of each person's box.
        areas: Area of each person's region, square pixels.
        options: The evaluation protocol.
        sigmas: Standard deviation of each joint, for OKS.
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
    boxes = shards.box_to_crop(people["box"], **image_sizes)
    return box_to_region(boxes, input_size, padding=padding)


@gc_paused()
def ground_truth(shards: Shards, *, rows: np.ndarray | None = None) -> dict[str, Any]:
    """Return the annotations of the shards as a COCO dataset, including crowds and people without keypoints.

    `rows` restricts it to these people and their images.
    """
    people = shards.annotated.columns(("id", "image_id", "box", "area", "crowd", "keypoints"), rows)
    shown = (people["keypoints"][:, 2::3] > 0).sum(axis=1)
    columns = (people[name].tolist() for name in ("id", "image_id", "box", "area", "keypoints"))
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": CATEGORY,
            "bbox": box,
            "area": area,
            "iscrowd": crowd,
            "keypoints": keypoints,
            "num_keypoints": labelled,
        }
        for number, image, box, area, keypoints, crowd, labelled in zip(
            *columns, people["crowd"].astype(int).tolist(), shown.tolist(), strict=True
        )
    ]
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
    count. The box is used if the skeleton has no torso.
    """
    kind, scores = _pck(shards, predictions)
    return {f"PCK_{kind}@{PCK_THRESHOLDS[kind]}": scores.mean}


def joint_accuracy(shards: Shards, predictions: Predictions) -> dict[str, float]:
    """Return the PCK of `keypoint_accuracy` for each joint that is labelled at all, as `joint/<name>`."""
    _, scores = _pck(shards, predictions)
    pairs = zip(shards.skeleton.keypoints, scores.per_joint.tolist(), strict=True)
    return {f"joint/{name}": score for name, score in pairs if math.isfinite(score)}


def _pck(shards: Shards, predictions: Predictions) -> tuple[str, PCK]:
    """Return `torso` or `box`, by which errors are normalised, and the PCK."""
    people = shards.columns(("keypoints", "box"), predictions.rows)
    triples = people["keypoints"].reshape(len(predictions.rows), -1, 3)
    truth, visible = triples[..., :2], triples[..., 2] > 0
    if shards.skeleton.torso is not None:
        kind, (a, b) = "torso", (shards.skeleton.index(name) for name in shards.skeleton.torso)
        lengths = np.linalg.norm(truth[:, a] - truth[:, b], axis=-1)
        lengths = np.where(visible[:, a] & visible[:, b], lengths, np.nan)
    else:
        kind, lengths = "box", people["box"][:, 2:].max(axis=1)
    return kind, pck(predictions.keypoints, truth, lengths, visible, PCK_THRESHOLDS[kind])


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
