"""The report on a dataset before training, for the console, for JSON and for programs."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from pydantic_core import to_json
from rich import box
from rich.markup import escape
from rich.table import Table

from fpd_accel.check.label_rules import check_boxes, check_images, check_keypoints, check_repeated, check_skipped
from fpd_accel.check.labels import Finding, Labels, Severity, read_labels
from fpd_accel.check.oracle import OracleScore, check_oracle, score_labels
from fpd_accel.check.skeleton_rules import Limb, check_limbs, check_sides, check_skeleton, measure_limbs, sigma_source
from fpd_accel.console import stdout
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.files import write_whole
from fpd_accel.skeleton import Skeleton

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "information")
NOUNS = ("error", "warning", "note")
COLORS = {"error": "red", "warning": "yellow", "information": "cyan"}
SHOWN_IDS = 8  # annotation ids per finding on the console; JSON has all
LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LEVEL_NAMES = ("min", "5 %", "25 %", "median", "75 %", "95 %", "max")
SMALL, MEDIUM = 32.0**2, 96.0**2  # largest areas of COCO's size classes, square pixels
GROUPS = (0, 1, 2, 3, 6, 11)  # smallest number of people per image of each group of images
show = partial(stdout.print, soft_wrap=True)


@dataclass(frozen=True)
class Report:
    """Statistics and findings of a set of shards; the functions below describe the numbers."""

    path: str
    fingerprint: str
    skeleton: Skeleton
    counts: dict[str, Any]
    images_by_people: dict[str, int]
    sizes: dict[str, int]
    quantile_levels: tuple[float, ...]
    quantiles: dict[str, list[float]]
    joints: list[dict[str, Any]]
    limbs: list[Limb]
    oracle: OracleScore
    findings: tuple[Finding, ...]  # errors first

    def of(self, severity: Severity) -> list[Finding]:
        """Return the findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    def raise_errors(self) -> None:
        """Raise DataError with the list of errors, if there are any."""
        if errors := self.of("error"):
            number = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
            raise DataError("\n  ".join([f"{self.path}: {number} to correct", *(e.message for e in errors)]))


def check_shards(shards: Shards, *, labels: Labels | None = None) -> Report:
    """Check the skeleton and all annotations of a set of shards, without decoding an image.

    `labels` are its annotations, if they have been read already.

    Raises:
        DataError: The shards are damaged.
    """
    labels = labels or read_labels(shards)
    limbs, oracle = measure_limbs(labels), score_labels(shards, labels)
    people_per_image = np.bincount(labels.image_rows[labels.usable], minlength=len(labels.listed_images))
    findings = [
        *check_skipped(shards),
        *check_skeleton(shards.skeleton),
        *check_repeated(labels),
        *check_images(shards),
        *check_boxes(labels, cut=shards.description.get("clip_boxes", True)),
        *check_keypoints(labels),
        *check_limbs(limbs),
        *check_sides(labels),
        *check_oracle(oracle),
    ]
    return Report(
        path=str(shards.path),
        fingerprint=shards.fingerprint,
        skeleton=shards.skeleton,
        counts=_count_all(shards, labels),
        images_by_people=_images_by_people(people_per_image),
        sizes=_sizes(labels),
        quantile_levels=LEVELS,
        quantiles=_quantiles(labels, people_per_image),
        joints=_visibility(labels),
        limbs=limbs,
        oracle=oracle,
        findings=tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))),
    )


def _count_all(shards: Shards, labels: Labels) -> dict[str, Any]:
    """Return the numbers of images, people and usable people, of unusable people by reason, and of what was skipped."""
    reasons, numbers = np.unique(labels.exclude_reason[~labels.usable], return_counts=True)
    return {
        "images": len(labels.listed_images),
        "people": len(labels.ids),
        "usable": int(labels.usable.sum()),
        "unusable": dict(zip(reasons.tolist(), numbers.tolist(), strict=True)),
        "skipped": dict(shards.description.get("skipped", {})),
    }


def _images_by_people(counts: Int[np.ndarray, " image"]) -> dict[str, int]:
    """Return the numbers of images by their number of usable people: `{"0": 3, "1": 17, …, "11+": 2}`."""
    groups = {}
    for first, after in pairwise((*GROUPS, math.inf)):
        name = f"{first}+" if after == math.inf else str(first) if after == first + 1 else f"{first}-{after - 1}"
        groups[name] = int(((counts >= first) & (counts < after)).sum())
    return groups


def _sizes(labels: Labels) -> dict[str, int]:
    """Return the numbers of usable people by COCO's size class, which the annotated area decides."""
    areas = labels.areas[labels.usable]
    small, medium = (int((areas <= limit).sum()) for limit in (SMALL, MEDIUM))
    return {"small": small, "medium": medium - small, "large": len(areas) - medium}


def _quantiles(labels: Labels, people_per_image: Int[np.ndarray, " image"]) -> dict[str, list[float]]:
    """Return the quantiles at `LEVELS` of each size of usable people, in pixels and square pixels."""
    usable = labels.usable
    width, height = labels.boxes[usable, 2:].T
    area = labels.areas[usable]
    rows = np.unique(labels.image_rows, return_index=True)[1]  # one person of each image
    measured = {
        "people per image": people_per_image,
        "labelled keypoints per person": labels.labelled[usable].sum(axis=1),
        "box width": width,
        "box height": height,
        "box area": width * height,
        "person area": area,
        "person area / box area": area / np.maximum(width * height, 1),
        "image width": labels.widths[rows],
        "image height": labels.heights[rows],
    }
    return {name: np.quantile(values, LEVELS).tolist() for name, values in measured.items() if len(values)}


