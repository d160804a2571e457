"""Training jobs as processes of their own: started, watched, and never left behind.

They are forks of one process that has imported everything (see ``forks.py``), else each would take seconds to begin.
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
PATIENCE = 280.0  # seconds that anything is waited for: so many that only what hangs takes them, on any machine
ENVIRONMENT = {
    **os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}  # fmt: skip


class Job:
    """A process in a session of its own; what it says on either channel goes to a file."""

    def __init__(self, pid: int, log: Path, code: Path) -> None:
        self.pid, self._log, self._code = pid, log, code
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, as soon as there is one; of a signal the negative."""
        if self.returncode is None and self._code.exists():
            self.returncode = int(self._code.read_text())
            self._code.unlink()  # process ids come again
        return self.returncode

    def wait(self) -> int:
        wait_for(lambda: self.poll() is not None, f"the end of a job which said: {self.said()}")
        assert self.returncode is not None
        return self.returncode

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def ends(self) -> str:
        """What it said until its end, in one line."""
        self.wait()
        return " ".join(self.said().split())

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """The job and its loader processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Forks:
    """The process that forks the jobs, begun when the first is asked for, and all that still run."""

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
            self._process.communicate()  # the end of what it reads is its end
            shutil.rmtree(self._folder)


FORKS = Forks()


def start(*command: object, **environment: str) -> Job:
    """A job of a script and its arguments."""
    return FORKS.start([str(word) for word in command], ENVIRONMENT | environment)


def start_ranks(*command: object, ranks: int = 2, **environment: str) -> list[Job]:
    """The ranks of one job as a launcher would start them, each with its own exit code and its own last words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    everywhere = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return [start(*command, **everywhere, **environment, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]


def launch(ranks: int, tasks: list[list[object]], *, expected: int | None = 0, **environment: str) -> str:
    """Run the tasks of ``ranks.py`` on so many gloo processes; what they said, in one line."""
    started = start_ranks(RANKS, json.dumps(tasks), ranks=ranks, **environment)
    said = " ".join(job.ends() for job in started)
    assert expected is None or {job.returncode for job in started} == {expected}, said[-5000:]
    return said


def killing_itself(folder: Path, *, step: int) -> Path:
    """A script like the command, which dies by SIGKILL right after a step."""
    script = folder / f"killed_after_{step}.py"
    script.write_text(
        "import itertools, os, runpy, signal\n"
        "from fpd_accel.trainer import Trainer\n"
        "after_step, steps = Trainer._after_step, itertools.count(1)\n"
        "def die(self, *arguments):\n"
        "    after_step(self, *arguments)\n"
        f"    if next(steps) == {step}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Trainer._after_step = die\n"
        f"runpy.run_path({str(DISTILL)!r}, run_name='__main__')\n"
    )
    return script


def wait_for(reached: Callable[[], bool], what: str, *jobs: Job, every: float = 0.01) -> None:
    """Until something is so, looking every so many seconds; none of the jobs may end before."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        for job in jobs:
            assert job.poll() is None, job.said()
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(every)


def wait_for_step(directory: Path, step: int, *jobs: Job) -> None:
    metrics = directory / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), f"step {step}", *jobs)


def children(process: int) -> list[int]:
    """Process ids of what a process has started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]
