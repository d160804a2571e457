"""What the ranks of one launch do in the tests, one task after the other; imports are paid for once per launch.

torchrun --nproc_per_node 2 tests/ranks.py '[["train", "recipe.yaml", ["run.name=two"]], …]'
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fpd_accel import evaluation, teacher_cache
from fpd_accel.config import Evaluate, load_recipe
from fpd_accel.data.shards import Shards
from fpd_accel.distill import Distiller
from fpd_accel.errors import UserError
from fpd_accel.evaluation import evaluate
from fpd_accel.model_folder import load_model, read_model_config
from fpd_accel.processes import create_accelerator
from fpd_accel.run import run
from fpd_accel.student import Student


def train(recipe: str, overrides: list[str]) -> None:
    run(load_recipe(recipe, overrides))


def train_from(*recipes: str) -> None:
    """Each rank with its own recipe, which must not be."""
    try:
        run(load_recipe(recipes[int(os.environ["RANK"])], check_files=False))
    except UserError as error:
        sys.stderr.write(f"refused: {error}\n")  # in one piece: two ranks write into one pipe


def train_in_small_parts(recipe: str, overrides: list[str]) -> None:
    """A cache of the teacher has as many parts as it can."""
    teacher_cache.PART_BYTES = 1
    train(recipe, overrides)


def train_with_slow_scores(recipe: str, overrides: list[str], seconds: float) -> None:
    """The first rank takes its time over AP, as it does with a million people."""
    scored = evaluation.average_precision

    def slowly(*arguments: Any) -> dict[str, float]:
        time.sleep(seconds)
        return scored(*arguments)

    evaluation.average_precision = slowly
    try:
        train(recipe, overrides)
    finally:
        evaluation.average_precision = scored


def score(folder: str, shards: str, output: str) -> None:
    """Metrics, losses and people of a model folder, on batches of five."""
    accelerator = create_accelerator("fp32")
    torch.set_num_threads(1)  # sums in another order would be another rounding
    model, codec = load_model(folder), read_model_config(folder).create_codec()
    found = evaluate(
        model, Shards(shards), codec=codec, options=Evaluate(batch=5), accelerator=accelerator,
        compare=Distiller(model, None, codec).compare,
    )  # fmt: skip
    Path(f"{output}.{accelerator.process_index}").write_text(json.dumps(found))


def dtypes(recipe: str, overrides: list[str]) -> None:
    """What comes out of the last convolution of a prepared student, and out of the student."""
    from fpd_accel.models import create_model

    chosen = load_recipe(recipe, overrides)
    accelerator = create_accelerator(chosen.train.precision, parallel=chosen.train.parallel)
    student = Student(create_model("tiny_w8", 17), accelerator, train=chosen.train, optim=chosen.optim)
    inside: list[torch.dtype] = []
    student.network.head.register_forward_hook(lambda _module, _inputs, output: inside.append(output.dtype))
    heatmaps = student.model(torch.zeros(1, 3, 64, 64))[-1]
    if accelerator.is_main_process:
        weights = {parameter.dtype for parameter in student.network.parameters()}
        print("dtypes:", *inside, heatmaps.dtype, *weights, file=sys.stderr)


TASKS = {
    "train": train,
    "train_from": train_from,
    "train_in_small_parts": train_in_small_parts,
    "train_with_slow_scores": train_with_slow_scores,
    "score": score,
    "dtypes": dtypes,
}

if __name__ == "__main__":
    for name, *arguments in json.loads(sys.argv[1]):
        TASKS[name](*arguments)
