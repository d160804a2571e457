"""The watchdog watches every part of a run."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fpd_accel.training.run
from fpd_accel.config.loading import load_recipe
from fpd_accel.distributed.watchdog import Watchdog
from fpd_accel.models.create import create_model
from fpd_accel.skeleton import COCO
from fpd_accel.training.student import Student
from fpd_accel.weights.model_folder import ModelConfig, save_model

PATIENCE = 100  # seconds to wait for a thread to end


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_watchdog_watches_until_the_outermost_block_ends() -> None:
    watchdog = Watchdog(60)
    for _ in range(2):
        with watchdog:
            (thread,) = watchers()
            with watchdog:
                pass
            assert watchers() == [thread]
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.faults
def test_a_run_is_watched_while_networks_are_prepared_restored_and_evaluated(
    tiny_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watched: dict[str, int] = {}

    def watch(place: Any, name: str) -> None:
        function = getattr(place, name)

        def watching(*arguments: Any, **options: Any) -> Any:
            watched[name] = len(watchers())
            assert options.get("watchdog", "") is not None
            return function(*arguments, **options)

        monkeypatch.setattr(place, name, watching)

    for place, name in ((Student, "__init__"), (Student, "restore"), (fpd_accel.training.trainer, "evaluate")):
        watch(place, name)
    teacher = ModelConfig(arch="tiny_w8", skeleton=COCO, input_size=(64, 64))
    save_model(tmp_path / "teacher", create_model("tiny_w8", 17).state_dict(), teacher)
    recipe = tiny_recipe(teacher={"weights": str(tmp_path / "teacher")}, distill={"mode": "fpd"})
    for steps in (1, 2):
        fpd_accel.training.run.run(load_recipe(recipe, [f"train.steps={steps}"]))
    assert watched == {"__init__": 1, "restore": 1, "evaluate": 1}
    for thread in watchers():
        thread.join(PATIENCE)
    assert watchers() == []
