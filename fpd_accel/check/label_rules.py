"""Checks of the annotations person by person: boxes, areas, keypoints, and duplicates."""

from collections import defaultdict

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Float, Int

from fpd_accel.check.labels import Finding, Labels, People, Severity
from fpd_accel.console import track
from fpd_accel.data import coco, mpii
from fpd_accel.data.shards import Shards
from fpd_accel.files import sha256

TOLERANCE = 1.0  # pixels that a box or keypoint may lie outside the image, because of rounding
FAR = 0.5  # share of the box's longer side; a keypoint further outside the box probably belongs to another person
SKIP_REASONS = mpii.MPII_SKIPPED | coco.COCO_SKIPPED  # reason -> words, for both annotation formats
SAMPLED = 1024  # bytes from the middle of a file, compared before whole files are


def check_skipped(shards: Shards) -> list[Finding]:
    """Return what `prepare` left out, except images without annotated people."""
    return [
        Finding("warning", f"skipped_{reason}", f"prepare left out {count} {SKIP_REASONS.get(reason, reason)}", count)
        for reason, count in shards.description.get("skipped", {}).items()
        if reason != "image_empty"
    ]


def check_boxes(labels: Labels, *, cut: bool) -> list[Finding]:
    """Return findings about boxes and areas that are impossible, or do not fit their image.

    `cut` says whether boxes are cut to the image before cropping.
    """
    x, y, width, height = labels.boxes.T
    right, bottom = x + width, y + height
    people = ~labels.crowd
    outside = people & ((right <= 0) | (bottom <= 0) | (x >= labels.widths) | (y >= labels.heights))
    flat = people & ~outside & ((width <= 0) | (height <= 0))
    excess = np.maximum.reduce([-x, -y, right - labels.widths, bottom - labels.heights])
    partly = labels.usable & ~outside & (excess > TOLERANCE)
    reaches = f"the box reaches outside the image, by up to {excess[partly].max(initial=0):.0f} pixels"
    cropped = "it is cut to the image when the person is cropped" if cut else "crops are not cut to the image"
    without_area = labels.usable & (labels.areas <= 0)
    above_box = labels.usable & (labels.areas > 1.01 * width * height + 1)
    text = "{share}: the box lies entirely outside the image; boxes are x, y, width, height in pixels"
    findings = labels.finding(None, "box_outside_image", outside, text, among=people)
    findings += labels.finding(None, "box_without_size", flat, "{share}: the box has no width or height", among=people)
    severity: Severity = "warning" if cut else "information"
    findings += labels.finding(severity, "box_partly_outside_image", partly, f"{{share}}: {reaches}; {cropped}")
    text = "{share}: the area is zero or negative, so OKS has no scale; leave it out to use the area of the box"
    findings += labels.finding("error", "area_not_positive", without_area, text)
    text = "{share}: the area is larger than the box; is it in square pixels?"
    findings += labels.finding(None, "area_above_box", above_box, text)
    return [*findings, *_areas_of_boxes(labels)]


def _areas_of_boxes(labels: Labels) -> list[Finding]:
    """Return a finding if most areas are a constant share of the box, and so not measured from a segment."""
    box_areas = labels.boxes[:, 2] * labels.boxes[:, 3]
    shares = labels.areas[labels.usable] / np.maximum(box_areas, 1)[labels.usable]
    usual = float(np.median(shares)) if len(shares) else 0.0
    constant = int((labels.usable & (np.abs(labels.areas - usual * box_areas) <= 1e-3 * labels.areas)).sum())
    if len(shares) < 2 or constant <= 0.5 * len(shares):
        return []
    share = f"{constant} of {len(shares)} people: the area is {usual:.2f} times that of the box"
    hint = "not that of a segment (0.5 is the median of COCO); the larger the area, the more lenient is OKS"
    return [Finding("information", "area_of_box", f"{share}, {hint}", constant)]


def check_keypoints(labels: Labels) -> list[Finding]:
    """Return findings about keypoints in impossible places, and about visibility flags without a meaning."""
    points, labelled = labels.keypoints, labels.labelled
    x, y = points[..., 0], points[..., 1]
    unknown = ~np.isin(labels.visibility, (0, 1, 2)) & ~labels.crowd[:, None]
    origin = labelled & (x == 0) & (y == 0)
    beyond = np.maximum.reduce([-x, -y, x - labels.widths[:, None], y - labels.heights[:, None]])
    outside = labelled & ~origin & (beyond > TOLERANCE)
    far = labelled & ~origin & ~outside & (outside_box(labels) > FAR)
    ignored = (labels.visibility == 0) & ((x != 0) | (y != 0)) & labels.usable[:, None]
    rules: tuple[tuple[Severity | None, str, np.ndarray, str], ...] = (
        ("error", "visibility_unknown", unknown, "visibility is not 0 (unlabelled), 1 (hidden) or 2 (seen)"),
        (None, "keypoint_at_origin", origin, "labelled at (0, 0); unlabelled keypoints need visibility 0"),
        (None, "keypoint_outside_image", outside, "labelled outside the image; coordinates are pixels of the image"),
        (None, "keypoint_far_from_box", far, "labelled more than half a box outside the person's own box"),
        ("warning", "unlabelled_with_place", ignored, "placed but with visibility 0, so training ignores them"),
    )
    findings: list[Finding] = []
    for severity, check, keypoints, text in rules:
        number = int(keypoints.sum())
        message = f"{number} keypoint{'s' * (number > 1)} of {{share}}: {text}"
        among = ~labels.crowd if keypoints is unknown else labels.usable
        findings += labels.finding(severity, check, np.asarray(keypoints.any(axis=1)), message, among=among)
    never = [labels.skeleton.keypoints[joint] for joint in np.flatnonzero(labelled.sum(axis=0) == 0)]
    if never:
        text = f"never labelled, so their heatmaps will not be trained: {', '.join(never)}"
        findings.append(Finding("warning", "joint_never_labelled", text, len(never)))
    return findings


