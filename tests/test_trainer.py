"""The training loop: the files of a run, errors that stop it, and equal losses on any number of processes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import DISTILL, start_ranks

from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Distill, Optim
from fpd_accel.distributed import accelerator as processes
from fpd_accel.errors import ConfigError, TrainingError
from fpd_accel.training import trainer
from fpd_accel.training.checkpoint import checkpoints
from fpd_accel.training.optim import alpha_at, create_optimizer, learning_rate, parameter_groups
from fpd_accel.weights.load import read_tensors


def train(recipe: Path, *overrides: str) -> None:
    from fpd_accel.training.run import run

    run(load_recipe(recipe, overrides))


def records(directory: Path, kind: str) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_one_command_trains_the_teacher_then_the_student(
    tiny_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tiny_recipe(
        file_name="teacher.yaml", run={"name": "teacher"}, student={"arch": "tiny_w16"}, train={"steps": 2}
    )
    recipe = tiny_recipe(
        run={"name": "student"},
        teacher={"recipe": str(teacher)},
        distill={"mode": "fpd"},
        log={"pictures_every_steps": 2, "trackers": ["tensorboard"]},
    )
    train(recipe)
    run = tmp_path / "student"
    for name in ("recipe.yaml", "teacher/model.safetensors", "best/config.json", "final/model.safetensors"):
        assert (run / name).is_file(), name
    assert (run / "predictions" / "valid.json").is_file()
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["step_00000002.png", "step_00000004.png"]
    assert any((run / "tensorboard").iterdir())
    trained = records(run, "train")
    assert [record["step"] for record in trained] == [1, 2, 3, 4]
    wanted = {"train_pose_loss", "train_kd_pose_loss", "train_loss", "train_acc", "lr", "data_time", "step_time"}
    assert wanted <= trained[0].keys()
    assert all(record["train_kd_pose_loss"] > 0 for record in trained)
    assert {"valid_AP", "valid_AR", "valid_loss", "valid_acc"} <= records(run, "valid")[-1].keys()
    assert load_recipe(run / "recipe.yaml") == load_recipe(recipe)
    shown = capsys.readouterr()
    assert "tiny_w16" in shown.out
    assert "multiply-adds" in shown.err
    train(recipe)  # finished already: nothing is trained again
    assert records(run, "train") == trained


@pytest.mark.faults
def test_a_teacher_is_finished_once_its_best_weights_are_there(
    tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_recipe(
        file_name="teacher.yaml", run={"name": "teacher"}, student={"arch": "tiny_w16"}, train={"steps": 1},
        data={"valid": None},
    )  # fmt: skip
    recipe = tiny_recipe(run={"name": "student"}, teacher={"recipe": str(teacher)}, distill={"mode": "fpd"})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    monkeypatch.undo()
    train(recipe)  # goes on with the teacher
    shutil.rmtree(tmp_path / "teacher" / "best")
    with pytest.raises(ConfigError, match=r"teacher\.recipe: its run is finished, but .*best is gone; remove"):
        train(recipe, "run.name=another")


def test_results_have_every_person_of_the_held_out_set_once(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    from fpd_accel.data.shards import Shards

    train(tiny_recipe(evaluate={"batch": 5, "nms_threshold": 1.0}))
    people = json.loads((tmp_path / "tiny" / "predictions" / "valid.json").read_text())
    recipe = load_recipe(tmp_path / "tiny" / "recipe.yaml")
    assert len(people) == len(Shards(str(recipe.data.valid)))
    assert {"image_id", "category_id", "keypoints", "score"} == people[0].keys()
    assert len(people[0]["keypoints"]) == 51


def test_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoints(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(checkpoint={"every_steps": 2}, log={"every_steps": 5})
    train(recipe, "train.steps=4")
    before = {path.name for path in checkpoints(tmp_path / "tiny" / "checkpoints")}
    with pytest.raises(TrainingError, match=r"step \d+ is"):
        # The schedule jumps at epoch 0.5, behind the steps that are already taken.
        train(recipe, "run.name=wild", "optim.lr=1e30", "train.steps=20")
    assert not checkpoints(tmp_path / "wild" / "checkpoints") or all(
        torch.isfinite(tensor).all() for tensor in _weights(checkpoints(tmp_path / "wild" / "checkpoints")[-1])
    )
    assert {path.name for path in checkpoints(tmp_path / "tiny" / "checkpoints")} == before


def _weights(checkpoint: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(checkpoint / "student.safetensors").values())


def test_accumulation_gives_the_losses_of_one_large_batch(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    sections = {"train": {"freeze_norm": True, "steps": 4}, "optim": {"name": "sgd", "lr": 0.1}}
    for name, device_batch in (("one", 4), ("four", 1)):
        sections["train"]["device_batch"] = device_batch
        train(tiny_recipe(run={"name": name}, **sections))
    curves = [[r["train_loss"] for r in records(tmp_path / name, "train")] for name in ("one", "four")]
    np.testing.assert_allclose(*curves, rtol=1e-5)  # relative


@pytest.mark.faults
def test_two_processes_see_the_same_people_and_give_the_same_losses_as_one(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    sections = {"train": {"freeze_norm": True, "steps": 5, "clip_norm": 1.0}, "optim": {"lr": 0.003}}
    train(tiny_recipe(run={"name": "one"}, **sections))
    two = tiny_recipe(run={"name": "two"}, **sections)
    ranks = start_ranks(DISTILL, "--config", two)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output()
    assert "2 x 2" in ranks[0].output()
    curves = [[r["train_loss"] for r in records(tmp_path / name, "train")] for name in ("one", "two")]
    np.testing.assert_allclose(*curves, rtol=1e-5)  # relative
    ends = [records(tmp_path / name, "valid")[-1]["valid_AR"] for name in ("one", "two")]
    people = [len(json.loads((tmp_path / name / "predictions" / "valid.json").read_text())) for name in ("one", "two")]
    assert people[0] == people[1]
    assert ends[0] == pytest.approx(ends[1], abs=0.02)


@pytest.mark.gpu
def test_statistics_shared_between_devices_keep_their_names(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for name, shared in (("own", False), ("shared", True)):
        train(tiny_recipe(run={"name": name}, train={"sync_norm": shared}))
    ends = [dict(read_tensors(tmp_path / name / "final")) for name in ("own", "shared")]
    assert ends[0].keys() == ends[1].keys()


def test_student_can_start_from_a_finished_one(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    train(tiny_recipe(run={"name": "first"}))
    again = tiny_recipe(
        run={"name": "second"}, student={"weights": str(tmp_path / "first" / "final")}, train={"steps": 1}
    )
    train(again, "optim.lr=1e-12")
    ends = [_weights_of(tmp_path / name / "final") for name in ("first", "second")]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*ends, strict=True))


def _weights_of(folder: Path) -> list[torch.Tensor]:
    from fpd_accel import load_model

    return [parameter.detach() for parameter in load_model(folder).parameters()]


def test_bf16_trains_with_losses_in_fp32(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    train(tiny_recipe(train={"precision": "bf16", "steps": 2}))
    assert all(np.isfinite(record["train_loss"]) for record in records(tmp_path / "tiny", "train"))
    assert all(tensor.dtype == torch.float32 for tensor in _weights_of(tmp_path / "tiny" / "final"))


@pytest.mark.parametrize("multiplied", [False, True])
def test_emulated_bf16_gives_a_warning(
    tiny_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    multiplied: bool,
) -> None:
    monkeypatch.setattr(processes, "multiplies_bf16", lambda _: multiplied)
    train(tiny_recipe(train={"precision": "bf16", "steps": 1}))
    warned = "precision bf16: this hardware has no bfloat16 arithmetic" in capsys.readouterr().err
    assert warned != multiplied


def test_moving_average_is_evaluated_with_its_own_weights(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    # With a decay near 1 the average stays at the initial weights, so that it must not follow the student's.
    sections = {"precision": "bf16", "steps": 3, "ema_decay": 0.999999}
    train(tiny_recipe(run={"name": "still"}, train=sections, optim={"lr": 0.1}))
    train(tiny_recipe(run={"name": "fresh"}, train={**sections, "steps": 1}, optim={"lr": 1e-12}))
    losses = [records(tmp_path / name, "valid")[-1]["valid_loss"] for name in ("still", "fresh")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    ends = [tmp_path / name / "final" for name in ("still", "fresh")]
    ends.append(checkpoints(tmp_path / "still" / "checkpoints")[-1] / "student.safetensors")
    average, initial, student = (dict(read_tensors(path)) for path in ends)
    assert all(torch.allclose(average[name], initial[name], atol=1e-3) for name in initial if "weight" in name)
    assert not torch.allclose(student["head.weight"], initial["head.weight"], atol=1e-2)


def test_step_schedule_decays_at_its_milestones() -> None:
    optim = Optim(lr=1.0, schedule="step", milestones=(2.0, 3.0), gamma=0.1)
    rates = [learning_rate(optim, step, total_steps=8, steps_per_epoch=2) for step in range(8)]
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_schedule_warms_up_and_ends_at_its_final_rate() -> None:
    optim = Optim(lr=1.0, schedule="cosine", warmup_steps=2, final_lr=0.1)
    rates = [learning_rate(optim, step, total_steps=12, steps_per_epoch=1) for step in range(13)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[7] == pytest.approx(0.55)
    assert rates[12] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_alpha_moves_from_its_first_to_its_final_value() -> None:
    linear = Distill(alpha=0.8, alpha_final=0.2, alpha_schedule="linear")
    assert [alpha_at(linear, step, total_steps=3) for step in range(3)] == pytest.approx([0.8, 0.5, 0.2])
    assert alpha_at(Distill(alpha=0.3), 7, total_steps=9) == 0.3


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_biases_and_norms_do_not_decay(name: str) -> None:
    from fpd_accel import create_model

    model = create_model("tiny_w8", 17)
    decayed, kept = parameter_groups(model, 0.1)
    assert all(parameter.ndim == 4 for parameter in decayed["params"])
    assert kept["weight_decay"] == 0
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    optimizer = create_optimizer(model, Optim(name=name, weight_decay=0.1), torch.device("cpu"))  # type: ignore[arg-type]
    assert optimizer.defaults["fused"]
