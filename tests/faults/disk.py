"""Read run directories: the phase in which a process was killed, damaged checkpoints, differences of two runs."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from material import KEEP

TENSORS = ("student", "student_ema", "optimizer")
CURVE = (
    "step", "train_loss", "train_pose_loss", "train_kd_pose_loss", "train_acc", "lr", "alpha", "epoch", "samples",
)  # fmt: skip
STATE = ("step", "samples", "seed", "best_metrics", "data_sha256", "teacher_sha256", "topology")
SAVES = ("writing", "flushing", "renamed", "pruning")  # the phases of a save, in their order
PHASES = (*SAVES, "startup", "between steps", "evaluation")


class Fault(Exception):  # noqa: N818 - the field's word
    """A violated expectation: the result of a kill differs from what is guaranteed."""


@dataclass(frozen=True)
class Disk:
    """The state of a run directory."""

    whole: tuple[str, ...]  # names of the checkpoints, oldest first
    hidden: frozenset[str]  # staged ones and half-removed ones
    flushing: frozenset[str]  # staged ones that have a manifest
    latest: str | None
    metrics: int | None  # inode of metrics.jsonl: each start replaces it
    step: int  # of the last record
    evaluated: int  # step of the last evaluation

    @property
    def newest(self) -> int:
        """Return the step of the newest checkpoint; 0 if there is none."""
        return int(self.whole[-1].removeprefix("step_")) if self.whole else 0


def look(run: Path) -> Disk:
    folder, metrics = run / "checkpoints", run / "metrics.jsonl"
    names, found = listing(folder), list(records(run))
    latest = folder / "latest"
    return Disk(
        whole=tuple(sorted(name for name in names if name.startswith("step_"))),
        hidden=frozenset(name for name in names if name.endswith((".writing", ".removing"))),
        flushing=frozenset(name for name in names if name[0] == "." and (folder / name / "MANIFEST.json").exists()),
        latest=latest.read_text().strip() if latest.exists() else None,
        metrics=metrics.stat().st_ino if metrics.exists() else None,
        step=max((record["step"] for record in found if record["kind"] == "train"), default=0),
        evaluated=max((record["step"] for record in found if record["kind"] == "valid"), default=0),
    )


def listing(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 - a thousand times a second
    except FileNotFoundError:
        return set()


def records(run: Path) -> Iterator[dict[str, Any]]:
    with suppress(FileNotFoundError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with suppress(json.JSONDecodeError):  # the line that was being written
                yield json.loads(line)


def phase(before: Disk, after: Disk, *, stale: set[str], evaluations: set[int]) -> str:
    """Return the phase in which a process was killed.

    Args:
        before: The run directory when the process started.
        after: The run directory when it had ended.
        stale: Hidden names that existed all the time in between: an earlier process left them.
        evaluations: The steps after which the run evaluates.
    """
    fresh = after.hidden - stale
    new = [name for name in after.whole if name not in before.whole]
    if staged := {name for name in fresh if name.endswith(".writing")}:
        return "flushing" if staged <= after.flushing else "writing"
    if fresh:
        return "pruning"
    if new and (after.latest != new[-1] or len(after.whole) > KEEP):
        return "renamed"
    if after.metrics == before.metrics or after.step <= before.newest:
        return "startup"
    return "evaluation" if after.step in evaluations and after.evaluated < after.step else "between steps"


def inspect(run: Path, before: Disk, after: Disk, *, expected: dict[str, dict[str, str]] | None) -> None:
    """Check what has to hold for the checkpoints of a run after any kill.

    Args:
        run: The run directory.
        before: Its state when the killed process started.
        after: Its state when that had ended.
        expected: The `manifests` of the undisturbed run, if equal bytes are expected.

    Raises:
        Fault: A checkpoint is damaged or lost, or `latest` names a wrong one.
    """
    from fpd_accel.training.checkpoint import newest_whole, problem

    folder = run / "checkpoints"
    if after.newest < before.newest:
        raise Fault(f"the newest checkpoint went back from step {before.newest} to {after.newest}")
    for name in after.whole:
        reason = problem(folder / name)
        if reason is not None:
            raise Fault(f"{folder / name}: {reason}")
        if expected is not None and manifest(folder / name) != expected[name]:
            raise Fault(f"{folder / name}: not the bytes of the undisturbed run")
    newest = newest_whole(folder)
    if (newest.name if newest is not None else None) != (after.whole[-1] if after.whole else None):
        raise Fault(f"{folder}: the newest whole checkpoint is {newest}, of {after.whole}")
    nothing_yet = after.latest is None and len(after.whole) <= 1
    if after.latest not in after.whole[-2:] and not nothing_yet:
        raise Fault(f"{folder}: latest names {after.latest}, of {after.whole}")


def manifest(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of tensors, from the checkpoint's manifest."""
    files = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
    return {name: files[f"{name}.safetensors"]["sha256"] for name in TENSORS}


