"""What a user gets wrong at the command line: exit code 2, a message that says what, and never a traceback."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from fpd_accel import cli
from fpd_accel.config import load_recipe
from fpd_accel.model_folder import ModelConfig, save_model
from fpd_accel.models import create_model
from fpd_accel.skeleton import COCO, Skeleton, load_skeleton

ROOT = Path(__file__).parents[1]
LEEDS = ROOT / "recipes" / "skeletons" / "lsp.yaml"


def script(name: str) -> ModuleType:
    """A recipe script as a module: in this process it answers at once, torch being there already."""
    specification = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "recipes" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class Terminal:
    """Runs commands as a shell would, and reads what they say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, name: str, *arguments: object) -> tuple[int, str]:
        """Exit code and stderr of ``recipes/<name>.py`` or ``fpd-accel``."""
        main = cli.main if name == "fpd-accel" else script(name).main
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            code = main()
        except SystemExit as leaving:  # argparse
            code = leaving.code if isinstance(leaving.code, int) else 1
        return code, self.capsys.readouterr().err

    def refuses(self, name: str, *arguments: object) -> str:
        code, message = self(name, *arguments)
        assert code == 2, message
        assert message.count("error:") == 1
        assert "Traceback" not in message
        return message


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a model folder with fresh weights."""

    def write(
        arch: str = "tiny_w8", *, skeleton: Skeleton = COCO, input_size: tuple[int, int] = (64, 64), name: str = "model"
    ) -> Path:
        weights = create_model(arch, skeleton.num_keypoints).state_dict()
        save_model(tmp_path / name, weights, ModelConfig(arch=arch, skeleton=skeleton, input_size=input_size))
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def finished_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run of two steps that has come to its end; tests leave it as it is."""
    from fpd_accel.run import run

    root = tmp_path_factory.mktemp("runs")
    values = {
        "run": {"name": "finished", "root": str(root)},
        "data": {"train": str(tiny_shards), "input_size": [64, 64], "workers": 0},
        "student": {"arch": "tiny_w8"},
        "distill": {"mode": "normal"},
        "train": {"steps": 2, "global_batch": 4},
        "optim": {"schedule": "constant"},
        "log": {"every_steps": 1, "pictures_every_steps": None, "tensorboard": False},
    }
    path = root / "finished.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    run(load_recipe(path))
    return path


# --- recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stesp=3", ["train.stesp: unknown key", "did you mean 'steps'?"]),
        ("qqqq=3", ["qqqq: unknown key", "choices: run, data"]),
        ("distill.alpha=1.5", ["distill.alpha: 1.5", "less than or equal to 1"]),
        ("distill.mode=teach", ["distill.mode: 'teach' is not a choice", "fpd, normal"]),
        ("distill.mode=fpd", ["distill.mode: 'fpd' needs a teacher", "teacher.weights"]),
        ("student.arch=hrnet_23", ["student.arch: 'hrnet_23' is no architecture", "hrnet_w32"]),
        ("student.weights=nothing.pth", ["student.weights: nothing.pth: no such file or model folder"]),
        ("data.train=nowhere", ["data.train: nowhere: no prepared dataset there", "fpd-accel prepare"]),
        ("train.steps", ["train.steps: an override is key.path=value"]),
    ],
)
def test_a_wrong_value_is_refused(
    terminal: Terminal, tiny_recipe: Callable[..., Path], override: str, words: list[str]
) -> None:
    path = tiny_recipe()
    message = terminal.refuses("distill", "--config", path, override)
    for word in [str(path), *words]:
        assert word in message
    assert not (path.parent / "tiny").exists()  # no run directory for a run that never was


def test_a_teacher_file_that_is_missing_is_named(terminal: Terminal, tiny_recipe: Callable[..., Path]) -> None:
    path = tiny_recipe(distill={"mode": "fpd"}, teacher={"weights": "weights/teacher.pth", "arch": "tiny_w16"})
    message = terminal.refuses("distill", "--config", path)
    assert "teacher.weights: weights/teacher.pth: no such file or model folder" in message


