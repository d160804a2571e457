"""The lock of a run directory: one job at a time, also under Slurm."""

import multiprocessing
import shutil
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fpd_accel.config.loading import load_recipe
from fpd_accel.errors import CheckpointError
from fpd_accel.training import run_lock
from fpd_accel.training.checkpoint import checkpoints
from fpd_accel.training.run import run
from fpd_accel.training.run_lock import LOCK_NAME, RunLock

PATIENCE = 100  # seconds to wait for another process
Job = Callable[..., tuple[str, BaseProcess]]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """Return a function that takes the lock in another process; it returns "holds" or the error, and the process."""
    started: list[tuple[BaseProcess, Connection]] = []
    monkeypatch.setattr(run_lock, "LOCK_PATIENCE", 0.05)

    def hold(pipe: Connection) -> None:
        lock = RunLock(tmp_path)
        try:
            lock.acquire()
            pipe.send("holds")
        except CheckpointError as error:
            pipe.send(str(error))
        pipe.recv()

    def start(*, slurm: str | None = None, restarts: str | None = None) -> tuple[str, BaseProcess]:
        enter(monkeypatch, slurm=slurm, restarts=restarts)
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=hold, args=(there,), daemon=True)
        process.start()
        started.append((process, here))
        assert here.poll(PATIENCE)
        return here.recv(), process

    yield start
    for process, _ in started:
        process.kill()
        process.join()


def enter(monkeypatch: pytest.MonkeyPatch, *, slurm: str | None, restarts: str | None) -> None:
    """Set the variables of a Slurm job; the number of restarts exists only from the second start on."""
    for name, value in (("SLURM_JOB_ID", slurm), ("SLURM_RESTART_COUNT", restarts)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("restarts", [None, "2"])
def test_second_step_of_one_slurm_job_is_refused(restarts: str | None, job: Job) -> None:
    answer, first = job(slurm="7", restarts=restarts)
    assert answer == "holds"
    answer, _ = job(slurm="7", restarts=restarts)
    assert "another job is training here (" in answer
    assert f"pid {first.pid}, Slurm job 7, start {restarts or 0}); wait for it, end it" in answer


def test_slurm_job_of_another_number_is_refused(job: Job) -> None:
    job(slurm="7")
    assert "another job is training here (" in job(slurm="17", restarts="1")[0]
    assert "another job is training here (" in job(slurm=None)[0]


def test_requeued_slurm_job_goes_on_although_its_lost_node_has_the_lock(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, lost = job(slurm="7")
    enter(monkeypatch, slurm="7", restarts="1")
    with RunLock(tmp_path) as lock:
        lock.acquire()
        assert (tmp_path / LOCK_NAME).read_text().endswith("Slurm job 7, start 1\n")
        assert "another job is training here (" in job(slurm="7", restarts="1")[0]
        lost.kill()  # the file server notices at last
        waiting = next(thread for thread in threading.enumerate() if thread.name == "lock")
        waiting.join(PATIENCE)
        assert not waiting.is_alive()
        assert "another job is training here (" in job(slurm="8")[0]
    assert job(slurm="8")[0] == "holds"


@pytest.mark.faults
def test_run_that_another_job_began_meanwhile_goes_on_from_its_checkpoint(
    tiny_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    recipe = tiny_recipe(data={"valid": None}, checkpoint={"keep": 9})
    run(load_recipe(recipe, ["train.steps=2"]))
    shutil.move(tmp_path / "tiny", tmp_path / "other")
    acquire = RunLock.acquire

    def acquire_late(lock: RunLock) -> None:
        if (tmp_path / "other").exists():
            shutil.move(tmp_path / "other", tmp_path / "tiny")
        acquire(lock)

    monkeypatch.setattr(RunLock, "acquire", acquire_late)
    run(load_recipe(recipe, ["train.steps=3"]))
    assert "step 2 of 3" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in checkpoints(tmp_path / "tiny" / "checkpoints")] == ["step_00000002", "step_00000003"]
    assert not (tmp_path / "tiny" / "checkpoints" / "set_aside").exists()
