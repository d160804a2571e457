"""What the ranks of one launch do in the tests, one task after the other.

torchrun --nproc_per_node 2 tests/ranks.py '[["train", "recipe.yaml", ["run.name=two"]], …]'
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch.nn import functional

from fpd_accel import evaluation, shared_folder, teacher_cache, trainer
from fpd_accel.config import Evaluate, load_recipe
from fpd_accel.data.batch import Batch
from fpd_accel.data.shards import Shards
from fpd_accel.distill import Distiller
from fpd_accel.errors import Preempted, UserError
from fpd_accel.evaluation import evaluate
from fpd_accel.losses import Losses
from fpd_accel.model_folder import load_model, read_model_config
from fpd_accel.processes import create_accelerator
from fpd_accel.run import run
from fpd_accel.stop import StopRequest
from fpd_accel.student import Student
from fpd_accel.watchdog import Watchdog

RANK = int(os.environ.get("RANK", "0"))


def smooth_relu(feature: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """SiLU instead. A sum in another order may round to the other side of ReLU's kink: this one pixel then has another
    gradient, and from there on the weights are no longer equal but for rounding."""
    return functional.silu(feature, inplace=inplace)


def without_kinks() -> None:
    """All networks of the tasks to come."""
    functional.relu = smooth_relu


def train(recipe: str, overrides: list[str]) -> None:
    run(load_recipe(recipe, overrides))


def train_from(*recipes: str) -> None:
    """Each rank with its own recipe, which must not be."""
    try:
        run(load_recipe(recipes[RANK], check_files=False))
    except UserError as error:
        sys.stderr.write(f"refused: {error}\n")  # in one piece: two ranks write into one pipe


def train_in_small_parts(recipe: str, overrides: list[str]) -> None:
    """A cache of the teacher has as many parts as it can."""
    teacher_cache.PART_BYTES = 1
    train(recipe, overrides)


def train_on_machines_apart(recipe: str, folder: str) -> None:
    """Each rank has a disk of its own, as far as relative paths go."""
    shared_folder.LATENCY = 1.0
    Path(f"{folder}_{RANK}").mkdir()
    os.chdir(f"{folder}_{RANK}")
    try:
        train(recipe, [])
    except UserError as error:
        sys.stderr.write(f"refused: {error}\n")  # in one piece: two ranks write into one pipe
        sys.exit(2)


def train_with_slow_scores(recipe: str, overrides: list[str], seconds: float, limit: float) -> None:
    """The first rank takes so long over AP, as it does with a million people, and silence is allowed for less."""
    predict, average_precision, evaluate_all = evaluation.predict, evaluation.average_precision, trainer.evaluate

    def and_lower_the_limit(*arguments: Any, watchdog: Watchdog, **options: Any) -> Any:
        found = predict(*arguments, watchdog=watchdog, **options)
        watchdog.alive("scores come next")
        watchdog.seconds = limit
        return found

    def slowly(*arguments: Any) -> dict[str, float]:
        time.sleep(seconds)
        return average_precision(*arguments)

    def and_raise_it_again(*arguments: Any, watchdog: Watchdog, **options: Any) -> Any:
        before = watchdog.seconds
        found = evaluate_all(*arguments, watchdog=watchdog, **options)
        watchdog.seconds = before
        return found

    with (
        patch.object(evaluation, "predict", and_lower_the_limit),
        patch.object(evaluation, "average_precision", slowly),
        patch.object(trainer, "evaluate", and_raise_it_again),
    ):
        train(recipe, [*overrides, "evaluate.teacher=false"])


def train_noting_people(recipe: str, overrides: list[str], output: str, stop_after: int | None = None) -> None:
    """Rows of the people in each micro-batch of a rank, a line each; after so many the last rank is asked to stop."""
    forward, stop, taken = Distiller.forward, StopRequest(), 0

    def noting(distiller: Distiller, batch: Batch) -> Losses:
        nonlocal taken
        taken += 1
        notes.write(json.dumps(batch.rows.tolist()) + "\n")
        if taken == stop_after and int(os.environ["WORLD_SIZE"]) == RANK + 1:
            stop.name = "SIGUSR1"
        return forward(distiller, batch)

    with (
        Path(f"{output}.{RANK}").open("a") as notes,
        patch.object(Distiller, "forward", noting),
        suppress(Preempted),
    ):
        run(load_recipe(recipe, overrides), stop=stop)


def train_noting_statistics(recipe: str, overrides: list[str], output: str) -> None:
    """The statistics of each rank's own normalisation layers before they are averaged for the last time."""
    average_buffers = Student.average_buffers

    def noting(student: Student) -> None:
        own = {name: buffer.clone() for name, buffer in student.network.named_buffers() if buffer.is_floating_point()}
        save_file(own, f"{output}.{RANK}")
        average_buffers(student)

    with patch.object(Student, "average_buffers", noting):
        train(recipe, overrides)


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
    "without_kinks": without_kinks,
    "train": train,
    "train_from": train_from,
    "train_in_small_parts": train_in_small_parts,
    "train_on_machines_apart": train_on_machines_apart,
    "train_with_slow_scores": train_with_slow_scores,
    "train_noting_people": train_noting_people,
    "train_noting_statistics": train_noting_statistics,
    "score": score,
    "dtypes": dtypes,
}

if __name__ == "__main__":
    for name, *arguments in json.loads(sys.argv[1]):
        TASKS[name](*arguments)