def outside_box(labels: Labels) -> Float[np.ndarray, "person joint"]:
    """Return how far each keypoint lies outside its box, as a share of the longer side; zero or less inside."""
    (x, y), (left, top, width, height) = np.moveaxis(labels.keypoints, -1, 0), labels.boxes.T[..., None]
    outside = np.maximum.reduce([left - x, top - y, x - left - width, y - top - height])
    return outside / labels.longer_side[:, None]


def check_repeated(labels: Labels) -> list[Finding]:
    """Return findings about repeated ids, people who refer to a wrong image, and people annotated twice."""
    everyone = np.ones(len(labels.ids), dtype=bool)
    listed, count = np.unique(labels.listed_images, return_counts=True)
    wrong_row = labels.listed_images[labels.image_rows] != labels.image_ids
    text = "{share}: the annotation id is that of an earlier person, so results would be ambiguous"
    findings = labels.finding("error", "id_repeated", _repeats(labels.ids), text, among=everyone)
    text = "{share} refer to the row of another image"
    findings += labels.finding("error", "image_mixed_up", wrong_row, text, among=everyone)
    if len(repeated := listed[count > 1]):
        text = f"{len(repeated)} image ids appear more than once, for example {repeated[0]}"
        findings.append(Finding("error", "image_id_repeated", text, len(repeated)))
    same_image, other_image = repeated_people(labels)
    text = "{share} repeat the box and every keypoint of another person in"
    findings += labels.finding("warning", "person_repeated", same_image, f"{text} the same image")
    findings += labels.finding("warning", "person_repeated_in_other_image", other_image, f"{text} another image")
    return findings


def repeated_people(labels: Labels) -> tuple[People, People]:
    """Return which usable people repeat an earlier one in the same image, and which one in another image only."""
    rows = np.flatnonzero(labels.usable)
    parts = (labels.boxes, labels.keypoints.reshape(len(labels.ids), -1), labels.visibility)
    values = np.ascontiguousarray(np.concatenate([part[rows] for part in parts], axis=1).astype(np.float32) + 0.0)
    groups = np.unique(values.view(f"V{4 * values.shape[1]}").ravel(), return_inverse=True)[1]
    in_image = np.unique(np.stack([groups, labels.image_ids[rows]], axis=1), axis=0, return_inverse=True)[1]
    same, anywhere = np.zeros(len(labels.ids), dtype=bool), np.zeros(len(labels.ids), dtype=bool)
    same[rows], anywhere[rows] = _repeats(in_image.reshape(-1)), _repeats(groups)
    return same, anywhere & ~same


def _repeats(groups: Int[np.ndarray, " person"]) -> People:
    """Return all members of each group except its first."""
    repeats = np.ones(len(groups), dtype=bool)
    repeats[np.unique(groups, return_index=True)[1]] = False
    return repeats


def check_images(shards: Shards) -> list[Finding]:
    """Return a finding if images with different ids have the same bytes."""
    if not (groups := repeated_images(shards)):
        return []
    extra = sum(len(group) - 1 for group in groups)
    first = ", ".join(shards.images.data.column("file_name").take(groups[0][:3]).to_pylist())
    text = f"{extra} images repeat the bytes of another ({first}), so the same people count more than once"
    return [Finding("warning", "image_repeated", text, extra)]


def repeated_images(shards: Shards) -> list[tuple[int, ...]]:
    """Return groups of image rows with the same bytes.

    A file is read whole only if its length and the bytes in its middle are those of another file.
    """
    column = shards.images.data.column("bytes")
    _, inverse, count = np.unique(pc.binary_length(column).to_numpy(), return_inverse=True, return_counts=True)
    candidates: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for row in np.flatnonzero(count[inverse] > 1).tolist():
        content = memoryview(column[row].as_buffer())
        middle = len(content) // 2
        sample = content[max(middle - SAMPLED // 2, 0) : middle + SAMPLED // 2]
        candidates[len(content), bytes(sample)].append(row)
    suspects = [row for rows in candidates.values() if len(rows) > 1 for row in rows]
    groups: dict[str, list[int]] = defaultdict(list)
    for row in track(suspects, "comparing images", total=len(suspects)):
        groups[sha256(column[row].as_py())].append(row)
    return [tuple(rows) for rows in groups.values() if len(rows) > 1]
