"""Progress, `metrics.jsonl` and trackers of one run. Values leave the device here alone."""

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fpd_accel.console import console, is_main_process, say, warn
from fpd_accel.distributed.accelerator import available_cores
from fpd_accel.training.trackers import Trackers

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from torch import Tensor

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


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, appended and flushed.

    Args:
        path: The file; its folder exists.
        resume_step: Records of later steps are dropped, because the resumed run writes them again.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # a killed run was writing this line
                    continue
                if record.get("step", 0) <= resume_step:
                    kept.append(line)
            replacement = path.with_suffix(".jsonl.new")
            replacement.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            replacement.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records."""
        self._file.writelines(json.dumps(record) + "\n" for record in records)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StepMeter:
    """Losses of the steps since the last flush, kept on the device; one copy and one all-reduce per flush.

    Args:
        accelerator: Averages over ranks.
        split: Whether the distillation loss is also recorded apart for people with and without labels.
    """

    NAMES = ("train_loss", "train_pose_loss", "train_kd_pose_loss", "train_acc")
    SPLIT_NAMES = ("train_kd_labelled_loss", "train_kd_unlabelled_loss")  # their sum is `train_kd_pose_loss`

    def __init__(self, accelerator: "Accelerator", *, split: bool = False) -> None:
        self._accelerator = accelerator
        self.names = (*self.NAMES, *self.SPLIT_NAMES) if split else self.NAMES
        self._values: list[Tensor] = []
        self._host: list[dict[str, float]] = []
        self.last_accuracy = math.nan

    def add(self, values: "Tensor", **host: float) -> None:
        """Add a step: the `values` of `names`, on the device, and those that the host knows without the device."""
        self._values.append(values)
        self._host.append(host)

    def flush(self) -> list[dict[str, Any]]:
        """Return one record per step, averaged over ranks. The host waits for the device here and nowhere else.

        Spread the time this call waits for the device evenly over the flushed steps: `data_time` and `step_time` come
        in as the host measured them and leave as the device spent them. While the device was behind, no step waited
        for data.
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
    """Progress bar, `metrics.jsonl` and trackers of one run; silent on every rank but the first.

    Args:
        directory: The run directory; it exists.
        total_steps: Steps of the whole run.
        step: The step that the run starts or resumes at.
        workers: Loader processes per rank, for advice on their number.
        trackers: Receive every value too; None for none.
    """

    def __init__(
        self, directory: Path, *, total_steps: int, step: int, workers: int, trackers: Trackers | None = None
    ) -> None:
        self.main, self.total_steps, self.workers, self.trackers = is_main_process(), total_steps, workers, trackers
        self._metrics = MetricsFile(directory / "metrics.jsonl", resume_step=step) if self.main else None
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        if trackers is not None:
            try:
                trackers.start()
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
        """Close the files, each of them even if another cannot be closed."""
        with ExitStack() as stack:
            stack.callback(setattr, threading, "excepthook", self._hook)
            if self.trackers is not None:
                stack.callback(self.trackers.finish)
            if self._metrics is not None:
                stack.callback(self._metrics.close)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback for a disk error in the thread of a tracker: the next call raises the same error."""
        if not isinstance(failure.exc_value, OSError):
            self._hook(failure)

    def train(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the records of the steps since the last call, and show the progress."""
        if not self.main or not records:
            return
        assert self._metrics is not None
        self._metrics.write({"kind": "train", **record} for record in records)
        names = [name for name, value in records[-1].items() if isinstance(value, float)]
        mean = {name: sum(record[name] for record in records) / len(records) for name in names}
        mean["lr"], mean["epoch"] = records[-1]["lr"], records[-1]["epoch"]
        step, seconds = records[-1]["step"], mean["data_time"] + mean["step_time"]
        rate = records[-1]["samples"] / seconds
        self._track({_tag(name): value for name, value in mean.items()} | {"time/samples_per_second": rate}, step)
        text = (
            f"epoch {mean['epoch']:.2f} · {rate:.0f} samples/s · "
            f"data {100 * mean['data_time'] / seconds:.0f} % · loss {mean['train_loss']:.2e} "
            f"pose {mean['train_pose_loss']:.2e} kd {mean['train_kd_pose_loss']:.2e} · acc {mean['train_acc']:.3f}"
        )
        self._show(text, step, seconds)
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
        short = (
            ""
            if ranks * needed <= cores
            else ", which is too few: set data.workers to about the cores of each rank, and expect to wait still"
        )
        warn(
            f"{100 * waiting:.0f} % of the time goes into waiting for data: the loader, not the device, is the "
            f"bottleneck; it gives {samples / (data + step):.0f} samples/s with data.workers={self.workers}, the "
            f"device could take {samples / step:.0f}: data.workers={needed} would suffice; this machine has {cores} "
            f"cores for {ranks} rank{'s' * (ranks != 1)}{short}"
        )

    def evaluation(
        self, metrics: dict[str, float], step: int, *, protocol: dict[str, Any], prefix: str = "valid"
    ) -> None:
        """Write the metrics of one evaluation as `<prefix>_<name>`, with the settings that they depend on.

        Args:
            metrics: Scores by name.
            step: The step of the weights that were evaluated.
            protocol: Settings of the evaluation.
            prefix: Of the names, and kind of the record.
        """
        if not self.main:
            return
        assert self._metrics is not None
        named = {f"{prefix}_{name}": value for name, value in metrics.items()}
        self._metrics.write([{"kind": prefix, "step": step, **named, "protocol": protocol}])
        self._track({f"{prefix}/{name}": value for name, value in metrics.items()}, step)
        shown = " · ".join(
            f"{name} {metrics[name]:.3f}" for name in ("PCKh@0.5", "AP", "AR", "acc", "loss") if name in metrics
        )
        say(f"step {step}: {prefix} {shown}")

    def picture(self, name: str, image: "np.ndarray", step: int) -> None:
        """Send a picture (height, width, 3), RGB uint8, to the trackers."""
        if self.trackers is not None:
            self.trackers.picture(name, image, step)

    def _track(self, values: Mapping[str, float], step: int) -> None:
        if self.trackers is not None:
            self.trackers.log(values, step)

    def _show(self, text: str, step: int, seconds: float) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last_line > LINE_SECONDS or step == self.total_steps:
            self._last_line = time.monotonic()
            remaining = seconds * (self.total_steps - step)
            say(f"step {step}/{self.total_steps} · {text} · eta {remaining / 60:.1f} min")


def _tag(name: str) -> str:
    """Return the tag of a value of `metrics.jsonl` in the trackers, such as `train/loss`."""
    return TAGS.get(name) or name.replace("train_", "train/", 1)
