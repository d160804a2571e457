"""A run that was stopped, killed or damaged resumes bit for bit, or a message says why it cannot."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from jobs import killing_itself, start
from safetensors.torch import load_file

from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Optim, Train
from fpd_accel.distributed.accelerator import create_accelerator
from fpd_accel.distributed.preemption import StopSignal
from fpd_accel.errors import CheckpointError, Preempted
from fpd_accel.models.create import create_model
from fpd_accel.training.checkpoint import checkpoints, newest_whole, problem, read_state, write_checkpoint
from fpd_accel.training.student import Student

CURVE = ("train_loss", "train_pose_loss", "train_kd_pose_loss", "train_acc", "lr", "alpha")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_valid: Path) -> Path:
    """Return the directory of an undisturbed distillation of 12 steps that uses every part of the state.

    Beside it are its recipe, `recipe.yaml`, and the model folder `teacher`.
    """
    from fpd_accel.models.create import create_model
    from fpd_accel.skeleton import COCO
    from fpd_accel.weights.model_folder import ModelConfig, save_model

    root = tmp_path_factory.mktemp("distilled")
    config = ModelConfig(arch="tiny_w16", skeleton=COCO, input_size=(64, 64))
    save_model(root / "teacher", create_model("tiny_w16", 17).state_dict(), config)
    values = {
        "run": {"name": "whole", "root": str(root)},
        "data": {"train": str(tiny_shards), "valid": str(tiny_valid), "input_size": [64, 64], "workers": 1},
        "student": {"arch": "tiny_w8"},
        "teacher": {"weights": str(root / "teacher")},
        "distill": {"mode": "fpd"},
        "train": {"steps": 12, "global_batch": 4, "ema_decay": 0.9},
        "optim": {"name": "adamw", "lr": 0.001, "weight_decay": 0.01, "schedule": "cosine"},
        "evaluate": {"batch": 4, "every_epochs": 0.3},
        "log": {"every_steps": 1, "pictures_every_steps": None, "trackers": []},
        "checkpoint": {"every_steps": 3, "keep": 3},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    train(root / "recipe.yaml")
    return root / "whole"


@pytest.fixture
def distilling(whole: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes the recipe of the same distillation by another name, with a teacher of its own."""
    shutil.copytree(whole.with_name("teacher"), tmp_path / "teacher")

    def write(name: str) -> Path:
        values = yaml.safe_load(whole.with_name("recipe.yaml").read_text(encoding="utf-8"))
        values |= {"run": {"name": name, "root": str(tmp_path)}, "teacher": {"weights": str(tmp_path / "teacher")}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        return tmp_path / f"{name}.yaml"

    return write


@pytest.fixture
def distilled(distilling: Callable[[str], Path], whole: Path, tmp_path: Path) -> Path:
    """Return the recipe of a copy of the finished distillation, `run`, that the test may change."""
    shutil.copytree(whole, tmp_path / "run")
    return distilling("run")


def curve(directory: Path) -> list[list[float]]:
    """Return the values of every training step, exactly as written."""
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [[record["step"], *(record[name] for name in CURVE)] for record in records if record["kind"] == "train"]


def train(recipe: Path, *overrides: str) -> None:
    from fpd_accel.training.run import run

    run(load_recipe(recipe, overrides))


def assert_same_end(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    for name in ("student", "student_ema", "optimizer"):
        ends = [load_file(checkpoints(run / "checkpoints")[-1] / f"{name}.safetensors") for run in (one, other)]
        assert ends[0].keys() == ends[1].keys()
        assert all(ends[0][key].equal(ends[1][key]) for key in ends[0]), name


@pytest.mark.faults
def test_killed_run_resumes_bit_for_bit(distilling: Callable[[str], Path], whole: Path, tmp_path: Path) -> None:
    script = killing_itself(tmp_path, step=5)
    job = start(script, "--config", distilling("killed"), "checkpoint.background=false")  # else step 3 might be late
    assert job.wait() == -signal.SIGKILL, job.output()
    assert read_state(newest_whole(tmp_path / "killed" / "checkpoints"))["step"] == 3
    train(tmp_path / "killed.yaml")
    assert_same_end(whole, tmp_path / "killed")


def test_gradients_that_have_to_stay_in_place_exist_after_resuming(tmp_path: Path) -> None:
    def create() -> Student:
        train = Train(global_batch=2, compile="whole", cuda_graphs=True)
        return Student(create_model("tiny_w8", 17), create_accelerator("fp32"), train=train, optim=Optim(name="adamw"))

    student = create()
    student.train()
    student.model(torch.rand(2, 3, 64, 64))[-1].square().mean().backward()
    student.step(1e-3)
    write_checkpoint(tmp_path, 1, tensors=student.state(), state={}, keep=1)
    resumed = create()
    resumed.restore(tmp_path / "step_00000001")
    before, after = student.state(), resumed.state()
    for name in ("student", "optimizer"):
        assert before[name].keys() == after[name].keys()
        assert all(before[name][key].equal(after[name][key]) for key in before[name]), name
    assert all(p.grad is not None and not p.grad.any() for p in resumed.network.parameters())


@pytest.mark.faults
def test_an_evaluation_that_a_stop_skipped_is_made_up_for(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    from fpd_accel.distributed.preemption import StopSignal
    from fpd_accel.errors import Preempted
    from fpd_accel.training.run import run

    stop = StopSignal()
    stop.name = "SIGTERM"  # it came before the first step
    for name in ("whole", "stopped"):
        recipe = load_recipe(tiny_recipe(run={"name": name}, train={"steps": 3}, evaluate={"every_epochs": 0.01}))
        for _ in range(2 if name == "stopped" else 0):
            with pytest.raises(Preempted, match="SIGTERM"):
                run(recipe, stop=stop)
        run(recipe)
    ends = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped")]
    evaluations = [[r for r in map(json.loads, end.splitlines()) if r["kind"] == "valid"] for end in ends]
    assert [record["step"] for record in evaluations[0]] == [1, 2, 3]
    assert evaluations[0] == evaluations[1]


def test_run_resumes_mid_epoch_from_a_named_checkpoint(distilled: Path, whole: Path, tmp_path: Path) -> None:
    from fpd_accel.training.run import run

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    run(load_recipe(distilled), resume=str(tmp_path / "run" / "checkpoints" / "step_00000006"))
    assert_same_end(whole, tmp_path / "run")


@pytest.mark.faults
def test_checkpoints_newer_than_a_named_one_are_set_aside(
    distilled: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fpd_accel.training.run import run

    folder = tmp_path / "run" / "checkpoints"
    flip_bit(folder / "step_00000012" / "student.safetensors")
    recipe = load_recipe(distilled, ["checkpoint.save_every_minutes=1e-9", "checkpoint.every_steps=100"])
    stop = StopSignal()
    stop.name = "SIGTERM"  # after one step
    with pytest.raises(Preempted):
        run(recipe, resume=str(folder / "step_00000006"), stop=stop)
    assert [path.name for path in checkpoints(folder)] == ["step_00000006", "step_00000007"]
    assert {path.name for path in (folder / "set_aside").iterdir()} == {"step_00000009", "step_00000012"}
    assert (folder / "latest").read_text() == "step_00000007\n"
    assert "step_00000012: the run goes on from step 6, before it; moved to" in capsys.readouterr().err
    train(distilled)
    assert_same_end(whole, tmp_path / "run")


@pytest.mark.faults
def test_an_outdated_latest_of_a_killed_run_is_corrected(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished / "done", tmp_path / "done")
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    train(finished / "recipe.yaml", f"run.root={tmp_path}")
    assert (run / "checkpoints" / "latest").read_text() == "step_00000004\n"


def test_checkpoint_of_another_run_is_refused(distilling: Callable[[str], Path], whole: Path, tmp_path: Path) -> None:
    from fpd_accel.training.run import run

    other = distilling("other")
    with pytest.raises(CheckpointError, match="of another run"):
        run(load_recipe(other, ["run.seed=5"]), resume=str(whole / "checkpoints" / "step_00000012"))
    assert not (tmp_path / "other").exists()


def test_scores_of_other_evaluation_settings_are_discarded(
    distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert json.loads((folder / "best" / "config.json").read_text())["source"]["protocol"]["flip_test"] is True
    evaluations = (folder / "metrics.jsonl").read_text().count('"kind": "valid"')
    capsys.readouterr()
    train(distilled, "evaluate.flip_test=false")
    assert "earlier scores are discarded" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_text().count('"kind": "valid"') == evaluations + 1
    source = json.loads((folder / "best" / "config.json").read_text())["source"]
    assert (source["step"], source["protocol"]["flip_test"]) == (12, False)


@pytest.mark.parametrize(
    "change",
    [{"normalization": {"color": "bgr"}}, {"codec": {"name": "heatmap", "sigma": 3.0}}, {"codec": {"name": "dark"}}],
)
def test_a_teacher_of_equal_weights_and_another_description_is_another_teacher(
    change: dict, distilled: Path, tmp_path: Path
) -> None:
    description = tmp_path / "teacher" / "config.json"
    description.write_text(json.dumps({**json.loads(description.read_text()), **change}))
    with pytest.raises(CheckpointError, match="the teacher is not what this run was begun with"):
        train(distilled)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit-flipped weights": lambda folder: flip_bit(folder / "student.safetensors"),
    "bit-flipped optimizer": lambda folder: flip_bit(folder / "optimizer.safetensors"),
    "truncated": lambda folder: os.truncate(folder / "student.safetensors", 1000),
    "no manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "MANIFEST.json", 30),
    "missing state": lambda folder: (folder / "state.json").unlink(),
    "changed state": lambda folder: (folder / "state.json").write_text('{"step": 12}'),
    "manifest of nothing": lambda folder: (folder / "MANIFEST.json").write_text('{"files": {}}'),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """Return the root of a finished run, `done`, with two checkpoints."""
    root = tmp_path_factory.mktemp("finished")
    recipe = root / "recipe.yaml"
    recipe.write_text(
        f"run: {{name: done, root: {root}}}\n"
        f"data: {{train: {tiny_shards}, input_size: [64, 64], workers: 0}}\n"
        "student: {arch: tiny_w8}\ndistill: {mode: normal}\ntrain: {steps: 4, global_batch: 2}\n"
        "optim: {schedule: constant}\nlog: {trackers: [], pictures_every_steps: null}\n"
        "checkpoint: {every_steps: 2, keep: 2}\n"
    )
    train(recipe)
    return root


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_never_loaded(
    damage: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished / "done", tmp_path / "done")
    older, newer = checkpoints(run / "checkpoints")
    assert problem(newer) is None
    DAMAGES[damage](newer)
    assert newest_whole(run / "checkpoints") == older
    messages = capsys.readouterr().err
    assert newer.name in messages
    assert "passed over" in messages
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        read_state(newer)


def test_half_written_checkpoint_does_not_exist(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished / "done", tmp_path / "done")
    newest = checkpoints(run / "checkpoints")[-1]
    newest.rename(newest.with_name(f".{newest.name}.writing"))
    assert read_state(newest_whole(run / "checkpoints"))["step"] == 2


def test_no_whole_checkpoint_at_all_is_an_error(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished / "done", tmp_path / "done")
    for checkpoint in checkpoints(run / "checkpoints"):
        flip_bit(checkpoint / "student.safetensors")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"):
        newest_whole(run / "checkpoints")


def test_checkpoint_has_no_teacher_and_no_pickle(whole: Path) -> None:
    folder = checkpoints(whole / "checkpoints")[-1]
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "student.safetensors", "student_ema.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json",
    }  # fmt: skip
    from fpd_accel.models.create import create_model

    student = create_model("tiny_w8", 17).state_dict()
    assert load_file(folder / "student.safetensors").keys() == student.keys()
    state = json.loads((folder / "state.json").read_text())
    assert {"step", "samples", "seed", "topology", "recipe_sha256", "teacher_sha256", "versions"} <= state.keys()
    assert len(checkpoints(whole / "checkpoints")) == 3
    assert (whole / "checkpoints" / "latest").read_text().strip() == folder.name


def test_longer_run_goes_on_where_the_schedule_allows_it(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "done", tmp_path / "done")
    train(finished / "recipe.yaml", f"run.root={tmp_path}", "train.steps=6")
    assert [row[0] for row in curve(tmp_path / "done")] == [1, 2, 3, 4, 5, 6]


def test_longer_run_is_refused_where_it_would_change_steps_already_taken(distilled: Path) -> None:
    with pytest.raises(CheckpointError, match="already taken"):
        train(distilled, "train.steps=20")


def test_other_data_and_other_teacher_are_refused(distilled: Path, tiny_valid: Path, tmp_path: Path) -> None:
    from fpd_accel.models.create import create_model
    from fpd_accel.weights.model_folder import read_model_config, save_model

    with pytest.raises(CheckpointError, match="is not what this run was begun with"):
        train(distilled, f"data.train={tiny_valid}")
    config = read_model_config(tmp_path / "teacher")
    torch.manual_seed(12345)  # a run seeds the generator: without this the teacher might be the same again
    save_model(tmp_path / "teacher", create_model("tiny_w16", 17).state_dict(), config)
    with pytest.raises(CheckpointError, match="the teacher is not what this run was begun with"):
        train(distilled)
