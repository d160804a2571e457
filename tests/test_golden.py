"""The loss curve of a tiny run is a file in the repository: a change states "same curve", or "new curve" and why.

To record a new curve: FPD_RECORD_GOLDEN=1 pytest tests/test_golden.py
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fpd_accel.config.loading import load_recipe

GOLDEN = Path(__file__).parent / "golden" / "tiny_fpd.json"
NAMES = ("train_loss", "train_pose_loss", "train_kd_pose_loss", "train_acc", "lr", "alpha")


def test_loss_curve_of_the_tiny_run_is_the_recorded_one(
    tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fpd_accel.training.run import run

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # on all cores, as it was recorded: threads sum in another order
    teacher = tiny_recipe(
        file_name="teacher.yaml", run={"name": "teacher"}, student={"arch": "tiny_w16"}, train={"steps": 6}
    )
    recipe = tiny_recipe(
        run={"name": "student"},
        teacher={"recipe": str(teacher)},
        distill={"mode": "fpd", "alpha": 0.7, "alpha_final": 0.3, "alpha_schedule": "linear"},
        train={"steps": 12, "device_batch": 2, "clip_norm": 1.0, "ema_decay": 0.9},
        optim={"name": "adamw", "lr": "3e-3", "schedule": "cosine", "warmup_steps": 3},
    )
    run(load_recipe(recipe))
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    curve = [{name: record[name] for name in NAMES} for record in map(json.loads, lines) if record["kind"] == "train"]
    if os.environ.get("FPD_RECORD_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(curve, indent=1) + "\n")
        pytest.fail(f"recorded {GOLDEN}; run again without FPD_RECORD_GOLDEN")
    recorded = json.loads(GOLDEN.read_text())
    assert len(curve) == len(recorded) == 12
    for name in NAMES:
        # Relative; processors differ in the order of their sums, and twelve steps of Adam amplify that.
        tolerance = 2e-2 if name.startswith("train_") else 1e-12
        found, wanted = ([step[name] for step in steps] for steps in (curve, recorded))
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=0.03 if name == "train_acc" else 0, err_msg=name)
