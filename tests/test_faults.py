"""Faults of disks, data and processes end a job with one message, and the last checkpoint stays intact."""

import itertools
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from jobs import DISTILL, ENVIRONMENT, PATIENCE, ROOT, children, start, start_ranks, wait_for

from fpd_accel.models.create import create_model
from fpd_accel.skeleton import COCO
from fpd_accel.training.checkpoint import checkpoints, newest_whole, problem, read_state
from fpd_accel.weights.model_folder import ModelConfig, save_model

pytestmark = pytest.mark.faults


@pytest.fixture
def distill(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs the command in this process and returns its exit code and stderr."""

    def main(recipe: Path, *overrides: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(DISTILL), "--config", str(recipe), *overrides])
        capfd.readouterr()
        code = runpy.run_path(str(DISTILL))["main"]()
        return code, " ".join(capfd.readouterr().err.split())

    return main


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Return a function that arranges a call right after a step of a run in this process."""

    def arrange(step: int, action: Callable[[], object]) -> None:
        from fpd_accel.training.student import Student

        taken, steps = Student.step, itertools.count(1)

        def take(student: Student, rate: float) -> None:
            taken(student, rate)
            if next(steps) == step:
                action()

        monkeypatch.setattr(Student, "step", take)

    return arrange


def curve(directory: Path) -> list[tuple[int, float]]:
    found = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["train_loss"]) for record in found if record["kind"] == "train"]


def assert_intact(directory: Path, *, step: int) -> None:
    """Check that the newest checkpoint is that of a step, that all verify, and that there are no staged files."""
    folder = directory / "checkpoints"
    assert all(problem(checkpoint) is None for checkpoint in checkpoints(folder))
    newest = newest_whole(folder)
    assert newest is not None
    assert read_state(newest)["step"] == step
    assert sorted(path.name for path in folder.glob(".*")) == []
    assert (folder / "latest").read_text().strip() == newest.name


# ---- full disks


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, str], None]]:
    """Return a function that mounts a file system of a size at a folder, or changes the size of a mounted one."""
    mounted: list[Path] = []

    def mount(folder: Path, size: str) -> None:
        options = f"size={size},mode=755" if folder not in mounted else f"remount,size={size}"
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def short_recipe(tiny_recipe: Callable[..., Path]) -> Callable[[str], Path]:
    """Return a function that writes a recipe of six steps, with a checkpoint after every third."""

    def write(name: str, **sections: dict) -> Path:
        values = {
            "run": {"name": name},
            "train": {"steps": 6, "ema_decay": 0.9},
            "evaluate": {"every_epochs": 0.3},
            "checkpoint": {"every_steps": 3, "keep": 2},
        }
        for section, change in sections.items():
            values[section] = values.get(section, {}) | change
        return tiny_recipe(file_name=f"{name}.yaml", **values)

    return write


