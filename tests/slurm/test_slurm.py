"""`launch/slurm.sbatch` on a cluster of two nodes: an interrupted run ends as an undisturbed one does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from cluster import Cluster, why_not

from fpd_accel.training.checkpoint import newest_whole, read_state

ROOT = Path(__file__).parents[2]
STEPS = 400
CURVE = ("step", "train_loss", "train_pose_loss", "train_acc", "lr")

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """Return the folder of runs and logs, with the recipe of a short run and a script that activates this Python."""
    folder = tmp_path_factory.mktemp("jobs")
    values = {
        "run": {"name": "job", "root": str(folder)},
        "data": {"train": str(tiny_shards), "input_size": [64, 64], "workers": 1},
        "student": {"arch": "tiny_w8"},
        "distill": {"mode": "normal"},
        "train": {
            "steps": STEPS,
            "global_batch": 4,
            "freeze_norm": True,
        },  # ranks have statistics of their own
        "optim": {"lr": 0.001, "schedule": "cosine"},
        "log": {"every_steps": 1, "pictures_every_steps": None, "trackers": []},
        "checkpoint": {"every_steps": 1000},  # only on a signal and at the end
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    (folder / "activate").write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    return folder


@pytest.fixture(scope="module")
def submit(cluster: Cluster, folder: Path) -> Callable[..., str]:
    """Return a function that submits a run by name, one process on each of two nodes, and returns the job's number."""

    def submit(name: str, *overrides: str) -> str:
        return cluster.run(
            "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--chdir={ROOT}",
            f"--output={folder}/{name}.log", "launch/slurm.sbatch", str(folder / "recipe.yaml"), f"run.name={name}",
            *overrides, FPD_ACTIVATE=str(folder / "activate"), CUDA_VISIBLE_DEVICES="", PYTHONWARNINGS="ignore",
        )  # fmt: skip

    return submit


@pytest.fixture(autouse=True)
def no_job_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.cancel_all()