def _visibility(labels: Labels) -> list[dict[str, Any]]:
    """Return for each joint how many usable people have it seen, hidden or unlabelled, and its sigma."""
    states, skeleton = labels.visibility[labels.usable], labels.skeleton
    return [
        {
            "name": name,
            "seen": int((states[:, k] == 2).sum()),
            "hidden": int((states[:, k] == 1).sum()),
            "unlabelled": int((states[:, k] == 0).sum()),
            "flips_with": skeleton.flip_partner.get(name),
            "sigma": skeleton.sigmas[k],
            "sigma_source": sigma_source(skeleton, name),
        }
        for k, name in enumerate(skeleton.keypoints)
    ]


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON, whole or not at all; undefined numbers are null.

    Raises:
        DataError: The file cannot be written.
    """
    names = {"path": "data", "fingerprint": "sha256", "sizes": "people_by_size", "oracle": "ground_truth_as_prediction"}
    values = {names.get(field, field): value for field, value in vars(report).items()}
    write_whole(path, to_json(values, indent=2, inf_nan_mode="null") + b"\n")


def show_report(report: Report) -> None:
    """Print the report to stdout: numbers first, findings last."""
    counts, skeleton = report.counts, report.skeleton
    stdout.print(f"[bold]{escape(report.path)}[/bold]: skeleton {escape(skeleton.name)}{skeleton.sigma_note}")
    show(
        f"{counts['images']} images, {counts['people']} annotated people, {counts['usable']} of them usable; not "
        f"usable: {_listed(counts['unusable'])}; skipped by prepare: {_listed(counts['skipped'])}"
    )
    by_people, by_size = _listed(report.images_by_people), _listed(report.sizes)
    show(f"images by usable people: {by_people}; people by COCO's size: {by_size}")
    stdout.print(_quantile_table(report), _joint_table(report))
    if report.limbs:
        stdout.print(_limb_table(report))
    _show_oracle(report.oracle)
    for finding in report.findings:
        color, message = COLORS[finding.severity], escape(finding.message)
        show(f"[{color}]{finding.severity}[/{color}] {finding.check}: {message}{_ids(finding.people)}")
    numbers = ((len(report.of(severity)), name) for severity, name in zip(SEVERITIES, NOUNS, strict=True))
    stdout.print(", ".join(f"{number} {name}{'s' * (number != 1)}" for number, name in numbers))


def _show_oracle(oracle: OracleScore) -> None:
    scores = f"AP {oracle.average_precision:.4f}, AR {oracle.average_recall:.4f}"
    rest = " (the others cannot be confused)" if oracle.evaluated < oracle.people else ""
    show(f"Labels as predictions: {scores} on {oracle.evaluated} of {oracle.people} people{rest}")
    for lost in oracle.lost[:SHOWN_IDS]:
        show(f"  annotation {lost.person} of image {lost.image}: {escape(lost.reason)}")
    if len(oracle.lost) > SHOWN_IDS:
        stdout.print(f"  and {len(oracle.lost) - SHOWN_IDS} more")
    stdout.print()


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _quantile_table(report: Report) -> Table:
    table = _table("Sizes of usable people, pixels", "", *LEVEL_NAMES)
    for name, values in report.quantiles.items():
        table.add_row(name, *(f"{value:.2f}" if name.endswith("/ box area") else f"{value:.0f}" for value in values))
    return table


def _joint_table(report: Report) -> Table:
    table = _table("Keypoints of usable people", "joint", "seen", "hidden", "unlabelled", "labelled", "sigma")
    table.add_column("from", no_wrap=True)
    table.add_column("flips with", no_wrap=True)
    total = max(report.counts["usable"], 1)
    for joint in report.joints:
        numbers = (str(joint[name]) for name in ("seen", "hidden", "unlabelled"))
        labelled, sigma = f"{(joint['seen'] + joint['hidden']) / total:.1%}", f"{joint['sigma']:.3f}"
        names = (joint["sigma_source"], escape(joint["flips_with"] or "-"))
        table.add_row(escape(joint["name"]), *numbers, labelled, sigma, *names)
    return table


def _limb_table(report: Report) -> Table:
    title = "Limbs: length as a share of the longer side of the box"
    table = _table(title, "limb", "people", "median", "25 %", "75 %", "shorter with exchanged sides")
    for limb in report.limbs:
        lengths = (_number(value, ".3f") for value in (limb.median, limb.lower, limb.upper))
        name = escape(" - ".join(limb.ends))
        table.add_row(name, str(limb.people), *lengths, _number(limb.exchanged, ".1%"))
    return table


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()) or "none"


def _ids(people: tuple[int, ...]) -> str:
    if not people:
        return ""
    more = ", …" if len(people) > SHOWN_IDS else ""
    return f" (annotations {', '.join(map(str, people[:SHOWN_IDS]))}{more})"
