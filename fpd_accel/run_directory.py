"""May this recipe go on in this run directory, and from where? Everything is checked before anything is written."""

import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from fpd_accel.checkpoint import newest_whole, read_state
from fpd_accel.config import Recipe, differences, dump_recipe, load_recipe, steps_per_epoch, total_steps
from fpd_accel.data.mixture import Mixture
from fpd_accel.errors import CheckpointError
from fpd_accel.log import say, warn
from fpd_accel.model_folder import ModelConfig
from fpd_accel.optim import learning_rate, teacher_share

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RECIPE_NAME = "recipe.yaml"
PACKAGES = (
    "fpd-accel",
    "torch",
    "torchvision",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "opencv-python-headless",
    "simplejpeg",
)

LOCK_NAME = ".lock"
LOCK_PATIENCE = 3.0  # seconds that a lock is waited for: the run before may be on its way out


class RunLock(AbstractContextManager["RunLock"]):
    """One job at a time in a run directory.

    A POSIX record lock on ``.lock``: the system gives it back however the job ends, and NFS passes it on between
    machines. Where the file system has no locks, a warning says so and nothing is refused. NFS may keep the lock of a
    node that was lost: a start of a Slurm job goes before the same job's earlier ones, which Slurm has ended.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock, making the directory; does nothing if it is held already.

        Raises:
            CheckpointError: another job has it, or the directory cannot be made.
        """
        if self._file is not None or fcntl is None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = (self.directory / LOCK_NAME).open("a+", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"run.root: {self.directory}: cannot be made: {error.strerror}") from None
        deadline = time.monotonic() + LOCK_PATIENCE
        while not self._try():
            if time.monotonic() > deadline:
                self._file.seek(0)
                holder = self._file.read().strip() or "unknown"
                if _is_earlier_start(holder):
                    warn(f"{self.directory}: still locked by this job's last start ({holder}); going on")
                    threading.Thread(target=_take_when_free, args=(self._file,), name="lock", daemon=True).start()
                    break
                self._file.close()
                self._file = None
                raise CheckpointError(
                    f"{self.directory}: another job is training here ({holder}); wait for it, end it, or choose "
                    "another run.name"
                )
            time.sleep(0.1)
        self._file.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        start = f", Slurm job {job}, start {_slurm_start()}" if job is not None else ""
        self._file.write(f"{socket.gethostname()}, pid {os.getpid()}{start}\n")
        self._file.flush()

    def _try(self) -> bool:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            warn(
                f"{self.directory}: this file system has no locks ({error.strerror}), so nothing keeps a second job "
                "from training in it"
            )
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.truncate(0)
            self._file.close()
            self._file = None


def _take_when_free(file: IO[str]) -> None:
    """In the background: else a lock that comes free late would be for anybody to take."""
    with suppress(OSError, ValueError):  # ValueError: the run is over
        fcntl.lockf(file, fcntl.LOCK_EX)


def _slurm_start() -> int:
    """How often this Slurm job was requeued before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _is_earlier_start(holder: str) -> bool:
    """Whether what a lock file says is of this Slurm job before it was requeued, and not of another step of it."""
    said = re.search(r", Slurm job (\S+), start (\d+)$", holder)
    return said is not None and said[1] == os.environ.get("SLURM_JOB_ID") and int(said[2]) < _slurm_start()


def provenance(
    recipe: Recipe, *, data: Mixture, unlabelled: str | None, teacher: tuple[ModelConfig, Mapping[str, Tensor]] | None
) -> dict[str, Any]:
    """What ``state.json`` says beside the position: enough to refuse a resume that would not be one."""
    return {
        "data_sha256": data.fingerprint,
        "datasets": data.identities,
        "unlabelled_sha256": unlabelled,
        "teacher_sha256": teacher_digest(*teacher) if teacher is not None else None,
        "recipe_sha256": hashlib.sha256(dump_recipe(recipe).encode()).hexdigest(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def teacher_digest(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that decides what a teacher says: weights, pixels as it wants them, and what its outputs mean."""
    meaning = config.model_dump_json(include={"arch", "input_size", "codec", "normalization"})
    return hashlib.sha256(f"{meaning} {weights_digest(weights)}".encode()).hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_checkpoint(recipe: Recipe, resume: str) -> Path | None:
    """The checkpoint that ``--resume`` means: ``auto`` the newest whole one, if any; ``none``; or a directory.

    Raises:
        CheckpointError: ``none`` for a run that exists, a damaged directory, or no whole checkpoint among several.
    """
    directory = recipe.run.directory
    if resume == "auto":
        return newest_whole(directory / "checkpoints")
    if resume == "none":
        if (directory / RECIPE_NAME).exists():
            raise CheckpointError(
                f"{directory}: this run exists; continue it with --resume auto, or choose another run.name"
            )
        return None
    chosen = Path(resume)
    read_state(chosen)
    if chosen.resolve().parent != (directory / "checkpoints").resolve():
        raise CheckpointError(
            f"{chosen}: a checkpoint of another run than {directory}; --resume goes on with a run, under its own "
            "run.name; to start a new run from that network, set student.weights to its best/ or final/ folder"
        )
    return chosen


