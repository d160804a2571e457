"""torch.compile: graphs give what the plain networks and losses give, and evaluation runs without them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fpd_accel.config import load_recipe
from fpd_accel.data.batch import Batch, DeviceCopy
from fpd_accel.errors import ConfigError, TrainingError
from fpd_accel.run import run

GRAPHS = Path(__file__).with_name("graphs.py")
RANKS = Path(__file__).with_name("ranks.py")


def compare(what: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(GRAPHS), what], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lru_cache" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("what", "graphs"),
    # Whole: the teacher, and the student with its losses. Units: a block of either, shared by two, and the losses.
    [("whole", 2), pytest.param("units", 3, marks=pytest.mark.slow)],
)
def test_graphs_give_what_is_written(what: str, graphs: int) -> None:
    found = compare(what)
    assert max(found["total"]) < 1e-6  # relative; fp32
    assert max(found["gradient"]) < 1e-5  # of the norm of all gradients
    assert max(found["statistics"]) < 1e-6
    assert max(found["taught"]) < 1e-6
    assert found["graphs"] == [graphs] * 3  # another alpha is no other graph
    assert found["graphs_after_evaluation"] == graphs
    assert "blocks.0.change.0.weight" in found["names"]  # names are the network's own


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
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    for ranks, parallel, what in ((1, "ddp", "whole"), (2, "ddp", "whole"), (2, "fsdp2", "whole")):
        name = f"{parallel}_{what}_{ranks}"
        overrides = [f"run.name={name}", f"train.parallel={parallel}", f"train.compile={what}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        tasks = json.dumps([["train", str(recipe), overrides]])
        done = subprocess.run(
            [*command, str(RANKS), tasks], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-5000:]
        said = "student (units)" if parallel == "fsdp2" else f"student ({what})"
        assert f"compiling {said}" in done.stderr
        np.testing.assert_allclose(curve(tmp_path / name), curve(tmp_path / "plain"), rtol=1e-5)


def test_replayed_graphs_need_one_graph_and_a_gpu(tiny_recipe: Callable[..., Path]) -> None:
    recipe = tiny_recipe()
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs: goes with train\.compile=whole, not units"):
        load_recipe(recipe, ["train.cuda_graphs=true", "train.compile=units"])
    with pytest.raises(TrainingError, match=r"train\.cuda_graphs: for one process on a GPU alone"):
        run(load_recipe(recipe, ["train.cuda_graphs=true", "train.compile=whole"]))


def random_batch() -> Batch:
    return Batch(
        crops=torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8),
        keypoints=torch.rand(2, 3, 2),
        visible=torch.ones(2, 3),
        centers=torch.zeros(2, 2),
        sizes=torch.ones(2, 2),
        rows=torch.arange(2),
    )


def test_batches_come_to_a_processor_as_they_are() -> None:
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
