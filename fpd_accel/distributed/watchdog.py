"""A watchdog: a process that waits too long, for another rank or a disk, reports where it hangs and ends."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

EXIT_HUNG = 2


class Watchdog(AbstractContextManager["Watchdog"]):
    """Ends the process if `alive` has not been called for a number of seconds; `hint` is advice for the message.

    A rank that hangs in a collective operation cannot raise an exception. So a thread watches the clock; it prints the
    rank, the machine, the last activity and the stack, and exits without cleaning up, whereupon the launcher ends the
    other ranks. Time during which the machine or the process is suspended does not count. Blocks may be nested.
    """

    def __init__(self, seconds: float, *, rank: int = 0, hint: str = "") -> None:
        self.seconds, self.rank, self.hint = seconds, rank, hint
        self._last, self._doing = time.monotonic(), "starting"
        self._paused = self._entered = 0
        self._over = threading.Event()

    def alive(self, doing: str) -> None:
        """Report progress, and the activity that comes next."""
        self._last, self._doing = time.monotonic(), doing

    @contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """Suspend the limit within the block; `doing` is the activity after it."""
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

    def __exit__(self, *_exception: object) -> None:
        self._entered -= 1
        if not self._entered:
            self._over.set()

    def _watch(self, over: threading.Event) -> None:
        interval, silent, heard = min(1.0, self.seconds / 4), 0.0, self._last
        before = time.monotonic()
        while not over.wait(interval):
            now = time.monotonic()
            # Do not count the time during which the process was suspended.
            silent = 0.0 if self._last != heard or self._paused else silent + min(now - before, 2 * interval)
            heard, before = self._last, now
            if silent > self.seconds:
                self._end(silent)

    def _end(self, silent: float) -> None:
        threading.Timer(10, os._exit, (EXIT_HUNG,)).start()  # in case writing the message hangs too
        print(
            f"error: rank {self.rank} on {socket.gethostname()} (pid {os.getpid()}) has made no progress for "
            f"{silent:.0f} s; it was at: {self._doing}. {self.hint}".rstrip(),
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(EXIT_HUNG)
