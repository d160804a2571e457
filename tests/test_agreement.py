"""What one rank meets alone ends all of them, with one message; two ranks are two threads here."""

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

from fpd_accel import processes
from fpd_accel.checkpoint import write_checkpoint
from fpd_accel.config import load_recipe
from fpd_accel.data.remote import UnreachableError
from fpd_accel.data.shards import Shards
from fpd_accel.errors import CheckpointError, DataError, Preempted, TrainingError, UserError
from fpd_accel.guard import Guard
from fpd_accel.processes import on_every_rank
from fpd_accel.run import run
from fpd_accel.student import Student

PATIENCE = 100  # seconds that one thread waits for the other


class Rank(Accelerator):
    """One of two ranks, as far as they agree upon anything."""

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
    """A function that runs another on two ranks at once; what each returned or raised."""
    barrier, this = threading.Barrier(2, timeout=PATIENCE), threading.local()
    said: list[Any] = [None, None]

    def gather(mine: Any) -> list[Any]:
        said[this.rank] = mine
        barrier.wait()
        answers = list(said)
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


def assert_said_once(errors: list[Any], kind: type[UserError]) -> str:
    """Both ranks raise the same, which the first alone will print."""
    assert [type(error) for error in errors] == [kind, kind], errors
    assert str(errors[0]) == str(errors[1])
    assert [error.local for error in errors] == [False, False]
    return str(errors[0])


def test_unforeseen_error_of_one_rank_is_told_to_the_others(both: Both) -> None:
    def open_on(rank: Rank) -> str:
        if rank.process_index == 1:
            raise MemoryError("no more of it")
        return "opened"

    first, second = both(lambda rank: on_every_rank(rank, lambda: open_on(rank), same=str))
    assert isinstance(second, MemoryError)  # with its own traceback
    assert isinstance(first, TrainingError)
    assert str(first) == f"rank 1 on {os.uname().nodename} failed: MemoryError: no more of it"


def test_error_of_any_kind_that_a_user_can_mend_arrives_as_it_is(both: Both) -> None:
    def open_on(rank: Rank) -> str:
        if rank.process_index == 1:
            raise UnreachableError("https://example.org: cannot be read")
        return "opened"

    errors = both(lambda rank: on_every_rank(rank, lambda: open_on(rank), same=str))
    said = assert_said_once(errors, UnreachableError)
    assert said == f"rank 1 on {os.uname().nodename}: https://example.org: cannot be read"


def test_error_of_a_loader_process_arrives_without_its_traceback(both: Both) -> None:
    def read_on(rank: Rank) -> str:
        try:
            raise DataError("shards: image 3.jpg no longer decodes; prepare it again")
        except DataError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()  # as PyTorch hands it over
        return "read"

    errors = both(lambda rank: on_every_rank(rank, lambda: read_on(rank), same=str))
    assert assert_said_once(errors, DataError) == "shards: image 3.jpg no longer decodes; prepare it again"


def test_a_stop_that_one_rank_heeds_is_heeded_by_all(both: Both) -> None:
    def decode_on(rank: Rank) -> str:
        if rank.process_index == 1:
            raise Preempted("asked to stop")
        return "decoded"

    errors = both(lambda rank: on_every_rank(rank, lambda: decode_on(rank), same=str))
    assert [type(error) for error in errors] == [Preempted, Preempted]
    assert str(errors[0]) == f"rank 1 on {os.uname().nodename}: asked to stop"


@pytest.mark.parametrize("deed", ["missing", "damaged"])
def test_images_that_one_machine_lacks_are_named_before_anything_is_written(
    deed: str, both: Both, tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_shards, tmp_path / "copy")
    for file in (copy / "images").glob("*.arrow"):
        file.unlink() if deed == "missing" else os.truncate(file, 100)
    recipes = [
        load_recipe(tiny_recipe(file_name=f"{people.name}.yaml", data={"train": str(people)}))
        for people in (tiny_shards, copy)
    ]
    said = assert_said_once(both(lambda rank: run(recipes[rank.process_index], accelerator=rank)), DataError)
    assert said.startswith(f"rank 1 on {os.uname().nodename}: {copy / 'images'}: cannot be opened")
    assert not recipes[0].run.directory.exists()


@pytest.mark.parametrize("deed", ["removed", "cut short", "of another run"])
def test_checkpoint_that_one_machine_cannot_read_is_read_by_none(deed: str, both: Both, tmp_path: Path) -> None:
    whole, other = (
        write_checkpoint(
            tmp_path / machine, 1, tensors={name: {"weight": torch.ones(9)} for name in ("student", "optimizer")},
            state={"seed": seed}, keep=1,
        )
        for machine, seed in (("here", 0), ("there", int(deed == "of another run")))
    )  # fmt: skip
    if deed == "removed":
        (other / "optimizer.safetensors").unlink()
    elif deed == "cut short":
        os.truncate(other / "optimizer.safetensors", 20)

    def restore(rank: Rank) -> None:
        student = object.__new__(Student)  # it has to come to an end before there is a network
        student.accelerator, student.average = rank, None
        student.restore((whole, other)[rank.process_index])

    said = assert_said_once(both(restore), DataError if deed == "of another run" else CheckpointError)
    assert said.startswith(f"rank 1 on {os.uname().nodename}")
    assert deed == "of another run" or f"{other}: cannot be resumed: optimizer.safetensors" in said


def test_data_that_change_under_all_ranks_are_told_once(
    both: Both, tiny_recipe: Callable[..., Path], tiny_shards: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_shards, tmp_path / "copy")
    recipe = load_recipe(tiny_recipe(data={"train": str(copy)}))
    removed = threading.Barrier(2, timeout=PATIENCE, action=lambda: shutil.rmtree(copy / "images"))

    def look(rank: Rank) -> None:
        guard = Guard(recipe, rank, shards=[Shards(copy)])
        removed.wait()
        with guard.explaining():
            guard.look_at_all()

    said = assert_said_once(both(look), DataError)
    assert str(copy / "images") in said
    assert "was removed while the run was reading it" in said


def test_rank_that_is_waited_for_in_vain_is_told_of(
    both: Both, tiny_recipe: Callable[..., Path], tiny_shards: Path
) -> None:
    recipe, store = load_recipe(tiny_recipe()), dist.HashStore()
    over = threading.Event()

    def reduce(rank: Rank) -> None:
        guard = Guard(recipe, rank, shards=[Shards(tiny_shards)])
        group = dist.ProcessGroupGloo(store, rank.process_index, 2, timedelta(seconds=PATIENCE))
        if not rank.is_main_process:
            over.wait(PATIENCE)  # it hangs
            return
        try:
            options = dist.AllreduceOptions()
            options.timeout = timedelta(seconds=0.2)
            with guard.explaining():
                group.allreduce([torch.zeros(1)], options).wait()
        finally:
            over.set()

    error, _ = both(reduce)
    assert isinstance(error, TrainingError), error
    assert error.local
    said = str(error)
    assert said.startswith(f"{recipe.run.directory}: another process is gone, or hangs (")
    assert "Timed out waiting" in said
    assert said.endswith("its own message says why; there is no checkpoint yet, and the same command goes on")
