"""Trackers get grouped tags, the recipe and pictures; one that is not installed is refused before anything starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Log
from fpd_accel.errors import ConfigError
from fpd_accel.training import trackers
from fpd_accel.training.run import run
from fpd_accel.training.trackers import flatten


def events(directory: Path) -> EventAccumulator:
    found = EventAccumulator(str(directory))
    found.Reload()
    return found


def test_tensorboard_has_grouped_tags_the_recipe_and_a_picture(
    tiny_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(tiny_recipe(train={"steps": 2}, log={"trackers": ["tensorboard"], "pictures_every_steps": 2}))
    run(recipe)
    tags = events(recipe.run.directory / "tensorboard").Tags()
    assert {"train/loss", "train/pose_loss", "train/acc", "train/lr", "valid/AP", "time/data", "time/step",
            "time/samples_per_second", "valid/joint/left_ankle"} <= set(tags["scalars"])  # fmt: skip
    assert all("/" in tag for tag in tags["scalars"])
    assert "people" in tags["images"]
    assert "recipe/text_summary" in tags["tensors"]
    assert list((recipe.run.directory / "tensorboard").rglob("hparams.yml"))


def test_a_tracker_that_is_not_installed_is_refused(
    tiny_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    recipe = load_recipe(tiny_recipe(), ["log.trackers=[tensorboard, wandb, trackio]"])
    with pytest.raises(ConfigError, match=r"log\.trackers: wandb, trackio not installed; run `pip install wandb trac"):
        run(recipe)
    assert not recipe.run.directory.exists()
    with pytest.raises(
        ConfigError, match=r"log\.trackers\.0: 'tensorbord' is not a choice; did you mean 'tensorboard'"
    ):
        load_recipe(tiny_recipe(), ["log.trackers=[tensorbord]"])


@pytest.mark.parametrize(("tensorboard", "expected"), [(True, ("tensorboard",)), (False, ())])
def test_the_key_of_version_0_1_still_works(tensorboard: bool, expected: tuple[str, ...]) -> None:
    assert Log.model_validate({"tensorboard": tensorboard}).trackers == expected
    assert Log.model_validate({"tensorboard": tensorboard, "trackers": ["wandb"]}).trackers == ("wandb",)


def test_nested_sections_become_one_dictionary_of_plain_values() -> None:
    assert flatten({"a": {"b": 1, "c": None}, "d": [1, 2], "e": True}) == {
        "a.b": 1, "a.c": "None", "d": "[1, 2]", "e": True
    }  # fmt: skip
