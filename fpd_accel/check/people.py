"""What the annotations say, person by person: boxes, areas, keypoints, and what appears twice."""

import hashlib
from collections import defaultdict

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from fpd_accel.check.labels import Finding, Labels, Severity
from fpd_accel.data import coco, mpii
from fpd_accel.data.shards import Shards
from fpd_accel.log import track

SYSTEMATIC = 0.05  # share of the usable people above which a mistake is taken for one of the conversion: an error
TOLERANCE = 1.0  # pixels that a box or keypoint may leave the image by, as rounding makes it
FAR = 0.5  # of the box's longer side: a labelled keypoint further outside the box belongs to somebody else
SKIPPED = mpii.SKIPPED | coco.SKIPPED  # reason -> words, of either form of annotations
SAMPLED = 1024  # bytes from the middle of a file that tell most different files apart


def check_skipped(shards: Shards) -> list[Finding]:
    """What `prepare` left out, but for images in which nobody is annotated."""
    return [
        Finding("warning", f"skipped_{reason}", f"prepare left out {count} {SKIPPED.get(reason, reason)}", count)
        for reason, count in shards.description.get("skipped", {}).items()
        if reason != "image_empty"
    ]


def check_boxes(labels: Labels, *, cut: bool) -> list[Finding]:
    """Boxes and areas that cannot be, or not for the image they are in; ``cut`` to it before cropping, or not."""
    x, y, width, height = labels.boxes.T
    right, bottom = x + width, y + height
    people = ~labels.crowd
    wholly = people & ((right <= 0) | (bottom <= 0) | (x >= labels.widths) | (y >= labels.heights))
    flat = people & ~wholly & ((width <= 0) | (height <= 0))
    out_by = np.maximum.reduce([-x, -y, right - labels.widths, bottom - labels.heights])
    partly = labels.usable & ~wholly & (out_by > TOLERANCE)
    above = labels.usable & (labels.areas > 1.01 * width * height + 1)
    without = labels.usable & (labels.areas <= 0)
    share_of_box = labels.areas[labels.usable] / np.maximum(width * height, 1)[labels.usable]
    usual = float(np.median(share_of_box)) if len(share_of_box) else 0.0
    constant = labels.usable & (np.abs(labels.areas - usual * width * height) <= 1e-3 * labels.areas)
    finding = labels.finding
    findings = [
        *finding(
            _graded(wholly, people),
            "box_outside_image",
            wholly,
            lambda share: f"{share}: the box lies wholly outside the image; boxes are x, y, width, height in pixels",
            among=people,
        ),
        *finding(
            _graded(flat, people),
            "box_without_size",
            flat,
            lambda share: f"{share}: the box has no width or height",
            among=people,
        ),
        *finding(
            "warning" if cut else "information",
            "box_partly_outside_image",
            partly,
            lambda share: (
                f"{share}: the box reaches outside the image, by up to {out_by[partly].max():.0f} pixels; "
                + ("it is cut to the image when the person is cropped" if cut else "crops show it as it is")
            ),
        ),
        *finding(
            "error",
            "area_not_positive",
            without,
            lambda share: (
                f"{share}: the area is zero or negative, so that OKS has no scale; leave it out of the "
                "annotation to take the box's"
            ),
        ),
        *finding(
            _graded(above, labels.usable),
            "area_above_box",
            above,
            lambda share: f"{share}: the area is larger than the box; is it in square pixels?",
        ),
    ]
    if len(share_of_box) > 1 and constant.sum() > 0.5 * len(share_of_box):
        text = (
            f"{constant.sum()} of {len(share_of_box)} people: the area is {usual:.2f} times the box's, not a segment's "
            "(0.5 in the median of COCO); OKS is the more lenient the larger the area"
        )
        findings.append(Finding("information", "area_of_box", text, int(constant.sum())))
    return findings


def check_keypoints(labels: Labels) -> list[Finding]:
    """Keypoints that cannot be where they are, and visibility that means nothing."""
    points, labelled = labels.keypoints, labels.labelled
    x, y = points[..., 0], points[..., 1]
    unknown = ~np.isin(labels.visibility, (0, 1, 2)) & ~labels.crowd[:, None]
    origin = labelled & (x == 0) & (y == 0)
    beyond = np.maximum.reduce([-x, -y, x - labels.widths[:, None], y - labels.heights[:, None]])
    outside = labelled & ~origin & (beyond > TOLERANCE)
    far = labelled & ~origin & ~outside & (outside_box(labels) > FAR)
    forgotten = (labels.visibility == 0) & ((x != 0) | (y != 0)) & labels.usable[:, None]
    kinds: tuple[tuple[Severity | None, str, np.ndarray, str], ...] = (
        ("error", "visibility_unknown", unknown, "the visibility is none of 0 (unlabelled), 1 (hidden), 2 (seen)"),
        (None, "keypoint_at_origin", origin, "labelled, but at (0, 0); what nobody labelled has visibility 0"),
        (None, "keypoint_outside_image", outside, "labelled outside the image; they are in pixels of the whole image"),
        (None, "keypoint_far_from_box", far, "labelled more than half a box outside the person's own box"),
        ("warning", "unlabelled_with_place", forgotten, "placed, but with visibility 0: training does not see them"),
    )
    findings: list[Finding] = []
    for severity, check, chosen, text in kinds:
        people, number = np.asarray(chosen.any(axis=1)), int(chosen.sum())
        among = ~labels.crowd if chosen is unknown else labels.usable

        def message(share: str, number: int = number, text: str = text) -> str:
            return f"{number} keypoint{'s' * (number > 1)} of {share}: {text}"

        findings += labels.finding(severity or _graded(people, among), check, people, message, among=among)
    never = [labels.skeleton.keypoints[joint] for joint in np.flatnonzero(labelled.sum(axis=0) == 0)]
    if never:
        text = f"labelled in nobody, so that their heatmaps will never be trained: {', '.join(never)}"
        findings.append(Finding("warning", "joint_never_labelled", text, len(never)))
    return findings


