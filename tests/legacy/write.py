"""Write the files of this folder with the code of version 0.1 (commit cb09a90).

    git worktree add ../old cb09a90
    PYTHONPATH=../old ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 python tests/legacy/write.py OUTPUT

The tests in `tests/test_legacy.py` read these files with the current code. OUTPUT gets shards of five synthetic images,
and the same published; a model folder; a run that was interrupted after step 2 of 4, without its `teacher`, which is a
copy of `model`; and `expected.json`: the scores of the model, and the curve and the weights of an uninterrupted run.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from fpd_accel.data.parquet import publish
from fpd_accel.data.synthetic import draw_dataset
from fpd_accel.model_folder import load_model
from fpd_accel.run import run
from fpd_accel.stop import StopRequest
from fpd_accel.student import Student

from fpd_accel.config import load_recipe
from fpd_accel.data.coco import prepare_coco
from fpd_accel.data.shards import Shards
from fpd_accel.errors import Preempted
from fpd_accel.evaluation import evaluate

COMMON: dict[str, Any] = {
    "data": {"train": "shards", "input_size": [64, 64], "workers": 0},
    "log": {"every_steps": 1, "pictures_every_steps": None, "tensorboard": False},
}
TEACHER: dict[str, Any] = COMMON | {
    "run": {"name": "teacher", "root": "."},
    "student": {"arch": "tiny_w8"},
    "distill": {"mode": "normal"},
    "train": {"steps": 400, "global_batch": 6},
    "optim": {"lr": 0.004, "schedule": "cosine"},
}
RUN: dict[str, Any] = COMMON | {
    "run": {"name": "run", "root": "."},
    "student": {"arch": "hourglass_1x8"},  # 5,000 parameters
    "teacher": {"weights": "model"},
    "distill": {"mode": "fpd", "mask": "all"},
    "train": {"steps": 4, "global_batch": 4, "ema_decay": 0.9},
    "optim": {"name": "adamw", "lr": 0.001, "weight_decay": 0.01, "schedule": "cosine"},
    "checkpoint": {"every_steps": 2, "keep": 5, "background": False},
}


def main() -> None:
    Path(sys.argv[1]).mkdir(parents=True)
    os.chdir(sys.argv[1])
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # one thread
    draw_dataset(Path("drawn"), images=5, seed=5, image_size=(96, 128), workers=0)
    prepare_coco(images="drawn/images", annotations="drawn/person_keypoints.json", output="shards")
    publish(Shards("shards"), "published")
    Path("teacher.yaml").write_text(yaml.safe_dump(TEACHER, sort_keys=False))
    run(load_recipe("teacher.yaml"))
    shutil.move("teacher/final", "model")
    Path("recipe.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    run(load_recipe("recipe.yaml"))
    shutil.move("run", "whole")
    interrupt(after=2)
    scores, _ = evaluate(load_model("model"), Shards("shards"), input_size=(64, 64))
    expected = {
        "scores": scores,
        "curve": [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()],
        "final_sha256": hashlib.sha256(Path("whole/final/model.safetensors").read_bytes()).hexdigest(),
    }
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    for name in ("drawn", "teacher", "whole", "run/teacher"):
        shutil.rmtree(name)
    Path("teacher.yaml").unlink()


def interrupt(*, after: int) -> None:
    """Begin the run again and ask it to stop after a step."""
    step, stop, taken = Student.step, StopRequest(), 0

    def counted(student: Student, rate: float) -> None:
        nonlocal taken
        step(student, rate)
        taken += 1
        if taken == after:
            stop.name = "SIGTERM"

    Student.step = counted  # type: ignore[method-assign]
    try:
        run(load_recipe("recipe.yaml"), stop=stop)
    except Preempted as preempted:
        print(preempted, file=sys.stderr)


if __name__ == "__main__":
    main()
