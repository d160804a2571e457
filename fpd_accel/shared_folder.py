"""A folder that all processes of a run write to: one job at a time, and on one disk that all machines see."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from fpd_accel.errors import DataError
from fpd_accel.files import replace_file
from fpd_accel.log import say
from fpd_accel.processes import on_every_rank, on_first_rank

PATIENCE = 10.0  # seconds that a lock is waited for, before all ranks meet again
LATENCY = 60.0  # seconds until a shared file system shows one machine what another one wrote
LOOK = 1.0  # seconds between looks at it


@dataclass(frozen=True)
class SharedFolder:
    """A folder as one rank sees it; ``setting`` of the recipe names it, ``alive`` is told what is waited for."""

    path: Path
    setting: str
    accelerator: Accelerator
    alive: Callable[[str], None]

    @contextmanager
    def one_job(self, *, meanwhile: Callable[[], None]) -> Iterator[None]:
        """One job writes, on all of its ranks; whoever comes later waits for it, and finds what it wrote.

        ``meanwhile`` is called on all ranks again and again while another job is waited for, and may raise.

        Raises:
            DataError: the folder cannot be made.
        """
        path, waited = self.path.with_suffix(".lock"), False
        lock = FileLock(path)

        def acquire() -> bool:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=PATIENCE if waited else 0)
            except Timeout:
                return False
            except OSError as error:
                raise DataError(f"{self.setting}: {self.path}: cannot be made: {error.strerror}") from None
            return True

        try:
            while not on_first_rank(self.accelerator, acquire):  # in short turns: collective operations have a limit
                if not waited:
                    say(f"{self.setting}: another job is writing {self.path}; waiting for it")
                waited = True
                self.alive(f"waiting for another job that writes {self.path}")
                meanwhile()
            yield
        finally:
            lock.release()

    def require_shared(self) -> None:
        """All machines see what the first one writes.

        Raises:
            DataError: one does not.
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

        path = on_first_rank(self.accelerator, write)
        try:
            on_every_rank(self.accelerator, look, same=str)
        finally:
            if self.accelerator.is_main_process:
                with suppress(OSError):  # an empty file that stays harms nobody; the others would wait for this rank
                    path.unlink()

    def wait_for(self, lacking: Callable[[], str]) -> None:
        """Until this machine sees what was written on another one; ``lacking`` says what it does not, empty: nothing.

        Raises:
            DataError: it does not in ``LATENCY`` seconds.
        """
        deadline = time.monotonic() + LATENCY
        while problem := lacking():
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.path}: {problem}; set {self.setting} to a folder on a disk that all machines share"
                )
            self.alive(f"waiting for {self.path}")
            time.sleep(LOOK)