def curve(run: Path) -> np.ndarray:
    """Return the values of every training step, (steps, values); the first is the step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return np.array([[record[name] for name in CURVE] for record in records if record["kind"] == "train"])


def wait_for_step(run: Path, step: int, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not (run / "metrics.jsonl").exists() or f'"step": {step},' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, f"{run} does not reach step {step}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, submit: Callable[..., str], folder: Path) -> np.ndarray:
    """Return the curve of a run that is not interrupted."""
    job = cluster.wait(submit("undisturbed"), "COMPLETED")
    assert (job["NumNodes"], job["NumTasks"], job["Restarts"], job["ExitCode"]) == ("2", "2", "0", "0:0")
    assert "(2 x 2, accumulated 1 times)" in (folder / "undisturbed.log").read_text()
    values = curve(folder / "undisturbed")
    assert values[:, 0].tolist() == list(range(1, STEPS + 1))
    return values


def assert_resumed_to_the_same_end(cluster: Cluster, number: str, folder: Path, name: str, whole: np.ndarray) -> None:
    """Check that a job was started a second time, has resumed, and has the curve of an uninterrupted run."""
    job = cluster.wait(number, "COMPLETED")
    assert (job["Restarts"], job["ExitCode"]) == ("1", "0:0")
    log = (folder / f"{name}.log").read_text()
    assert "saved at step" in log
    assert "resuming" in log
    np.testing.assert_array_equal(curve(folder / name), whole)


def test_signal_before_the_time_is_up_requeues_and_resumes(
    cluster: Cluster, submit: Callable[..., str], folder: Path, undisturbed: np.ndarray
) -> None:
    number = submit("preempted")
    wait_for_step(folder / "preempted", 20)
    cluster.run("scancel", "--signal=USR1", "--batch", number)  # as --signal=B:USR1@T does
    job = cluster.wait(number, "PENDING")
    assert job["Restarts"] == "1"
    step = read_state(newest_whole(folder / "preempted" / "checkpoints"))["step"]
    assert 20 <= step < STEPS
    assert curve(folder / "preempted")[-1, 0] == step
    assert_resumed_to_the_same_end(cluster, number, folder, "preempted", undisturbed)


def test_a_preempted_job_resumes_after_the_urgent_one(
    cluster: Cluster, submit: Callable[..., str], folder: Path, undisturbed: np.ndarray
) -> None:
    number = submit("displaced")
    wait_for_step(folder / "displaced", 20)
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    cluster.wait(number, "PENDING")
    assert_resumed_to_the_same_end(cluster, number, folder, "displaced", undisturbed)
    cluster.wait(urgent, "COMPLETED")


def test_signal_while_processes_are_starting_is_not_lost(
    cluster: Cluster, submit: Callable[..., str], folder: Path, undisturbed: np.ndarray
) -> None:
    number, log = submit("early"), folder / "early.log"
    cluster.wait(number, "RUNNING")
    while not (log.exists() and log.read_text()):  # the batch script has begun
        time.sleep(0.01)
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    assert_resumed_to_the_same_end(cluster, number, folder, "early", undisturbed)


def test_processes_may_end_some_seconds_apart(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "distill.py").write_text(
        "import os, sys, time\n"
        "if 'SLURM_RESTART_COUNT' in os.environ:\n"
        "    sys.exit(0 if sys.argv[-2:] == ['--resume', 'auto'] else 1)\n"
        "time.sleep(3 * int(os.environ['RANK']))\n"
        "sys.exit(75)\n"
    )
    number = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", f"--chdir={tmp_path}", f"--output={tmp_path}/log",
        str(ROOT / "launch" / "slurm.sbatch"), "recipe.yaml", FPD_ACTIVATE=str(folder / "activate"),
    )  # fmt: skip
    assert cluster.wait(number, "COMPLETED")["Restarts"] == "1"


def test_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, submit: Callable[..., str], folder: Path) -> None:
    number = submit("cancelled")
    wait_for_step(folder / "cancelled", 20)
    cluster.run("scancel", number)
    assert cluster.wait(number, "CANCELLED")["Restarts"] == "0"
    assert "cancelled and is not requeued" in (folder / "cancelled.log").read_text()
    assert read_state(newest_whole(folder / "cancelled" / "checkpoints"))["step"] >= 20


def test_student_is_sharded_over_nodes(cluster: Cluster, submit: Callable[..., str], folder: Path) -> None:
    shared = ("train.steps=20", "optim.schedule=constant")
    for name, parallel in {"sharded": "fsdp2", "copied": "ddp"}.items():
        cluster.wait(submit(name, *shared, f"train.parallel={parallel}"), "COMPLETED")
    np.testing.assert_allclose(curve(folder / "sharded"), curve(folder / "copied"), rtol=1e-5)


def test_mistake_ends_the_job_with_its_code_and_one_message(
    cluster: Cluster, submit: Callable[..., str], folder: Path
) -> None:
    assert cluster.wait(submit("mistake", "train.stepss=3"), "FAILED")["ExitCode"] == "2:0"
    assert (folder / "mistake.log").read_text().count("did you mean 'steps'?") == 1


def test_killed_process_ends_the_job(cluster: Cluster, submit: Callable[..., str], folder: Path) -> None:
    number = submit("killed", "train.steps=100000")
    wait_for_step(folder / "killed", 5)
    os.kill(task(number, rank=1), signal.SIGKILL)
    assert cluster.wait(number, "FAILED")["ExitCode"] == "137:0"


def task(job: str, *, rank: int) -> int:
    """Return the process id of a job's task: the oldest process with both numbers in its environment."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode(), b"WORLD_SIZE=2"}
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted <= set(entry.read_bytes().split(b"\0")):
                found.append(int(entry.parent.name))
    return min(found)


def test_tasks_without_the_variables_of_a_launcher_are_refused(cluster: Cluster, folder: Path) -> None:
    done = subprocess.run(
        [
            "srun", "--nodes=2", "--ntasks=2", sys.executable, "recipes/distill.py",
            "--config", str(folder / "recipe.yaml"), "run.name=apart",
        ],
        cwd=ROOT, env={**cluster.environment, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "2 processes were started (SLURM_STEP_NUM_TASKS)" in done.stderr
    assert "sbatch launch/slurm.sbatch" in done.stderr
    assert not (folder / "apart").exists()
