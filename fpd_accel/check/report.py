"""All that is to be known of a dataset before training, in one record: for the console, for JSON and for programs."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from fpd_accel.check.anatomy import Limb, check_limbs, check_sides, check_skeleton, measure_limbs
from fpd_accel.check.labels import Finding, Labels, Severity, read_labels
from fpd_accel.check.people import check_boxes, check_images, check_keypoints, check_repeated, check_skipped
from fpd_accel.check.proof import Proof, check_proof, prove
from fpd_accel.check.statistics import (
    LEVEL_NAMES,
    LEVELS,
    count_all,
    crowding,
    quantiles,
    sizes,
    visibility,
)
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.files import write_whole
from fpd_accel.log import results
from fpd_accel.skeleton import Skeleton

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "information")
NOUNS = ("error", "warning", "note")
COLORS = {"error": "red", "warning": "yellow", "information": "cyan"}
SHOWN_IDS = 8  # annotation ids that the console shows of a finding; JSON has all


@dataclass(frozen=True)
class Report:
    """Statistics and findings of a set of shards; see ``statistics.py`` for the numbers."""

    path: str
    fingerprint: str
    skeleton: Skeleton
    counts: dict[str, Any]
    crowding: dict[str, int]
    sizes: dict[str, int]
    quantiles: dict[str, list[float]]
    joints: list[dict[str, Any]]
    limbs: list[Limb]
    proof: Proof
    findings: tuple[Finding, ...]  # errors first

    def of(self, severity: Severity) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == severity]

    def raise_errors(self) -> None:
        """Raise DataError with the list of errors, if there are any."""
        errors = self.of("error")
        if errors:
            number = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
            raise DataError("\n".join([f"{self.path}: {number} to correct", *(f"  {e.message}" for e in errors)]))

    def as_json(self) -> dict[str, Any]:
        """The report as values that JSON knows; what is undefined is null."""
        values = {
            "data": self.path,
            "sha256": self.fingerprint,
            "skeleton": self.skeleton.model_dump(mode="json"),
            "counts": self.counts,
            "images_by_people": self.crowding,
            "people_by_size": self.sizes,
            "quantile_levels": list(LEVELS),
            "quantiles": self.quantiles,
            "joints": self.joints,
            "limbs": [asdict(limb) for limb in self.limbs],
            "ground_truth_as_prediction": {**asdict(self.proof), "holds": self.proof.holds},
            "findings": [asdict(finding) for finding in self.findings],
        }
        defined: dict[str, Any] = _without_nan(values)
        return defined


def check_shards(shards: Shards, *, labels: Labels | None = None) -> Report:
    """Look at everything annotated, without decoding an image.

    Raises:
        DataError: the shards are damaged.
    """
    labels = labels or read_labels(shards)
    limbs, proof = measure_limbs(labels), prove(shards, labels)
    findings = [
        *check_skipped(shards),
        *check_skeleton(shards.skeleton),
        *check_repeated(labels),
        *check_images(shards),
        *check_boxes(labels, cut=shards.description.get("clip_boxes", True)),
        *check_keypoints(labels),
        *check_limbs(limbs),
        *check_sides(labels),
        *check_proof(proof),
    ]
    return Report(
        path=str(shards.path),
        fingerprint=shards.fingerprint,
        skeleton=shards.skeleton,
        counts=count_all(shards, labels),
        crowding=crowding(labels),
        sizes=sizes(labels),
        quantiles=quantiles(labels),
        joints=visibility(labels),
        limbs=limbs,
        proof=proof,
        findings=tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))),
    )


def write_json(report: Report, path: Path) -> None:
    """Write the report, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    write_whole(path, json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n")


def show_report(report: Report) -> None:
    """Print the report to stdout: numbers first, findings last."""
    counts, skeleton = report.counts, report.skeleton
    results.print(f"[bold]{escape(report.path)}[/bold]: skeleton {escape(skeleton.name)}{skeleton.sigma_note}")
    results.print(
        f"{counts['images']} images, {counts['people']} annotated people, {counts['usable']} of them usable; not "
        f"usable: {_listed(counts['unusable'])}; skipped by prepare: {_listed(counts['skipped'])}",
        soft_wrap=True,
    )
    results.print(
        f"images by usable people: {_listed(report.crowding)}; people by COCO's size: {_listed(report.sizes)}",
        soft_wrap=True,
    )
    results.print(_quantile_table(report), _joint_table(report))
    if report.limbs:
        results.print(_limb_table(report))
    proof = report.proof
    results.print(
        f"Ground truth as prediction: AP {proof.average_precision:.4f}, AR {proof.average_recall:.4f} on "
        f"{proof.evaluated} of {proof.people} people"
        + (" (nobody else can be confused with another)" if proof.evaluated < proof.people else ""),
        soft_wrap=True,
    )
    for lost in proof.lost[:SHOWN_IDS]:
        results.print(f"  annotation {lost.person} of image {lost.image}: {escape(lost.reason)}", soft_wrap=True)
    if len(proof.lost) > SHOWN_IDS:
        results.print(f"  and {len(proof.lost) - SHOWN_IDS} more")
    results.print()
    for finding in report.findings:
        color = COLORS[finding.severity]
        results.print(
            f"[{color}]{finding.severity}[/{color}] {finding.check}: {escape(finding.message)}{_ids(finding.people)}",
            soft_wrap=True,
        )
    numbers = ((len(report.of(severity)), name) for severity, name in zip(SEVERITIES, NOUNS, strict=True))
    results.print(", ".join(f"{number} {name}{'s' * (number != 1)}" for number, name in numbers))


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
    title = "Limbs, in shares of the longer side of the box"
    table = _table(title, "limb", "people", "median", "25 %", "75 %", "shorter with sides exchanged")
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