def manifests(run: Path) -> dict[str, dict[str, str]]:
    """Return the manifests of all checkpoints of a run, and remove the checkpoints but the last."""
    found = sorted((run / "checkpoints").glob("step_*"))
    listed = {checkpoint.name: manifest(checkpoint) for checkpoint in found}
    for checkpoint in found[:-1]:
        shutil.rmtree(checkpoint)
    return listed


def compare(whole: Path, killed: Path, *, tolerance: float) -> float:
    """Compare two finished runs bit for bit, and return the largest difference of running statistics.

    Running statistics may differ by up to `tolerance`; if they do, the scores that depend on them are not compared.

    Raises:
        Fault: The runs differ in anything else.
    """
    if (files := lasting(whole)) != lasting(killed):
        raise Fault(f"{killed}: other files than in {whole}: {sorted(files ^ lasting(killed))}")
    last = look(whole).whole[-1]
    names = (*(f"checkpoints/{last}/{name}" for name in TENSORS), "final/model", "best/model")
    largest = max(difference(whole / f"{name}.safetensors", killed / f"{name}.safetensors") for name in names)
    if not largest <= tolerance:
        raise Fault(f"running statistics differ by {largest:g}")
    exact = largest == 0.0
    for kind in ("train", "valid"):
        curves = ([r for r in records(run) if r["kind"] == kind] for run in (whole, killed))
        fields = CURVE if kind == "train" else ("step",)
        for one, other in zip_longest(*curves, fillvalue={"step": None}):
            keys = one.keys() if kind == "valid" and exact else fields
            wrong = [key for key in keys if one.get(key) != other.get(key)]
            if wrong:
                raise Fault(f"metrics.jsonl: {kind}, step {one['step']}: other {', '.join(wrong)}: {one}, {other}")
    states = [json.loads((run / "checkpoints" / last / "state.json").read_text()) for run in (whole, killed)]
    for key in STATE:
        if states[0][key] != states[1][key] and (exact or key != "best_metrics"):
            raise Fault(f"state.json: {key} is {states[1][key]}, not {states[0][key]}")
    return largest


def lasting(run: Path) -> set[str]:
    """Return the paths, within a run, of the files that do not depend on how often it was started."""
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(("checkpoints/", "tensorboard/"))}


def difference(one: Path, other: Path) -> float:
    """Return the largest difference of running statistics between two files of tensors.

    Raises:
        Fault: Any other tensor differs.
    """
    from safetensors.torch import load_file

    tensors, others = load_file(one), load_file(other)
    if tensors.keys() != others.keys():
        raise Fault(f"{other}: not the tensors of {one}")
    changed = {key: float((t - others[key]).abs().max()) for key, t in tensors.items() if not t.equal(others[key])}
    if wrong := [key for key in changed if "running_" not in key]:
        raise Fault(f"{other}: {len(wrong)} tensors differ, {wrong[0]} by {changed[wrong[0]]:g}")
    return max(changed.values(), default=0.0)