def check_resume(
    recipe: Recipe, checkpoint: Path | None, *, people: int, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The state to resume from (empty without a checkpoint), if going on gives what the run was begun for.

    Raises:
        CheckpointError: recipe, data or teacher would give another result; each difference is named.
    """
    directory = recipe.run.directory
    state = read_state(checkpoint) if checkpoint is not None else {}
    step, steps = state.get("step", 0), total_steps(recipe, people)
    if (directory / RECIPE_NAME).exists():
        before = load_recipe(directory / RECIPE_NAME, check_files=False)
        altering, harmless = differences(before, recipe)
        altering += _schedule_differences(before, recipe, step=step, people=people)
        if altering:
            listed = "\n".join(f"  {difference}" for difference in altering)
            raise CheckpointError(
                f"{directory}: this run was begun by another recipe; choose another run.name, or undo\n{listed}"
            )
        for difference in harmless:
            say(f"changed since the run began: {difference}")
    identities = {"data_sha256": "data.train", "unlabelled_sha256": "data.unlabelled", "teacher_sha256": "the teacher"}
    for key, name in identities.items():
        if checkpoint is not None and state.get(key) != provenance[key]:
            changed = _changed_dataset(state.get("datasets"), provenance["datasets"]) if key == "data_sha256" else ""
            raise CheckpointError(
                f"{checkpoint}: {name} is not what this run was begun with (SHA-256 {state.get(key)}){changed}"
            )
    if step > steps:
        raise CheckpointError(f"{checkpoint}: already at step {step}, but the recipe ends at step {steps}")
    return state


def _changed_dataset(before: list[dict[str, Any]] | None, now: list[dict[str, Any]]) -> str:
    """What changed among several datasets: their number, the content of one, or its part of the samples."""
    if before is None or len(before) == len(now) == 1:  # None: a run begun when there could be one alone
        return ""
    if len(before) != len(now):
        return f": datasets then: {len(before)}, now: {len(now)}"
    for number, (old, new) in enumerate(zip(before, now, strict=True)):
        if old["sha256"] != new["sha256"]:
            return f": data.train.{number}.shards was {old['path']}, and {new['path']} holds other people or images"
    old_parts, new_parts = (" : ".join(str(dataset["part"]) for dataset in datasets) for datasets in (before, now))
    return f": the weights were as {old_parts}, and are as {new_parts} now"


def write_recipe(recipe: Recipe) -> None:
    """Put the resolved recipe into the run directory, whole or not at all."""
    try:
        recipe.run.directory.mkdir(parents=True, exist_ok=True)
        staged = recipe.run.directory / f".{RECIPE_NAME}"
        staged.write_text(dump_recipe(recipe), encoding="utf-8")
        staged.replace(recipe.run.directory / RECIPE_NAME)
    except OSError as error:
        raise CheckpointError(f"run.root: {recipe.run.directory}: cannot be written: {error.strerror}") from None


def _schedule_differences(before: Recipe, after: Recipe, *, step: int, people: int) -> list[str]:
    """A longer run is the same run only if the steps already taken had the same learning rate and alpha."""
    schedules = []
    for recipe in (before, after):
        steps, per_epoch = total_steps(recipe, people), steps_per_epoch(recipe, people)
        schedules.append(
            [
                (
                    learning_rate(recipe.optim, i, total_steps=steps, steps_per_epoch=per_epoch),
                    teacher_share(recipe.distill, i, total_steps=steps),
                )
                for i in range(step)
            ]
        )
    if schedules[0] == schedules[1]:
        return []
    first = next(i for i, (old, new) in enumerate(zip(*schedules, strict=True)) if old != new)
    return [f"train.steps, train.epochs: the new length changes the schedule of step {first + 1}, already taken"]
