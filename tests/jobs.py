"""Training jobs in processes of their own, which end with the test that started them.

They are forks of one process that has imported everything (see `forks.py`): an interpreter of its own would take each
job seconds.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
DISTILL = ROOT / "recipes" / "distill.py"
RANKS = ROOT / "tests" / "ranks.py"
PATIENCE = 280.0  # seconds to wait for anything; long enough that only a hanging job takes them, on any machine
ENVIRONMENT = {
    **os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}  # fmt: skip


class Job:
    """A process in a session of its own, whose stdout and stderr go to one file."""

    def __init__(self, pid: int, log: Path, code: Path) -> None:
        self.pid, self._log, self._code = pid, log, code
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the job runs."""
        if self.returncode is None and self._code.exists():
            self.returncode = int(self._code.read_text())
            self._code.unlink()  # process ids are used again
        return self.returncode

    def wait(self) -> int:
        wait_for(lambda: self.poll() is not None, f"the end of a job with the output: {self.output()}")
        assert self.returncode is not None
        return self.returncode

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def final_output(self) -> str:
        """Wait for the end, and return the output in one line."""
        self.wait()
        return " ".join(self.output().split())

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the job and its loader processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Forks:
    """The process that forks the jobs, started with the first of them, and all jobs that may still run."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder = Path()
        self._running: list[Job] = []
        self._count = 0

    def start(self, command: list[str], environment: dict[str, str]) -> Job:
        if self._process is None:
            self._folder = Path(tempfile.mkdtemp(prefix="jobs_"))
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "forks.py"), str(self._folder)],
                cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            )  # fmt: skip
        self._count += 1
        log = self._folder / f"{self._count}.log"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": command, "environment": environment, "log": str(log)}) + "\n")
        pid = int(self._process.stdout.readline())
        log.touch()
        self._running.append(Job(pid, log, self._folder / f"{pid}.code"))
        return self._running[-1]

    def leave_nothing_running(self) -> None:
        for job in self._running:
            if job.poll() is None:
                job.kill()
        for job in self._running:
            job.wait()
        self._running.clear()

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()  # it ends with its stdin
            shutil.rmtree(self._folder)


FORKS = Forks()


def start(*command: object, **environment: str) -> Job:
    """Start a script with its arguments, and with variables besides those of `ENVIRONMENT`."""
    return FORKS.start([str(word) for word in command], ENVIRONMENT | environment)


def start_ranks(*command: object, ranks: int = 2, **environment: str) -> list[Job]:
    """Start the ranks of one job as a launcher does; unlike a launcher's, each has its own exit code and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return [start(*command, **common, **environment, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]


def launch(ranks: int, tasks: list[list[object]], *, expected: int | None = 0, **environment: str) -> str:
    """Run tasks of `ranks.py` on that many gloo ranks, and return their output in one line.

    Every rank has to end with the exit code `expected`, unless that is None.
    """
    started = start_ranks(RANKS, json.dumps(tasks), ranks=ranks, **environment)
    output = " ".join(job.final_output() for job in started)
    assert expected is None or {job.returncode for job in started} == {expected}, output[-5000:]
    return output


def killing_itself(folder: Path, *, step: int) -> Path:
    """Write a script like `recipes/distill.py` that ends by SIGKILL right after a step."""
    script = folder / f"killed_after_{step}.py"
    script.write_text(
        "import itertools, os, runpy, signal\n"
        "from fpd_accel.training.trainer import Trainer\n"
        "after_step, steps = Trainer._after_step, itertools.count(1)\n"
        "def die(self, *arguments):\n"
        "    after_step(self, *arguments)\n"
        f"    if next(steps) == {step}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Trainer._after_step = die\n"
        f"runpy.run_path({str(DISTILL)!r}, run_name='__main__')\n"
    )
    return script


def wait_for(reached: Callable[[], bool], event: str, *jobs: Job, every: float = 0.01) -> None:
    """Wait until `reached` returns True, calling it every so many seconds; none of the jobs may end before."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        for job in jobs:
            assert job.poll() is None, job.output()
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for {event}"
        time.sleep(every)


def wait_for_step(directory: Path, step: int, *jobs: Job) -> None:
    """Wait until a run has logged a step."""
    metrics = directory / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), f"step {step}", *jobs)


def children(process: int) -> list[int]:
    """Return the process ids of the children of a process."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]
