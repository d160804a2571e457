"""The proof that the labels are worth AP 1.0, by the path that scores networks, and who is in the way where not.

Evaluating 150,000 people takes minutes, but hardly any of them can go wrong. A label taken as prediction has OKS 1 with
itself, so it is counted right unless the evaluation drops it or gives its label to somebody else. That needs a second
person of the image within reach of one of the two steps, more people in the image than COCO counts, numbers that spoil
OKS itself, or somebody whose box cannot be cropped. All images with such people are evaluated, and as many others as
make a fair sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from fpd_accel.check.labels import Finding, Labels
from fpd_accel.config import Evaluate
from fpd_accel.data.shards import Shards
from fpd_accel.geometry import box_to_region
from fpd_accel.log import track
from fpd_accel.metrics import average_precision
from fpd_accel.scoring import ground_truth, ground_truth_predictions, results

INPUT_SIZE = (256, 192)  # decides the regions whose area scales OKS in the suppression of near-duplicates
PADDING = 1.25
MOST_PEOPLE = 20  # of an image that COCO's keypoint protocol counts
SIMILAR = 0.89  # OKS from which two people are looked at; suppression needs more than 0.9, confusion needs 1
AREAS = (1.0, 1e10)  # square pixels: below, rounding the predictions matters; above, COCO ignores people
SAMPLE = 2000  # people who are evaluated in any case
EXPLAINED_SHARE = 0.01  # of the people who may be lost for a reason that is known before that is an error
PERFECT = 1 - 1e-9  # what rounding leaves of a measure of 1
CHUNK = 64  # images searched together for those that lose somebody


@dataclass(frozen=True)
class Lost:
    """Someone who cannot be found by predicting the labels, or who stands in another's way."""

    person: int  # annotation id
    image: int  # image id
    reason: str
    explained: bool  # whether the evaluation's own rules explain it


@dataclass(frozen=True)
class Proof:
    """What predicting the labels scored on the people evaluated."""

    average_precision: float
    average_recall: float
    evaluated: int  # people
    people: int  # usable people of the dataset
    lost: tuple[Lost, ...]

    @property
    def holds(self) -> bool:
        return min(self.average_precision, self.average_recall) > PERFECT


def prove(shards: Shards, labels: Labels, *, sample: int = SAMPLE) -> Proof:
    """Predict the labels of every image that could lose somebody, and of others up to ``sample`` people."""
    pairs = similar_people(shards, labels)
    images = _chosen(labels, _at_risk(labels, pairs), max(sample, 1))
    score = _score(shards, labels, images)
    lost: list[Lost] = []
    if min(score) <= PERFECT:
        for image in _failing(shards, labels, images):
            lost += _explain(labels, image, pairs)
    evaluated = int((labels.usable & np.isin(labels.image_ids, images)).sum())
    return Proof(*score, evaluated, int(labels.usable.sum()), tuple(lost))


def check_proof(proof: Proof) -> list[Finding]:
    """A finding unless the labels score 1.0."""
    if proof.holds:
        return []
    unexplained = [lost for lost in proof.lost if not lost.explained]
    share = (1 - proof.average_recall) * proof.evaluated / max(proof.people, 1)  # the others are all found
    severe = unexplained or not proof.lost or share > EXPLAINED_SHARE
    reasons = sorted({lost.reason.partition(":")[0] for lost in proof.lost})
    text = (
        f"the labels themselves score AP {proof.average_precision:.4f}, AR {proof.average_recall:.4f}, not 1, on "
        f"{proof.evaluated} of {proof.people} people; in the way are {len(proof.lost)} people "
        f"({'; '.join(reasons) or 'nobody found'})"
    )
    ids = tuple(lost.person for lost in proof.lost)
    return [Finding("error" if severe else "warning", "ground_truth_below_one", text, len(proof.lost), ids)]


def similar_people(shards: Shards, labels: Labels) -> dict[tuple[int, int], str]:
    """Pairs of usable rows of one image that the evaluation may confuse -> why, in words."""
    rows = np.flatnonzero(labels.usable)
    rows = rows[np.argsort(labels.image_ids[rows], kind="stable")]
    images = labels.image_ids[rows]
    boxes = shards.box_to_crop(labels.boxes[rows], width=labels.widths[rows], height=labels.heights[rows])
    regions = box_to_region(boxes, INPUT_SIZE, padding=PADDING)[1].prod(axis=1)
    middle = (labels.boxes[rows, :2] + labels.boxes[rows, 2:] / 2)[:, None]
    shown = labels.labelled[rows]
    points = np.where(shown[..., None], labels.keypoints[rows], middle)  # as the labels are predicted
    areas, variance = labels.areas[rows], 8 * np.square(np.asarray(labels.skeleton.sigmas))
    everything = np.ones_like(shown)
    pairs: dict[tuple[int, int], str] = {}
    offset = 1
    while len(first := np.flatnonzero(images[offset:] == images[:-offset])):
        second = first + offset
        squares = np.square(points[first] - points[second]).sum(axis=-1) / variance
        near = _oks(squares, (regions[first] + regions[second]) / 2, everything[first]) > SIMILAR
        for_second = _oks(squares, areas[second], shown[second]) > SIMILAR
        for_first = _oks(squares, areas[first], shown[first]) > SIMILAR
        for place in np.flatnonzero(near | for_second | for_first).tolist():
            reason = "dropped as a near-duplicate" if near[place] else "labels cannot be told apart"
            pairs[int(rows[first[place]]), int(rows[second[place]])] = reason
        offset += 1
    return pairs


