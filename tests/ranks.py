"""Tasks for the ranks of one launch, done one after the other.

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

from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Evaluate
from fpd_accel.data.batch import Batch
from fpd_accel.data.shards import Shards
from fpd_accel.distributed import shared_folder
from fpd_accel.distributed.accelerator import create_accelerator
from fpd_accel.distributed.preemption import StopSignal
from fpd_accel.distributed.watchdog import Watchdog
from fpd_accel.errors import Preempted, UserError
from fpd_accel.evaluation import evaluate as evaluation
from fpd_accel.evaluation.evaluate import evaluate
from fpd_accel.losses import Losses
from fpd_accel.training import trainer
from fpd_accel.training.distiller import Distiller
from fpd_accel.training.run import run
from fpd_accel.training.student import Student
from fpd_accel.training.teacher_cache import build as teacher_cache
from fpd_accel.weights.model_folder import load_model, read_model_config

RANK = int(os.environ.get("RANK", "0"))


def smooth_relu(feature: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """Return SiLU in place of ReLU.

    A sum in another order may round to the other side of ReLU's kink. The gradient of that pixel then changes by more
    than rounding, and so do all weights from there on.
    """
    return functional.silu(feature, inplace=inplace)


def without_kinks() -> None:
    """Replace ReLU in the networks of all following tasks."""
    functional.relu = smooth_relu


def train(recipe: str, overrides: list[str]) -> None:
    run(load_recipe(recipe, overrides))


def train_from(*recipes: str) -> None:
    """Train on each rank from its own recipe, which has to be refused."""
    try:
        run(load_recipe(recipes[RANK], check_files=False))
    except UserError as error:
        sys.stderr.write(f"refused: {error}\n")  # one write: two ranks share a pipe


def train_in_small_parts(recipe: str, overrides: list[str]) -> None:
    """Train with a teacher cache of as many parts as possible."""
    teacher_cache.PART_BYTES = 1
    train(recipe, overrides)


def train_on_machines_apart(recipe: str, folder: str) -> None:
    """Train on ranks that do not share a disk: each works in a folder of its own, and the paths are relative."""
    shared_folder.VISIBLE_SECONDS = 1.0
    Path(f"{folder}_{RANK}").mkdir()
    os.chdir(f"{folder}_{RANK}")
    try:
        train(recipe, [])
    except UserError as error:
        sys.stderr.write(f"refused: {error}\n")  # one write: two ranks share a pipe
        sys.exit(2)


def train_with_slow_scores(recipe: str, overrides: list[str], seconds: float, limit: float) -> None:
    """Train with an AP on rank 0 that takes longer than the watchdog of the others waits, as with a million people."""
    predict, average_precision, evaluate_all = evaluation.predict, evaluation.average_precision, trainer.evaluate

    def predict_and_lower_the_limit(*arguments: Any, watchdog: Watchdog, **options: Any) -> Any:
        found = predict(*arguments, watchdog=watchdog, **options)
        watchdog.alive("scores come next")
        watchdog.seconds = limit
        return found

    def slow_average_precision(*arguments: Any) -> dict[str, float]:
        time.sleep(seconds)
        return average_precision(*arguments)

    def evaluate_and_restore_the_limit(*arguments: Any, watchdog: Watchdog, **options: Any) -> Any:
        before = watchdog.seconds
        found = evaluate_all(*arguments, watchdog=watchdog, **options)
        watchdog.seconds = before
        return found

    with (
        patch.object(evaluation, "predict", predict_and_lower_the_limit),
        patch.object(evaluation, "average_precision", slow_average_precision),
        patch.object(trainer, "evaluate", evaluate_and_restore_the_limit),
    ):
        train(recipe, [*overrides, "evaluate.teacher=false"])


def train_recording_people(recipe: str, overrides: list[str], output: str, stop_after: int | None = None) -> None:
    """Train, and write the rows of the people in each micro-batch of a rank as a line of `output`.RANK.

    After `stop_after` micro-batches the last rank gets a signal to stop.
    """
    forward, stop, taken = Distiller.forward, StopSignal(), 0

    def recording(distiller: Distiller, batch: Batch) -> Losses:
        nonlocal taken
        taken += 1
        records.write(json.dumps(batch.rows.tolist()) + "\n")
        if taken == stop_after and int(os.environ["WORLD_SIZE"]) == RANK + 1:
            stop.name = "SIGUSR1"
        return forward(distiller, batch)

    with (
        Path(f"{output}.{RANK}").open("a") as records,
        patch.object(Distiller, "forward", recording),
        suppress(Preempted),
    ):
        run(load_recipe(recipe, overrides), stop=stop)


def train_recording_statistics(recipe: str, overrides: list[str], output: str) -> None:
    """Train, and write each rank's own normalisation statistics before they are averaged for the last time."""
    average_buffers = Student.average_buffers

    def recording(student: Student) -> None:
        own = {name: buffer.clone() for name, buffer in student.network.named_buffers() if buffer.is_floating_point()}
        save_file(own, f"{output}.{RANK}")
        average_buffers(student)

    with patch.object(Student, "average_buffers", recording):
        train(recipe, overrides)


def score(folder: str, shards: str, output: str) -> None:
    """Evaluate a model folder in batches of five, and write metrics, losses and people to `output`.RANK."""
    accelerator = create_accelerator("fp32")
    torch.set_num_threads(1)  # another order of sums rounds differently
    model, codec = load_model(folder), read_model_config(folder).create_codec()
    found = evaluate(
        model, Shards(shards), codec=codec, options=Evaluate(batch=5), accelerator=accelerator,
        compare=Distiller(model, None, codec).compare,
    )  # fmt: skip
    Path(f"{output}.{accelerator.process_index}").write_text(json.dumps(found))


def dtypes(recipe: str, overrides: list[str]) -> None:
    """Print the dtypes of the last convolution's output, of the student's output and of its weights."""
    from fpd_accel.models.create import create_model

    values = load_recipe(recipe, overrides)
    accelerator = create_accelerator(values.train.precision, parallel=values.train.parallel)
    student = Student(create_model("tiny_w8", 17), accelerator, train=values.train, optim=values.optim)
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
    "train_recording_people": train_recording_people,
    "train_recording_statistics": train_recording_statistics,
    "score": score,
    "dtypes": dtypes,
}

if __name__ == "__main__":
    for name, *arguments in json.loads(sys.argv[1]):
        TASKS[name](*arguments)
