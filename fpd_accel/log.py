"""What a person sees of a run: console, progress, metrics.jsonl, TensorBoard. Values leave the device here alone."""

import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from torch import Tensor

Item = TypeVar("Item")
console = Console(stderr=True, highlight=False)
results = Console(
    highlight=False, width=None if sys.stdout.isatty() else 140
)  # tables: what a person may want to redirect into a file
WAITING = 0.4  # of the time, from which on a person is told that the loader is too slow
LINE_SECONDS = 10.0  # between lines of progress where there is no terminal to draw a bar in


def is_main_process() -> bool:
    """Rank 0, or the only process; known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """A line for the person who waits, once per job."""
    if is_main_process():
        console.print(escape(message), soft_wrap=True)


def warn(message: str) -> None:
    if is_main_process():
        console.print(f"[yellow]warning:[/yellow] {escape(message)}", soft_wrap=True)


def fail(error: Exception) -> int:
    """Print what the user got wrong, once per job and without a traceback; the exit code for it.

    What only one process has met, that one prints.
    """
    if is_main_process():
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
    elif getattr(error, "local", False):
        console.print(f"[red]error (rank {os.environ['RANK']}):[/red] {escape(str(error))}", soft_wrap=True)
    return 2


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a progress bar on rank 0, and without one where there is no terminal."""
    shown = is_main_process() and console.is_terminal
    return iter(rich_track(items, description, total=total, console=console, disable=not shown, transient=True))


def sufficient_workers(data_time: float, step_time: float, *, workers: int) -> int:
    """Loader processes per rank that would keep up with the device, by the seconds of a step in which both were timed.

    With workers the loader is at work in all of a step that waits for it, ``data_time + step_time``, and so it has to
    be that many times ``step_time`` faster. Without any it is at work in ``data_time`` alone. What one process more
    brings is taken to be as much as each of the others brings: true while each has a core.
    """
    busy = workers * (data_time + step_time) if workers else data_time
    return max(1, math.ceil(busy / max(step_time, 1e-9)))


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, appended and flushed; a resumed run drops what it writes again."""

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the line that a killed run was writing
                    continue
                if record.get("step", 0) <= resume_step:
                    kept.append(line)
            replacement = path.with_suffix(".jsonl.new")
            replacement.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            replacement.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        self._file.writelines(json.dumps(record) + "\n" for record in records)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class StepMeter:
    """Losses of the steps since the last flush, kept on the device; one copy and one all-reduce per flush."""

    NAMES = ("train_loss", "train_pose_loss", "train_kd_pose_loss", "train_acc")
    SPLIT_NAMES = ("train_kd_labelled_loss", "train_kd_unlabelled_loss")  # they add up to the third of NAMES

    def __init__(self, accelerator: "Accelerator", *, split: bool = False) -> None:
        """``split``: the teacher's term is also given apart, for people with and without labels."""
        self._accelerator = accelerator
        self.names = (*self.NAMES, *self.SPLIT_NAMES) if split else self.NAMES
        self._values: list[Tensor] = []
        self._host: list[dict[str, float]] = []
        self.last_accuracy = math.nan

    def add(self, values: "Tensor", **host: float) -> None:
        """``values``: those of ``names`` on the device; ``host``: what the step knows without asking it."""
        self._values.append(values)
        self._host.append(host)

    def flush(self) -> list[dict[str, Any]]:
        """One record per step, the mean over ranks. The host waits for the device here and nowhere else.

        So a step's ``data_time`` and ``step_time`` come in as the host saw them, and leave as the device did: what it
        is behind by counts as theirs in equal parts, and while it was behind nobody waited for data.
        """
        if not self._values:
            return []
        import torch

        began = time.perf_counter()
        stacked = self._accelerator.reduce(torch.stack(self._values), reduction="mean").cpu().tolist()
        behind = (time.perf_counter() - began) / len(stacked)
        for host in self._host:
            host["step_time"] += behind + min(host["data_time"], behind)
            host["data_time"] -= min(host["data_time"], behind)
        records = [
            host | dict(zip(self.names, row, strict=True)) for host, row in zip(self._host, stacked, strict=True)
        ]
        self._values, self._host = [], []
        return records

    def __len__(self) -> int:
        return len(self._values)


