"""One job at a time in a run directory."""

import os
import re
import socket
import threading
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO

from fpd_accel.console import warn
from fpd_accel.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
LOCK_PATIENCE = 3.0  # seconds to wait for the lock, because an earlier run may just be ending


class RunLock(AbstractContextManager["RunLock"]):
    """A lock that lets one job at a time use a run directory.

    It is a POSIX record lock on `.lock`: the system releases it however the job ends, and NFS shares it between
    machines. Where the file system has no locks, a warning says so and no job is refused. NFS may keep the lock of a
    lost node: a restarted Slurm job takes precedence over its own earlier starts, which Slurm has ended.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock, and make the directory; do nothing if this job holds it already.

        Raises:
            CheckpointError: Another job holds it, or the directory cannot be made.
        """
        if self._file is not None or fcntl is None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = (self.directory / LOCK_NAME).open("a+", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"run.root: {self.directory}: cannot be made: {error.strerror}") from None
        deadline = time.monotonic() + LOCK_PATIENCE
        while not self._try():
            if time.monotonic() > deadline:
                self._file.seek(0)
                holder = self._file.read().strip() or "unknown"
                if _is_earlier_start(holder):
                    warn(f"{self.directory}: still locked by this job's last start ({holder}); going on")
                    threading.Thread(target=_take_when_free, args=(self._file,), name="lock", daemon=True).start()
                    break
                self._file.close()
                self._file = None
                raise CheckpointError(
                    f"{self.directory}: another job is training here ({holder}); wait for it, end it, or choose "
                    "another run.name"
                )
            time.sleep(0.1)
        self._file.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        start = f", Slurm job {job}, start {_slurm_start()}" if job is not None else ""
        self._file.write(f"{socket.gethostname()}, pid {os.getpid()}{start}\n")
        self._file.flush()

    def _try(self) -> bool:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            warn(
                f"{self.directory}: this file system has no locks ({error.strerror}), so nothing keeps a second job "
                "from training in it"
            )
        return True

    def __exit__(self, *_exception: object) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.truncate(0)
            self._file.close()
            self._file = None


def _take_when_free(file: IO[str]) -> None:
    """Take the lock in the background as soon as it is free, so that no other job can."""
    with suppress(OSError, ValueError):  # ValueError: the run is over
        fcntl.lockf(file, fcntl.LOCK_EX)


def _slurm_start() -> int:
    """Return how often this Slurm job was requeued before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _is_earlier_start(holder: str) -> bool:
    """Return whether the holder is this Slurm job before it was requeued, and not another step of the same start."""
    entry = re.search(r", Slurm job (\S+), start (\d+)$", holder)
    return entry is not None and entry[1] == os.environ.get("SLURM_JOB_ID") and int(entry[2]) < _slurm_start()
