"""Checkpoints are written beside training, one at a time, and what goes wrong is known before the next."""

import os
import threading
from pathlib import Path

import pytest
import torch

from fpd_accel.errors import CheckpointError
from fpd_accel.training.checkpoint import CheckpointWriter, checkpoints, continue_from, problem, write_checkpoint

TENSORS = {"student": {"weight": torch.arange(6.0).reshape(2, 3)}}


def write(directory: Path, step: int, *, keep: int = 2) -> Path:
    return write_checkpoint(directory, step, tensors=TENSORS, state={"samples": step}, keep=keep)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    disk_is_ready = threading.Event()
    writer = CheckpointWriter(tmp_path)

    def slowly() -> Path:
        assert disk_is_ready.wait(10)
        return write(tmp_path, 1)

    writer.submit(slowly)
    assert not checkpoints(tmp_path)  # and yet we are here
    assert not writer.failed
    disk_is_ready.set()
    writer.wait()
    assert problem(tmp_path / "step_00000001") is None
    writer.close()


def test_a_checkpoint_without_background_is_on_the_disk_at_once(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, background=False)
    writer.submit(lambda: write(tmp_path, 1))
    assert problem(tmp_path / "step_00000001") is None
    writer.close()


def test_a_failed_write_is_raised_once(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)

    def fail() -> Path:
        raise CheckpointError("no room")

    writer.submit(fail)
    writer.close()
    assert writer.failed
    with pytest.raises(CheckpointError, match="no room"):
        writer.wait()
    assert not writer.failed


def test_a_failed_write_leaves_no_files_and_the_older_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"step 2 .* No space left on device; step_00000001, before it, is intact"
    ):
        write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert problem(tmp_path / "step_00000001") is None


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (".step_00000002.writing", ".step_00000000.removing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "student.safetensors").write_bytes(b"half")
    continue_from(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 5):
        write(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]
    assert (tmp_path / "latest").read_text().strip() == "step_00000004"