def test_disk_full_at_a_checkpoint(
    short_recipe: Callable[..., Path],
    distill: Callable[..., tuple[int, str]],
    small_disk: Callable[[Path, str], None],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "full" / "checkpoints"
    small_disk(folder, "2m")  # a checkpoint has 1.3 MB
    code, output = distill(short_recipe("full"))
    assert code == 2, output
    assert f"{folder}: the checkpoint of step 6 (" in output
    assert "No space left on device" in output
    assert "; step_00000003, before it, is intact; make room and run the same command again" in output
    assert "Traceback" not in output
    assert_intact(folder.parent, step=3)
    small_disk(folder, "64m")
    code, output = distill(tmp_path / "full.yaml")
    assert code == 0, output
    assert_intact(folder.parent, step=6)
    assert distill(short_recipe("whole"))[0] == 0
    assert curve(tmp_path / "full") == curve(tmp_path / "whole")


def test_file_larger_than_allowed_at_a_checkpoint(
    short_recipe: Callable[..., Path], distill: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    recipe = short_recipe("limited", evaluate={"every_epochs": None})
    assert distill(recipe, "train.steps=3")[0] == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        code, output = distill(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2, output
    assert "the checkpoint of step 6 (" in output
    assert "File too large" in output
    assert "step_00000003, before it, is intact" in output
    assert "Traceback" not in output
    assert_intact(tmp_path / "limited", step=3)
    assert distill(recipe)[0] == 0


PARTS = {
    "best": {},
    "final": {"evaluate": {"every_epochs": None}, "data": {"valid": None, "workers": 0}},
    "predictions": {},
    "pictures": {"log": {"pictures_every_steps": 2}},
    "tensorboard": {"log": {"trackers": ["tensorboard"]}},
}


@pytest.mark.parametrize("part", PARTS)
def test_disk_full_elsewhere(
    part: str,
    short_recipe: Callable[..., Path],
    distill: Callable[..., tuple[int, str]],
    small_disk: Callable[[Path, str], None],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "full" / part
    small_disk(folder, "4k")
    if part == "tensorboard":
        (folder / "others").write_bytes(bytes(4096))
    recipe = short_recipe("full", **PARTS[part])
    code, output = distill(recipe)
    assert code == 2, output
    assert str(tmp_path / "full") in output
    assert "No space left on device" in output
    assert "make room and run the same command again" in output
    assert "Traceback" not in output
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    found = checkpoints(tmp_path / "full" / "checkpoints")
    assert all(problem(checkpoint) is None for checkpoint in found)
    small_disk(folder, "64m")
    code, output = distill(recipe)
    assert code == 0, output
    assert_intact(tmp_path / "full", step=6)
    assert [step for step, _ in curve(tmp_path / "full")] == [1, 2, 3, 4, 5, 6]


def test_disk_full_at_the_metrics(
    short_recipe: Callable[..., Path],
    distill: Callable[..., tuple[int, str]],
    small_disk: Callable[[Path, str], None],
    tmp_path: Path,
) -> None:
    recipe = short_recipe("full", evaluate={"every_epochs": None}, data={"valid": None})
    assert distill(recipe, "train.steps=3", "optim.schedule=constant")[0] == 0
    saved = tmp_path / "saved"
    shutil.move(tmp_path / "full", saved)
    small_disk(tmp_path / "full", "16m")
    shutil.copytree(saved, tmp_path / "full", dirs_exist_ok=True)
    status = os.statvfs(tmp_path / "full")
    (tmp_path / "full" / "others").write_bytes(bytes(status.f_bfree * status.f_bsize - 3 * 4096))
    code, output = distill(recipe, "train.steps=90", "checkpoint.every_steps=100")
    assert code == 2, output
    assert "No space left on device" in output
    assert "make room and run the same command again" in output
    assert "Traceback" not in output
    assert_intact(tmp_path / "full", step=3)
    (tmp_path / "full" / "others").unlink()
    assert distill(recipe, "train.steps=90", "checkpoint.every_steps=100")[0] == 0
    assert [step for step, _ in curve(tmp_path / "full")] == list(range(1, 91))


def test_disk_full_on_the_rank_that_writes_ends_both(
    short_recipe: Callable[..., Path], small_disk: Callable[[Path, str], None], tmp_path: Path
) -> None:
    small_disk(tmp_path / "full" / "best", "4k")
    recipe = short_recipe("full", evaluate={"every_epochs": 0.5})  # after the checkpoint of step 3
    ranks = start_ranks(DISTILL, "--config", recipe)
    outputs = [rank.final_output() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert "No space left on device" in outputs[0]
    assert "the connection to another rank was lost or timed out" in outputs[1]
    assert "Traceback" not in outputs[0] + outputs[1]
    assert_intact(tmp_path / "full", step=3)


# ---- data that change under the job


@pytest.fixture
def own_shards(tiny_shards: Path, tmp_path: Path) -> Path:
    """Return a copy of the training shards that the test may damage."""
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def images_file(shards: Path) -> Path:
    return next((shards / "images").glob("*.arrow"))


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    os.truncate(file, 4096)


def replace(file: Path) -> None:
    other = file.with_name("other")
    shutil.copy(file, other)
    other.replace(file)


def overwrite(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size // 10)
        opened.write(b"\xff" * (size * 8 // 10))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [remove, truncate, replace, overwrite])
def test_data_changed_under_a_job(
    damage: Callable[[Path], None],
    workers: int,
    short_recipe: Callable[..., Path],
    own_shards: Path,
    after_step: Callable[[int, Callable[[], object]], None],
    distill: Callable[..., tuple[int, str]],
    tmp_path: Path,
) -> None:
    recipe = short_recipe(
        "read", data={"train": str(own_shards), "valid": None, "workers": workers}, train={"steps": 100},
        checkpoint={"every_steps": 5}, log={"every_steps": 5},
    )  # fmt: skip
    after_step(6, lambda: damage(images_file(own_shards)))
    code, output = distill(recipe)
    assert code == 2, output
    assert str(own_shards) in output
    assert "Traceback" not in output
    assert any(
        text in output for text in ("while the run was reading it", "a loader process ended", "no longer decodes")
    )
    assert_intact(tmp_path / "read", step=5)


def test_shard_removed_under_two_ranks_ends_both_with_one_message(
    short_recipe: Callable[..., Path], own_shards: Path, tmp_path: Path
) -> None:
    file = images_file(own_shards)
    script = tmp_path / "removing.py"
    script.write_text(
        "import itertools, os, runpy\n"
        "from fpd_accel.training.student import Student\n"
        "step, calls = Student.step, itertools.count(1)\n"
        "def step_and_remove(self, rate):\n"
        "    step(self, rate)\n"
        f"    if next(calls) == 5 and os.environ['RANK'] == '1': os.unlink({str(file)!r})\n"
        "Student.step = step_and_remove\n"
        f"runpy.run_path({str(DISTILL)!r}, run_name='__main__')\n"
    )
    recipe = short_recipe(
        "read", data={"train": str(own_shards), "valid": None, "workers": 1}, train={"steps": 100},
        log={"every_steps": 3},
    )  # fmt: skip
    ranks = start_ranks(script, "--config", recipe)
    outputs = [rank.final_output() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert "Traceback" not in outputs[0] + outputs[1]
    message = f"{file}: was removed while the run was reading it; step_00000003 is intact"
    assert [one.count(message) for one in outputs] == [1, 0], outputs
    assert [one.count("error") for one in outputs] == [1, 0], outputs
    assert_intact(tmp_path / "read", step=3)


@pytest.fixture
def ends_when_cut_short(
    after_step: Callable[[int, Callable[[], object]], None], distill: Callable[..., tuple[int, str]], tmp_path: Path
) -> Callable[[Path, Path], None]:
    """Return a function that truncates the images of a run, `read`, after step 6, and checks how the run ends."""

    def run(recipe: Path, people: Path) -> None:
        after_step(6, lambda: truncate(images_file(people)))
        code, output = distill(recipe)
        assert code == 2, output
        assert str(people) in output
        assert "Traceback" not in output
        assert_intact(tmp_path / "read", step=5)

    return run


@pytest.mark.parametrize("workers", [0, 1])
def test_held_out_data_truncated_under_a_job(
    workers: int,
    short_recipe: Callable[..., Path],
    tiny_valid: Path,
    ends_when_cut_short: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    valid = shutil.copytree(tiny_valid, tmp_path / "valid")
    recipe = short_recipe(
        "read", data={"valid": str(valid), "workers": workers}, train={"steps": 100}, evaluate={"every_epochs": 1},
        log={"every_steps": 5}, checkpoint={"every_steps": 5},
    )  # fmt: skip
    ends_when_cut_short(recipe, valid)


def test_unlabelled_data_truncated_under_a_job_without_loader_processes(
    short_recipe: Callable[..., Path],
    own_shards: Path,
    ends_when_cut_short: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    unlabelled = shutil.copytree(own_shards, tmp_path / "unlabelled")
    teacher = ModelConfig(arch="tiny_w8", skeleton=COCO, input_size=(64, 64))
    save_model(tmp_path / "teacher", create_model("tiny_w8", 17).state_dict(), teacher)
    recipe = short_recipe(
        "read", data={"valid": None, "unlabelled": {"shards": str(unlabelled)}}, train={"steps": 100},
        teacher={"weights": str(tmp_path / "teacher")}, distill={"mode": "fpd", "mask": "all"},
        log={"every_steps": 5}, checkpoint={"every_steps": 5},
    )  # fmt: skip
    ends_when_cut_short(recipe, unlabelled)


def test_a_bus_error_of_a_truncated_file_names_the_line_of_code(
    short_recipe: Callable[..., Path], own_shards: Path, tmp_path: Path
) -> None:
    script = tmp_path / "cut_short.py"
    script.write_text(
        "import os, runpy\n"
        "from fpd_accel.data.stream import PoseStream\n"
        "batch = PoseStream.batch\n"
        "def cut(self, samples):\n"
        f"    if samples.start == 20: os.truncate({str(images_file(own_shards))!r}, 4096)\n"
        "    return batch(self, samples)\n"
        "PoseStream.batch = cut\n"
        f"runpy.run_path({str(DISTILL)!r}, run_name='__main__')\n"
    )
    recipe = short_recipe(
        "cut", data={"train": str(own_shards), "valid": None}, checkpoint={"every_steps": 3, "background": False}
    )
    job = start(script, "--config", recipe)
    output = job.final_output()
    assert job.returncode == -signal.SIGBUS, output
    assert "Fatal Python error: Bus error" in output
    assert "stream.py" in output
    assert_intact(tmp_path / "cut", step=3)


# ---- losses of nan


def change_rows(folder: Path, change: Callable[[dict], dict]) -> None:
    """Rewrite the rows of an Arrow dataset."""
    rows = load_from_disk(str(folder))
    changed = Dataset.from_list([change(row) for row in rows], features=rows.features)
    del rows
    shutil.rmtree(folder)
    changed.save_to_disk(str(folder))


def order_of(shards: Path) -> np.ndarray:
    """Return the rows of `people` in the order of the first epoch with seed 0."""
    from fpd_accel.data.shards import Shards

    opened = Shards(shards)
    return opened.usable[opened.order(0, 0, source=0)]


@pytest.fixture
def spoilt_loss(tmp_path: Path) -> Callable[[int, int], Path]:
    """Return a function that writes a script like the command, in which the loss of one rank at one step is nan."""

    def write(rank: int, step: int) -> Path:
        script = tmp_path / "spoilt_loss.py"
        script.write_text(
            "import itertools, os, runpy, sys\n"
            "from dataclasses import replace\n"
            "from fpd_accel.training.distiller import Distiller\n"
            "forward, calls = Distiller.forward, itertools.count(1)\n"
            "def spoilt(self, batch):\n"
            "    losses = forward(self, batch)\n"
            f"    wrong = next(calls) == {step} and os.environ.get('RANK', '0') == '{rank}'\n"
            "    return replace(losses, total=losses.total * float('nan')) if wrong else losses\n"
            "Distiller.forward = spoilt\n"
            f"runpy.run_path({str(DISTILL)!r}, run_name='__main__')\n"
        )
        return script

    return write


def test_a_loss_of_nan_on_one_rank_ends_both_at_the_same_step(
    short_recipe: Callable[..., Path], spoilt_loss: Callable[[int, int], Path], tmp_path: Path
) -> None:
    recipe = short_recipe("spoilt", data={"valid": None}, log={"every_steps": 6})
    ranks = start_ranks(spoilt_loss(1, 5), "--config", recipe)
    outputs = [rank.final_output() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert f"{tmp_path / 'spoilt'}: the loss of step 5 is nan; nothing was saved after it" in outputs[0]
    assert "Traceback" not in outputs[0] + outputs[1]
    assert_intact(tmp_path / "spoilt", step=3)
    again = start_ranks(DISTILL, "--config", recipe)
    outputs = [rank.final_output() for rank in again]
    assert [rank.returncode for rank in again] == [0, 0], outputs
    assert_intact(tmp_path / "spoilt", step=6)
    assert [step for step, _ in curve(tmp_path / "spoilt")] == [1, 2, 3, 4, 5, 6]


def test_a_teacher_with_outputs_of_nan_ends_the_run(
    short_recipe: Callable[..., Path], distill: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    from fpd_accel.models.create import create_model
    from fpd_accel.skeleton import COCO
    from fpd_accel.weights.model_folder import ModelConfig, save_model

    weights = create_model("tiny_w8", 17).state_dict()
    weights["head.bias"].fill_(float("nan"))
    save_model(tmp_path / "teacher", weights, ModelConfig(arch="tiny_w8", skeleton=COCO, input_size=(64, 64)))
    sections = {"teacher": {"weights": str(tmp_path / "teacher")}, "distill": {"mode": "fpd"}}
    code, output = distill(short_recipe("spoilt", **sections))
    assert code == 2, output
    assert "the loss of step 1 is nan" in output
    assert checkpoints(tmp_path / "spoilt" / "checkpoints") == []


# ---- processes that end


def test_image_that_one_rank_alone_cannot_read_is_named_by_that_rank(
    short_recipe: Callable[..., Path], own_shards: Path, tmp_path: Path
) -> None:
    from fpd_accel.data.shards import Shards

    images = Shards(own_shards).people[order_of(own_shards).tolist()]["image_row"].tolist()
    image = next(images[k] for k in range(12, 24) if k % 4 >= 2 and images[k] not in images[:k])
    numbers = iter(range(10**6))
    change_rows(
        own_shards / "images", lambda record: record if next(numbers) != image else record | {"bytes": b"no picture"}
    )
    ranks = start_ranks(DISTILL, "--config", short_recipe("spoilt", data={"train": str(own_shards), "valid": None}))
    outputs = [rank.final_output() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert "error (rank 1):" in outputs[1]
    assert "the connection to another rank was lost or timed out" in outputs[0]
    assert "step_00000003 is intact, and the same command goes on" in outputs[0]
    assert "no longer decodes; prepare it again" in outputs[1]
    assert "Traceback" not in outputs[0] + outputs[1]


@pytest.fixture
def torchrun() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts the command on two ranks with torchrun."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        started.append(
            subprocess.Popen(
                [*launcher, str(DISTILL), *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            for each in (*children(process.pid), process.pid):
                os.kill(each, signal.SIGKILL)
        process.communicate()


def test_rank_that_is_killed_ends_the_job_and_the_same_command_goes_on(
    short_recipe: Callable[..., Path], torchrun: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    recipe = short_recipe("torn", train={"steps": 60}, data={"valid": None}, checkpoint={"every_steps": 5})
    job = torchrun("--config", str(recipe), "train.steps=40000", "optim.schedule=constant")
    metrics = tmp_path / "torn" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 12,' in metrics.read_text()):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.01)
    os.kill(max(children(job.pid)), signal.SIGKILL)  # `faults/kills.py` kills any of them
    _, output = job.communicate(timeout=PATIENCE)
    assert job.returncode not in (0, None)
    assert "the connection to another rank was lost or timed out" in output
    assert "SIGKILL" in output  # in torchrun's summary
    newest = newest_whole(tmp_path / "torn" / "checkpoints")
    assert newest is not None
    step = read_state(newest)["step"]
    again = start_ranks(DISTILL, "--config", recipe, f"train.steps={step + 5}")
    assert [rank.wait() for rank in again] == [0, 0], again[0].output()
    assert [step for step, _ in curve(tmp_path / "torn")] == list(range(1, step + 6))


def test_ctrl_c_ends_the_run_without_leaving_anything_half_written(
    short_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "interrupted"
    sections = {"train": {"steps": 40000}, "checkpoint": {"every_steps": 2}, "data": {"valid": None, "workers": 1}}
    job = start(DISTILL, "--config", short_recipe("interrupted", **sections))
    wait_for((folder / "checkpoints" / "latest").exists, "a checkpoint", job)
    wait_for(lambda: any((folder / "checkpoints").glob(".step_*.writing")), "another one", job, every=0.0005)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does: the loader processes get it too
    output = job.final_output()
    assert job.returncode == 130, output
    assert "interrupted; the same command continues from the last checkpoint" in output
    assert "Traceback" not in output
    newest = newest_whole(folder / "checkpoints")
    assert newest is not None
    assert_intact(folder, step=read_state(newest)["step"])