def _oks(
    squares: Float[np.ndarray, "pair joint"], areas: Float[np.ndarray, " pair"], counted: Bool[np.ndarray, "pair joint"]
) -> Float[np.ndarray, " pair"]:
    """OKS of pairs over the joints counted, from squared distances over variances."""
    similarity = np.exp(-squares / np.maximum(areas, np.spacing(1.0))[:, None])
    return (similarity * counted).sum(axis=-1) / np.maximum(counted.sum(axis=-1), 1)


def _uncropped(labels: Labels) -> Bool[np.ndarray, " person"]:
    """People whose keypoints count in the evaluation, but who are never cropped and so never found."""
    return ~labels.usable & ~labels.crowd & (labels.visibility > 0).any(axis=1)


def _at_risk(labels: Labels, pairs: dict[tuple[int, int], str]) -> Int[np.ndarray, " image"]:
    """Ids of images in which somebody may be lost."""
    usable = labels.usable
    ids, count = np.unique(labels.image_ids[usable], return_counts=True)
    listed, times = np.unique(labels.listed_images, return_counts=True)
    strange = np.asarray(~np.isin(labels.visibility, (0, 1, 2)).all(axis=1))
    odd = usable & ((labels.areas <= AREAS[0]) | (labels.areas >= AREAS[1]) | strange)
    paired = labels.image_ids[[row for pair in pairs for row in pair]]
    alone = labels.image_ids[odd | _uncropped(labels)]
    return np.unique(np.concatenate([ids[count > MOST_PEOPLE], listed[times > 1], alone, paired]))


def _chosen(labels: Labels, risky: Int[np.ndarray, " image"], sample: int) -> Int[np.ndarray, " chosen"]:
    """Ids of all risky images and of evenly spaced others, up to about ``sample`` people."""
    ids = labels.image_ids[labels.usable]
    certain = np.isin(ids, risky)
    others, room = np.unique(ids[~certain]), sample - int(certain.sum())
    if room <= 0:
        return risky
    stride = max(1, -(-int((~certain).sum()) // room))
    return np.union1d(risky, others[::stride])


def _score(shards: Shards, labels: Labels, images: Int[np.ndarray, " image"]) -> tuple[float, float]:
    """AP and AR of the labels as predictions in some images; AR is the share of people found."""
    here = np.isin(labels.image_ids, images)
    rows = np.flatnonzero(here & labels.usable)
    if not len(rows):
        return 0.0, 0.0
    predictions = ground_truth_predictions(shards, rows=rows)
    with np.errstate(over="ignore"):  # of an area below zero
        found = results(shards, predictions, options=Evaluate(), input_size=INPUT_SIZE, padding=PADDING)
        truth = ground_truth(shards, rows=np.flatnonzero(here))
        measures = average_precision(truth, found, shards.skeleton.sigmas)
    return measures["AP"], measures["AR"]


def _failing(shards: Shards, labels: Labels, images: Int[np.ndarray, " image"]) -> Iterator[int]:
    """Each image whose labels do not score 1.0 by themselves."""
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    for chunk in track(chunks, "looking for those in the way", total=len(chunks)):
        if min(_score(shards, labels, chunk)) <= PERFECT:
            yield from (int(image) for image in chunk if min(_score(shards, labels, np.array([image]))) <= PERFECT)


def _explain(labels: Labels, image: int, pairs: dict[tuple[int, int], str]) -> list[Lost]:
    """Why the labels of one image do not score 1.0."""
    rows = np.flatnonzero((labels.image_ids == image) & labels.usable)
    members = set(rows.tolist())
    lost = [
        Lost(int(labels.ids[second]), image, f"{reason}: of annotation {labels.ids[first]}", True)
        for (first, second), reason in pairs.items()
        if first in members
    ]
    reason = f"COCO counts {MOST_PEOPLE} people an image: this one has {len(rows)}"
    lost += [Lost(int(labels.ids[row]), image, reason, True) for row in rows[MOST_PEOPLE:]]
    never = np.flatnonzero((labels.image_ids == image) & _uncropped(labels))
    lost += [
        Lost(int(labels.ids[row]), image, f"counted by the evaluation but never cropped: {labels.unused[row]}", True)
        for row in never
    ]
    if lost:
        return lost
    return [Lost(int(labels.ids[row]), image, "area, visibility or ids spoil the measure", False) for row in rows]
