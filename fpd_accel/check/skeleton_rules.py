"""Checks of the skeleton, and of the labels against it: flip pairs, limbs, left and right, sigmas.

Left and right are judged only where geometry allows it. For a single person these are a face seen from the front, and
the shoulders compared with the hips. For a whole dataset it is also the length of limbs: if the columns of two joints
are exchanged, limbs between the wrong sides are shorter. COCO, LSP-Extended and synthetic people are far from the
thresholds below (largest values measured: 8 % of limbs shorter with sides exchanged, a ratio of 3.0 between the
quartiles of a limb's length, 40 % of left joints at the left of the image).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from fpd_accel.check.labels import Finding, Labels
from fpd_accel.skeleton import PUBLISHED_SIGMAS, Skeleton, estimated_sigma, split_side

FEWEST = 20  # smallest number of people for a finding about the whole dataset
MAJORITY = 0.5  # share of people in whom exchanged sides fit better, above which the labels count as exchanged
VIEWER_SHARE = 0.9  # share of pairs with the left joint at the image's left, above which sides look like the viewer's
ABSURD_SPREAD = 6.0  # ratio of the upper to the lower quartile of a limb's length that is reported
SIGMA_FACTOR = 2.0  # ratio of a sigma to the published one of the same name that is reported
CLEAR = 0.2  # share of a reference length below which a direction in the image is not significant


@dataclass(frozen=True)
class Limb:
    """The lengths of a limb in the labels, as shares of the longer side of the person's box."""

    ends: tuple[str, str]
    people: int  # number of people with both ends labelled
    median: float  # not-a-number without such people, as are the quartiles
    lower: float  # quartile
    upper: float  # quartile
    exchanged: float  # share of people in whom it is shorter with left and right exchanged; not-a-number if undefined


def check_skeleton(skeleton: Skeleton) -> list[Finding]:
    """Return findings about the skeleton alone: names, flip pairs, upper body, sigmas and missing fields."""
    return [*_flip_pairs(skeleton), *_upper_body(skeleton), *_sigmas(skeleton), *_missing_fields(skeleton)]


def _flip_pairs(skeleton: Skeleton) -> Iterator[Finding]:
    paired = skeleton.flip_partner
    by_side = {split_side(name): name for name in skeleton.keypoints}
    for a, b in skeleton.flip_pairs:
        (side_a, part_a), (side_b, part_b) = split_side(a), split_side(b)
        if side_a and side_b and (part_a != part_b or side_a == side_b):
            text = f"flip_pairs: {a!r} and {b!r} are a pair, but their names are not two sides of one joint"
            yield Finding("error", "flip_pair_mismatch", text, 1)
        elif bool(side_a) != bool(side_b):
            text = f"flip_pairs: {a!r} and {b!r} are a pair, but only one of the names has a side"
            yield Finding("warning", "flip_pair_mismatch", text, 1)
        elif side_a == "right":
            rule = "the left joint comes first, otherwise pictures show the sides wrong"
            yield Finding("warning", "flip_pair_order", f"flip_pairs: {a!r} precedes {b!r}; {rule}", 1)
    for (side, part), name in by_side.items():
        other = by_side.get(("right" if side == "left" else "left", part))
        if side and other is None:
            text = f"keypoints: {name!r} has no joint of the other side; in mirrored images it is on the wrong side"
            yield Finding("warning", "side_without_partner", text, 1)
        elif side == "left" and name not in paired and other not in paired:
            text = f"flip_pairs: {name!r} and {other!r} are in no pair; mirrored images train each as the other"
            yield Finding("error", "flip_pair_missing", text, 1)


def _upper_body(skeleton: Skeleton) -> Iterator[Finding]:
    upper = set(skeleton.upper_body)
    for pair in skeleton.flip_pairs:
        if len(upper & set(pair)) == 1:
            inside, outside = pair if pair[0] in upper else pair[::-1]
            text = f"upper_body: has {inside!r} but not {outside!r}; half-body crops would separate the two sides"
            yield Finding("warning", "upper_body_one_sided", text, 1)