class RunLog(AbstractContextManager["RunLog"]):
    """Progress bar, ``metrics.jsonl`` and TensorBoard of one run; silent on every rank but the first."""

    def __init__(self, directory: Path, *, total_steps: int, step: int, tensorboard: bool, workers: int) -> None:
        """``workers``: loader processes per rank, for advice alone."""
        self.main, self.total_steps, self.workers = is_main_process(), total_steps, workers
        self._metrics = MetricsFile(directory / "metrics.jsonl", resume_step=step) if self.main else None
        self._board: Any = None
        self._hook = threading.excepthook
        if self.main and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = self._thread_failed
            try:
                self._board = SummaryWriter(directory / "tensorboard", purge_step=step + 1 if step else None)
            except OSError:
                self.close()
                raise
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = time.monotonic()
        self._rates: deque[tuple[float, int]] = deque(maxlen=20)
        self._steps, self._warned = 0, False
        if self.main and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._bar = Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task("training", total=total_steps, completed=step)
            self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self.close()

    def close(self) -> None:
        """Close the files, each of them even if another cannot be."""
        with ExitStack() as stack:
            stack.callback(setattr, threading, "excepthook", self._hook)
            for file in (self._metrics, self._board):
                if file is not None:
                    stack.callback(file.close)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread has no more to say of a disk than what the next call raises: no traceback."""
        if not isinstance(failure.exc_value, OSError):
            self._hook(failure)

    def train(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the records of the steps since the last call, and tell the person how it goes."""
        if not self.main or not records:
            return
        assert self._metrics is not None
        self._metrics.write({"kind": "train", **record} for record in records)
        names = [name for name, value in records[-1].items() if isinstance(value, float)]
        mean = {name: sum(record[name] for record in records) / len(records) for name in names}
        mean["lr"], mean["epoch"] = records[-1]["lr"], records[-1]["epoch"]
        step = records[-1]["step"]
        self._scalars(mean, step)
        seconds = mean["data_time"] + mean["step_time"]
        text = (
            f"epoch {mean['epoch']:.2f} · {records[-1]['samples'] / seconds:.0f} samples/s · "
            f"data {100 * mean['data_time'] / seconds:.0f} % · loss {mean['train_loss']:.2e} "
            f"pose {mean['train_pose_loss']:.2e} kd {mean['train_kd_pose_loss']:.2e} · acc {mean['train_acc']:.3f}"
        )
        self._show(text, step, seconds)
        self._advise(records if self._steps else records[1:])  # the first step waits for everything to start
        self._steps += len(records)

    def _advise(self, records: Sequence[dict[str, Any]]) -> None:
        """Say once that the loader is too slow, and how many workers would not be."""
        if self._warned or len(records) < 5:
            return
        data, step = (sum(record[name] for record in records) / len(records) for name in ("data_time", "step_time"))
        waiting = data / (data + step)
        if waiting <= WAITING:
            return
        self._warned = True
        people, ranks = records[-1]["samples"], int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed, cores = sufficient_workers(data, step, workers=self.workers), available_cores()
        short = (
            ""
            if ranks * needed <= cores
            else ", which is too few: let data.workers be about the cores of each rank, and expect to wait still"
        )
        warn(
            f"{100 * waiting:.0f} % of the time goes into waiting for data: the loader, not the device, is the "
            f"bottleneck; it gives {people / (data + step):.0f} samples/s with data.workers={self.workers}, the device "
            f"could take {people / step:.0f}: data.workers={needed} would suffice; this machine has {cores} cores for "
            f"{ranks} rank{'s' * (ranks != 1)}{short}"
        )

    def evaluation(
        self, metrics: dict[str, float], step: int, *, protocol: dict[str, Any], prefix: str = "valid"
    ) -> None:
        """Write the metrics of one evaluation under ``<prefix>_<name>``, and the protocol that gave them."""
        if not self.main:
            return
        assert self._metrics is not None
        named = {f"{prefix}_{name}": value for name, value in metrics.items()}
        self._metrics.write([{"kind": prefix, "step": step, **named, "protocol": protocol}])
        self._scalars(named, step)
        shown = " · ".join(
            f"{name} {metrics[name]:.3f}" for name in ("PCKh@0.5", "AP", "AR", "acc", "loss") if name in metrics
        )
        say(f"step {step}: {prefix} {shown}")

    def picture(self, name: str, image: "np.ndarray", step: int) -> None:
        """A picture (height, width, 3), RGB uint8, into TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")

    def _scalars(self, values: dict[str, float], step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _show(self, text: str, step: int, seconds: float) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last_line > LINE_SECONDS or step == self.total_steps:
            self._last_line = time.monotonic()
            remaining = seconds * (self.total_steps - step)
            say(f"step {step}/{self.total_steps} · {text} · eta {remaining / 60:.1f} min")
