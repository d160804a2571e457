"""An error on one rank ends all ranks, with one message; the two ranks are two threads here."""

import os
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch._utils import ExceptionWrapper

from fpd_accel.config.loading import load_recipe
from fpd_accel.data.published.download import UnreachableError
from fpd_accel.data.shards import Shards
from fpd_accel.distributed import accelerator as processes
from fpd_accel.distributed.accelerator import run_on_all
from fpd_accel.errors import CheckpointError, DataError, Preempted, TrainingError, UserError
from fpd_accel.training.checkpoint import write_checkpoint
from fpd_accel.training.run import run
from fpd_accel.training.student import Student
from fpd_accel.training.supervisor import RunSupervisor

PATIENCE = 100  # seconds to wait for the other thread


class Rank(Accelerator):
    """One of two ranks, with the collective operations that the tests need."""

    num_processes = 2  # type: ignore[assignment]
    device = torch.device("cpu")  # type: ignore[assignment]

    def __init__(self, rank: int, gather: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
        self.rank, self.gather_all = rank, gather

    def reduce(self, tensor: torch.Tensor, reduction: str = "sum", scale: float = 1.0) -> torch.Tensor:
        assert (reduction, scale) == ("sum", 1.0)
        return torch.stack(self.gather_all(tensor)).sum()

    @property
    def process_index(self) -> int:
        return self.rank

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0


Both = Callable[[Callable[[Rank], Any]], list[Any]]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Both:
    """Return a function that calls another on two ranks at once and returns what each returned or raised."""
    barrier, this = threading.Barrier(2, timeout=PATIENCE), threading.local()
    values: list[Any] = [None, None]

    def gather(mine: Any) -> list[Any]:
        values[this.rank] = mine
        barrier.wait()
        answers = list(values)
        barrier.wait()
        return answers

    def all_gather_object(answers: list[Any], mine: Any) -> None:
        answers[:] = gather(mine)

    def broadcast_object_list(values: list[Any]) -> None:
        values[:] = gather(list(values))[0]

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(processes, "broadcast_object_list", broadcast_object_list)

    def run_both(function: Callable[[Rank], Any]) -> list[Any]:
        found: list[Any] = [None, None]

        def one(rank: int) -> None:
            this.rank = rank
            try:
                found[rank] = function(Rank(rank, gather))
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        return found

    return run_both


def message_of_both(errors: list[Any], kind: type[UserError]) -> str:
    """Check that both ranks raise the same error, which only the first will print; return its message."""
    assert [type(error) for error in errors] == [kind, kind], errors
    assert str(errors[0]) == str(errors[1])
    assert [error.this_rank_only for error in errors] == [False, False]
    return str(errors[0])


def test_an_unforeseen_error_of_one_rank_is_reported_to_the_others(both: Both) -> None:
    def open_on(rank: Rank) -> str:
        if rank.process_index == 1:
            raise MemoryError("no more of it")
        return "opened"

    first, second = both(lambda rank: run_on_all(rank, lambda: open_on(rank), same=str))
    assert isinstance(second, MemoryError)  # the original, with its traceback
    assert isinstance(first, TrainingError)
    assert str(first) == f"rank 1 on {os.uname().nodename} failed: MemoryError: no more of it"


def test_user_errors_of_one_rank_keep_their_type_on_all_ranks(both: Both) -> None:
    def open_on(rank: Rank) -> str:
        if rank.process_index == 1:
            raise UnreachableError("https://example.org: cannot be read")
        return "opened"

    errors = both(lambda rank: run_on_all(rank, lambda: open_on(rank), same=str))
    message = message_of_both(errors, UnreachableError)
    assert message == f"rank 1 on {os.uname().nodename}: https://example.org: cannot be read"


def test_error_of_a_loader_process_arrives_without_its_traceback(both: Both) -> None:
    def read_on(rank: Rank) -> str:
        try:
            raise DataError("shards: image 3.jpg no longer decodes; prepare it again")
        except DataError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()  # as PyTorch hands it over
        return "read"

    errors = both(lambda rank: run_on_all(rank, lambda: read_on(rank), same=str))
    assert message_of_both(errors, DataError) == "shards: image 3.jpg no longer decodes; prepare it again"


def test_a_stop_of_one_rank_stops_all_ranks(both: Both) -> None:
    def decode_on(rank: Rank) -> str:
        if rank.process_index == 1:
            raise Preempted("asked to stop")
        return "decoded"

    errors = both(lambda rank: run_on_all(rank, lambda: decode_on(rank), same=str))
    assert [type(error) for error in errors] == [Preempted, Preempted]
    assert str(errors[0]) == f"rank 1 on {os.uname().nodename}: asked to stop"


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_images_that_one_machine_lacks_are_named_before_anything_is_written(
    damage: str, both: Both, tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_shards, tmp_path / "copy")
    for file in (copy / "images").glob("*.arrow"):
        file.unlink() if damage == "missing" else os.truncate(file, 100)
    recipes = [
        load_recipe(tiny_recipe(file_name=f"{people.name}.yaml", data={"train": str(people)}))
        for people in (tiny_shards, copy)
    ]
    message = message_of_both(both(lambda rank: run(recipes[rank.process_index], accelerator=rank)), DataError)
    assert message.startswith(f"rank 1 on {os.uname().nodename}: {copy / 'images'}: cannot be opened")
    assert not recipes[0].run.directory.exists()


@pytest.mark.parametrize("damage", ["removed", "cut short", "of another run"])
def test_a_checkpoint_that_one_machine_cannot_read_is_not_loaded(damage: str, both: Both, tmp_path: Path) -> None:
    whole, other = (
        write_checkpoint(
            tmp_path / machine, 1, tensors={name: {"weight": torch.ones(9)} for name in ("student", "optimizer")},
            state={"seed": seed}, keep=1,
        )
        for machine, seed in (("here", 0), ("there", int(damage == "of another run")))
    )  # fmt: skip
    if damage == "removed":
        (other / "optimizer.safetensors").unlink()
    elif damage == "cut short":
        os.truncate(other / "optimizer.safetensors", 20)

    def restore(rank: Rank) -> None:
        student = object.__new__(Student)  # the error comes before there is a network
        student.accelerator, student.average = rank, None
        student.restore((whole, other)[rank.process_index])

    message = message_of_both(both(restore), DataError if damage == "of another run" else CheckpointError)
    assert message.startswith(f"rank 1 on {os.uname().nodename}")
    assert damage == "of another run" or f"{other}: cannot be resumed: optimizer.safetensors" in message


def test_data_that_change_under_all_ranks_give_one_message(
    both: Both, tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_shards, tmp_path / "copy")
    recipe = load_recipe(tiny_recipe(data={"train": str(copy)}))
    removed = threading.Barrier(2, timeout=PATIENCE, action=lambda: shutil.rmtree(copy / "images"))

    def look(rank: Rank) -> None:
        supervisor = RunSupervisor(recipe.run.directory, rank, shards=[Shards(copy)])
        removed.wait()
        with supervisor.translated():
            supervisor.check_all_data_files()

    message = message_of_both(both(look), DataError)
    assert str(copy / "images") in message
    assert "was removed while the run was reading it" in message


def test_a_rank_that_does_not_answer_is_reported(
    both: Both, tiny_recipe: Callable[..., Path], tiny_shards: Path
) -> None:
    recipe, store = load_recipe(tiny_recipe()), dist.HashStore()
    over = threading.Event()

    def reduce(rank: Rank) -> None:
        supervisor = RunSupervisor(recipe.run.directory, rank, shards=[Shards(tiny_shards)])
        group = dist.ProcessGroupGloo(store, rank.process_index, 2, timedelta(seconds=PATIENCE))
        if not rank.is_main_process:
            over.wait(PATIENCE)  # this rank hangs
            return
        try:
            options = dist.AllreduceOptions()
            options.timeout = timedelta(seconds=0.2)
            with supervisor.translated():
                group.allreduce([torch.zeros(1)], options).wait()
        finally:
            over.set()

    error, _ = both(reduce)
    assert isinstance(error, TrainingError), error
    assert error.this_rank_only
    message = str(error)
    assert message.startswith(f"{recipe.run.directory}: the connection to another rank was lost or timed out (")
    assert "Timed out waiting" in message
    assert message.endswith("see that rank's error; there is no checkpoint yet, and the same command goes on")
