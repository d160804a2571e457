"""A run that is asked to stop saves where it is, says so, and ends with a code that asks for a new start."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fpd_accel.checkpoint import checkpoints, newest_whole, read_state
from fpd_accel.errors import EXIT_PREEMPTED

ROOT = Path(__file__).parents[1]
STEPS = 400
ENVIRONMENT = {
    **os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}  # fmt: skip

STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture
def long_recipe(tiny_recipe: Callable[..., Path]) -> Callable[..., Path]:
    def write(name: str, **sections: dict) -> Path:
        values = {
            "run": {"name": name},
            "data": {"workers": 1, "valid": None},
            "train": {"steps": STEPS, "freeze_norm": True, "ema_decay": 0.9},
            "checkpoint": {"every_steps": 1000},
        }
        for section, change in sections.items():
            values[section] = values.get(section, {}) | change
        return tiny_recipe(file_name=f"{name}.yaml", **values)

    return write


def start(recipe: Path, *arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "recipes" / "distill.py"), "--config", str(recipe), *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_step(directory: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = directory / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, process.stderr.read() if process.stderr is not None else ""
        time.sleep(0.01)


def curve(directory: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["train_loss"]) for record in records if record["kind"] == "train"]


def children(process: int) -> list[int]:
    """Process ids of what a process has started: the ranks of a launcher."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
def test_run_asked_to_stop_saves_and_goes_on(
    asked: signal.Signals, long_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, folder = long_recipe("stopped"), tmp_path / "stopped"
    process = start(recipe)
    wait_for_step(folder, 3, process)
    os.killpg(process.pid, asked)  # loader processes get it as well, as a scheduler's signal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED, said
    step = read_state(newest_whole(folder / "checkpoints"))["step"]
    assert 3 <= step < STEPS
    assert f"asked to stop ({asked.name}); saved at step {step}" in " ".join(said.split())
    assert curve(folder)[-1][0] == step
    again = start(recipe, f"train.steps={step + 3}")
    _, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    whole = start(long_recipe("whole"), f"train.steps={step + 3}")
    whole.communicate(timeout=120)
    assert curve(folder) == curve(tmp_path / "whole")


@pytest.mark.timeout(200)
def test_signal_to_one_rank_stops_all_after_the_same_step(long_recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    process = start(long_recipe("ranks"), ranks=2)
    wait_for_step(folder, 3, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGUSR1)
    _, said = process.communicate(timeout=100)
    assert "saved at step" in said, said
    state = read_state(newest_whole(folder / "checkpoints"))
    assert state["topology"]["ranks"] == 2
    assert curve(folder)[-1][0] == state["step"]


def test_checkpoint_by_the_clock(long_recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "clock"
    recipe = long_recipe("clock", checkpoint={"save_every_minutes": 0.01, "keep": 100}, train={"steps": 60})
    process = start(recipe)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert len(checkpoints(folder / "checkpoints")) > 1  # the last one comes without a clock


def test_second_job_on_a_run_directory_refuses(long_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe, folder = long_recipe("one", train={"steps": 100 * STEPS}), tmp_path / "one"  # still there when asked
    first = start(recipe)
    wait_for_step(folder, 1, first)
    second = start(recipe)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"another job is training here ({os.uname().nodename}, pid {first.pid})" in " ".join(said.split())
    assert first.poll() is None


@pytest.mark.timeout(200)
def test_rank_that_hangs_ends_the_run_with_a_message(long_recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "hung"
    process = start(long_recipe("hung", train={"timeout_minutes": 0.1}), ranks=2)
    wait_for_step(folder, 2, process)
    frozen = max(children(process.pid))
    os.kill(frozen, signal.SIGSTOP)
    said = ""
    assert process.stderr is not None
    while "no progress" not in said:
        said += process.stderr.readline()
    assert "rank 0 on" in said
    assert "it was at: step" in said


def test_processes_of_srun_that_know_nothing_of_each_other_are_refused(long_recipe: Callable[..., Path]) -> None:
    environment = {**ENVIRONMENT, "SLURM_STEP_NUM_TASKS": "2"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "distill.py"), "--config", str(long_recipe("alone"))],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "sbatch launch/slurm.sbatch" in done.stderr
