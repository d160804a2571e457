"""Preemption: a run stops on SIGTERM, which schedulers and launchers send, or SIGUSR1, which batch scripts send."""

import multiprocessing
import os
import signal
import sys
import threading
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any

POLL_SECONDS = 1.0  # between two checks whether the parent process still exists
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignal(AbstractContextManager["StopSignal"]):
    """A signal handler that only records the signal; the run reacts to it between two steps.

    Outside the main thread, where Python takes no signals, it has no effect.
    """

    name: str | None = None
    """Name of the signal that was received."""

    def __enter__(self) -> "StopSignal":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name


def ignore_stop_signals(seconds: int = 60) -> None:
    """Make a loader worker ignore the job's stop signals.

    The scheduler signals the whole group, and workers must survive until the trainer has saved. SIGUSR1 and Ctrl-C are
    ignored, and so is SIGTERM unless the parent process sends it; the worker ends with its parent. Where the system
    does not tell the sender of a signal, SIGTERM is obeyed `seconds` later.
    """
    sys.excepthook = _report_unless_orphaned
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda _number, _frame: signal.alarm(seconds))
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of threads begun from here on as well
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="end_with_parent", daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Exit when the parent process sends SIGTERM or ends; runs in a thread, because the main thread may be blocked."""
    started_by = multiprocessing.parent_process()
    parents = {parent, started_by.pid if started_by is not None else parent}  # two processes if there is a fork server
    while os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
        if sent is not None and sent.si_pid in parents:
            break
    os._exit(128 + signal.SIGTERM)


def terminate(process: BaseProcess) -> None:
    """Terminate a child that ignores stop signals; repeat the signal, because two at once may be merged into one."""
    while process.is_alive():
        process.terminate()
        process.join(POLL_SECONDS)


def stop_watching_children() -> None:
    """Stop PyTorch's loaders from raising exceptions in a signal handler when a child ends, from now on.

    Loaders created later still notice a dead worker, some seconds later.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _report_unless_orphaned(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print no traceback if the parent process has ended in the middle of a message."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
