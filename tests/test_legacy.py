"""Files written by version 0.1 (commit cb09a90) are read: shards, published shards, a model, an interrupted run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fpd_accel import load_model
from fpd_accel.config.loading import load_recipe
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream
from fpd_accel.evaluation.evaluate import evaluate
from fpd_accel.training.checkpoint import newest_whole, read_state
from fpd_accel.training.run import run

LEGACY = Path(__file__).parent / "legacy"  # written by legacy/write.py
EXPECTED = json.loads((LEGACY / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def legacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a copy of the files, to which the paths in the recipes are relative."""
    shutil.copytree(LEGACY, tmp_path / "legacy")
    shutil.copytree(LEGACY / "model", tmp_path / "legacy" / "run" / "teacher")  # a run keeps a copy of its teacher
    monkeypatch.chdir(tmp_path / "legacy")


def test_old_shards_and_old_published_shards_are_one_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    state = read_state(newest_whole(Path("run/checkpoints")))
    batches = []
    for shards in (Shards("shards"), Shards("published"), Shards(f"file://{Path('published').resolve()}")):
        assert (shards.fingerprint, len(shards), len(shards.images)) == (state["data_sha256"], 12, 5)
        batches.append(PoseStream(shards, input_size=(64, 64), batch_size=12).batch(range(12)))
    for batch in batches[1:]:
        assert all(torch.equal(getattr(batch, name), getattr(batches[0], name)) for name in ("crops", "keypoints"))


def test_an_old_model_folder_has_the_scores_that_it_had() -> None:
    scores, _ = evaluate(load_model("model"), Shards("shards"), input_size=(64, 64))
    old = EXPECTED["scores"]
    assert {name: scores[name] for name in old} == pytest.approx(old, abs=1e-6)


def test_an_old_run_is_resumed_with_the_losses_that_the_old_code_gave_without_interruption() -> None:
    run(load_recipe("recipe.yaml"))
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record, old in zip(records, EXPECTED["curve"], strict=True):
        for name in old.keys() - {"kind", "data_time", "step_time"}:
            assert record[name] == pytest.approx(old[name], rel=1e-4), name  # other machines sum in another order
    assert (Path("run") / "final" / "model.safetensors").is_file()
