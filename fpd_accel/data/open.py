"""Opening of a recipe's datasets: synthetic ones are drawn if they are missing, and all are checked together."""

import os
from pathlib import Path

from fpd_accel.config.schema import Data, Evaluate
from fpd_accel.console import say
from fpd_accel.data.coco import prepare_coco
from fpd_accel.data.detections import open_detections, with_boxes
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.pixel_cache import open_decoded
from fpd_accel.data.published.stream import open_training
from fpd_accel.data.shards import Shards
from fpd_accel.distributed.preemption import StopSignal
from fpd_accel.errors import ConfigError
from fpd_accel.synthetic.dataset import draw_dataset


def draw_missing_data(data: Data) -> None:
    """Draw and prepare the datasets of `data.synthetic` that do not exist yet; to be run by one process."""
    if data.synthetic is None:
        return
    assert isinstance(data.train, str)  # the recipe's rules ensure it
    datasets = [(data.train, data.synthetic.train_images, 2 * data.synthetic.seed)]
    if data.valid is not None:
        datasets.append((data.valid, data.synthetic.valid_images, 2 * data.synthetic.seed + 1))
    for shards, images, seed in datasets:
        if (Path(shards) / "dataset.json").is_file():
            continue
        drawn = Path(f"{Path(shards)}_coco")  # an ordinary COCO dataset beside the shards, prepared like any other
        if not drawn.exists():
            say(f"drawing {images} images of synthetic people into {drawn}")
            draw_dataset(drawn, images=images, seed=seed, workers=min(os.cpu_count() or 1, 8) if images > 100 else 0)
        prepare_coco(images=drawn / "images", annotations=drawn / "person_keypoints.json", output=shards)


def open_data(
    data: Data, evaluate: Evaluate, *, stop: StopSignal | None = None
) -> tuple[Mixture, Shards | None, Shards | None]:
    """Return (train, valid, unlabelled) datasets; the last two may be None.

    Their files are mapped, so that missing or damaged ones are found here, where all ranks learn of the error.
    `evaluate` may name a detector's boxes for `data.valid`.

    Raises:
        UserError: A dataset cannot be used, or the datasets do not match.
        Preempted: `stop` was requested while images were decoded.
    """
    train = _open_labelled(data)
    valid = _open_valid(data, evaluate, train)
    unlabelled = _open_unlabelled(data)
    opened = [shards for shards in (*train.datasets, valid, unlabelled) if shards is not None]
    for shards in opened:
        shards.open()
    if data.decoded_cache is not None:
        for shards in opened:
            shards.decoded = open_decoded(shards, data.decoded_cache, stop=stop)
    return train, valid, unlabelled


def _open_labelled(data: Data) -> Mixture:
    opened = {
        field: open_training(dataset.shards, streaming=data.streaming, window=data.stream_window)
        for field, dataset in data.labelled.items()
    }
    for field, shards in opened.items():
        _require_people(field, shards)
    weights = [dataset.weight for dataset in data.labelled.values() if dataset.weight is not None]
    return Mixture(tuple(opened.values()), tuple(weights) or None)


def _open_valid(data: Data, evaluate: Evaluate, train: Mixture) -> Shards | None:
    if data.valid is None:
        return None
    valid = Shards(data.valid)
    if valid.skeleton.keypoints != train.skeleton.keypoints:
        raise ConfigError(
            f"data.valid: {valid.path} has the keypoints of skeleton {valid.skeleton.name!r}, but data.train those of "
            f"{train.skeleton.name!r}"
        )
    valid = with_boxes(valid, evaluate)
    _require_people("data.valid", valid)
    return valid


def _open_unlabelled(data: Data) -> Shards | None:
    """Return the dataset without labels: the people of its shards, or a detector's boxes in them."""
    if data.unlabelled is None:
        return None
    shards = open_training(data.unlabelled.shards, streaming=data.streaming, window=data.stream_window)
    if data.unlabelled.boxes is not None:
        shards = open_detections(shards, data.unlabelled.boxes, threshold=data.unlabelled.box_threshold)
    _require_people("data.unlabelled.shards", shards)
    return shards


def _require_people(field: str, shards: Shards) -> None:
    if not len(shards):
        raise ConfigError(
            f"{field}: {shards.path} has images, but no people; detect people with `fpd-accel detect` and give the "
            "file as data.unlabelled.boxes or evaluate.boxes"
        )
