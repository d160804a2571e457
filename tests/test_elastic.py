"""A run on any number of ranks, replicated or sharded: the same losses, and checkpoints that fit all of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from jobs import launch
from ranks import smooth_relu
from safetensors.torch import load_file

from fpd_accel.config.loading import load_recipe
from fpd_accel.training.checkpoint import checkpoints, read_state

STEPS, HALF = 8, 4
WORLDS = {"ddp2": (2, "ddp"), "fsdp2": (2, "fsdp2"), "ddp3": (3, "ddp")}
# Each name is a run whose second half has another number of ranks or another sharding.
ELASTIC = {"ddp2": "one_to_ddp2", "fsdp2": "ddp2_to_fsdp2", "ddp3": "fsdp2_to_ddp3", "one": "fsdp2_to_one"}


def losses(directory: Path) -> list[float]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in trained] == list(range(1, len(trained) + 1))
    return [record["train_loss"] for record in trained]


def newest(directory: Path) -> Path:
    return checkpoints(directory / "checkpoints")[-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_valid: Path) -> Path:
    """Return the root of distillations of eight steps: one in each world, and those that change it half-way."""
    import yaml

    from fpd_accel.models.create import create_model
    from fpd_accel.skeleton import COCO
    from fpd_accel.weights.model_folder import ModelConfig, save_model

    root = tmp_path_factory.mktemp("worlds")
    config = ModelConfig(arch="tiny_w16", skeleton=COCO, input_size=(64, 64))
    torch.manual_seed(7)
    save_model(root / "teacher", create_model("tiny_w16", 17).state_dict(), config)
    recipe = root / "recipe.yaml"
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "one", "root": str(root)},
        "data": {"train": str(tiny_shards), "valid": str(tiny_valid), "input_size": [64, 64], "workers": 0},
        "student": {"arch": "tiny_w8"},
        "teacher": {"weights": str(root / "teacher")},
        "train": {"steps": STEPS, "global_batch": 12, "freeze_norm": True, "clip_norm": 0.5, "ema_decay": 0.9},
        "optim": {"name": "adamw", "lr": 0.001, "weight_decay": 0.01, "schedule": "constant"},
        "evaluate": {"batch": 4, "every_epochs": None},
        "log": {"every_steps": 1, "pictures_every_steps": None, "trackers": []},
        "checkpoint": {"every_steps": HALF, "keep": 9},
    }
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    with patch("torch.nn.functional.relu", smooth_relu):
        train(recipe)
    for world, (ranks, parallel) in {**WORLDS, "one": (1, "auto")}.items():
        halve(root, ELASTIC[world])
        names = [world, ELASTIC[world]] if world != "one" else [ELASTIC[world]]
        tasks = [["train", str(recipe), [f"run.name={name}", f"train.parallel={parallel}"]] for name in names]
        if world == "fsdp2":  # also with accumulation and a sharded teacher
            changes = ["run.name=sharded_teacher", "train.parallel=fsdp2", "teacher.shard=true", "train.device_batch=3"]
            tasks.append(["train", str(recipe), changes])
        else:
            tasks.append(["score", str(root / "one" / "final"), str(tiny_valid), str(root / f"scores_{ranks}")])
        if ranks == 2:
            changes = [f"run.name=statistics_{world}", f"train.parallel={parallel}", "train.freeze_norm=false"]
            changes += ["train.steps=2", "data.valid=null"]
            tasks.append(["train_recording_statistics", str(recipe), changes, str(root / f"own_{world}")])
        if world == "ddp2":
            tasks.append(["train_with_slow_scores", str(recipe), ["run.name=slow"], 5, 2])
        output = launch(ranks, [["without_kinks"], *tasks])
        assert ("sharded (FSDP2)" in output) == (parallel == "fsdp2")
        (root / f"output_{world}").write_text(output)
    return root


def train(recipe: Path, *overrides: str) -> None:
    from accelerate.state import AcceleratorState

    from fpd_accel.training.run import run

    AcceleratorState._reset_state(reset_partial_state=True)
    run(load_recipe(recipe, overrides))


def halve(root: Path, name: str) -> None:
    """Begin the run `A_to_B` with the first half of A."""
    shutil.copytree(root / name.split("_to_")[0], root / name)
    shutil.rmtree(newest(root / name))


@pytest.mark.faults
@pytest.mark.parametrize("name", [*WORLDS, "sharded_teacher"])
def test_every_world_size_and_sharding_gives_the_losses_of_one_process(name: str, runs: Path) -> None:
    np.testing.assert_allclose(losses(runs / name), losses(runs / "one"), rtol=1e-5)
    assert len(losses(runs / name)) == STEPS


@pytest.mark.faults
@pytest.mark.parametrize("world", ELASTIC)
def test_a_run_resumes_with_another_world_size_or_sharding(world: str, runs: Path) -> None:
    run = runs / ELASTIC[world]
    output = (runs / f"output_{world}").read_text()
    assert f"resuming {run} from step_{HALF:08}: step {HALF} of {STEPS}" in output
    np.testing.assert_allclose(losses(run), losses(runs / "one"), rtol=1e-5)
    first, second = (read_state(checkpoint)["topology"] for checkpoint in checkpoints(run / "checkpoints"))
    assert first != second


@pytest.mark.faults
@pytest.mark.parametrize("world", ["ddp2", "fsdp2"])
def test_saved_statistics_are_the_mean_over_ranks(world: str, runs: Path) -> None:
    saved = load_file(newest(runs / f"statistics_{world}") / "student.safetensors")
    first, second = (load_file(runs / f"own_{world}.{rank}") for rank in range(2))
    assert sum("running_mean" in name for name in first) > 3
    for name, own in first.items():
        assert not own.equal(second[name])
        torch.testing.assert_close(saved[name], (own + second[name]) / 2)


@pytest.mark.faults
@pytest.mark.parametrize("name", [*WORLDS, *ELASTIC.values()])
def test_checkpoints_hold_the_whole_network_whatever_the_sharding(name: str, runs: Path) -> None:
    for file in ("student", "student_ema", "optimizer"):
        whole, other = (load_file(newest(runs / run) / f"{file}.safetensors") for run in ("one", name))
        assert {key: value.shape for key, value in whole.items()} == {k: v.shape for k, v in other.items()}, file
        for key, tensor in whole.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-6)
    models = [load_file(runs / run / "final" / "model.safetensors") for run in ("one", name)]
    assert models[0].keys() == models[1].keys()


@pytest.mark.faults
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_bf16_is_used_in_the_forward_pass_only(parallel: str, runs: Path) -> None:
    overrides = [f"train.parallel={parallel}", "train.precision=bf16"]
    output = launch(2, [["dtypes", str(runs / "recipe.yaml"), overrides]])
    assert "dtypes: torch.bfloat16 torch.float32 torch.float32" in output


@pytest.mark.faults
def test_evaluation_is_the_same_on_any_number_of_ranks(runs: Path, tiny_valid: Path) -> None:
    found = {path.name: json.loads(path.read_text()) for path in runs.glob("scores_*")}
    assert sorted(found) == ["scores_1.0", *(f"scores_{ranks}.{rank}" for ranks in (2, 3) for rank in range(ranks))]
    assert all(answer == found["scores_1.0"] for answer in found.values())
    metrics, people = found["scores_1.0"]
    assert len(people) == 13  # in batches of five
    assert metrics["loss"] > 0


@pytest.mark.faults
def test_ranks_that_open_other_data_or_none_end_with_one_message(
    runs: Path, tiny_shards: Path, tiny_valid: Path, tmp_path: Path
) -> None:
    for name, other in (("other", tiny_valid), ("none", tmp_path)):
        recipes = [tmp_path / f"{name}_{rank}.yaml" for rank in range(2)]
        for recipe, people in zip(recipes, (tiny_shards, other), strict=True):
            text = (runs / "recipe.yaml").read_text().replace(str(tiny_shards), str(people))
            recipe.write_text(text.replace("name: one", f"name: {name}"))
        done = launch(2, [["train_from", *map(str, recipes)]], expected=None)
        assert done.count("refused: rank 1 on ") == 2  # both ranks raise it
        assert ("has opened other data" if name == "other" else "not a prepared dataset") in done
        assert not (runs / name).exists()


@pytest.mark.faults
def test_ranks_wait_longer_for_the_scores_than_for_a_step(runs: Path) -> None:
    records = map(json.loads, (runs / "slow" / "metrics.jsonl").read_text().splitlines())
    assert [record["kind"] for record in records][-1] == "valid"
    assert (runs / "slow" / "final" / "model.safetensors").is_file()


@pytest.mark.faults
def test_another_batch_size_of_batch_normalisation_is_reported(
    tiny_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(checkpoint={"every_steps": 2, "keep": 9})
    train(recipe)
    train(recipe, "train.steps=6", "train.device_batch=2")
    output = " ".join(capsys.readouterr().err.split())
    assert "batch normalisation sees 2 samples at a time, before 4" in output
    train(recipe, "train.steps=6")
    assert "finished already, at step 6" in " ".join(capsys.readouterr().err.split())
