"""Keypoints that a network found -> COCO's result format and scores: the part of evaluation behind the network.

Score a person by box score times mean score of confident keypoints, drop near-duplicates of an image by OKS, and
compare with what is annotated.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, Real

from fpd_accel.config import Evaluate
from fpd_accel.data.columns import read_columns
from fpd_accel.data.detections import Detections
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.geometry import box_to_region
from fpd_accel.metrics import mpii_scores, pck, rescore, without_collection
from fpd_accel.similarity import Sigmas, oks_nms_by_image, soft_oks_nms_by_image

CATEGORY = 1  # "person", as COCO numbers it
PCK_THRESHOLDS = {"torso": 0.2, "box": 0.1}  # share of the torso's length, or of the box's longer side


@dataclass(frozen=True)
class Predictions:
    """Keypoints of N people in image pixels, as arrays that share their first axis."""

    rows: Int[np.ndarray, " person"]  # of the people in the shards
    keypoints: Float[np.ndarray, "person joint 2"]
    scores: Float[np.ndarray, "person joint"]  # heatmap maxima


def results(
    shards: Shards, predictions: Predictions, *, options: Evaluate, input_size: tuple[int, int], padding: float = 1.25
) -> list[dict[str, Any]]:
    """People in COCO's result format, rescored, without near-duplicates (OKS-NMS per image), best of an image first."""
    people = shards.columns(("image_id", "score"), predictions.rows)
    sizes = regions(shards, predictions.rows, input_size, padding)[1]
    areas = sizes.prod(axis=1)  # of the padded region, as the published code takes it
    return chosen_people(
        predictions, people["image_id"], people["score"], areas, options=options, sigmas=shards.skeleton.sigmas
    )


@without_collection()
def chosen_people(
    predictions: Predictions,
    images: Integer[np.ndarray, " person"],
    box_scores: Real[np.ndarray, " person"],
    areas: Real[np.ndarray, " person"],
    *,
    options: Evaluate,
    sigmas: Sigmas,
) -> list[dict[str, Any]]:
    """:func:`results` of people whose image, score of the box and area of the region are known.

    Soft suppression chooses whom to keep by decayed scores, but as in the published code the score of a person stays.
    """
    scores = rescore(predictions.scores, box_scores, options.keypoint_threshold)
    own = (images, predictions.keypoints, scores, areas)
    match options.nms:
        case "hard":
            kept = oks_nms_by_image(*own, options.nms_threshold, sigmas)
        case "soft":
            kept = soft_oks_nms_by_image(*own, options.nms_threshold, sigmas)
        case "none":
            kept = np.lexsort((-scores, images))
    triples = np.concatenate([predictions.keypoints[kept], predictions.scores[kept, :, None]], axis=2)
    # Rounded as numbers, which is the same as digit by digit: a float32 times 1000 is exact in float64.
    rounded = np.round(triples.reshape(len(kept), -1).astype(np.float64), 3)
    return [
        {"image_id": image, "category_id": CATEGORY, "keypoints": keypoints, "score": score}
        for image, keypoints, score in zip(images[kept].tolist(), rounded.tolist(), scores[kept].tolist(), strict=True)
    ]


def crowding(shards: Shards, predictions: Predictions, people: list[dict[str, Any]]) -> dict[str, float]:
    """What the scores of a protocol hang on: people per image with people, before and after NMS, and their scores."""
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
    """Centres and (width, height) of the crops of some people, image pixels."""
    people = shards.columns(("box", "image_row"), rows)
    pictures = read_columns(shards.images, ("width", "height"), people["image_row"])
    boxes = shards.box_to_crop(people["box"], **pictures)
    return box_to_region(boxes, input_size, padding=padding)


@without_collection()
def ground_truth(shards: Shards, *, rows: np.ndarray | None = None) -> dict[str, Any]:
    """Everything annotated in the shards as a COCO dataset: crowds and people without keypoints too.

    ``rows`` takes some people alone, and their images.
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
    """The labels as predictions, for testing the path behind the network: it has to score 1.0.

    A network says something about every keypoint, so unlabelled ones lie in the middle of the box. ``rows`` takes some
    usable people alone.
    """
    rows = shards.usable if rows is None else rows
    people = shards.columns(("keypoints", "box"), rows)
    triples = people["keypoints"].reshape(len(rows), -1, 3)
    middle = (people["box"][:, :2] + people["box"][:, 2:] / 2)[:, None]
    labelled = triples[..., 2] > 0
    keypoints = np.where(labelled[..., None], triples[..., :2], middle)
    return Predictions(rows, keypoints, labelled.astype(np.float32))


def keypoint_accuracy(shards: Shards, predictions: Predictions) -> dict[str, float]:
    """PCK in percent: the share of labelled keypoints found within 0.2 torso lengths (or 0.1 of the box's longer side).

    The torso's ends are the skeleton's (Sapp & Taskar, CVPR 2013, for 0.2); people without both of them do not count.
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
    threshold = PCK_THRESHOLDS[kind]
    return {f"PCK_{kind}@{threshold}": pck(predictions.keypoints, truth, lengths, visible, threshold).mean}


def head_accuracy(shards: Shards, predictions: Predictions) -> dict[str, float]:
    """:func:`~fpd_accel.metrics.mpii_scores` of the people whose head size the shards know, if there are any."""
    if not shards.has_head_sizes:
        return {}
    people = shards.columns(("keypoints", "head_size"), predictions.rows)
    triples = people["keypoints"].reshape(len(predictions.rows), -1, 3)
    return mpii_scores(predictions.keypoints, triples[..., :2], people["head_size"], triples[..., 2] > 0)


def selection_metric(shards: Shards | Mixture) -> str:
    """The metric by which the best of several networks is chosen on these people."""
    return "PCKh@0.5" if shards.has_head_sizes and not isinstance(shards, Detections) else "AP"