def _sigmas(skeleton: Skeleton) -> Iterator[Finding]:
    if skeleton.sigmas_estimated:
        count = len(skeleton.sigmas_estimated)
        hint = "AP compares networks on this data, but not with published numbers; every table says so"
        text = f"sigmas: estimated for {count} of {skeleton.num_keypoints} keypoints; {hint}"
        yield Finding("warning", "sigmas_estimated", text, count)
    unlike, one_sided = [], []
    for name, sigma in zip(skeleton.keypoints, skeleton.sigmas, strict=True):
        published, source = estimated_sigma(name)
        if source != "neutral" and max(sigma / published, published / sigma) > SIGMA_FACTOR:
            unlike.append(f"{name} {sigma:g} ({source} {published:g})")
    for left, right in skeleton.flip_pairs:
        a, b = (skeleton.sigmas[skeleton.index(name)] for name in (left, right))
        if a != b and not {left, right} <= PUBLISHED_SIGMAS["COCO-WholeBody"].keys():
            one_sided.append(f"{left} {a:g}, {right} {b:g}")
    if unlike:
        text = f"sigmas: far from the published ones of these names, so AP cannot be compared: {'; '.join(unlike)}"
        yield Finding("warning", "sigma_unlike_published", text, len(unlike))
    if one_sided:
        text = f"sigmas: the two sides of a joint are expected to have equal sigmas: {'; '.join(one_sided)}"
        yield Finding("warning", "sigma_one_sided", text, len(one_sided))


def _missing_fields(skeleton: Skeleton) -> Iterator[Finding]:
    consequences = {
        "flip_pairs": "mirroring exchanges no joints",
        "limbs": "pictures show dots without lines",
        "upper_body": "half-body augmentation counts every joint as lower body",
        "torso": "PCK is normalised by the box",
    }
    for field, consequence in consequences.items():
        if not getattr(skeleton, field):
            yield Finding("information", f"no_{field}", f"{field}: not given; {consequence}")


def sigma_source(skeleton: Skeleton, name: str) -> str:
    """Return the source of a joint's sigma in words: estimated or given, and from which published set."""
    published, source = estimated_sigma(name)
    if name in skeleton.sigmas_estimated:
        return f"estimated: {source}"
    same = source != "neutral" and abs(skeleton.sigmas[skeleton.index(name)] - published) < 1e-9
    return f"given, as {source}" if same else "given"


def measure_limbs(labels: Labels) -> list[Limb]:
    """Return the lengths in the labels of every limb of the skeleton."""
    skeleton, flip = labels.skeleton, labels.skeleton.flip_index
    limbs = []
    for (a, b), ends in zip(skeleton.limb_indices, skeleton.limbs, strict=True):
        shown = labels.labelled[:, [a, b]].all(axis=1)
        lengths = _distance(labels, a, b)[shown] / labels.longer_side[shown]
        lower, median, upper = np.quantile(lengths, (0.25, 0.5, 0.75)) if len(lengths) else (np.nan,) * 3
        exchanged = np.nan
        if flip[a] != a and flip[b] not in (a, b):
            four = labels.labelled[:, [a, b, flip[a], flip[b]]].all(axis=1)
            own = _distance(labels, a, b) + _distance(labels, flip[a], flip[b])
            other = _distance(labels, a, flip[b]) + _distance(labels, flip[a], b)
            exchanged = float((other < own)[four].mean()) if four.sum() >= FEWEST else np.nan
        limbs.append(Limb(ends, int(shown.sum()), float(median), float(lower), float(upper), exchanged))
    return limbs


def _distance(labels: Labels, a: int, b: int) -> Float[np.ndarray, " person"]:
    return np.linalg.norm(labels.keypoints[:, a] - labels.keypoints[:, b], axis=-1)


def check_limbs(limbs: list[Limb]) -> Iterator[Finding]:
    """Yield findings about limb lengths, and about sides exchanged along a limb in most people."""
    reported = set()
    for limb in limbs:
        a, b = limb.ends
        if limb.people and limb.median == 0:
            text = f"limb {a} - {b}: both ends are labelled at the same pixel in most of {limb.people} people"
            yield Finding("error", "limb_without_length", text, limb.people)
        elif limb.people >= FEWEST and limb.upper > ABSURD_SPREAD * limb.lower:
            text = f"limb {a} - {b}: the quartiles of its length are {limb.lower:.3f} and {limb.upper:.3f} of the box"
            text += "; are these the same two joints in every annotation?"
            yield Finding("warning", "limb_spread", text, limb.people)
        mirrored = frozenset(split_side(name)[1] for name in limb.ends)
        if limb.exchanged > MAJORITY and mirrored not in reported:
            reported.add(mirrored)
            text = (
                f"left and right seem exchanged between {a} and {b}: in {limb.exchanged:.0%} of the people the limbs "
                "are shorter with one of the two joints taken from the other side; check the order of keypoints"
            )
            yield Finding("error", "sides_exchanged_along_limb", text, limb.people)


