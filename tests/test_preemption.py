"""A run that gets a stop signal saves after the current step and ends with the exit code for a restart."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import DISTILL, start, start_ranks, wait_for_step

from fpd_accel.errors import EXIT_PREEMPTED
from fpd_accel.training.checkpoint import checkpoints, newest_whole, read_state

pytestmark = pytest.mark.faults
STEPS = 40_000  # never reached, however late a signal comes


@pytest.fixture
def long_recipe(tiny_recipe: Callable[..., Path]) -> Callable[..., Path]:
    def write(name: str, **sections: dict) -> Path:
        values = {
            "run": {"name": name},
            "data": {"workers": 1, "valid": None},
            "train": {"steps": STEPS, "freeze_norm": True, "ema_decay": 0.9},
            "checkpoint": {"every_steps": 10 * STEPS},
        }
        for section, change in sections.items():
            values[section] = values.get(section, {}) | change
        return tiny_recipe(file_name=f"{name}.yaml", **values)

    return write


def curve(directory: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["train_loss"]) for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_run_asked_to_stop_saves_and_goes_on(
    number: signal.Signals, long_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, folder = long_recipe("stopped"), tmp_path / "stopped"
    job = start(DISTILL, "--config", recipe)
    wait_for_step(folder, 3, job)
    os.killpg(job.pid, number)  # loader processes get it too, as from a scheduler
    output = job.final_output()
    assert job.returncode == EXIT_PREEMPTED, output
    step = read_state(newest_whole(folder / "checkpoints"))["step"]
    assert 3 <= step < STEPS
    assert f"asked to stop ({number.name}); saved at step {step}" in output
    assert curve(folder)[-1][0] == step
    both = [start(DISTILL, "--config", one, f"train.steps={step + 3}") for one in (recipe, long_recipe("whole"))]
    for ended in both:
        assert ended.wait() == 0, ended.output()
    assert curve(folder) == curve(tmp_path / "whole")


def test_signal_to_one_rank_stops_all_after_the_same_step(long_recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    ranks = start_ranks(DISTILL, "--config", long_recipe("ranks"))
    wait_for_step(folder, 3, *ranks)
    ranks[1].send_signal(signal.SIGUSR1)
    outputs = [rank.final_output() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_PREEMPTED, EXIT_PREEMPTED], outputs
    assert "asked to stop (on another rank); saved at step" in outputs[0]
    state = read_state(newest_whole(folder / "checkpoints"))
    assert state["topology"]["ranks"] == 2
    assert curve(folder)[-1][0] == state["step"]


def test_checkpoint_by_the_clock(long_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = long_recipe("clock", checkpoint={"save_every_minutes": 1e-6, "keep": 100}, train={"steps": 8})
    job = start(DISTILL, "--config", recipe)
    assert job.wait() == 0, job.output()
    assert len(checkpoints(tmp_path / "clock" / "checkpoints")) > 1  # the last one does not depend on the clock


def test_second_job_on_a_run_directory_refuses(long_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = long_recipe("one")
    first = start(DISTILL, "--config", recipe)
    wait_for_step(tmp_path / "one", 1, first)
    second = start(DISTILL, "--config", recipe)
    output = second.final_output()
    assert second.returncode == 2
    assert f"another job is training here ({os.uname().nodename}, pid {first.pid})" in output
    assert first.poll() is None


def test_rank_that_hangs_ends_the_run_with_a_message(long_recipe: Callable[..., Path], tmp_path: Path) -> None:
    script = tmp_path / "hanging.py"  # the time limit is short, from the hanging step on
    script.write_text(
        "import os, runpy, signal\n"
        "from fpd_accel.distributed.watchdog import Watchdog\n"
        "alive = Watchdog.alive\n"
        "def hang(self, doing):\n"
        "    alive(self, doing)\n"
        "    if doing.startswith('step 4 '):\n"
        "        if os.environ['RANK'] == '1':\n"
        "            os.kill(os.getpid(), signal.SIGSTOP)\n"
        "        self.seconds = 2\n"
        "Watchdog.alive = hang\n"
        f"runpy.run_path({str(DISTILL)!r}, run_name='__main__')\n"
    )
    ranks = start_ranks(script, "--config", long_recipe("hung"))
    output = ranks[0].final_output()
    assert ranks[0].returncode == 2, output
    assert "error: rank 0 on" in output
    assert "has made no progress for" in output
    assert "it was at: step 4 of" in output
    assert [step for step, _ in curve(tmp_path / "hung")] == [1, 2, 3]


def test_processes_of_srun_without_a_launchers_variables_are_refused(long_recipe: Callable[..., Path]) -> None:
    job = start(DISTILL, "--config", long_recipe("alone"), SLURM_STEP_NUM_TASKS="2")
    output = job.final_output()
    assert job.returncode == 2
    assert "sbatch launch/slurm.sbatch" in output
