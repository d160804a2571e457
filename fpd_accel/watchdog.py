"""A limit on silence: a process that waits for ever, for another rank or a disk, says where and ends."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

EXIT_HUNG = 2


class Watchdog(AbstractContextManager["Watchdog"]):
    """Ends the process if :meth:`alive` has not been called for ``seconds``.

    A collective operation waits for every rank, and one that hangs in it cannot raise an exception. So a thread watches
    the clock; it prints the rank, the machine, the last sign of life and the stack, and exits without cleaning up. The
    launcher then ends the other ranks. Time during which machine or process are suspended does not count. Blocks may
    lie within one another.
    """

    def __init__(self, seconds: float, *, rank: int = 0, hint: str = "") -> None:
        self.seconds, self.rank, self.hint = seconds, rank, hint
        self._last, self._doing = time.monotonic(), "starting"
        self._paused = self._entered = 0
        self._over = threading.Event()

    def alive(self, doing: str) -> None:
        """A sign of life, and what comes next."""
        self._last, self._doing = time.monotonic(), doing

    @contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """For what may take any time at all."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self.alive(doing)

    def __enter__(self) -> "Watchdog":
        self.alive(self._doing)
        self._entered += 1
        if self._entered == 1:
            self._over = threading.Event()
            threading.Thread(target=self._watch, args=(self._over,), name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if not self._entered:
            self._over.set()

    def _watch(self, over: threading.Event) -> None:
        interval, silent, heard = min(1.0, self.seconds / 4), 0.0, self._last
        before = time.monotonic()
        while not over.wait(interval):
            now = time.monotonic()
            # A process that was suspended has not been silent for all that time.
            silent = 0.0 if self._last != heard or self._paused else silent + min(now - before, 2 * interval)
            heard, before = self._last, now
            if silent > self.seconds:
                self._end(silent)

    def _end(self, silent: float) -> None:
        threading.Timer(10, os._exit, (EXIT_HUNG,)).start()  # the log may be on the disk that hangs
        print(
            f"error: rank {self.rank} on {socket.gethostname()} (pid {os.getpid()}) has made no progress for "
            f"{silent:.0f} s; it was at: {self._doing}. {self.hint}".rstrip(),
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(EXIT_HUNG)
