"""Progress, `metrics.jsonl` and trackers of one run. Values leave the device here alone."""

import json
import math
import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fpd_accel.console import console, is_main_process, say, warn
from fpd_accel.distributed.accelerator import available_cores
from fpd_accel.files import replace_file
from fpd_accel.training.trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

LOADER_BOUND = 0.4  # share of the time spent waiting for data above which the user is warned
LINE_SECONDS = 10.0  # between lines of progress where there is no terminal for a progress bar
TAGS = {
    "data_time": "time/data",
    "step_time": "time/step",
    "lr": "train/lr",
    "epoch": "train/epoch",
    "alpha": "train/alpha",
    "samples": "train/samples",
}
"""Tags in trackers of the values whose names in `metrics.jsonl` have no `train_` or `valid_` in front."""


def sufficient_workers(data_time: float, step_time: float, *, workers: int) -> int:
    """Return the loader processes per rank that would keep up with the device.

    With workers, the loader works during all of a step that waits for it (`data_time + step_time`), so it has to be
    that many times `step_time` faster; without workers it works during `data_time` alone. Each further process is taken
    to add as much as each of the others, which holds while each has a core.

    Args:
        data_time: Seconds of a step spent waiting for data.
        step_time: Seconds of the rest of the step.
        workers: Loader processes per rank when both were timed.
    """
    busy = workers * (data_time + step_time) if workers else data_time
    return max(1, math.ceil(busy / max(step_time, 1e-9)))


def open_metrics(path: Path, *, step: int) -> IO[str]:
    """Open `metrics.jsonl` to append to; later records than of `step` are dropped, as a resumed run repeats them."""
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # a killed run was writing this line
                continue
            if record.get("step", 0) <= step:
                kept.append(f"{line}\n")
        replace_file(path, "".join(kept))
    return path.open("a", encoding="utf-8")


class StepMeter:
    """Losses of the steps since the last flush, kept on the device; one copy and one all-reduce per flush.

    With `split`, the distillation loss is also recorded apart for people with and without labels.
    """

    NAMES = ("train_loss", "train_pose_loss", "train_kd_pose_loss", "train_acc")
    SPLIT_NAMES = ("train_kd_labelled_loss", "train_kd_unlabelled_loss")  # their sum is `train_kd_pose_loss`

    def __init__(self, accelerator: "Accelerator", *, split: bool = False) -> None:
        self._accelerator = accelerator
        self.names = (*self.NAMES, *self.SPLIT_NAMES) if split else self.NAMES
        self._values: list[Tensor] = []
        self._host: list[dict[str, float]] = []

    def add(self, values: Tensor, **host: float) -> None:
        """Add a step: the `values` of `names`, on the device, and those that the host knows without the device."""
        self._values.append(values)
        self._host.append(host)

    def flush(self) -> list[dict[str, Any]]:
        """Return one record per step, averaged over ranks. The host waits for the device here and nowhere else.

        The time of this wait is spread evenly over the steps: `data_time` and `step_time` come in as the host measured
        them and leave as the device spent them. While the device was behind, no step waited for data.
        """
        if not self._values:
            return []
        began = time.perf_counter()
        stacked = self._accelerator.reduce(torch.stack(self._values), reduction="mean").cpu().tolist()
        behind = (time.perf_counter() - began) / len(stacked)
        records = []
        for host, row in zip(self._host, stacked, strict=True):
            waited = min(host["data_time"], behind)
            times = {"data_time": host["data_time"] - waited, "step_time": host["step_time"] + behind + waited}
            records.append(host | times | dict(zip(self.names, row, strict=True)))
        self._values, self._host = [], []
        return records


