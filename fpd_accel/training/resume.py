"""Whether a recipe may continue in a run directory, and from which checkpoint. Checked before anything is written."""

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpd_accel.config.loading import dump_recipe, load_recipe
from fpd_accel.config.plan import steps_per_epoch, total_steps
from fpd_accel.config.schema import Recipe
from fpd_accel.console import say
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.errors import CheckpointError
from fpd_accel.files import replace_file, sha256
from fpd_accel.training.checkpoint import checkpoints, newest_whole, read_state
from fpd_accel.training.networks import TeacherNetwork
from fpd_accel.training.optim import alpha_at, learning_rate
from fpd_accel.training.resume_rules import differences
from fpd_accel.training.run_lock import RunLock
from fpd_accel.weights.model_folder import save_model

RECIPE_NAME = "recipe.yaml"
PACKAGES = (
    "fpd-accel", "torch", "torchvision", "accelerate", "datasets", "safetensors", "numpy", "opencv-python-headless",
    "simplejpeg",
)  # fmt: skip
IDENTITIES = {"data_sha256": "data.train", "unlabelled_sha256": "data.unlabelled", "teacher_sha256": "the teacher"}
"""Entries of `state.json` that a resumed run must have too, and what they identify."""


def begin(
    recipe: Recipe,
    lock: RunLock,
    *,
    resume: str,
    people: int,
    provenance: Mapping[str, Any],
    teacher: TeacherNetwork | None,
) -> tuple[Path | None, dict[str, Any]]:
    """Lock the run directory, write recipe and teacher into it, and return the checkpoint to resume from, if any.

    Args:
        recipe: The run to start or to resume.
        lock: Of its directory.
        resume: `auto`, `none` or the directory of a checkpoint.
        people: Number of labelled people to train on, by which epochs become steps.
        provenance: See the function of this name.
        teacher: Written as a model folder when the run starts.

    Returns:
        The verified checkpoint, or None, and its `state.json`, or an empty dictionary.

    Raises:
        CheckpointError: The run must not continue here; a new run that is refused leaves no directory.
    """
    if not recipe.run.directory.exists():
        find_checkpoint(recipe, resume, people=people, provenance=provenance)
    lock.acquire()
    # Once more under the lock: another job may have started this run and ended meanwhile.
    checkpoint, state = find_checkpoint(recipe, resume, people=people, provenance=provenance)
    write_recipe(recipe)
    if teacher is not None and checkpoint is None:  # a resumed run has the same teacher in its folder already
        save_model(recipe.run.directory / "teacher", teacher.network.state_dict(), teacher.config)
    return checkpoint, state


def find_checkpoint(
    recipe: Recipe, resume: str, *, people: int, provenance: Mapping[str, Any]
) -> tuple[Path | None, dict[str, Any]]:
    """Return the checkpoint that `--resume` means, and its state, if continuing gives what the run was started for.

    Each file of a checkpoint is hashed once.

    Raises:
        CheckpointError: The run exists and `resume` is `none`; no checkpoint is whole; or recipe, data or teacher would
            give another result, and each difference is named.
    """
    checkpoint, state = _choose_checkpoint(recipe.run.directory, resume)
    _check_recipe(recipe, step=state.get("step", 0), people=people)
    for key, name in IDENTITIES.items():
        if checkpoint is not None and state.get(key) != provenance[key]:
            changed = _changed_dataset(state.get("datasets"), provenance["datasets"]) if key == "data_sha256" else ""
            raise CheckpointError(
                f"{checkpoint}: {name} is not what this run was begun with (SHA-256 {state.get(key)}){changed}"
            )
    step, steps = state.get("step", 0), total_steps(recipe.train, recipe.data, people)
    if step > steps:
        raise CheckpointError(f"{checkpoint}: already at step {step}, but the recipe ends at step {steps}")
    return checkpoint, state


