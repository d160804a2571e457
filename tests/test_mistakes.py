"""Mistakes of users at the command line: exit code 2, a message that says what is wrong, and never a traceback."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Once
from refusals import FINISHED, REFUSALS, SOUND, STEPS, Refusal
from terminal import ROOT, Place, Terminal, write_model, write_people

from fpd_accel.config.schema import Evaluate


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


@pytest.fixture(scope="session")
def finished_run(once: Once, tiny_shards: Path) -> Path:
    """Return the directory of a run of two steps that has come to its end."""
    from fpd_accel.config.loading import load_recipe
    from fpd_accel.training.run import run

    def write(folder: Path) -> None:
        place = Place(train=str(tiny_shards), run="finished")
        (folder / "finished.yaml").write_text(place.fill(FINISHED), encoding="utf-8")
        run(load_recipe(folder / "finished.yaml", [f"run.root={folder}"]))

    return once("finished", write) / "finished"


@pytest.fixture
def place(
    tiny_shards: Path, tiny_valid: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    """Return the paths that the table of refusals names; the test works in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    return Place(train=str(tiny_shards), valid=str(tiny_valid), finished_run=str(finished_run))


def pattern(line: str) -> str:
    """Return the regular expression of a line that leaves words out with "…"."""
    return ".*".join(re.escape(part.strip()) for part in line.split("…"))


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.id)
def test_a_mistake_is_answered_by_one_message_and_nothing_is_written(
    row: Refusal, terminal: Terminal, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in row.environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    place.write(row.files)
    words, says = [place.fill(word) for word in shlex.split(row.command)], [place.fill(line) for line in row.says]
    before = place.contents()
    message = terminal.refuses(*words)
    _, of_a_recipe, listed = message.partition("this recipe cannot be used\n")
    if of_a_recipe:
        assert f"error: {words[2]}: this" in message
        lines = [line.strip() for line in listed.splitlines()]
        assert len(lines) == len(says), message
        for line, expected in zip(lines, says, strict=True):
            assert re.match(pattern(expected), line), f"{line!r} is not {expected!r}"
    else:
        for expected in says:
            assert re.search(pattern(expected), message, re.DOTALL), f"no {expected!r} in {message!r}"
    assert place.contents() == before


def test_options_reach_the_evaluation_from_flags_and_from_keys(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(
        "fpd_accel.evaluation.folder.evaluate_folder", lambda *_, **keywords: (given.update(keywords), [])
    )
    flags = ("--model", "a", "--data", "b", "--boxes", "c", "--batch", 5, "--no-flip-test", "--precision", "bf16")
    assert terminal("evaluate", *flags, "nms=soft", "scales=[1.0, 1.1]", "evaluate.flip_shift=false")[0] == 0
    options = Evaluate(boxes="c", batch=5, flip_test=False, nms="soft", scales=(1.0, 1.1), flip_shift=False)
    assert given == {"options": options, "workers": 2, "precision": "bf16"}
    assert terminal("evaluate", "--model", "a", "--data", "b", "--workers", 0)[0] == 0
    assert given == {"options": Evaluate(), "workers": 0, "precision": "fp32"}


def test_people_are_written_whole_or_not_at_all(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpd_accel.evaluation.folder.evaluate_folder", lambda *_, **__: (object(), [{"image_id": 1}]))
    output = tmp_path / "new" / "people.json"
    assert terminal("evaluate", "--model", "a", "--data", "b", "--output", output)[0] == 0
    monkeypatch.setattr("fpd_accel.evaluation.folder.evaluate_folder", lambda *_, **__: (object(), []))
    (tmp_path / "new" / f".people.json.{os.getpid()}").mkdir()  # in the way of the temporary name
    message = terminal.refuses("evaluate", "--model", "a", "--data", "b", "--output", output)
    assert "people.json: cannot be written: Is a directory" in message
    assert json.loads(output.read_bytes()) == [{"image_id": 1}]


def test_detected_boxes_can_be_predicted_on(terminal: Terminal, tmp_path: Path) -> None:
    images, _ = write_people(tmp_path)
    person = {"image_id": 1, "category_id": 1, "bbox": [1.5, 2, 20, 30], "score": 0.9, "file_name": "a.jpg"}
    others = [{**person, "category_id": 18}, {**person, "bbox": [1, 2, 0, 9]}, {**person, "file_name": "b.jpg"}]
    (tmp_path / "boxes.json").write_text(json.dumps([person, *others]), encoding="utf-8")
    arguments = (
        "--model",
        write_model(tmp_path / "model", "tiny_w8"),
        "--boxes",
        tmp_path / "boxes.json",
        "--output",
        tmp_path / "out",
    )
    code, message = terminal("fpd-accel", "predict", images / "a.jpg", *arguments)
    assert code == 0, message
    (found,) = json.loads((tmp_path / "out" / "keypoints.json").read_bytes())
    assert (found["file_name"], found["bbox"], len(found["keypoints"])) == ("a.jpg", [1.5, 2, 20, 30], 51)


def test_keypoints_that_cannot_be_written_leave_nothing_half_written(terminal: Terminal, place: Place) -> None:
    Path("taken", "keypoints.json").mkdir(parents=True)
    words = [place.fill(word) for word in ["predict", "--output", "taken", "--model", "$tiny_w8", "$images/a.jpg"]]
    assert "taken/keypoints.json: cannot be written: Is a directory" in terminal.refuses("fpd-accel", *words)
    assert not list(Path().rglob(".*"))


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
    ("local_rank", "mistake", "begins"),
    [
        ("0", "train.stesp=3", ""),  # a mistake that every rank reads: rank 0 reports it
        ("0", "data.train=nowhere", "error (rank 1): "),  # files may be missing on one machine
        ("1", "data.train=nowhere", ""),
    ],
)
def test_other_ranks_report_missing_files_of_their_own_machine_only(
    local_rank: str,
    mistake: str,
    begins: str,
    terminal: Terminal,
    tiny_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    code, message = terminal("distill", "--config", tiny_recipe(), mistake)
    assert code == 2
    assert message.startswith(begins)
    assert bool(message) == bool(begins)


def test_every_command_from_drawing_to_prediction_ends_with_code_zero(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = SOUND.replace("$train", "shards").replace(STEPS, "{steps: 1, global_batch: 2}")
    Path("sound.yaml").write_text(text, encoding="utf-8")
    for command in (
        "fpd-accel synth drawn --images 3 --workers 0",
        "fpd-accel prepare --images drawn/images --annotations drawn/person_keypoints.json --output shards",
        "fpd-accel check shards",
        "fpd-accel publish shards published",
        "distill --config sound.yaml data.valid=published",
        "evaluate --model sound/best --data shards",
        "fpd-accel info sound/best",
        "fpd-accel predict drawn/images/000000000001.jpg --model sound/final --output found",
    ):
        code, message = terminal(*command.split())
        assert code == 0, f"{command}: {message}"
    assert len(json.loads(Path("found", "keypoints.json").read_bytes())) == 1
    assert torch.is_grad_enabled()
