"""What may happen to a running job, disks and data and processes, ends it with one message and costs nothing before."""

import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fpd_accel.checkpoint import checkpoints, newest_whole, problem, read_state

ROOT = Path(__file__).parents[1]
DISTILL = ROOT / "recipes" / "distill.py"
ENVIRONMENT = {
    **os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}  # fmt: skip
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        for child in children(process.pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def children(process: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env={**ENVIRONMENT, **environment}, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


def start_ranks(recipe: Path) -> list[subprocess.Popen[str]]:
    """Two ranks as a launcher would start them, each with its own exit code and its own last words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    everywhere = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(str(DISTILL), "--config", str(recipe), RANK=rank, LOCAL_RANK=rank, **everywhere) for rank in ("0", "1")
    ]


@pytest.fixture
def distill(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function that runs the command in this process; its exit code, and what it said."""

    def main(recipe: Path, *overrides: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(DISTILL), "--config", str(recipe), *overrides])
        capfd.readouterr()
        code = runpy.run_path(str(DISTILL))["main"]()
        return code, " ".join(capfd.readouterr().err.split())

    return main


@contextmanager
def at_step(directory: Path, step: int, deed: Callable[[], object]) -> Iterator[None]:
    """Do something to a run of this process when it has come to a step."""
    metrics, over = directory / "metrics.jsonl", threading.Event()

    def wait() -> None:
        while not over.wait(0.002):
            if metrics.exists() and f'"step": {step},' in metrics.read_text():
                deed()
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def curve(directory: Path) -> list[tuple[int, float]]:
    found = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["train_loss"]) for record in found if record["kind"] == "train"]


def assert_intact(directory: Path, *, step: int) -> None:
    """The newest checkpoint is that of a step, all verify, and nothing else lies beside them."""
    folder = directory / "checkpoints"
    assert all(problem(checkpoint) is None for checkpoint in checkpoints(folder))
    newest = newest_whole(folder)
    assert newest is not None
    assert read_state(newest)["step"] == step
    assert sorted(path.name for path in folder.glob(".*")) == []
    assert (folder / "latest").read_text().strip() == newest.name


# ---- disks that take no more


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, str], None]]:
    """A function that mounts a file system of some size at a folder, or gives the one there another size."""
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
    """Six steps, evaluated after each epoch, a checkpoint after each third step."""

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
    small_disk(folder, "2m")  # one has 1.3 MB
    code, said = distill(short_recipe("full"))
    assert code == 2, said
    assert f"{folder}: the checkpoint of step 6 (" in said
    assert "No space left on device" in said
    assert "; step_00000003, before it, is intact; make room and run the same command again" in said
    assert "Traceback" not in said
    assert_intact(folder.parent, step=3)
    small_disk(folder, "64m")
    code, said = distill(tmp_path / "full.yaml")
    assert code == 0, said
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
        code, said = distill(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2, said
    assert "the checkpoint of step 6 (" in said
    assert "File too large" in said
    assert "step_00000003, before it, is intact" in said
    assert "Traceback" not in said
    assert_intact(tmp_path / "limited", step=3)
    assert distill(recipe)[0] == 0


PARTS = {
    "best": {},
    "final": {"evaluate": {"every_epochs": None}, "data": {"valid": None, "workers": 0}},
    "predictions": {},
    "pictures": {"log": {"pictures_every_steps": 2}},
    "tensorboard": {"log": {"tensorboard": True}},
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
    code, said = distill(recipe)
    assert code == 2, said
    assert str(tmp_path / "full") in said
    assert "No space left on device" in said
    assert "make room and run the same command again" in said
    assert "Traceback" not in said
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    found = checkpoints(tmp_path / "full" / "checkpoints")
    assert all(problem(checkpoint) is None for checkpoint in found)
    small_disk(folder, "64m")
    code, said = distill(recipe)
    assert code == 0, said
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
    code, said = distill(recipe, "train.steps=90", "checkpoint.every_steps=100")
    assert code == 2, said
    assert "No space left on device" in said
    assert "make room and run the same command again" in said
    assert "Traceback" not in said
    assert_intact(tmp_path / "full", step=3)
    (tmp_path / "full" / "others").unlink()
    assert distill(recipe, "train.steps=90", "checkpoint.every_steps=100")[0] == 0
    assert [step for step, _ in curve(tmp_path / "full")] == list(range(1, 91))
