"""Which fields of a recipe may change when a run is resumed.

Data and teacher are compared by content instead of by path, the length of the run by the schedule that it gives (see
`resume.py`), and initial weights no longer matter. How a global batch is spread over devices matters to batch
normalisation alone, and is announced when the run resumes.
"""

from typing import Any

FREE_ON_RESUME = (
    "run.name", "run.root", "data.train", "data.valid", "data.workers", "data.decoded_cache", "data.synthetic",
    "data.unlabelled.shards", "data.unlabelled.boxes", "student.weights", "student.init", "teacher.weights",
    "teacher.arch", "teacher.arguments", "teacher.color", "teacher.codec", "teacher.recipe", "teacher.overrides",
    "teacher.compile", "teacher.shard", "teacher.fold_norm", "teacher.cache", "train.steps", "train.epochs",
    "train.device_batch", "train.parallel", "train.timeout_minutes", "train.compile", "train.cuda_graphs", "evaluate",
    "log", "checkpoint",
)  # fmt: skip
"""Fields, and sections, that leave the trained weights alone."""


def differences(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the differences of two dumped recipes as `path: old -> new`: those that alter the result, and the rest."""
    old, new = by_dotted_path(before), by_dotted_path(after)
    altering: list[str] = []
    harmless: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            free = any(key == name or key.startswith(f"{name}.") for name in FREE_ON_RESUME)
            (harmless if free else altering).append(f"{key}: {old.get(key)} -> {new.get(key)}")
    return altering, harmless


def by_dotted_path(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one dictionary."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= by_dotted_path(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
