"""Everything that may end a run before its last step: signals, write errors, changed files, lost or hanging ranks.

Whichever rank meets the reason, all ranks stop after the same step, print one message, and leave the last checkpoint
intact.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator

from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.distributed.accelerator import FlagReducer, run_on_main, translate_comm_errors
from fpd_accel.distributed.preemption import StopSignal, stop_watching_children
from fpd_accel.distributed.watchdog import Watchdog
from fpd_accel.errors import CheckpointError, DataError, TrainingError, UserError, message_of, this_rank_only
from fpd_accel.training.checkpoint import CheckpointWriter, checkpoints, continue_from

HINT = "Another rank that hangs looks the same from here: see its own message. Raise train.timeout_minutes if it works."


class RunSupervisor:
    """Stops all ranks after the same step when any of them gets a signal, a write error or a changed data file.

    A rank that alone meets an error keeps it as its `problem` until all ranks know that there is one.

    Args:
        directory: The run directory; checkpoints are written below it.
        accelerator: Tells the ranks apart.
        shards: Datasets whose files must not change during the run.
        stop: The signal handler of the process, if it has one.
        timeout_minutes: Time without progress after which a process ends with a message.
        save_every_minutes: Interval of checkpoints by the clock; None for none.
        background: Whether checkpoints are written while training goes on.
        loader_processes: Per rank. Without any, this process reads the mapped files itself.
    """

    def __init__(
        self,
        directory: Path,
        accelerator: Accelerator,
        *,
        shards: Sequence[Shards | Mixture],
        stop: StopSignal | None = None,
        timeout_minutes: float = 30.0,
        save_every_minutes: float | None = None,
        background: bool = True,
        loader_processes: int = 0,
    ) -> None:
        self.directory, self.accelerator, self.shards = directory, accelerator, shards
        self.stop = stop or StopSignal()
        self._timeout, self._save_every, self._loader_processes = timeout_minutes, save_every_minutes, loader_processes
        for dataset in shards:
            dataset.open()  # so that changes are noticed here although loader processes may do the reading
        self.problem: UserError | None = None
        self.writer = CheckpointWriter(directory / "checkpoints", background=background)
        self.watchdog = Watchdog(60 * timeout_minutes, rank=accelerator.process_index, hint=HINT)
        self._saved_at, self._save_requested = time.monotonic(), False

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Limit the time without progress, and mark the errors that only this rank can report, within the block."""
        with self.watchdog, self.translated():
            yield

    @contextmanager
    def training(self, *, step: int) -> Iterator[None]:
        """Let ranks `sync_flags` within the block, which trains from `step` on; the checkpoint writer ends with it."""
        with self.guarded(), closing(self.writer):
            self._reducer = FlagReducer(
                ("stop", "save", "problem"), ranks=self.accelerator.num_processes, minutes=self._timeout
            )
            if self.accelerator.is_main_process:
                continue_from(self.writer.directory, step)
            yield

    def sync_flags(self) -> set[str]:
        """Return the flags raised by any rank: `stop` after a signal, `save` when the clock asks for a checkpoint.

        All ranks call this after every step.

        Raises:
            UserError: One of the ranks has a problem.
        """
        raised = self._reducer.step(self._own_flags())
        if "problem" in raised:
            self._end_all_ranks()
        return raised

    def check_data_files(self, *read: Shards | Mixture) -> None:
        """Raise DataError if a file changed that this process is about to read.

        A memory-mapped file that was cut short would end the process by SIGBUS, without a message.
        """
        if not self._loader_processes and (problem := self._find_change(read)) is not None:
            raise this_rank_only(problem)

    def check_all_data_files(self) -> None:
        """Check the files of all ranks before anything is saved, so that nothing comes of data that changed.

        Raises:
            DataError: Files changed, or there is another problem on any rank.
        """
        self.problem = self.problem or self._find_change(self.shards)
        problems = torch.tensor(float(self.problem is not None), device=self.accelerator.device)
        if self.accelerator.reduce(problems, reduction="sum") > 0:
            self._end_all_ranks()

    def save(self, write: Callable[[], Path], *, wait: bool) -> None:
        """Start writing a checkpoint on rank 0; with `wait`, all ranks wait until it is on the disk."""
        self._saved_at, self._save_requested = time.monotonic(), False
        if self.accelerator.is_main_process:
            try:
                self.writer.submit(write)
            except CheckpointError as error:
                self.problem = error
        if wait:
            run_on_main(self.accelerator, self._require_written)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn errors of the data, of loader processes and of the connection to other ranks into `UserError`s.

        PyTorch reports a dead loader process from a signal handler, so that error may come from any line of the block.
        """
        with translate_comm_errors(self.accelerator, str(self.directory), intact=self._describe_intact):
            try:
                yield
            except DataError as error:
                if error.raised_everywhere:
                    raise
                raise this_rank_only(DataError(message_of(error))) from None
            except RuntimeError as error:
                message = " ".join(str(error).split())
                if "DataLoader worker" in message:
                    raise self._loader_ended(message) from None
                raise
            except (ConnectionError, EOFError) as error:  # a loader process died in the middle of a batch
                raise self._loader_ended(type(error).__name__) from None

    def _own_flags(self) -> set[str]:
        flags = {"stop"} if self.stop.name is not None else set()
        if self._save_every is not None and not self._save_requested and self.accelerator.is_main_process:
            self._save_requested = time.monotonic() - self._saved_at > 60 * self._save_every
            flags |= {"save"} if self._save_requested else set()
        if self.problem is None and self.writer.failed:
            self._wait_for_writer()
        return flags | ({"problem"} if self.problem is not None else set())

    def _require_written(self) -> None:
        if self.problem is None:
            self._wait_for_writer()
        self._raise_own()

    def _raise_own(self) -> None:
        if self.problem is not None:
            raise self.problem

    def _wait_for_writer(self) -> None:
        try:
            self.writer.wait()
        except CheckpointError as error:
            self.problem = error

    def _end_all_ranks(self) -> NoReturn:
        """Raise on every rank; the problem of rank 0, if it has one, goes before those of the others."""
        run_on_main(self.accelerator, self._raise_own)
        if self.problem is not None:
            raise this_rank_only(self.problem)
        raise TrainingError(f"{self.directory}: stopped because another rank failed; see that rank's error")

    def _loader_ended(self, message: str) -> UserError:
        stop_watching_children()  # other loader processes may follow
        suspect = next(filter(None, (shards.changed() for shards in self.shards)), str(self.shards[0].path))
        return this_rank_only(
            DataError(
                f"{suspect}: a loader process ended ({message}); were the files changed under the job, or is memory "
                f"short? {self._describe_intact()}"
            )
        )

    def _find_change(self, datasets: Iterable[Shards | Mixture]) -> DataError | None:
        changed = next(filter(None, (shards.changed() for shards in datasets)), None)
        if changed is None:
            return None
        return DataError(f"{changed} while the run was reading it; {self._describe_intact()}")

    def _describe_intact(self) -> str:
        """Name the newest checkpoint, after waiting for the one that is being written."""
        self._wait_for_writer()
        found = checkpoints(self.writer.directory)
        return f"{found[-1].name} is intact" if found else "there is no checkpoint yet"
