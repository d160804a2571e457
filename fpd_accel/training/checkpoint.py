"""Checkpoints: directories that are written whole or not at all, and verified when they are read.

`step_00001000/` holds safetensors, `state.json` and `MANIFEST.json` with the size and SHA-256 of each file. It is
written under a temporary name, flushed to the disk and renamed. Resuming takes the newest directory that matches its
manifest. It contains no pickle.

This relies on two properties of local disks, NFS, Lustre and GPFS: a directory is renamed at once or not at all, and
flushed data stay. Object stores mounted as folders (gcsfuse, s3fs) rename file by file; a checkpoint interrupted there
does not match its manifest, and the one before it is taken.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from fpd_accel.console import warn
from fpd_accel.errors import CheckpointError
from fpd_accel.files import replace_file, sha256, staged_folder

MANIFEST = "MANIFEST.json"
STATE = "state.json"
LATEST = "latest"  # names the newest checkpoint for people and scripts; resuming does not rely on it
SET_ASIDE = "set_aside"


class CheckpointWriter:
    """Writes checkpoints one after the other in a thread; training waits only if two would overlap.

    Without `background`, `submit` returns when the checkpoint is written.
    """

    def __init__(self, directory: Path, *, background: bool = True) -> None:
        self.directory, self._background = directory, background
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def submit(self, write: Callable[[], Path]) -> None:
        """Start writing, after waiting for the checkpoint before it.

        Raises:
            CheckpointError: The checkpoint before it, or without `background` this one, could not be written.
        """
        self.wait()
        self._writing = self._thread.submit(write)
        if not self._background:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether writing the last checkpoint has failed; `wait` raises the reason."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk.

        Raises:
            CheckpointError: It could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Finish the checkpoint that is being written."""
        self._thread.shutdown()


def write_checkpoint(
    directory: Path, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write `<directory>/step_N`, then remove all but the newest `keep` checkpoints.

    Args:
        directory: Of the checkpoints of a run.
        step: Optimizer steps taken.
        tensors: The content of each safetensors file, by its name without suffix.
        state: The content of `state.json` beside the step.
        keep: Checkpoints that stay on the disk, this one included.

    Raises:
        CheckpointError: It cannot be written; nothing of it is left, and those before it are untouched.
    """
    final = directory / _name(step)
    try:
        with staged_folder(final) as staging:
            for name, group in tensors.items():
                contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
                save_file(contiguous, staging / f"{name}.safetensors")
            (staging / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")
            files = {
                path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(staging.iterdir())
            }
            (staging / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
            if final.exists():  # a damaged checkpoint of the same step, which resuming passed over
                _remove(final)
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values()) / 1e6
        before = checkpoints(directory)
        intact = f"{before[-1].name}, before it, is intact" if before else "there is none before it"
        raise CheckpointError(
            f"{directory}: the checkpoint of step {step} ({needed:.0f} MB) could not be written: "
            f"{getattr(error, 'strerror', None) or error}; {intact}; make room and run the same command again"
        ) from None
    try:
        replace_file(directory / LATEST, final.name + "\n")
        for old in checkpoints(directory)[:-keep]:
            _remove(old)
    except OSError as error:
        warn(f"{directory}: {final.name} is written, but older checkpoints could not be removed: {error}")
    return final


def continue_from(directory: Path, step: int) -> None:
    """Remove what a killed run was writing or deleting, and move checkpoints newer than `step` to `set_aside/`.

    A newer checkpoint is damaged, or the user resumed from an older one: it does not belong to the run that continues,
    so it must neither be resumed from nor count among those to keep.
    """
    for pattern in (".step_*.writing", ".step_*.removing"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    left, aside = checkpoints(directory), directory / SET_ASIDE
    while left and left[-1].name > _name(step):
        newer = left.pop()
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / newer.name, ignore_errors=True)
        newer.rename(aside / newer.name)
        warn(f"{newer}: the run goes on from step {step}, before it; moved to {aside}")
    if left:  # a job may have been killed between writing a checkpoint and its pointer
        replace_file(directory / LATEST, left[-1].name + "\n")


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _remove(checkpoint: Path) -> None:
    """Rename a checkpoint before deleting it, so that a half-deleted one is never taken for a checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removing")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, whole or not."""
    return sorted(path for path in directory.glob("step_*") if path.is_dir())


def problem(checkpoint: Path) -> str | None:
    """Return why a checkpoint must not be loaded; None if every file has the size and SHA-256 of its manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
            if sha256(path) != expected["sha256"]:
                return f"{name} does not have the SHA-256 of the manifest"
        if STATE not in files:
            return f"{MANIFEST} does not list {STATE}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def newest_whole(directory: Path) -> Path | None:
    """Return the newest checkpoint that verifies, with a warning for each newer one; None if there is none.

    Raises:
        CheckpointError: There are checkpoints, but none of them is whole.
    """
    found = checkpoints(directory)
    for checkpoint in reversed(found):
        reason = problem(checkpoint)
        if reason is None:
            return checkpoint
        warn(f"{checkpoint}: passed over: {reason}")
    if found:
        raise CheckpointError(
            f"{directory}: none of the {len(found)} checkpoints is whole; remove them to start afresh"
        )
    return None


def read_state(checkpoint: Path, *, verified: bool = False) -> dict[str, Any]:
    """Return `state.json` of a checkpoint, whose files are hashed before, unless they are `verified` already.

    Raises:
        CheckpointError: The checkpoint is not whole.
    """
    reason: str | None = "there is no such directory"
    if checkpoint.is_dir():
        reason = None if verified else problem(checkpoint)
    if reason is not None:
        raise CheckpointError(f"{checkpoint}: cannot be resumed: {reason}")
    return json.loads((checkpoint / STATE).read_bytes())


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of the optimizer's state as `<parameter name>::<entry>`, whole on rank 0. All ranks take part.

    Hyperparameters belong to the recipe and are not stored.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=options)).get("state", {})  # type: ignore[assignment]
    on_cpu = next(model.parameters()).device.type == "cpu"  # from other devices they are copies already
    return {
        f"{name}::{key}": value.clone() if on_cpu else value
        for name, entries in state.items()
        for key, value in entries.items()
    }


def read_tensors(checkpoint: Path, names: Sequence[str], *, verified: bool = False) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of some files by the files' names without suffix; the files are mapped, not read.

    They are verified as this machine sees them, unless this process has `verified` them already.

    Raises:
        CheckpointError: The checkpoint is not whole here, or cannot be read.
    """
    read_state(checkpoint, verified=verified)
    try:
        return {name: load_file(checkpoint / f"{name}.safetensors") for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be resumed: {error}") from None


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Load saved tensors into an optimizer of the same model, sharded or not."""
    if not saved:  # plain SGD has no state
        return
    options = StateDictOptions(full_state_dict=True)
    whole: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))  # for its parameter groups
    parameters = dict(model.named_parameters())
    state: dict[str, Any] = {}
    for flat, mapped in saved.items():
        tensor = mapped.clone()  # otherwise the file stays mapped as long as the run lasts, and NFS cannot remove it
        name, _, key = flat.rpartition("::")
        parameter = parameters[name]
        if tensor.shape == parameter.shape and not isinstance(parameter, DTensor):
            # fused kernels need the memory format of the parameter
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(name, {})[key] = tensor
    set_optimizer_state_dict(model, optimizer, {**whole, "state": state}, options=options)
