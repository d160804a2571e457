"""Networks are checked before anything is written, and networks of one's own are trained, saved and loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import fpd_accel
from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Recipe
from fpd_accel.data.shards import Shards
from fpd_accel.errors import ConfigError, ModelError, UserError
from fpd_accel.training.run import run
from fpd_accel.weights.model_folder import load_model, read_model_config

OWN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_keypoints, *, width=4, strides=4, stages=1):
        super().__init__()
        self.body = nn.Conv2d(3, width, kernel_size=3, stride=strides, padding=1)
        self.heads = nn.ModuleList(nn.Conv2d(width, num_keypoints, kernel_size=1) for _ in range(stages))

    def forward(self, images):
        features = self.body(images).relu()
        return tuple(head(features) for head in self.heads)


class Bare(Net):
    def forward(self, images):
        return super().forward(images)[0]


class NoNetwork:
    def __init__(self, num_keypoints):
        raise AssertionError("called")
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with networks that this package does not know."""
    (tmp_path / "code").mkdir()
    name = f"own_networks_{tmp_path.name.replace('-', '_')}"
    (tmp_path / "code" / f"{name}.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    return name


@pytest.fixture
def refused(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """A function that starts a run which is refused; it returns the message, and nothing may have been written."""

    def start(*overrides: str) -> str:
        recipe = load_recipe(tiny_recipe(train={"steps": 2}), overrides)
        before = {path for path in recipe.run.directory.parent.rglob("*") if "code" not in path.parts}
        with pytest.raises(UserError) as caught:
            run(recipe)
        assert {path for path in recipe.run.directory.parent.rglob("*") if "code" not in path.parts} == before
        return str(caught.value)

    return start


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.arch=hourglass_2x7"], "multiple of 4 and at least 8, not 7"),
        (["student.arch=hourglass_1000x128"], "'hourglass_1000x128' is not an architecture"),
        (["student.arch=hourglass_1x16", "data.input_size=[96, 64]"], "multiples of 64, not 96 x 64"),
        (["student.arch=hrnet_w18", "data.input_size=[48, 64]"], "multiples of 32, not 48 x 64"),
    ],
)
def test_networks_that_cannot_be_built_are_refused_with_the_recipe(
    tiny_recipe: Callable[..., Path], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(tiny_recipe(), overrides)


def test_a_student_that_does_not_fit_is_refused_before_its_teacher_is_trained(
    tiny_recipe: Callable[..., Path], own_module: str, tmp_path: Path
) -> None:
    own = tiny_recipe(run={"name": "teacher", "root": str(tmp_path / "runs")}, train={"steps": 2}).rename(
        tmp_path / "teacher.yaml"
    )
    recipe = tiny_recipe(
        run={"name": "student", "root": str(tmp_path / "runs")},
        student={"arch": f"{own_module}:Net", "arguments": {"strides": 2}},
        distill={"mode": "fpd"},
        teacher={"recipe": str(own)},
        train={"steps": 2},
    )
    with pytest.raises(ModelError, match=r"own_networks\w+:Net"):
        run(load_recipe(recipe))
    assert not (tmp_path / "runs").exists()


def test_a_network_that_returns_a_tensor_is_refused_by_one_message(
    refused: Callable[..., str], own_module: str
) -> None:
    message = refused(f"student.arch={own_module}:Bare")
    assert f"{own_module}:Bare" in message
    assert "tuple" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arch", "words"),
    [("{}:Nett", "Nett"), ("no_such_module_anywhere:Net", "no_such_module_anywhere"), ("{}:NoNetwork", "nn.Module")],
)
def test_own_networks_that_do_not_exist_are_refused(
    refused: Callable[..., str], own_module: str, arch: str, words: str
) -> None:
    message = refused(f"student.arch={arch.format(own_module)}")
    assert words in message
    assert arch.format(own_module) in message


def test_wrong_arguments_of_an_own_network_are_named(refused: Callable[..., str], own_module: str) -> None:
    assert "widht" in refused(f"student.arch={own_module}:Net", "student.arguments={widht: 8}")


def test_a_corrected_command_goes_on_where_no_checkpoint_exists(
    tiny_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(tiny_recipe(train={"steps": 2}))
    recipe.run.directory.mkdir(parents=True)
    (recipe.run.directory / "recipe.yaml").write_text(
        tiny_recipe(train={"steps": 2}, optim={"lr": 0.5}).read_text(), encoding="utf-8"
    )  # of a start that ended before its first checkpoint
    (recipe.run.directory / ".lock").touch()
    run(recipe)
    assert (recipe.run.directory / "final" / "config.json").is_file()
    with pytest.raises(UserError, match=r"begun by another recipe.*\n.*optim\.lr"):
        run(load_recipe(tiny_recipe(train={"steps": 2}, optim={"lr": 0.5})))


def test_the_public_trainer_starts_by_itself(tiny_recipe: Callable[..., Path]) -> None:
    recipe = fpd_accel.load_recipe(tiny_recipe(train={"steps": 2}))
    shards = fpd_accel.Shards(recipe.data.train)
    student, teacher = (
        fpd_accel.create_model(arch, shards.skeleton.num_keypoints, input_size=recipe.data.input_size)
        for arch in (recipe.student.arch, "tiny_w16")
    )
    trainer = fpd_accel.Trainer(
        recipe, Accelerator(cpu=True), student=student, teacher=fpd_accel.Teacher(teacher), train=shards, valid=None
    )
    trainer.fit()
    records = (recipe.run.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [1, 2]
    assert load_recipe(recipe.run.directory / "recipe.yaml", check_files=False) == recipe


def test_the_trainer_refuses_a_student_that_its_recipe_does_not_describe(
    tiny_recipe: Callable[..., Path], own_module: str
) -> None:
    recipe = load_recipe(tiny_recipe(train={"steps": 2}))
    shards = Shards(recipe.data.train)
    network = getattr(__import__(own_module), "Net")(shards.skeleton.num_keypoints)  # noqa: B009
    with pytest.raises(ConfigError, match=rf"student\.arch: .*set student\.arch={own_module}:Net"):
        fpd_accel.Trainer(recipe, Accelerator(cpu=True), student=network, teacher=None, train=shards, valid=None)


def test_a_network_of_ones_own_is_trained_saved_loaded_evaluated_and_teaches(
    tiny_recipe: Callable[..., Path], own_module: str, tmp_path: Path
) -> None:
    options = {"arch": f"{own_module}:Net", "arguments": {"width": 8, "stages": 2}}
    recipe = _with_valid(load_recipe(tiny_recipe(student=options, train={"steps": 2})))
    run(recipe)
    folder = recipe.run.directory / "best"
    config = read_model_config(folder)
    assert (config.arch, config.arguments) == (options["arch"], options["arguments"])
    model = load_model(folder)
    assert type(model).__name__ == "Net"
    assert not model.training
    size = recipe.data.input_size
    assert [tuple(stage.shape) for stage in model(torch.zeros(2, 3, *size))] == [
        (2, config.skeleton.num_keypoints, size[0] // 4, size[1] // 4)
    ] * 2
    scores, people = fpd_accel.evaluate(model, Shards(recipe.data.train), codec=config.create_codec())
    assert "AP" in scores
    assert people
    taught = tiny_recipe(
        run={"name": "taught"}, teacher={"weights": str(folder)}, distill={"mode": "fpd"}, train={"steps": 2}
    )
    run(load_recipe(taught))


def _with_valid(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"valid": recipe.data.train})})
