"""What the ranks of one launch do in the tests, one task after the other; imports are paid for once per launch.

torchrun --nproc_per_node 2 tests/ranks.py '[["train", "recipe.yaml", ["run.name=two"]], …]'
"""

import json
import sys
from pathlib import Path

import torch

from fpd_accel.config import Evaluate, load_recipe
from fpd_accel.data.shards import Shards
from fpd_accel.distill import Distiller
from fpd_accel.evaluation import evaluate
from fpd_accel.model_folder import load_model, read_model_config
from fpd_accel.processes import create_accelerator
from fpd_accel.run import run


def train(recipe: str, overrides: list[str]) -> None:
    run(load_recipe(recipe, overrides))


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


if __name__ == "__main__":
    for name, *arguments in json.loads(sys.argv[1]):
        {"train": train, "score": score}[name](*arguments)
