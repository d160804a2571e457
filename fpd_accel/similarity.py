"""Object keypoint similarity of poses, and the suppression of near-duplicates by it, of one image or of many at once.

NumPy only. Keypoints are (x, y), with or without a score, in pixels; areas in square pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int, Integer, Real

from fpd_accel.skeleton import COCO

Sigmas = Sequence[float] | Float[np.ndarray, " joint"]
PAIRS = 1 << 15  # whose similarity is computed at once: 9 MB of 17 joints


def oks(
    keypoints: Real[np.ndarray, "person joint _"],
    others: Real[np.ndarray, "other joint _"],
    areas: Real[np.ndarray, " person"],
    other_areas: Real[np.ndarray, " other"],
    sigmas: Sigmas = COCO.sigmas,
) -> Float[np.ndarray, "person other"]:
    """Object keypoint similarity of every pose with every other, 0 to 1; the scale is the mean of the two areas.

    The measure of cocodataset.org/#keypoints-eval, over all joints whatever their scores.

    Raises:
        ValueError: there is not one sigma per joint.
    """
    _check_sigmas(sigmas, keypoints.shape[1])
    offset = keypoints[:, None, :, :2].astype(np.float64) - others[None, :, :, :2]
    variance = np.square(2 * np.asarray(sigmas, dtype=np.float64))
    area = (areas[:, None].astype(np.float64) + other_areas[None]) / 2 + np.spacing(1.0)
    exponent = np.square(offset).sum(axis=-1) / variance / area[..., None] / 2
    return np.exp(-exponent).mean(axis=-1)


def _check_sigmas(sigmas: Sigmas, joints: int) -> None:
    if len(sigmas) != joints:
        raise ValueError(f"{len(sigmas)} sigmas for {joints} joints")


def oks_nms(
    keypoints: Real[np.ndarray, "person joint _"],
    scores: Real[np.ndarray, " person"],
    areas: Real[np.ndarray, " person"],
    threshold: float,
    sigmas: Sigmas = COCO.sigmas,
) -> Int[np.ndarray, " kept"]:
    """Indices of the poses of one image to keep, best score first.

    Greedy: a pose is dropped if its similarity to a better one that is kept exceeds ``threshold`` (Papandreou et al.,
    CVPR 2017). Of equal scores the first wins.
    """
    return oks_nms_by_image(np.zeros(len(scores), dtype=np.int64), keypoints, scores, areas, threshold, sigmas)


def oks_nms_by_image(
    images: Integer[np.ndarray, " person"],
    keypoints: Real[np.ndarray, "person joint _"],
    scores: Real[np.ndarray, " person"],
    areas: Real[np.ndarray, " person"],
    threshold: float,
    sigmas: Sigmas = COCO.sigmas,
) -> Int[np.ndarray, " kept"]:
    """:func:`oks_nms` of every image at once: the kept of one image after those of another, by the images' numbers.

    Similarities are computed for all pairs of all images together; what is decided one by one are the similar ones.
    """
    order = np.lexsort((-scores, images))
    _, counts = np.unique(images, return_counts=True)
    poses = _Poses.of(keypoints[order], areas[order], sigmas)
    kept = [True] * len(order)
    for first, second in _pairs(counts):
        overlapping = ~(poses.similarity(first, second) <= threshold)  # and where it is not a number
        for better, worse in zip(first[overlapping].tolist(), second[overlapping].tolist(), strict=True):
            if kept[better]:
                kept[worse] = False
    return order[np.asarray(kept, dtype=bool)]


def soft_oks_nms(
    keypoints: Real[np.ndarray, "person joint _"],
    scores: Real[np.ndarray, " person"],
    areas: Real[np.ndarray, " person"],
    threshold: float,
    sigmas: Sigmas = COCO.sigmas,
    *,
    limit: int = 20,
) -> Int[np.ndarray, " kept"]:
    """Indices of at most ``limit`` poses of one image, in the order of their decayed scores.

    Each pose taken multiplies the scores of those left by ``exp(-oks² / threshold)`` (Bodla et al., Soft-NMS, ICCV
    2017, with similarity in place of overlap). Of equal scores the first wins.
    """
    images = np.zeros(len(scores), dtype=np.int64)
    return soft_oks_nms_by_image(images, keypoints, scores, areas, threshold, sigmas, limit=limit)


def soft_oks_nms_by_image(
    images: Integer[np.ndarray, " person"],
    keypoints: Real[np.ndarray, "person joint _"],
    scores: Real[np.ndarray, " person"],
    areas: Real[np.ndarray, " person"],
    threshold: float,
    sigmas: Sigmas = COCO.sigmas,
    *,
    limit: int = 20,
) -> Int[np.ndarray, " kept"]:
    """:func:`soft_oks_nms` of every image at once: the kept of one image after those of another, by their numbers.

    Images with equally many people are decided together.
    """
    order = np.argsort(images, kind="stable")
    _, counts = np.unique(images, return_counts=True)
    poses = _Poses.of(keypoints[order], areas[order], sigmas)
    starts, ends = np.cumsum(counts) - counts, np.cumsum(np.minimum(counts, limit))
    kept = np.empty(ends[-1] if len(ends) else 0, dtype=np.int64)
    for people in np.unique(counts).tolist():
        chosen = np.flatnonzero(counts == people)
        at_once = max(1, PAIRS // people**2)
        for block in np.split(chosen, range(at_once, len(chosen), at_once)):
            members = starts[block, None] + np.arange(people)
            taken = _take_by_decay(poses, members, scores[order[members]], threshold, limit)
            kept[ends[block, None] - taken.shape[1] + np.arange(taken.shape[1])] = taken
    return order[kept]


def _take_by_decay(
    poses: "_Poses",
    members: Int[np.ndarray, "image person"],
    scores: Real[np.ndarray, "image person"],
    threshold: float,
    limit: int,
) -> Int[np.ndarray, "image kept"]:
    """Members of each of some images with equally many, in the order in which soft suppression takes them."""
    images, people = members.shape
    first, second = np.triu_indices(people, 1)
    overlap = poses.similarity(members[:, first].ravel(), members[:, second].ravel()).reshape(images, -1)
    decay = np.empty((images, people, people))
    decay[:, first, second] = decay[:, second, first] = np.exp(-np.square(overlap) / threshold)
    decay[:, range(people), range(people)] = 1.0  # of one that is taken it no longer matters
    decayed, left = scores.astype(np.float64), np.ones(members.shape, dtype=bool)
    every, taken = np.arange(images), []
    for _ in range(min(people, limit)):
        best = np.where(left, decayed, -np.inf).argmax(axis=1)
        taken.append(members[every, best])
        left[every, best] = False
        decayed *= decay[every, best]
    return np.stack(taken, axis=1)


@dataclass(frozen=True, eq=False)
class _Poses:
    """Poses laid out so that the similarity of many pairs of them takes few passes."""

    x: Float64[np.ndarray, "person joint"]
    y: Float64[np.ndarray, "person joint"]
    areas: Float64[np.ndarray, " person"]
    variance: Float64[np.ndarray, " joint"]

    @classmethod
    def of(
        cls,
        keypoints: Real[np.ndarray, "person joint _"],
        areas: Real[np.ndarray, " person"],
        sigmas: Sigmas,
    ) -> "_Poses":
        _check_sigmas(sigmas, keypoints.shape[1])
        x, y = (np.ascontiguousarray(keypoints[..., axis], dtype=np.float64) for axis in (0, 1))
        return cls(x, y, areas.astype(np.float64), np.square(2 * np.asarray(sigmas, dtype=np.float64)))

    def similarity(self, first: Int[np.ndarray, " pair"], second: Int[np.ndarray, " pair"]) -> np.ndarray:
        """:func:`oks` of pairs, equal to the last bit."""
        across, down = self.x[first] - self.x[second], self.y[first] - self.y[second]
        np.square(across, out=across)
        np.square(down, out=down)
        exponent = np.add(across, down, out=across)
        area = (self.areas[first] + self.areas[second]) / 2 + np.spacing(1.0)
        exponent /= self.variance
        exponent /= area[:, None]
        exponent *= -0.5
        return np.exp(exponent, out=exponent).mean(axis=-1)


def _pairs(counts: Int[np.ndarray, " image"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places i < j of people of one image who lie one image after the other, by i, in blocks of about ``PAIRS``."""
    people = np.arange(counts.sum())
    partners = np.repeat(np.cumsum(counts), counts) - people - 1
    blocks = np.cumsum(partners) // PAIRS
    for block in np.split(people, np.flatnonzero(np.diff(blocks)) + 1):
        own = partners[block]
        first = np.repeat(block, own)
        before = np.repeat(np.cumsum(own) - own, own)
        if len(first):
            yield first, first + 1 + np.arange(len(first)) - before