def outside_box(labels: Labels) -> Float[np.ndarray, "person joint"]:
    """How far keypoints are outside their own box, in shares of its longer side; zero or less inside."""
    (x, y), (left, top, width, height) = np.moveaxis(labels.keypoints, -1, 0), labels.boxes.T[..., None]
    outside = np.maximum.reduce([left - x, top - y, x - left - width, y - top - height])
    return outside / labels.longer_side[:, None]


def _graded(chosen: Bool[np.ndarray, " person"], among: Bool[np.ndarray, " person"]) -> Severity:
    """A few mistakes are the labellers', many are the conversion's."""
    return "error" if chosen.sum() > SYSTEMATIC * max(int(among.sum()), 1) else "warning"


def check_repeated(labels: Labels) -> list[Finding]:
    """Ids that are not unique, people whose image is another, and people annotated twice."""
    finding, everyone = labels.finding, np.ones(len(labels.ids), dtype=bool)
    repeated_id = _later(np.unique(labels.ids, return_inverse=True)[1].reshape(-1))
    listed, count = np.unique(labels.listed_images, return_counts=True)
    elsewhere = labels.listed_images[labels.image_rows] != labels.image_ids
    findings = [
        *finding(
            "error",
            "id_repeated",
            repeated_id,
            lambda share: f"{share}: the annotation id came before; results could not be told apart",
            among=everyone,
        ),
        *finding(
            "error",
            "image_mixed_up",
            elsewhere,
            lambda share: f"{share} point to the row of another image",
            among=everyone,
        ),
    ]
    if (count > 1).any():
        text = f"{(count > 1).sum()} image ids appear more than once, {listed[count > 1][0]} among them"
        findings.append(Finding("error", "image_id_repeated", text, int((count > 1).sum())))
    same, elsewhere_too = repeated_people(labels)
    return [
        *findings,
        *finding(
            "warning",
            "person_repeated",
            same,
            lambda share: f"{share} repeat the box and every keypoint of another of the same image",
        ),
        *finding(
            "warning",
            "person_repeated_in_other_image",
            elsewhere_too,
            lambda share: f"{share} repeat the box and every keypoint of somebody in another image",
        ),
    ]


def repeated_people(labels: Labels) -> tuple[Bool[np.ndarray, " person"], Bool[np.ndarray, " person"]]:
    """Usable people who repeat an earlier one: of the same image, and of another image alone."""
    rows = np.flatnonzero(labels.usable)
    parts = (labels.boxes, labels.keypoints.reshape(len(labels.ids), -1), labels.visibility)
    values = np.ascontiguousarray(np.concatenate([part[rows] for part in parts], axis=1).astype(np.float32) + 0.0)
    alike = np.unique(values.view(f"V{4 * values.shape[1]}").ravel(), return_inverse=True)[1].reshape(-1)
    with_image = np.unique(np.stack([alike, labels.image_ids[rows]], axis=1), axis=0, return_inverse=True)[1]
    same, anywhere = np.zeros(len(labels.ids), dtype=bool), np.zeros(len(labels.ids), dtype=bool)
    same[rows], anywhere[rows] = _later(with_image.reshape(-1)), _later(alike)
    return same, anywhere & ~same


def _later(groups: Int[np.ndarray, " person"]) -> Bool[np.ndarray, " person"]:
    """Members of a group but for its first."""
    later = np.ones(len(groups), dtype=bool)
    later[np.unique(groups, return_index=True)[1]] = False
    return later


def check_images(shards: Shards) -> list[Finding]:
    """Images with the same bytes under two ids. A file is read whole only if length and middle agree with another's."""
    groups = repeated_images(shards)
    if not groups:
        return []
    names = shards.images.select_columns(["file_name"])
    extra = sum(len(group) - 1 for group in groups)
    first = ", ".join(names[list(groups[0])]["file_name"][:3])
    text = f"{extra} images repeat the bytes of another ({first}); the same people are counted more than once"
    return [Finding("warning", "image_repeated", text, extra)]


def repeated_images(shards: Shards) -> list[tuple[int, ...]]:
    """Rows of images that have the same bytes, in groups."""
    column = shards.images.data.column("bytes")
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    starts = np.cumsum([0, *map(len, chunks)])
    lengths = np.concatenate([pc.binary_length(chunk).to_numpy() for chunk in chunks])

    def content(row: int) -> memoryview:
        place = int(np.searchsorted(starts, row, side="right")) - 1
        return memoryview(chunks[place][row - int(starts[place])].as_buffer())

    _, inverse, count = np.unique(lengths, return_inverse=True, return_counts=True)
    candidates: dict[bytes, list[int]] = defaultdict(list)
    for row in np.flatnonzero(count[inverse.reshape(-1)] > 1).tolist():
        middle = int(lengths[row]) // 2
        sample = bytes(content(row)[max(middle - SAMPLED // 2, 0) : middle + SAMPLED // 2])
        candidates[int(lengths[row]).to_bytes(8, "little") + sample].append(row)
    suspects = [row for rows in candidates.values() if len(rows) > 1 for row in rows]
    alike: dict[bytes, list[int]] = defaultdict(list)
    for row in track(suspects, "comparing images", total=len(suspects)):
        alike[hashlib.sha256(content(row)).digest()].append(row)
    return [tuple(rows) for rows in alike.values() if len(rows) > 1]
