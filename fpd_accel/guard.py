"""What may end a run before its last step, and how: on every rank, with one message, the last checkpoint intact."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator

from fpd_accel.checkpoint import CheckpointWriter, checkpoints, continue_from
from fpd_accel.config import Recipe
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.errors import CheckpointError, DataError, TrainingError, UserError, local, said
from fpd_accel.processes import Consensus, explaining_silence, on_first_rank
from fpd_accel.stop import StopRequest, stop_watching_children
from fpd_accel.watchdog import Watchdog

HINT = "Another rank that hangs looks the same from here: see its own message. Raise train.timeout_minutes if it works."


class Guard:
    """Sees to it that ranks stop after the same step, whoever of them has the reason.

    Reasons are a signal, a checkpoint that could not be written, and files that change while they are read. What one
    rank meets alone it keeps as its ``problem`` until all have been told.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        *,
        shards: Sequence[Shards | Mixture],
        stop: StopRequest | None = None,
    ) -> None:
        self.recipe, self.accelerator, self.shards = recipe, accelerator, shards
        self.stop = stop or StopRequest()
        for opened in shards:
            opened.open()  # here too, and so watched, although it may be loader processes that read them
        self.problem: UserError | None = None
        self.writer = CheckpointWriter(recipe.run.directory / "checkpoints", background=recipe.checkpoint.background)
        self.watchdog = Watchdog(60 * recipe.train.timeout_minutes, rank=accelerator.process_index, hint=HINT)
        self._saved_at, self._asked_to_save = time.monotonic(), False

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While the block runs no process waits for ever, and errors that one process alone can know say so."""
        with self.watchdog, self.explaining():
            yield

    @contextmanager
    def watching(self, *, step: int) -> Iterator[None]:
        """While the block trains, from this step on, ranks may :meth:`ask` one another."""
        with ExitStack() as stack:
            stack.enter_context(self.awake())
            self._consensus = Consensus(
                ("stop", "save", "problem"),
                ranks=self.accelerator.num_processes,
                minutes=self.recipe.train.timeout_minutes,
            )
            stack.callback(self.writer.close)
            if self.accelerator.is_main_process:
                continue_from(self.writer.directory, step)
            yield

    def ask(self) -> set[str]:
        """After a step, on all ranks: ``stop`` if any was asked to, ``save`` if the clock says so.

        Raises:
            UserError: one of the ranks has a problem.
        """
        raised = self._consensus.exchange(self._flags())
        if "problem" in raised:
            self._give_up()
        return raised

    def look_at(self, *read: Shards | Mixture) -> None:
        """Before this process reads: a mapped file that was cut short would kill it by SIGBUS, without a word."""
        if self.recipe.data.workers:
            return
        for shards in read:
            if (changed := shards.changed()) is not None:
                raise local(self._changed(changed))

    def look_at_all(self) -> None:
        """Before anything is kept, on all ranks: nothing may come of data that have changed.

        Raises:
            DataError: they have, or there is another problem on any rank.
        """
        if self.problem is None:
            changed = next(filter(None, (shards.changed() for shards in self.shards)), None)
            self.problem = self._changed(changed) if changed is not None else None
        met = torch.tensor(float(self.problem is not None), device=self.accelerator.device)
        if self.accelerator.reduce(met, reduction="sum") > 0:
            self._give_up()

    def save(self, write: Callable[[], Path], *, wait: bool) -> None:
        """Begin to write a checkpoint, on the first rank; with ``wait``, on all of them, until it is on the disk."""
        self._saved_at, self._asked_to_save = time.monotonic(), False
        if self.accelerator.is_main_process:
            try:
                self.writer.submit(write)
            except CheckpointError as error:
                self.problem = error
        if wait:
            on_first_rank(self.accelerator, self._written)

    def _flags(self) -> set[str]:
        """What this process wants all of them to do."""
        flags = {"stop"} if self.stop.name is not None else set()
        minutes = self.recipe.checkpoint.save_every_minutes
        if minutes is not None and not self._asked_to_save and self.accelerator.is_main_process:
            self._asked_to_save = time.monotonic() - self._saved_at > 60 * minutes
            flags |= {"save"} if self._asked_to_save else set()
        if self.problem is None and self.writer.failed:
            self._wait_for_writer()
        return flags | ({"problem"} if self.problem is not None else set())

    def _written(self) -> None:
        if self.problem is None:
            self._wait_for_writer()
        if self.problem is not None:
            raise self.problem

    def _wait_for_writer(self) -> None:
        try:
            self.writer.wait()
        except CheckpointError as error:
            self.problem = error

    def _give_up(self) -> NoReturn:
        """End on every rank because of what one of them met; the first rank's own reason goes before the others'."""

        def first() -> None:
            if self.problem is not None:
                raise self.problem

        on_first_rank(self.accelerator, first)
        if self.problem is not None:
            raise local(self.problem)
        raise TrainingError(f"{self.recipe.run.directory}: another process ended the run; its own message says why")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """What is wrong with the data, or with the line to another rank, only this process knows.

        That a loader process has died is told by a signal, so that the error may come from any line of the block.
        """
        with explaining_silence(self.accelerator, str(self.recipe.run.directory), intact=self._intact):
            try:
                yield
            except DataError as error:
                if error.agreed:
                    raise
                raise local(DataError(said(error))) from None
            except RuntimeError as error:
                message = " ".join(str(error).split())
                if "DataLoader worker" in message:
                    raise self._loader_ended(message) from None
                raise
            except (ConnectionError, EOFError) as error:  # of a loader process that died in the middle of a batch
                raise self._loader_ended(type(error).__name__) from None

    def _loader_ended(self, message: str) -> UserError:
        stop_watching_children()  # others may follow
        return local(
            DataError(
                f"{self._suspect()}: a loader process ended ({message}); were the files changed under the job, or is "
                f"memory short? {self._intact()}"
            )
        )

    def _suspect(self) -> str:
        """The file that has changed, if one has; else the people to train on."""
        return next(filter(None, (shards.changed() for shards in self.shards)), str(self.shards[0].path))

    def _changed(self, changed: str) -> DataError:
        return DataError(f"{changed} while the run was reading it; {self._intact()}")

    def _intact(self) -> str:
        """What is there to go on from, the one that is being written included."""
        self._wait_for_writer()
        found = checkpoints(self.writer.directory)
        return f"{found[-1].name} is intact" if found else "there is no checkpoint yet"
