"""A folder that all processes of a run write to: one job at a time, on a disk that all machines share."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from fpd_accel.console import say
from fpd_accel.distributed.accelerator import run_on_all, run_on_main
from fpd_accel.errors import DataError
from fpd_accel.files import replace_file

LOCK_WAIT_SECONDS = 10.0  # time to wait for a lock before all ranks synchronise again
VISIBLE_SECONDS = 60.0  # time until a shared file system shows one machine the files of another
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class SharedFolder:
    """A folder as one rank sees it."""

    path: Path
    setting: str  # key of the recipe that names the folder, for messages
    accelerator: Accelerator
    alive: Callable[[str], None]  # called with the current activity while waiting (see `Watchdog.alive`)

    @contextmanager
    def one_job(self, *, meanwhile: Callable[[], None]) -> Iterator[None]:
        """Let one job write within the block, on all of its ranks; later jobs wait for it and find its files.

        While another job is waited for, all ranks call `meanwhile` repeatedly; it may raise.

        Raises:
            DataError: The folder cannot be made.
        """
        path, waited = self.path.with_suffix(".lock"), False
        lock = FileLock(path)

        def acquire() -> bool:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=LOCK_WAIT_SECONDS if waited else 0)
            except Timeout:
                return False
            except OSError as error:
                raise DataError(f"{self.setting}: {self.path}: cannot be made: {error.strerror}") from None
            return True

        try:
            while not run_on_main(self.accelerator, acquire):  # in short turns, because collective operations time out
                if not waited:
                    say(f"{self.setting}: another job is writing {self.path}; waiting for it")
                waited = True
                self.alive(f"waiting for another job that writes {self.path}")
                meanwhile()
            yield
        finally:
            lock.release()

    def require_shared(self) -> None:
        """Check that all machines see a file that rank 0 writes.

        Raises:
            DataError: One of them does not.
        """
        if self.accelerator.num_processes == 1:
            return

        def write() -> Path:
            path = self.path / f".seen_by_all.{uuid.uuid4().hex[:8]}"
            replace_file(path, "")
            return path

        def look() -> Path:
            self.wait_for(lambda: "" if path.exists() else "is not the same folder here as on the first machine")
            return path

        path = run_on_main(self.accelerator, write)
        try:
            run_on_all(self.accelerator, look, same=str)
        finally:
            if self.accelerator.is_main_process:
                with suppress(OSError):  # an empty file may stay; an error here would leave the other ranks waiting
                    path.unlink()

    def wait_for(self, problem: Callable[[], str]) -> None:
        """Wait until this machine sees the files that another one wrote: `problem` returns what is still missing.

        Raises:
            DataError: Something is missing after `VISIBLE_SECONDS`.
        """
        deadline = time.monotonic() + VISIBLE_SECONDS
        while missing := problem():
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.path}: {missing}; set {self.setting} to a folder on a disk that all machines share"
                )
            self.alive(f"waiting for {self.path}")
            time.sleep(POLL_SECONDS)
