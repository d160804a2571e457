"""torch.compile: graphs give the values of the plain networks and losses, and evaluation runs without them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import launch

from fpd_accel.config.loading import load_recipe
from fpd_accel.data.batch import Batch, DeviceCopy
from fpd_accel.training.run import run

GRAPHS = Path(__file__).with_name("graphs.py")


# The backend `eager` makes the same graphs and runs them without the C++ compiler, which takes a minute.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("choice", "graphs", "backend"),
    # Whole: the teacher, and the student with its losses. Units: a block of either, shared by two, and the losses.
    [
        pytest.param("whole", 2, "eager", marks=pytest.mark.parity),
        pytest.param("whole", 2, "inductor", marks=pytest.mark.parity),
        pytest.param("units", 3, "eager", marks=pytest.mark.parity),
        pytest.param("units", 3, "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_objective_equals_the_plain_one(choice: str, graphs: int, backend: str) -> None:
    command = [sys.executable, str(GRAPHS), choice, backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lru_cache" not in done.stderr
    found = json.loads(done.stdout)
    assert max(found["total"]) < 1e-6  # relative; fp32
    assert max(found["gradient"]) < 1e-5  # of the norm of all gradients
    assert max(found["statistics"]) < 1e-6
    assert max(found["teacher"]) < 1e-6
    assert found["graphs"] == [graphs] * 3  # another alpha makes no other graph
    assert found["graphs_after_evaluation"] == graphs
    assert "blocks.0.change.0.weight" in found["names"]  # the network's own names


def curve(directory: Path) -> list[float]:
    found = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [record["train_loss"] for record in found if record["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_runs_have_the_curve_of_plain_ones_on_one_and_two_ranks(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(train={"freeze_norm": True, "steps": 4}, log={"every_steps": 1})
    run(load_recipe(recipe, ["run.name=plain"]))
    for ranks, parallel, compiled in ((1, "ddp", "whole"), (2, "ddp", "whole"), (2, "fsdp2", "units")):
        name = f"{parallel}_{ranks}"
        overrides = [f"run.name={name}", f"train.parallel={parallel}", "train.compile=whole"]
        messages = launch(ranks, [["train", str(recipe), overrides]])
        assert f"compiling student ({compiled})" in messages
        np.testing.assert_allclose(curve(tmp_path / name), curve(tmp_path / "plain"), rtol=1e-5)


def random_batch() -> Batch:
    return Batch(
        crops=torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8),
        keypoints=torch.rand(2, 3, 2),
        visible=torch.ones(2, 3),
        centers=torch.zeros(2, 2),
        sizes=torch.ones(2, 2),
        rows=torch.arange(2),
    )


def test_batches_for_the_cpu_are_not_copied() -> None:
    batch = random_batch()
    copied = DeviceCopy(torch.device("cpu"))(batch)
    assert copied.crops.data_ptr() == batch.crops.data_ptr()
    assert copied.labelled is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_copied_beside_a_step_arrive_whole() -> None:
    copy = DeviceCopy(torch.device("cuda"))
    for _ in range(20):
        batch = random_batch()
        busy = torch.ones(4096, 4096, device="cuda")
        for _ in range(4):
            busy = busy @ busy / 4096
        copied = copy(batch.pin_memory())
        assert torch.equal(copied.crops.cpu(), batch.crops)
        assert torch.equal(copied.keypoints.cpu(), batch.keypoints)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(900)
def test_replayed_graphs_have_the_curve_of_plain_steps_and_resume(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(train={"steps": 6, "device_batch": 2})  # two forwards to a step
    replayed = ["train.compile=whole", "train.cuda_graphs=true"]
    for name, overrides in (("plain", []), ("replayed", [*replayed, "train.steps=3"]), ("replayed", replayed)):
        done = subprocess.run(
            [sys.executable, "recipes/distill.py", "--config", str(recipe), f"run.name={name}", *overrides],
            cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
            env={**os.environ, "TORCHINDUCTOR_CUDAGRAPH_OR_ERROR": "1"},  # else what cannot be replayed is run as it is
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(curve(tmp_path / "replayed"), curve(tmp_path / "plain"), rtol=1e-4)