def provenance(
    recipe: Recipe, *, data: Mixture, unlabelled: Shards | None, teacher: TeacherNetwork | None
) -> dict[str, Any]:
    """Return what `state.json` says beside the position: enough to refuse a resume that would change the result."""
    return {
        "data_sha256": data.fingerprint,
        "datasets": data.identities,
        "unlabelled_sha256": unlabelled.fingerprint if unlabelled is not None else None,
        "teacher_sha256": _teacher_digest(teacher) if teacher is not None else None,
        "recipe_sha256": sha256(dump_recipe(recipe)),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _teacher_digest(teacher: TeacherNetwork) -> str:
    """Return the SHA-256 of everything that decides on a teacher's outputs: weights, input pixels, meaning."""
    config, network = teacher
    described = {"arch", "input_size", "codec", "normalization"} | ({"arguments"} if config.arguments else set())
    return sha256(f"{config.model_dump_json(include=described)} {weights_digest(network.state_dict())}")


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name, whichever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_recipe(recipe: Recipe) -> None:
    """Write the resolved recipe into the run directory, whole or not at all; make the directory.

    Raises:
        CheckpointError: It cannot be written.
    """
    try:
        replace_file(recipe.run.directory / RECIPE_NAME, dump_recipe(recipe))
    except OSError as error:
        raise CheckpointError(f"run.root: {recipe.run.directory}: cannot be written: {error.strerror}") from None


def _choose_checkpoint(directory: Path, resume: str) -> tuple[Path | None, dict[str, Any]]:
    if resume == "auto":
        checkpoint = newest_whole(directory / "checkpoints")
        return checkpoint, read_state(checkpoint, verified=True) if checkpoint is not None else {}
    if resume == "none":
        if _has_begun(directory):
            raise CheckpointError(
                f"{directory}: this run exists; continue it with --resume auto, or choose another run.name"
            )
        return None, {}
    chosen = Path(resume)
    state = read_state(chosen)
    if chosen.resolve().parent != (directory / "checkpoints").resolve():
        raise CheckpointError(
            f"{chosen}: a checkpoint of another run than {directory}; --resume continues a run under its own run.name; "
            "to start a new run from that network, set student.weights to its best/ or final/ folder"
        )
    return chosen, state


def _has_begun(directory: Path) -> bool:
    """Return whether a run has results that another recipe must not replace: a checkpoint, `best/` or `final/`."""
    has_models = any((directory / name).exists() for name in ("best", "final"))
    return has_models or bool(checkpoints(directory / "checkpoints"))


def _check_recipe(recipe: Recipe, *, step: int, people: int) -> None:
    """Raise CheckpointError if a run that has begun was started by a recipe that gives another result."""
    directory = recipe.run.directory
    if not (directory / RECIPE_NAME).exists() or not _has_begun(directory):
        return
    before = load_recipe(directory / RECIPE_NAME, check_files=False)
    altering, harmless = differences(before.model_dump(mode="json"), recipe.model_dump(mode="json"))
    altering += _schedule_differences(before, recipe, step=step, people=people)
    if altering:
        listed = "\n".join(f"  {difference}" for difference in altering)
        raise CheckpointError(
            f"{directory}: this run was begun by another recipe; choose another run.name, or undo\n{listed}"
        )
    for difference in harmless:
        say(f"changed since the run began: {difference}")


def _changed_dataset(before: list[dict[str, Any]] | None, now: list[dict[str, Any]]) -> str:
    """Describe how several datasets changed: their number, the content of one, or its share of the samples."""
    if before is None or len(before) == len(now) == 1:  # None: started by a version that knew one dataset alone
        return ""
    if len(before) != len(now):
        return f": datasets then: {len(before)}, now: {len(now)}"
    for number, (old, new) in enumerate(zip(before, now, strict=True)):
        if old["sha256"] != new["sha256"]:
            return f": data.train.{number}.shards was {old['path']}, and {new['path']} holds other people or images"
    old_parts, new_parts = (" : ".join(str(dataset["part"]) for dataset in datasets) for datasets in (before, now))
    return f": the weights were as {old_parts}, and are as {new_parts} now"


def _schedule_differences(before: Recipe, after: Recipe, *, step: int, people: int) -> list[str]:
    """Name the first step already taken whose learning rate or alpha the new length of the run changes."""

    def scheduled(recipe: Recipe, taken: int) -> tuple[float, float]:
        steps = total_steps(recipe.train, recipe.data, people)
        per_epoch = steps_per_epoch(recipe.train, recipe.data, people)
        rate = learning_rate(recipe.optim, taken, total_steps=steps, steps_per_epoch=per_epoch)
        return rate, alpha_at(recipe.distill, taken, total_steps=steps)

    changed = next((taken for taken in range(step) if scheduled(before, taken) != scheduled(after, taken)), None)
    if changed is None:
        return []
    return [f"train.steps, train.epochs: the new length changes the schedule of step {changed + 1}, already taken"]
