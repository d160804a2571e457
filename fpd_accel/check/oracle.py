"""Oracle check: score the labels as predictions. AP must be 1.0; report the people that prevent it.

Evaluating 150,000 people takes minutes, but hardly any of them can fail. A label taken as a prediction has OKS 1 with
itself, so it counts as correct unless the evaluation drops it or assigns it to another label. This requires a second
person in the image who is similar enough for one of these two steps, more people in the image than COCO counts, values
that break OKS itself, or a person whose box cannot be cropped. All images with such people are evaluated, and as many
others as make a fair sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from fpd_accel.check.labels import Finding, Labels
from fpd_accel.config.schema import Evaluate
from fpd_accel.console import track
from fpd_accel.data.shards import Shards
from fpd_accel.evaluation.coco_results import coco_results, ground_truth, ground_truth_predictions
from fpd_accel.geometry import box_to_region
from fpd_accel.metrics import average_precision
from fpd_accel.oks import similarity

INPUT_SIZE = (256, 192)  # (height, width); determines the regions whose area scales OKS in the suppression
PADDING = 1.25
MOST_PEOPLE = 20  # people of an image that COCO's keypoint protocol counts
SIMILAR = 0.89  # OKS above which two people are examined; suppression needs more than 0.9, confusion needs 1
AREAS = (1.0, 1e10)  # square pixels: rounding of predictions matters below, COCO ignores people above
SAMPLE = 2000  # people who are evaluated in any case
EXPLAINED_SHARE = 0.01  # share of people lost for known reasons above which the finding is an error
PERFECT = 1 - 1e-9  # a measure of 1 after rounding
CHUNK = 64  # images evaluated together in the search for those that lose people


@dataclass(frozen=True)
class LostPerson:
    """A person who is not found by predicting the labels, or who prevents another person from being found."""

    person: int  # annotation id
    image: int  # image id
    reason: str
    explained: bool  # whether the rules of the evaluation explain it


@dataclass(frozen=True)
class OracleScore:
    """The score of the labels as predictions."""

    average_precision: float
    average_recall: float
    evaluated: int  # people
    people: int  # usable people of the dataset
    lost: tuple[LostPerson, ...]
    holds: bool  # whether the labels score 1.0


def score_labels(shards: Shards, labels: Labels, *, sample: int = SAMPLE) -> OracleScore:
    """Score the labels as predictions in every image that could lose a person, and in others up to `sample` people."""
    pairs = similar_people(shards, labels)
    images = _images_to_score(labels, _images_at_risk(labels, pairs), max(sample, 1))
    score = _score(shards, labels, images)
    holds = min(score) > PERFECT
    failing = () if holds else _failing_images(shards, labels, images)
    lost = tuple(person for image in failing for person in _explain(labels, image, pairs))
    evaluated = int((labels.usable & np.isin(labels.image_ids, images)).sum())
    return OracleScore(*score, evaluated, int(labels.usable.sum()), lost, holds)


def check_oracle(score: OracleScore) -> list[Finding]:
    """Return a finding unless the labels score 1.0."""
    if score.holds:
        return []
    unexplained = [lost for lost in score.lost if not lost.explained]
    share = (1 - score.average_recall) * score.evaluated / max(score.people, 1)  # all others are found
    severe = unexplained or not score.lost or share > EXPLAINED_SHARE
    reasons = sorted({lost.reason.partition(":")[0] for lost in score.lost})
    text = (
        f"the labels as predictions score AP {score.average_precision:.4f}, AR {score.average_recall:.4f} instead of 1 "
        f"on {score.evaluated} of {score.people} people, because of {len(score.lost)} people "
        f"({'; '.join(reasons) or 'none identified'})"
    )
    ids = tuple(lost.person for lost in score.lost)
    return [Finding("error" if severe else "warning", "ground_truth_below_one", text, len(score.lost), ids)]


def similar_people(shards: Shards, labels: Labels) -> dict[tuple[int, int], str]:
    """Return the pairs of usable rows of one image that the evaluation may confuse, with the reason in words."""
    rows = np.flatnonzero(labels.usable)
    rows = rows[np.argsort(labels.image_ids[rows], kind="stable")]
    images = labels.image_ids[rows]
    boxes = shards.box_to_crop(labels.boxes[rows], width=labels.widths[rows], height=labels.heights[rows])
    regions = box_to_region(boxes, INPUT_SIZE, padding=PADDING)[1].prod(axis=1)
    middle = (labels.boxes[rows, :2] + labels.boxes[rows, 2:] / 2)[:, None]
    shown = labels.labelled[rows]
    points = np.where(shown[..., None], labels.keypoints[rows], middle)  # as in ground_truth_predictions
    areas, sigmas = np.maximum(labels.areas[rows], 0), labels.skeleton.sigmas
    pairs: dict[tuple[int, int], str] = {}
    offset = 1
    while len(first := np.flatnonzero(images[offset:] == images[:-offset])):
        second = first + offset
        squares = np.square(points[first] - points[second]).sum(axis=-1)
        near = similarity(squares, (regions[first] + regions[second]) / 2, sigmas) > SIMILAR
        for_second = similarity(squares, areas[second], sigmas, counted=shown[second]) > SIMILAR
        for_first = similarity(squares, areas[first], sigmas, counted=shown[first]) > SIMILAR
        for place in np.flatnonzero(near | for_second | for_first).tolist():
            reason = "dropped as a near-duplicate" if near[place] else "labels cannot be told apart"
            pairs[int(rows[first[place]]), int(rows[second[place]])] = reason
        offset += 1
    return pairs


def _uncropped(labels: Labels) -> Bool[np.ndarray, " person"]:
    """Return the people whose keypoints count in the evaluation, but who are never cropped and so never found."""
    return ~labels.usable & ~labels.crowd & (labels.visibility > 0).any(axis=1)


def _images_at_risk(labels: Labels, pairs: dict[tuple[int, int], str]) -> Int[np.ndarray, " image"]:
    """Return the ids of images in which a person may be lost."""
    usable = labels.usable
    ids, count = np.unique(labels.image_ids[usable], return_counts=True)
    listed, times = np.unique(labels.listed_images, return_counts=True)
    unknown_flags = np.asarray(~np.isin(labels.visibility, (0, 1, 2)).all(axis=1))
    odd = usable & ((labels.areas <= AREAS[0]) | (labels.areas >= AREAS[1]) | unknown_flags)
    paired = labels.image_ids[[row for pair in pairs for row in pair]]
    single = labels.image_ids[odd | _uncropped(labels)]
    return np.unique(np.concatenate([ids[count > MOST_PEOPLE], listed[times > 1], single, paired]))


def _images_to_score(labels: Labels, risky: Int[np.ndarray, " image"], sample: int) -> Int[np.ndarray, " chosen"]:
    """Return the ids of all risky images and of evenly spaced others, up to about `sample` people."""
    ids = labels.image_ids[labels.usable]
    certain = np.isin(ids, risky)
    others, room = np.unique(ids[~certain]), sample - int(certain.sum())
    if room <= 0:
        return risky
    stride = max(1, -(-int((~certain).sum()) // room))
    return np.union1d(risky, others[::stride])


def _score(shards: Shards, labels: Labels, images: Int[np.ndarray, " image"]) -> tuple[float, float]:
    """Return AP and AR of the labels as predictions in some images; AR is the share of people found."""
    here = np.isin(labels.image_ids, images)
    rows = np.flatnonzero(here & labels.usable)
    if not len(rows):
        return 0.0, 0.0
    predictions = ground_truth_predictions(shards, rows=rows)
    with np.errstate(over="ignore"):  # caused by negative areas
        found = coco_results(shards, predictions, options=Evaluate(), input_size=INPUT_SIZE, padding=PADDING)
        truth = ground_truth(shards, rows=np.flatnonzero(here))
        measures = average_precision(truth, found, shards.skeleton.sigmas)
    return measures["AP"], measures["AR"]


def _failing_images(shards: Shards, labels: Labels, images: Int[np.ndarray, " image"]) -> Iterator[int]:
    """Yield each image whose labels do not score 1.0 by themselves."""
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    for chunk in track(chunks, "searching images that lose people", total=len(chunks)):
        if min(_score(shards, labels, chunk)) <= PERFECT:
            yield from (int(image) for image in chunk if min(_score(shards, labels, np.array([image]))) <= PERFECT)


def _explain(labels: Labels, image: int, pairs: dict[tuple[int, int], str]) -> list[LostPerson]:
    """Return the people because of whom the labels of one image do not score 1.0."""
    rows = np.flatnonzero((labels.image_ids == image) & labels.usable).tolist()
    chosen = ((first, second, reason) for (first, second), reason in pairs.items() if first in rows)
    reasons = [(second, f"{reason}: of annotation {labels.ids[first]}") for first, second, reason in chosen]
    too_many = f"COCO counts {MOST_PEOPLE} people per image: this one has {len(rows)}"
    reasons += [(row, too_many) for row in rows[MOST_PEOPLE:]]
    never = np.flatnonzero((labels.image_ids == image) & _uncropped(labels)).tolist()
    reasons += [(row, f"counted by the evaluation but never cropped: {labels.exclude_reason[row]}") for row in never]
    found = reasons or [(row, "area, visibility or ids break the measure") for row in rows]
    return [LostPerson(int(labels.ids[row]), image, reason, bool(reasons)) for row, reason in found]
