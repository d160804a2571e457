"""How a run is asked to stop: SIGTERM, which schedulers and launchers send, or SIGUSR1, which a batch script can."""

import multiprocessing
import os
import signal
import sys
import threading
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any

LOOK_UP_SECONDS = 1.0  # between two looks at whether the process that is served is still there
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequest(AbstractContextManager["StopRequest"]):
    """While the block runs, a signal only sets :attr:`name`: what to do about it is decided between two steps.

    Outside the main thread, where Python takes no signals, nothing is ever asked.
    """

    name: str | None = None  # of the signal that came

    def __enter__(self) -> "StopRequest":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name


def outlive_stop(seconds: int = 60) -> None:
    """For processes that serve one which stops between two steps: they get its signals too, and must not go first.

    SIGUSR1 and Ctrl-C are ignored, and so is SIGTERM but from the process that is served, at whose end they end too.
    Where the system does not tell who sends a signal, SIGTERM is obeyed ``seconds`` later.
    """
    sys.excepthook = _say_unless_alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda _number, _frame: signal.alarm(seconds))
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of threads begun from here on as well
        threading.Thread(target=_serve, args=(os.getppid(),), name="serve", daemon=True).start()


def _serve(parent: int) -> None:
    """Wait, beside a thread that may be blocked, for the order to end of the process that is served, or for its end."""
    served = multiprocessing.parent_process()
    masters = {parent, served.pid if served is not None else parent}  # two where a fork server stands between
    while os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, LOOK_UP_SECONDS)
        if sent is not None and sent.si_pid in masters:
            break
    os._exit(128 + signal.SIGTERM)


def end_process(process: BaseProcess) -> None:
    """Terminate a child that outlives a stop. Again and again: of two signals at once it may see another's alone."""
    while process.is_alive():
        process.terminate()
        process.join(LOOK_UP_SECONDS)


def stop_watching_children() -> None:
    """For the rest of the process: PyTorch's loaders raise from a signal handler, wherever that may be, for each child.

    A loader that is made later finds out all the same, some seconds later.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _say_unless_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """That the process it serves went away in the middle of a message is nothing to tell anybody."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
