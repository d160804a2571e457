"""Start `recipes/distill.py` in a session of its own, and kill it in different ways."""

import atexit
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from disk import Fault, listing

ROOT = Path(__file__).parents[2]
DISTILL = ROOT / "recipes" / "distill.py"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
}  # fmt: skip
# Modules to import before a fork.
IMPORTS = (
    "fpd_accel.training.run", "fpd_accel.synthetic.dataset", "torch.utils.tensorboard", "torch.distributed.checkpoint",
    "pycocotools.cocoeval", "safetensors.torch", "datasets.config",
)  # fmt: skip
KNOWN_THREADS = {"jemalloc_bg_thd"}  # of pyarrow's allocator, which handles forks itself


class Start:
    """The command in a process of its own, or in a fork of this process, which has imported everything."""

    def __init__(self, recipe: Path, log: Path, *, ranks: int = 1, fork: bool = False) -> None:
        self.log, self.ranks = log, ranks
        self.code: int | None = None
        self.arguments = [str(DISTILL), "--config", str(recipe)]
        self.pid = fork_off(self._distill, log) if fork else self._execute()

    def _execute(self) -> int:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        command = [sys.executable, *(launcher if self.ranks > 1 else []), *self.arguments]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        return self._process.pid

    def _distill(self) -> None:
        sys.argv = self.arguments
        runpy.run_path(self.arguments[0], run_name="__main__")

    def running(self) -> bool:
        if self.code is None:
            process, status = os.waitpid(self.pid, os.WNOHANG)
            if process:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, seconds: float) -> int:
        """Wait for the end and return the exit code.

        Raises:
            Fault: The command runs longer.
        """
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                self.kill_all()
                raise Fault(f"still running after {seconds:.0f} s:\n{self.output()}")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def kill_all(self) -> None:
        """Kill all processes at once; the launcher first, so that it cannot react to the end of its ranks."""
        for process in (self.pid, *descendants(self.pid)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def kill_group(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # just forked, not yet in a group of its own
            os.kill(self.pid, signal.SIGKILL)

    def kill_trainer(self) -> None:
        """Kill the trainer alone: its loader processes have to notice."""
        os.kill(self.pid, signal.SIGKILL)

    def kill_rank(self, rank: int) -> None:
        """Kill one rank of the launcher, or all processes if not all ranks have started."""
        ranks = sorted(process for process in descendants(self.pid) if int(fields(process)[1]) == self.pid)
        if len(ranks) != self.ranks:
            self.kill_all()
            return
        os.kill(ranks[rank], signal.SIGKILL)
        while fields(ranks[rank])[0] not in ("Z", "-"):
            time.sleep(0.001)

    def output(self) -> str:
        """Return the last 30 lines of the output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def fork_off(function: Callable[[], None], log: Path) -> int:
    """Call a function in a fork, in a session of its own that ends as a program does; return the process id.

    This process must not have threads: a fork has none of them, and would wait forever for locks that they held.
    """
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    assert threads <= KNOWN_THREADS | {Path("/proc/self/comm").read_text().strip()}, threads
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code: int | str | None = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        function()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:  # never return into the parent's stack
        atexit._run_exitfuncs()
        os._exit(int(code or 0))


def fields(process: int) -> list[str]:
    """Return state, parent, group and session of a process; the state is "-" if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return ["-", "0", "0", "0"]


def processes() -> dict[int, list[str]]:
    return {int(name): fields(int(name)) for name in listing(Path("/proc")) if name.isdigit()}


def descendants(process: int) -> list[int]:
    found, running = [process], processes()
    for ancestor in found:
        found += [other for other, (_, parent, *_) in running.items() if int(parent) == ancestor]
    return found[1:]


def living(sessions: set[int]) -> list[int]:
    """Return the running processes of these sessions."""
    return [
        process
        for process, (state, *_, session) in processes().items()
        if int(session) in sessions and state not in ("Z", "-")
    ]