def test_broken_yaml_is_refused_with_its_line(terminal: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("run: {name: a}\ndata: {train: [}\n", encoding="utf-8")
    message = terminal.refuses("distill", "--config", path)
    assert "broken.yaml: not readable as YAML" in message
    assert "line 2" in message


def test_a_recipe_that_does_not_exist_is_refused(terminal: Terminal, tiny_recipe: Callable[..., Path]) -> None:
    path = tiny_recipe()
    message = terminal.refuses("distill", "--config", path.with_name("tinny.yaml"))
    assert f"no such recipe; did you mean {path}?" in message


def test_a_global_batch_that_does_not_divide_is_refused_before_anything_starts(
    terminal: Terminal, tiny_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    message = terminal.refuses("distill", "--config", tiny_recipe(train={"global_batch": 5}))
    assert "train.global_batch: 5 does not divide by 2 ranks; use 4 or 6" in message


def test_processes_that_would_train_alone_are_refused(
    terminal: Terminal, tiny_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a launcher that Accelerate does not recognise
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    message = terminal.refuses("distill", "--config", tiny_recipe())
    assert "2 processes were started, but each trains alone" in message
    assert "ACCELERATE_USE_CPU=true" in message


def test_an_accumulation_from_outside_the_recipe_is_refused(
    terminal: Terminal, tiny_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    message = terminal.refuses("distill", "--config", tiny_recipe())
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set" in message
    assert "unset it" in message


def test_a_size_that_the_network_cannot_take_is_refused(terminal: Terminal, tiny_recipe: Callable[..., Path]) -> None:
    path = tiny_recipe(data={"input_size": [64, 72]})  # multiples of 4, but the network wants multiples of 16
    message = terminal.refuses("distill", "--config", path)
    assert "16" in message
    assert "72" in message


def test_a_run_directory_that_cannot_be_made_is_refused(
    terminal: Terminal, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "occupied").write_text("a file", encoding="utf-8")
    message = terminal.refuses("distill", "--config", tiny_recipe(run={"root": str(tmp_path / "occupied")}))
    assert "occupied" in message


# --- weights ----------------------------------------------------------------------------------------------------


def test_student_weights_of_another_architecture_are_refused(
    terminal: Terminal, tiny_recipe: Callable[..., Path], model_folder: Callable[..., Path]
) -> None:
    folder = model_folder("tiny_w16")
    path = tiny_recipe(student={"weights": str(folder)})
    message = terminal.refuses("distill", "--config", path)
    assert str(folder) in message
    assert "another architecture, tiny_w16" in message
    assert not (path.parent / "tiny").exists()


def test_damaged_student_weights_are_refused(
    terminal: Terminal, tiny_recipe: Callable[..., Path], model_folder: Callable[..., Path]
) -> None:
    weights = model_folder() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = terminal.refuses("distill", "--config", tiny_recipe(student={"weights": str(weights)}))
    assert f"{weights}: damaged, or not a safetensors file" in message


def test_teacher_weights_that_do_not_fit_the_teacher_are_refused(
    terminal: Terminal, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    save_file(create_model("tiny_w16", 17).state_dict(), tmp_path / "teacher.safetensors")
    teacher = {"weights": str(tmp_path / "teacher.safetensors"), "arch": "tiny_w32"}
    message = terminal.refuses("distill", "--config", tiny_recipe(distill={"mode": "fpd"}, teacher=teacher))
    assert "teacher.safetensors: the weights do not fit" in message
    assert "tiny_w16" in message


def test_a_teacher_of_another_skeleton_is_refused(
    terminal: Terminal, tiny_recipe: Callable[..., Path], model_folder: Callable[..., Path]
) -> None:
    folder = model_folder(skeleton=load_skeleton(LEEDS))
    path = tiny_recipe(distill={"mode": "fpd"}, teacher={"weights": str(folder)})
    message = terminal.refuses("distill", "--config", path)
    assert "trained on skeleton 'lsp' (14 keypoints), but the data have 'coco' (17)" in message
    assert not (path.parent / "tiny").exists()


def test_a_teacher_of_another_size_is_refused(
    terminal: Terminal, tiny_recipe: Callable[..., Path], model_folder: Callable[..., Path]
) -> None:
    folder = model_folder(input_size=(128, 96))
    message = terminal.refuses(
        "distill", "--config", tiny_recipe(distill={"mode": "fpd"}, teacher={"weights": str(folder)})
    )
    assert "takes [128, 96] (height, width), but data.input_size is [64, 64]" in message


def test_a_teacher_folder_that_is_no_model_is_refused(
    terminal: Terminal, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    message = terminal.refuses(
        "distill", "--config", tiny_recipe(distill={"mode": "fpd"}, teacher={"weights": str(tmp_path)})
    )
    assert f"{tmp_path}: not a model folder (no config.json)" in message


# --- runs that exist --------------------------------------------------------------------------------------------


def test_a_run_that_was_begun_by_another_recipe_is_refused(terminal: Terminal, finished_run: Path) -> None:
    before = {path: path.read_bytes() for path in (finished_run.parent / "finished").rglob("*") if path.is_file()}
    message = terminal.refuses("distill", "--config", finished_run, "optim.lr=0.5", "data.augment.flip=0")
    assert "this run was begun by another recipe; choose another run.name, or undo" in message
    assert "optim.lr: 0.001 -> 0.5" in message
    assert "data.augment.flip: 0.5 -> 0.0" in message
    after = {path: path.read_bytes() for path in (finished_run.parent / "finished").rglob("*") if path.is_file()}
    assert after == before


def test_starting_afresh_is_refused_where_a_run_exists(terminal: Terminal, finished_run: Path) -> None:
    message = terminal.refuses("distill", "--config", finished_run, "--resume", "none")
    assert "finished: this run exists; continue it with --resume auto, or choose another run.name" in message


@pytest.mark.parametrize("directory", ["nowhere", "finished", "finished/checkpoints/latest"])
def test_resuming_from_what_is_no_checkpoint_is_refused(terminal: Terminal, finished_run: Path, directory: str) -> None:
    path = finished_run.parent / directory
    message = terminal.refuses("distill", "--config", finished_run, "--resume", path)
    assert f"{path}: cannot be resumed" in message


def test_going_on_with_other_data_is_refused(terminal: Terminal, finished_run: Path, tiny_valid: Path) -> None:
    message = terminal.refuses("distill", "--config", finished_run, f"data.train={tiny_valid}", "train.steps=3")
    assert "data.train is not what this run was begun with" in message


def test_a_recipe_that_ends_before_the_run_has_got_to_is_refused(terminal: Terminal, finished_run: Path) -> None:
    message = terminal.refuses("distill", "--config", finished_run, "train.steps=1")
    assert "already at step 2, but the recipe ends at step 1" in message


def test_a_run_without_a_whole_checkpoint_is_refused(terminal: Terminal, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run.parent / "finished", tmp_path / "finished")
    (checkpoint,) = (tmp_path / "finished" / "checkpoints").glob("step_*")
    (checkpoint / "student.safetensors").write_bytes(b"")
    message = terminal.refuses("distill", "--config", finished_run, f"run.root={tmp_path}")
    assert "step_00000002: passed over: student.safetensors has 0 bytes" in message
    assert "none of the 1 checkpoints is whole; remove them to start afresh" in message


# --- prepare ----------------------------------------------------------------------------------------------------


@pytest.fixture
def coco_files(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with one image, and the annotations of one person in it."""
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.jpg"), np.full((40, 30, 3), 128, dtype=np.uint8))
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 30, "height": 40}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 20, 30], "keypoints": [9, 9, 2] * 17}
        ],
        "categories": [{"id": 1, "name": "person", "keypoints": list(COCO.keypoints)}],
    }
    (tmp_path / "people.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "images", tmp_path / "people.json"


def prepare(images: Path, annotations: Path, *more: object) -> list[object]:
    output = annotations.parent / "shards"
    return ["prepare", "--images", images, "--annotations", annotations, "--output", output, *more]


def test_preparing_with_the_wrong_skeleton_is_refused(terminal: Terminal, coco_files: tuple[Path, Path]) -> None:
    message = terminal.refuses("fpd-accel", *prepare(*coco_files, "--skeleton", LEEDS))
    assert "people.json: 17 keypoints, but skeleton 'lsp' has 14" in message
    assert "--skeleton" in message
    assert not (coco_files[0].parent / "shards").exists()


def test_preparing_without_the_images_is_refused(terminal: Terminal, coco_files: tuple[Path, Path]) -> None:
    images, annotations = coco_files
    message = terminal.refuses("fpd-accel", *prepare(images.with_name("imagse"), annotations))
    assert "imagse: no such image folder" in message
    (images.parent / "empty").mkdir()
    message = terminal.refuses("fpd-accel", *prepare(images.with_name("empty"), annotations))
    assert "empty: no image of" in message
    assert "empty/a.jpg" in message
    assert sorted(path.name for path in images.parent.iterdir()) == ["empty", "images", "people.json"]


def test_preparing_twice_into_one_folder_is_refused(terminal: Terminal, coco_files: tuple[Path, Path]) -> None:
    code, message = terminal("fpd-accel", *prepare(*coco_files))
    assert code == 0, message
    assert "shards: exists" in terminal.refuses("fpd-accel", *prepare(*coco_files))


def test_a_skeleton_that_does_not_exist_is_refused(terminal: Terminal, coco_files: tuple[Path, Path]) -> None:
    assert "mine.yaml: no such skeleton" in terminal.refuses(
        "fpd-accel", *prepare(*coco_files, "--skeleton", "mine.yaml")
    )


def test_training_and_held_out_people_of_different_skeletons_are_refused(
    terminal: Terminal, tiny_recipe: Callable[..., Path], coco_files: tuple[Path, Path]
) -> None:
    images, annotations = coco_files
    content = json.loads(annotations.read_bytes())
    content["categories"][0]["keypoints"] = list(load_skeleton(LEEDS).keypoints)
    content["annotations"][0]["keypoints"] = [9, 9, 2] * 14
    annotations.write_text(json.dumps(content), encoding="utf-8")
    assert terminal("fpd-accel", *prepare(images, annotations, "--skeleton", LEEDS))[0] == 0
    path = tiny_recipe(data={"valid": str(annotations.parent / "shards")})
    message = terminal.refuses("distill", "--config", path)
    assert "data.valid: " in message
    assert "skeleton 'lsp', but data.train those of 'coco'" in message


# --- evaluate, predict, synth -----------------------------------------------------------------------------------


def test_evaluating_a_folder_that_is_no_model_is_refused(terminal: Terminal, tmp_path: Path, tiny_valid: Path) -> None:
    message = terminal.refuses("evaluate", "--model", tmp_path, "--data", tiny_valid)
    assert f"{tmp_path}: not a model folder (no config.json)" in message


def test_evaluating_on_what_is_no_dataset_is_refused(
    terminal: Terminal, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    message = terminal.refuses("evaluate", "--model", model_folder(), "--data", tmp_path / "nothing")
    assert "nothing: not a prepared dataset (no dataset.json)" in message


def test_evaluating_on_people_of_another_skeleton_is_refused(
    terminal: Terminal, tiny_valid: Path, model_folder: Callable[..., Path]
) -> None:
    folder = model_folder(skeleton=load_skeleton(LEEDS))
    message = terminal.refuses("evaluate", "--model", folder, "--data", tiny_valid)
    assert "skeleton 'lsp' (14" in message
    assert "'coco' (17" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "config.json: damaged"), ('{"arch": "tiny_w8"}', "skeleton: Field required")],
)
def test_a_damaged_description_of_a_model_is_refused(
    terminal: Terminal, tiny_valid: Path, model_folder: Callable[..., Path], content: str, words: str
) -> None:
    folder = model_folder()
    (folder / "config.json").write_text(content, encoding="utf-8")
    assert words in terminal.refuses("evaluate", "--model", folder, "--data", tiny_valid)


def test_a_model_of_an_architecture_that_does_not_exist_is_refused(
    terminal: Terminal, tiny_valid: Path, model_folder: Callable[..., Path]
) -> None:
    folder = model_folder()
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.replace("tiny_w8", "tiny_w9"), encoding="utf-8")
    assert "'tiny_w9' is not a model" in terminal.refuses("evaluate", "--model", folder, "--data", tiny_valid)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "boxes.json: no such file of boxes; `fpd-accel detect` writes one"),
        ("{", "boxes.json: not readable as JSON"),
        ("{}", "boxes.json: not a list of boxes in COCO's result format"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]', "boxes.json: box 0 of 1: score missing"),
        ('[{"image_id": -1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', "none of its 1 boxes can be used"),
    ],
)
def test_boxes_that_cannot_be_used_are_refused(
    terminal: Terminal,
    tiny_valid: Path,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    content: str | None,
    words: str,
) -> None:
    boxes, output = tmp_path / "boxes.json", tmp_path / "people.json"
    if content is not None:
        boxes.write_text(content, encoding="utf-8")
    arguments = ("--model", model_folder(), "--data", tiny_valid, "--boxes", boxes, "--output", output)
    assert words in terminal.refuses("evaluate", *arguments)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nms-threshold", "0"], "--nms-threshold is above 0 and at most 1"),
        (["--nms-threshold", "1.5"], "--nms-threshold is above 0 and at most 1"),
        (["--nms-threshold", "nan"], "--nms-threshold is above 0 and at most 1"),
        (["--box-threshold", "inf"], "--box-threshold is a finite number"),
        (["--scales", "0.9", "1.1"], "--scales are positive numbers, 1 among them"),
        (["--scales", "1", "nan"], "--scales are positive numbers, 1 among them"),
        (["--nms", "weak"], "invalid choice: 'weak'"),
    ],
)
def test_an_impossible_protocol_is_refused(terminal: Terminal, arguments: list[str], words: str) -> None:
    assert words in terminal.refuses("evaluate", "--model", "a", "--data", "b", *arguments)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("folder", "folder: is a folder; --output is the file to write"),
        ("file/people.json", "file: cannot be made: File exists"),
    ],
)
def test_where_people_cannot_be_written_nothing_is_evaluated(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, words: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr("fpd_accel.run.evaluate_folder", lambda *_, **__: pytest.fail("evaluated"))
    assert words in terminal.refuses("evaluate", "--model", "a", "--data", "b", "--output", tmp_path / output)


def test_people_are_written_whole_or_not_at_all(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpd_accel.run.evaluate_folder", lambda *_, **__: (object(), [{"image_id": 1}]))
    output = tmp_path / "new" / "people.json"
    assert terminal("evaluate", "--model", "a", "--data", "b", "--output", output)[0] == 0
    monkeypatch.setattr("fpd_accel.run.evaluate_folder", lambda *_, **__: (object(), []))
    (tmp_path / "new" / f".people.json.{os.getpid()}").mkdir()  # in the way of the temporary name
    message = terminal.refuses("evaluate", "--model", "a", "--data", "b", "--output", output)
    assert "people.json: cannot be written: Is a directory" in message
    assert json.loads(output.read_bytes()) == [{"image_id": 1}]


def test_an_impossible_batch_is_refused(terminal: Terminal) -> None:
    assert "--batch is at least 1" in terminal.refuses("evaluate", "--model", "a", "--data", "b", "--batch", 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.jpg"], "nothing.jpg: no such image"),
        (["people.json"], "people.json: not an image that can be decoded"),
        (["images/a.jpg", "--boxes", "nothing.json"], "nothing.json: not readable as JSON"),
        (["images/a.jpg", "--boxes", "people.json"], "people.json: wanted a mapping from file name to a list"),
        (["images/a.jpg", "--boxes", "flat.json"], "flat.json: wanted a mapping from file name to a list"),
        (["images/a.jpg", "--boxes", "words.json"], "words.json"),
        (["images/a.jpg", "--boxes", "number.json"], "number.json: wanted a mapping from file name to a list"),
        (["images/a.jpg", "--boxes", "long.json"], "long.json: wanted a mapping from file name to a list"),
        (["images/a.jpg", "--boxes", "nested.json"], "nested.json: not readable as JSON"),
        (["images/a.jpg", "--output", "people.json"], "people.json/a.png: cannot be written: File exists"),
        (["images/a.jpg", "--output", "taken"], "taken/keypoints.json: cannot be written: Is a directory"),
        (["images/a.jpg", "--boxes", "unnamed.json"], "unnamed.json: its boxes have no file_name"),
        (["images/a.jpg", "--boxes", "empty.json"], "empty.json: an empty list"),
        (["images/a.jpg", "--boxes", "thin.json"], "positive width and height"),
        (["images/a.jpg", "--device", "gpu"], "gpu"),
        (["images/a.jpg", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_predicting_with_what_is_not_there_is_refused(
    terminal: Terminal,
    coco_files: tuple[Path, Path],
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    folder = coco_files[0].parent
    monkeypatch.chdir(folder)
    (folder / "flat.json").write_text('{"a.jpg": [1, 2, 3, 4]}', encoding="utf-8")
    (folder / "words.json").write_text('{"a.jpg": [["x", "y", "w", "h"]]}', encoding="utf-8")
    (folder / "number.json").write_text('{"a.jpg": 5}', encoding="utf-8")
    (folder / "long.json").write_text(json.dumps({"a.jpg": [[1, 2, 3, 10**400]]}), encoding="utf-8")
    (folder / "nested.json").write_text("[" * 10**6, encoding="utf-8")
    (folder / "taken" / "keypoints.json").mkdir(parents=True)
    (folder / "thin.json").write_text('{"a.jpg": [[1, 2, 0, 4]]}', encoding="utf-8")
    detection = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}
    (folder / "unnamed.json").write_text(json.dumps([detection]), encoding="utf-8")
    (folder / "empty.json").write_text("[]", encoding="utf-8")
    message = terminal.refuses("fpd-accel", "predict", "--output", "out", *arguments, "--model", model_folder())
    assert words in message
    assert not list(folder.rglob(".*"))  # nothing staged is left


@pytest.mark.parametrize(
    ("images", "output", "words"),
    [
        (["a.jpg", "missing.jpg"], "out", "missing.jpg: no such image"),
        (["a.jpg", "other/a.png"], "out", "a.jpg and other/a.png would both be drawn to out/a.png"),
        (["a.jpg", "a.jpg"], "out", "would both be drawn"),
        (["other/a.png"], "other", "other/a.png: its overlay would replace it"),
    ],
)
def test_images_are_looked_at_before_anything_is_predicted(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: list[str], output: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for name in ("a.jpg", "other/a.png"):
        cv2.imwrite(name, np.full((40, 30, 3), 128, dtype=np.uint8))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert words in terminal.refuses("fpd-accel", "predict", *images, "--model", "none", "--output", output)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_what_was_detected_can_be_predicted_on(
    terminal: Terminal, coco_files: tuple[Path, Path], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    person = {"image_id": 1, "category_id": 1, "bbox": [1.5, 2, 20, 30], "score": 0.9, "file_name": "a.jpg"}
    others = [{**person, "category_id": 18}, {**person, "bbox": [1, 2, 0, 9]}, {**person, "file_name": "b.jpg"}]
    (tmp_path / "boxes.json").write_text(json.dumps([person, *others]), encoding="utf-8")
    arguments = ("--model", model_folder(), "--boxes", tmp_path / "boxes.json", "--output", tmp_path / "out")
    code, message = terminal("fpd-accel", "predict", coco_files[0] / "a.jpg", *arguments)
    assert code == 0, message
    (found,) = json.loads((tmp_path / "out" / "keypoints.json").read_bytes())
    assert (found["file_name"], found["bbox"], len(found["keypoints"])) == ("a.jpg", [1.5, 2, 20, 30], 51)


def test_predicting_without_a_model_is_refused(
    terminal: Terminal, coco_files: tuple[Path, Path], tmp_path: Path
) -> None:
    image = coco_files[0] / "a.jpg"
    message = terminal.refuses(
        "fpd-accel", "predict", image, "--model", tmp_path / "none", "--output", tmp_path / "out"
    )
    assert "none: not a model folder" in message


def test_drawing_nothing_is_refused(terminal: Terminal, tmp_path: Path) -> None:
    assert "ask for 1 image or more" in terminal.refuses("fpd-accel", "synth", tmp_path / "drawn", "--images", 0)
    assert not (tmp_path / "drawn").exists()


# --- as a shell sees it -----------------------------------------------------------------------------------------


def test_a_typo_ends_a_real_process_with_code_two(tiny_recipe: Callable[..., Path]) -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "distill.py"), "--config", str(tiny_recipe()), "train.stesp=3"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "train.stesp: unknown key; did you mean 'steps'?" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


@pytest.mark.parametrize(
    ("place", "mistake", "said"),
    [
        ("0", "train.stesp=3", ""),  # what all read alike, the first of all says
        ("0", "data.train=nowhere", "error (rank 1): "),  # files may be missing on one machine
        ("1", "data.train=nowhere", ""),
    ],
)
def test_other_processes_complain_of_the_files_of_their_machine_alone(
    place: str,
    mistake: str,
    said: str,
    terminal: Terminal,
    tiny_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", place)
    code, message = terminal("distill", "--config", tiny_recipe(), mistake)
    assert code == 2
    assert message.startswith(said)
    assert bool(message) == bool(said)


def test_without_a_mistake_the_code_is_zero(terminal: Terminal, tiny_recipe: Callable[..., Path]) -> None:
    path = tiny_recipe(train={"steps": 1, "global_batch": 2}, data={"valid": None})
    code, message = terminal("distill", "--config", path)
    assert code == 0, message
    assert (path.parent / "tiny" / "final" / "model.safetensors").is_file()
    assert torch.is_grad_enabled()
