"""Object keypoint similarity (OKS) of poses, and non-maximum suppression by it, for one image or many at once.

NumPy only. Keypoints are (x, y), with or without a score, in pixels; areas are in square pixels. OKS is the measure of
cocodataset.org/#keypoints-eval.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Real

from fpd_accel.skeleton import COCO

Sigmas = Sequence[float] | Float[np.ndarray, " joint"]
Keypoints = Real[np.ndarray, "person joint _"]
PerPerson = Real[np.ndarray, " person"]  # a score, or an area in square pixels
ImageIds = Integer[np.ndarray, " person"]
Kept = Int[np.ndarray, " kept"]
PAIRS = 1 << 15  # pairs of poses whose similarity is computed at once: 9 MB with 17 joints


def similarity(
    squared_distances: Real[np.ndarray, "*pair joint"],
    areas: Real[np.ndarray, "*pair"],
    sigmas: Sigmas,
    *,
    counted: Bool[np.ndarray, "*pair joint"] | None = None,
) -> Float[np.ndarray, "*pair"]:
    """Return the OKS of pairs of poses, 0 to 1: the mean over joints of `exp(-d² / (2 area (2 sigma)²))`.

    Args:
        squared_distances: d² between the two places of each joint, square pixels.
        areas: Area that sets the scale of each pair, square pixels, 0 or more.
        sigmas: Standard deviation of each joint, see `Skeleton.sigmas`.
        counted: Joints that the mean is over; None: all.

    Raises:
        ValueError: There is not one sigma per joint.
    """
    _check_sigmas(sigmas, squared_distances.shape[-1])
    exponent = squared_distances / np.square(2 * np.asarray(sigmas, dtype=np.float64))
    exponent /= (areas + np.spacing(1.0))[..., None]
    exponent *= -0.5
    terms = np.exp(exponent, out=exponent)
    if counted is None:
        return terms.mean(axis=-1)
    return (terms * counted).sum(axis=-1) / np.maximum(counted.sum(axis=-1), 1)


def _check_sigmas(sigmas: Sigmas, joints: int) -> None:
    if len(sigmas) != joints:
        raise ValueError(f"{len(sigmas)} sigmas for {joints} joints")


def oks(
    keypoints: Keypoints,
    others: Real[np.ndarray, "other joint _"],
    areas: PerPerson,
    other_areas: Real[np.ndarray, " other"],
    sigmas: Sigmas = COCO.sigmas,
) -> Float[np.ndarray, "person other"]:
    """Return the OKS of every pose with every other pose, over all joints whatever their scores.

    The mean of both areas sets the scale of a pair.

    Raises:
        ValueError: There is not one sigma per joint.
    """
    offset = keypoints[:, None, :, :2].astype(np.float64) - others[None, :, :, :2]
    area = (areas[:, None].astype(np.float64) + other_areas[None]) / 2
    return similarity(np.square(offset).sum(axis=-1), area, sigmas)


def oks_nms(
    keypoints: Keypoints, scores: PerPerson, areas: PerPerson, threshold: float, sigmas: Sigmas = COCO.sigmas
) -> Kept:
    """Return the indices of the poses of one image to keep, best score first.

    Greedy suppression: a pose is dropped if its OKS with a better pose that is kept exceeds `threshold` (Papandreou et
    al., CVPR 2017). Of equal scores the first wins.
    """
    return oks_nms_by_image(np.zeros(len(scores), dtype=np.int64), keypoints, scores, areas, threshold, sigmas)


def oks_nms_by_image(
    images: ImageIds,
    keypoints: Keypoints,
    scores: PerPerson,
    areas: PerPerson,
    threshold: float,
    sigmas: Sigmas = COCO.sigmas,
) -> Kept:
    """Apply `oks_nms` to every image at once; return the kept indices image by image, in the order of image ids.

    The OKS of all pairs of all images is vectorised; only pairs above the threshold are decided one by one.
    """
    order = np.lexsort((-scores, images))
    _, counts = np.unique(images, return_counts=True)
    poses = _Poses(keypoints[order], areas[order], sigmas)
    kept = [True] * len(order)
    for first, second in _pairs(counts):
        overlapping = ~(poses.similarity(first, second) <= threshold)  # not-a-number counts as overlapping
        for better, worse in zip(first[overlapping].tolist(), second[overlapping].tolist(), strict=True):
            if kept[better]:
                kept[worse] = False
    return order[np.asarray(kept, dtype=bool)]


def soft_oks_nms(
    keypoints: Keypoints,
    scores: PerPerson,
    areas: PerPerson,
    threshold: float,
    sigmas: Sigmas = COCO.sigmas,
    *,
    limit: int = 20,
) -> Kept:
    """Return the indices of at most `limit` poses of one image, in the order of their decayed scores.

    Each selected pose multiplies the scores of the remaining ones by `exp(-oks² / threshold)` (Bodla et al., Soft-NMS,
    ICCV 2017, with OKS in place of overlap). Of equal scores the first wins.
    """
    images = np.zeros(len(scores), dtype=np.int64)
    return soft_oks_nms_by_image(images, keypoints, scores, areas, threshold, sigmas, limit=limit)


def soft_oks_nms_by_image(
    images: ImageIds,
    keypoints: Keypoints,
    scores: PerPerson,
    areas: PerPerson,
    threshold: float,
    sigmas: Sigmas = COCO.sigmas,
    *,
    limit: int = 20,
) -> Kept:
    """Apply `soft_oks_nms` to every image at once; return the kept indices image by image, in the order of image ids.

    Images with the same number of people are processed together.
    """
    order = np.argsort(images, kind="stable")
    _, counts = np.unique(images, return_counts=True)
    poses = _Poses(keypoints[order], areas[order], sigmas)
    starts, ends = np.cumsum(counts) - counts, np.cumsum(np.minimum(counts, limit))
    kept = np.empty(ends[-1] if len(ends) else 0, dtype=np.int64)
    for people in np.unique(counts).tolist():
        group = np.flatnonzero(counts == people)
        at_once = max(1, PAIRS // people**2)
        for block in np.split(group, range(at_once, len(group), at_once)):
            members = starts[block, None] + np.arange(people)
            selected = _select_by_decay(poses, members, scores[order[members]], threshold, limit)
            kept[ends[block, None] - selected.shape[1] + np.arange(selected.shape[1])] = selected
    return order[kept]


def _select_by_decay(
    poses: "_Poses",
    members: Int[np.ndarray, "image person"],
    scores: Real[np.ndarray, "image person"],
    threshold: float,
    limit: int,
) -> Int[np.ndarray, "image kept"]:
    """Return the members that soft suppression selects from images with equally many people, in order."""
    images, people = members.shape
    first, second = np.triu_indices(people, 1)
    overlap = poses.similarity(members[:, first].ravel(), members[:, second].ravel()).reshape(images, -1)
    decay = np.empty((images, people, people))
    decay[:, first, second] = decay[:, second, first] = np.exp(-np.square(overlap) / threshold)
    decay[:, range(people), range(people)] = 1.0  # a selected pose does not decay again
    decayed, remaining = scores.astype(np.float64), np.ones(members.shape, dtype=bool)
    every, selected = np.arange(images), []
    for _ in range(min(people, limit)):
        best = np.where(remaining, decayed, -np.inf).argmax(axis=1)
        selected.append(members[every, best])
        remaining[every, best] = False
        decayed *= decay[every, best]
    return np.stack(selected, axis=1)


class _Poses:
    """Poses with x and y in separate contiguous arrays, so that the OKS of many pairs takes few passes over memory."""

    def __init__(self, keypoints: Keypoints, areas: PerPerson, sigmas: Sigmas) -> None:
        _check_sigmas(sigmas, keypoints.shape[1])
        self.x, self.y = (np.ascontiguousarray(keypoints[..., axis], dtype=np.float64) for axis in (0, 1))
        self.areas, self.sigmas = areas.astype(np.float64), sigmas

    def similarity(self, first: Int[np.ndarray, " pair"], second: Int[np.ndarray, " pair"]) -> np.ndarray:
        """Return the OKS of pairs; the mean of both areas sets their scale."""
        dx, dy = self.x[first] - self.x[second], self.y[first] - self.y[second]
        np.square(dx, out=dx)
        np.square(dy, out=dy)
        return similarity(np.add(dx, dy, out=dx), (self.areas[first] + self.areas[second]) / 2, self.sigmas)


def _pairs(counts: Int[np.ndarray, " image"]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all pairs i < j of people of one image, ordered by i, in blocks of about `PAIRS`.

    Args:
        counts: Number of people of each image; people are numbered image after image.
    """
    people = np.arange(counts.sum())
    partners = np.repeat(np.cumsum(counts), counts) - people - 1
    blocks = np.cumsum(partners) // PAIRS
    for block in np.split(people, np.flatnonzero(np.diff(blocks)) + 1):
        own = partners[block]
        first = np.repeat(block, own)
        before = np.repeat(np.cumsum(own) - own, own)
        if len(first):
            yield first, first + 1 + np.arange(len(first)) - before