class RunLog(AbstractContextManager["RunLog"]):
    """Progress bar, `metrics.jsonl` and trackers of one run; silent on every rank but the first.

    Args:
        directory: The run directory; it exists.
        total_steps: Steps of the whole run.
        step: The step that the run starts or resumes at.
        workers: Loader processes per rank, for advice on their number.
        trackers: Receive every value too.
    """

    def __init__(self, directory: Path, *, total_steps: int, step: int, workers: int, trackers: Trackers) -> None:
        self.main, self.total_steps, self.workers, self.trackers = is_main_process(), total_steps, workers, trackers
        self._metrics = open_metrics(directory / "metrics.jsonl", step=step) if self.main else None
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._bar: Progress | None = None
        try:
            trackers.start()
        except OSError:
            self.__exit__()
            raise
        self._last_line = time.monotonic()
        self._steps, self._warned = 0, False
        if self.main and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._bar = Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=console, transient=True)
            self._bar.add_task("training", total=total_steps, completed=step)
            self._bar.start()

    def __exit__(self, *_exception: object) -> None:
        with ExitStack() as stack:  # closes each of these even if another cannot be closed
            stack.callback(setattr, threading, "excepthook", self._hook)
            stack.callback(self.trackers.finish)
            if self._metrics is not None:
                stack.callback(self._metrics.close)
            if self._bar is not None:
                stack.callback(self._bar.stop)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback for a disk error in the thread of a tracker: the next call raises the same error."""
        if not isinstance(failure.exc_value, OSError):
            self._hook(failure)

    def train(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the records of the steps since the last call, and show the progress."""
        if not self.main or not records:
            return
        self._write({"kind": "train", **record} for record in records)
        names = [name for name, value in records[-1].items() if isinstance(value, float)]
        mean = {name: sum(record[name] for record in records) / len(records) for name in names}
        mean["lr"], mean["epoch"] = records[-1]["lr"], records[-1]["epoch"]
        step, seconds = records[-1]["step"], mean["data_time"] + mean["step_time"]
        rate = records[-1]["samples"] / seconds
        tagged = {TAGS.get(name) or name.replace("train_", "train/", 1): value for name, value in mean.items()}
        self.trackers.log(tagged | {"time/samples_per_second": rate}, step)
        text = (
            f"epoch {mean['epoch']:.2f} · {rate:.0f} samples/s · "
            f"data {100 * mean['data_time'] / seconds:.0f} % · loss {mean['train_loss']:.2e} "
            f"pose {mean['train_pose_loss']:.2e} kd {mean['train_kd_pose_loss']:.2e} · acc {mean['train_acc']:.3f}"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        elif time.monotonic() - self._last_line > LINE_SECONDS or step == self.total_steps:
            self._last_line = time.monotonic()
            remaining = seconds * (self.total_steps - step)
            say(f"step {step}/{self.total_steps} · {text} · eta {remaining / 60:.1f} min")
        self._advise(records if self._steps else records[1:])  # the first step waits for everything to start
        self._steps += len(records)

    def _advise(self, records: Sequence[dict[str, Any]]) -> None:
        """Warn once if the loader is the bottleneck, with the number of workers that would keep up."""
        if self._warned or len(records) < 5:
            return
        data, step = (sum(record[name] for record in records) / len(records) for name in ("data_time", "step_time"))
        waiting = data / (data + step)
        if waiting <= LOADER_BOUND:
            return
        self._warned = True
        samples, ranks = records[-1]["samples"], int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed, cores = sufficient_workers(data, step, workers=self.workers), available_cores()
        short = ", which is too few: set data.workers to about the cores of each rank, and expect to wait still"
        warn(
            f"{100 * waiting:.0f} % of the time goes into waiting for data: the loader, not the device, is the "
            f"bottleneck; it gives {samples / (data + step):.0f} samples/s with data.workers={self.workers}, the "
            f"device could take {samples / step:.0f}: data.workers={needed} would suffice; this machine has {cores} "
            f"cores for {ranks} rank{'s' * (ranks != 1)}{short if ranks * needed > cores else ''}"
        )

    def evaluation(self, metrics: dict[str, float], step: int, *, protocol: dict[str, Any]) -> None:
        """Write the metrics of an evaluation as `valid_<name>`, with the settings that they depend on."""
        if not self.main:
            return
        named = {f"valid_{name}": value for name, value in metrics.items()}
        self._write([{"kind": "valid", "step": step, **named, "protocol": protocol}])
        self.trackers.log({f"valid/{name}": value for name, value in metrics.items()}, step)
        shown = " · ".join(
            f"{name} {metrics[name]:.3f}" for name in ("PCKh@0.5", "AP", "AR", "acc", "loss") if name in metrics
        )
        say(f"step {step}: valid {shown}")

    def _write(self, records: Iterable[dict[str, Any]]) -> None:
        assert self._metrics is not None  # on rank 0
        self._metrics.writelines(json.dumps(record) + "\n" for record in records)
        self._metrics.flush()
