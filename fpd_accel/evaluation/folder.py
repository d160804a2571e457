"""Evaluate a model folder on prepared people."""

from typing import Any

from fpd_accel.config.schema import Evaluate
from fpd_accel.data.detections import with_boxes
from fpd_accel.data.shards import Shards
from fpd_accel.distributed.accelerator import create_accelerator
from fpd_accel.errors import ConfigError
from fpd_accel.evaluation.evaluate import evaluate
from fpd_accel.evaluation.tables import Score, describe_protocol, show_scores
from fpd_accel.weights.model_folder import load_model, read_model_config


def evaluate_folder(
    folder: str, data: str, *, options: Evaluate | None = None, workers: int = 0, precision: str = "fp32"
) -> tuple[Score | None, list[dict[str, Any]]]:
    """Evaluate a model folder on prepared people, and print the table of its scores.

    The arguments are those of the command: `precision` is `fp32` or `bf16`, of the forward pass.

    Returns:
        The score, None on every rank except rank 0, and the people found in COCO's result format.

    Raises:
        UserError: Folder, data or boxes cannot be used, or folder and data have different keypoints.
    """
    options = options or Evaluate()
    config, shards = read_model_config(folder), Shards(data)
    if config.skeleton.keypoints != shards.skeleton.keypoints:
        raise ConfigError(
            f"{folder} predicts the keypoints of skeleton {config.skeleton.name!r} ({config.skeleton.num_keypoints}), "
            f"but {data} has {shards.skeleton.name!r} ({shards.skeleton.num_keypoints})"
        )
    shards = with_boxes(shards, options)
    accelerator = create_accelerator(precision, parallel="ddp")  # FSDP2 would shard parameters: needless here
    metrics, people = evaluate(
        accelerator.prepare_model(load_model(folder).to(accelerator.device), evaluation_mode=True),
        shards,
        codec=config.create_codec(),
        normalization=config.normalization,
        padding=config.box_padding,
        options=options,
        workers=workers,
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:
        return None, people
    score = Score(str(folder), config, metrics)
    show_scores(describe_protocol(shards, options), [score])
    return score, people
