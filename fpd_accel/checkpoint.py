"""A checkpoint is a directory that explains itself, written whole or not at all.

``step_00001000/`` holds safetensors, ``state.json`` and ``MANIFEST.json`` with the size and SHA-256 of each file. It is
written under a temporary name, flushed to the disk and renamed. Resuming takes the newest directory whose every byte is
as the manifest says. There is no pickle in it.

This relies on two things that local disks, NFS, Lustre and GPFS do: renaming a directory is all or nothing, and what
was flushed stays. Object stores mounted as folders (gcsfuse, s3fs) rename file by file; a checkpoint caught half-way
there is one that does not verify, and the one before it is taken.
"""

import hashlib
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from fpd_accel.errors import CheckpointError
from fpd_accel.files import flush
from fpd_accel.log import warn

MANIFEST = "MANIFEST.json"
STATE = "state.json"
SET_ASIDE = "set_aside"


class CheckpointWriter:
    """Writes checkpoints one after the other in a thread, so that training waits for none unless two would overlap."""

    def __init__(self, directory: Path, *, background: bool = True) -> None:
        self.directory, self._background = directory, background
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def submit(self, write: Callable[[], Path]) -> None:
        """Begin to write; first wait for the checkpoint before it.

        Raises:
            CheckpointError: of the checkpoint before it, or without ``background`` of this one.
        """
        self.wait()
        self._writing = self._thread.submit(write)
        if not self._background:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint is known not to have been written; :meth:`wait` says why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Until the last checkpoint is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Let what is being written come to its end."""
        self._thread.shutdown()


def write_checkpoint(
    directory: Path, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write ``<directory>/step_N``, one safetensors file per entry of ``tensors``; then remove all but ``keep``.

    ``latest`` names the newest, for people and scripts; resuming does not rely on it.

    Raises:
        CheckpointError: it cannot be written; nothing of it is left, and those before it are as they were.
    """
    staging = directory / f".{_name(step)}.writing"
    try:
        return _write(directory, staging, step, tensors=tensors, state=state, keep=keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values()) / 1e6
        before = checkpoints(directory)
        intact = f"{before[-1].name}, before it, is intact" if before else "there is none before it"
        raise CheckpointError(
            f"{directory}: the checkpoint of step {step} ({needed:.0f} MB) could not be written: "
            f"{getattr(error, 'strerror', None) or error}; {intact}; make room and run the same command again"
        ) from None


def _write(
    directory: Path,
    staging: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / _name(step)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for name, group in tensors.items():
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
        save_file(contiguous, staging / f"{name}.safetensors")
    (staging / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(staging.iterdir())}
    (staging / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    for path in (*staging.iterdir(), staging):
        flush(path)
    if final.exists():  # a damaged one of the same step, which resuming passed over
        _remove(final)
    staging.rename(final)
    flush(directory)
    try:
        _point_at(final)
        for old in checkpoints(directory)[:-keep]:
            _remove(old)
    except OSError as error:  # it is written all the same
        warn(f"{directory}: {final.name} is written, but what is older could not be cleared: {error}")
    return final


def continue_from(directory: Path, step: int) -> None:
    """Bring a folder of checkpoints to where its run is: what a killed one was writing or removing goes.

    What is newer than ``step`` moves to ``set_aside/``. It is damaged, or an older one was named to go on from: it must
    not be resumed from, as it is not what comes of this run, nor count among those to keep.
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
    if left:  # a job that was killed between a checkpoint and its pointer
        _point_at(left[-1])


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _point_at(checkpoint: Path) -> None:
    """Let ``latest`` name a checkpoint."""
    pointer = checkpoint.with_name(".latest")
    pointer.write_text(checkpoint.name + "\n", encoding="utf-8")
    pointer.replace(checkpoint.with_name("latest"))


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint under another name, so that half of it never looks like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removing")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    return sorted(path for path in directory.glob("step_*") if path.is_dir())


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint must not be loaded; None if every file is there with the size and SHA-256 of the manifest."""
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
    """The newest checkpoint that verifies, with a warning for each newer one passed over; None if there is none.

    Raises:
        CheckpointError: there are checkpoints, but not one of them is whole.
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


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is not whole.
    """
    reason = problem(checkpoint) if checkpoint.is_dir() else "there is no such directory"
    if reason is not None:
        raise CheckpointError(f"{checkpoint}: cannot be resumed: {reason}")
    return json.loads((checkpoint / STATE).read_bytes())


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the optimizer's state as ``<parameter name>::<entry>``, whole on the first rank; all ranks have to ask.

    Hyperparameters are the recipe's and are not stored.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=options)).get("state", {})  # type: ignore[assignment]
    on_cpu = next(model.parameters()).device.type == "cpu"  # from elsewhere they are copies already
    return {
        f"{name}::{key}": value.clone() if on_cpu else value
        for name, entries in state.items()
        for key, value in entries.items()
    }


def read_tensors(checkpoint: Path, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of some files of a checkpoint, by name and memory-mapped, verified as this machine has them.

    Raises:
        CheckpointError: the checkpoint is not whole here, or cannot be read.
    """
    read_state(checkpoint)
    try:
        return {name: load_file(checkpoint / f"{name}.safetensors") for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be resumed: {error}") from None


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Put saved tensors back into an optimizer of the same model, sharded or not."""
    if not saved:  # plain SGD remembers nothing
        return
    options = StateDictOptions(full_state_dict=True)
    whole: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))  # for its parameter groups
    parameters = dict(model.named_parameters())
    state: dict[str, Any] = {}
    for flat, mapped in saved.items():
        tensor = mapped.clone()  # else the file stays open as long as the run, and NFS cannot remove it
        name, _, key = flat.rpartition("::")
        parameter = parameters[name]
        if tensor.shape == parameter.shape and not isinstance(parameter, DTensor):
            # fused kernels want the memory format of the parameter
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(name, {})[key] = tensor
    set_optimizer_state_dict(model, optimizer, {**whole, "state": state}, options=options)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