def check_sides(labels: Labels) -> list[Finding]:
    """Return findings about left and right in single people, and in a dataset that names sides as the viewer sees."""
    text = "{share}: shoulders and hips point in opposite directions; left and right of one pair are probably exchanged"
    torsos = labels.finding("warning", "torso_twisted", _twisted(labels), text)
    return [*_faces(labels), *torsos, *_viewer_sides(labels)]


def _rows_of(labels: Labels, *joints: tuple[str, str]) -> list[int] | None:
    """Return the rows of joints by (side, part) in any spelling; None unless the skeleton has all of them."""
    rows = {split_side(name): row for row, name in enumerate(labels.skeleton.keypoints)}
    return [rows[joint] for joint in joints] if all(joint in rows for joint in joints) else None


def _faces(labels: Labels) -> list[Finding]:
    """Return a finding about people with both eyes seen, but on the wrong sides of the nose.

    Both eyes are visible only from the front, where the triangle left eye, right eye, nose has a fixed orientation.
    """
    joints = _rows_of(labels, ("left", "eye"), ("right", "eye"), ("", "nose"))
    if joints is None:
        return []
    seen = (labels.visibility[:, joints] == 2).all(axis=1) & labels.usable
    left, right, nose = (labels.keypoints[:, joint] for joint in joints)
    eyes, drop = left - right, nose - (left + right) / 2
    orientation = eyes[:, 0] * drop[:, 1] - eyes[:, 1] * drop[:, 0]
    mirrored = seen & (orientation < -CLEAR * np.square(eyes).sum(axis=1))
    share = f"{mirrored.sum()} of {seen.sum()} people with both eyes seen"
    if seen.sum() >= FEWEST and mirrored.sum() > MAJORITY * seen.sum():
        text = (
            f"left and right seem exchanged in the faces of {share}: left is the person's own left, at the right of "
            "the image in a person who faces the camera"
        )
        return labels.finding("error", "faces_mirrored", mirrored, text)
    text = f"{share} have them on the wrong sides of the nose: left and right are probably exchanged"
    return labels.finding("warning", "face_mirrored", mirrored, text)


def _twisted(labels: Labels) -> Bool[np.ndarray, " person"]:
    """Return the people whose shoulders clearly point opposite to their hips, which no spine allows."""
    joints = _rows_of(labels, *((side, part) for part in ("shoulder", "hip") for side in ("left", "right")))
    if joints is None:
        return np.zeros(len(labels.ids), dtype=bool)
    shown = labels.labelled[:, joints].all(axis=1)
    a, b, c, d = (labels.keypoints[:, joint] for joint in joints)
    shoulders, hips, torso = a - b, c - d, np.linalg.norm((a + b - c - d) / 2, axis=-1)
    lengths = np.linalg.norm(shoulders, axis=-1), np.linalg.norm(hips, axis=-1)
    opposite = (shoulders * hips).sum(axis=-1) < -0.5 * lengths[0] * lengths[1]
    return shown & opposite & (np.minimum(*lengths) > CLEAR * torso)


def _viewer_sides(labels: Labels) -> list[Finding]:
    left, right = ([labels.skeleton.index(pair[side]) for pair in labels.skeleton.flip_pairs] for side in (0, 1))
    offset = (labels.keypoints[:, left, 0] - labels.keypoints[:, right, 0]) / labels.longer_side[:, None]
    clear = labels.labelled[:, left] & labels.labelled[:, right] & (np.abs(offset) > CLEAR / 4)
    to_the_left, pairs = int((clear & (offset < 0)).sum()), int(clear.sum())
    if pairs < FEWEST or to_the_left <= VIEWER_SHARE * pairs:
        return []
    text = (
        f"in {to_the_left / pairs:.0%} of {pairs} pairs the left joint is at the left of the image: unless all these "
        "people are seen from behind, sides are named as the viewer sees them; they must be the person's own"
    )
    return [Finding("warning", "sides_as_seen_by_viewer", text, to_the_left)]
