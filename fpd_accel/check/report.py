"""The report on a dataset before training, for the console, for JSON and for programs."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from fpd_accel.check.label_rules import check_boxes, check_images, check_keypoints, check_repeated, check_skipped
from fpd_accel.check.labels import Finding, Labels, Severity, read_labels
from fpd_accel.check.oracle import OracleScore, check_oracle, score_labels
from fpd_accel.check.skeleton_rules import Limb, check_limbs, check_sides, check_skeleton, measure_limbs
from fpd_accel.check.statistics import LEVEL_NAMES, LEVELS, count_all, images_by_people, quantiles, sizes, visibility
from fpd_accel.console import stdout
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.files import write_whole
from fpd_accel.skeleton import Skeleton

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "information")
NOUNS = ("error", "warning", "note")
COLORS = {"error": "red", "warning": "yellow", "information": "cyan"}
SHOWN_IDS = 8  # annotation ids per finding on the console; JSON has all


@dataclass(frozen=True)
class Report:
    """Statistics and findings of a set of shards; `statistics.py` describes the numbers."""

    path: str
    fingerprint: str
    skeleton: Skeleton
    counts: dict[str, Any]
    images_by_people: dict[str, int]
    sizes: dict[str, int]
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
        errors = self.of("error")
        if errors:
            number = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
            raise DataError("\n".join([f"{self.path}: {number} to correct", *(f"  {e.message}" for e in errors)]))

    def as_json(self) -> dict[str, Any]:
        """Return the report as values for JSON; undefined numbers are null."""
        values: dict[str, Any] = {
            "data": self.path,
            "sha256": self.fingerprint,
            "skeleton": self.skeleton.model_dump(mode="json"),
            "counts": self.counts,
            "images_by_people": self.images_by_people,
            "people_by_size": self.sizes,
            "quantile_levels": list(LEVELS),
            "quantiles": self.quantiles,
            "joints": self.joints,
            "limbs": [asdict(limb) for limb in self.limbs],
            "ground_truth_as_prediction": {**asdict(self.oracle), "holds": self.oracle.holds},
            "findings": [asdict(finding) for finding in self.findings],
        }
        return {name: _without_nan(value) for name, value in values.items()}


def check_shards(shards: Shards, *, labels: Labels | None = None) -> Report:
    """Check the skeleton and all annotations of a set of shards, without decoding an image.

    Args:
        shards: The shards.
        labels: Their annotations, if they have been read already.

    Raises:
        DataError: The shards are damaged.
    """
    labels = labels or read_labels(shards)
    limbs, oracle = measure_limbs(labels), score_labels(shards, labels)
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
        counts=count_all(shards, labels),
        images_by_people=images_by_people(labels),
        sizes=sizes(labels),
        quantiles=quantiles(labels),
        joints=visibility(labels),
        limbs=limbs,
        oracle=oracle,
        findings=tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))),
    )


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON, whole or not at all.

    Raises:
        DataError: The file cannot be written.
    """
    write_whole(path, json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n")


def show_report(report: Report) -> None:
    """Print the report to stdout: numbers first, findings last."""
    counts, skeleton = report.counts, report.skeleton
    stdout.print(f"[bold]{escape(report.path)}[/bold]: skeleton {escape(skeleton.name)}{skeleton.sigma_note}")
    stdout.print(
        f"{counts['images']} images, {counts['people']} annotated people, {counts['usable']} of them usable; not "
        f"usable: {_listed(counts['unusable'])}; skipped by prepare: {_listed(counts['skipped'])}",
        soft_wrap=True,
    )
    stdout.print(
        f"images by usable people: {_listed(report.images_by_people)}; people by COCO's size: {_listed(report.sizes)}",
        soft_wrap=True,
    )
    stdout.print(_quantile_table(report), _joint_table(report))
    if report.limbs:
        stdout.print(_limb_table(report))
    _show_oracle(report.oracle)
    for finding in report.findings:
        color = COLORS[finding.severity]
        stdout.print(
            f"[{color}]{finding.severity}[/{color}] {finding.check}: {escape(finding.message)}{_ids(finding.people)}",
            soft_wrap=True,
        )
    numbers = ((len(report.of(severity)), name) for severity, name in zip(SEVERITIES, NOUNS, strict=True))
    stdout.print(", ".join(f"{number} {name}{'s' * (number != 1)}" for number, name in numbers))


def _show_oracle(oracle: OracleScore) -> None:
    stdout.print(
        f"Labels as predictions: AP {oracle.average_precision:.4f}, AR {oracle.average_recall:.4f} on "
        f"{oracle.evaluated} of {oracle.people} people"
        + (" (the others cannot be confused)" if oracle.evaluated < oracle.people else ""),
        soft_wrap=True,
    )
    for lost in oracle.lost[:SHOWN_IDS]:
        stdout.print(f"  annotation {lost.person} of image {lost.image}: {escape(lost.reason)}", soft_wrap=True)
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
        labelled = (joint["seen"] + joint["hidden"]) / total
        numbers = (str(joint[name]) for name in ("seen", "hidden", "unlabelled"))
        table.add_row(
            escape(joint["name"]),
            *numbers,
            f"{labelled:.1%}",
            f"{joint['sigma']:.3f}",
            joint["sigma_source"],
            escape(joint["flips_with"] or "-"),
        )
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


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
