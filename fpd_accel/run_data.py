"""The people of a recipe: drawn if they are synthetic and missing, opened, and checked against each other."""

import os
from pathlib import Path

from accelerate import Accelerator

from fpd_accel.config import Recipe
from fpd_accel.data.coco import prepare_coco
from fpd_accel.data.decoded import open_decoded
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.data.synthetic import draw_dataset
from fpd_accel.data.window import open_training
from fpd_accel.errors import ConfigError
from fpd_accel.evaluation import open_detections, with_boxes
from fpd_accel.log import say
from fpd_accel.stop import StopRequest


def draw_missing_data(recipe: Recipe, accelerator: Accelerator) -> None:
    """What ``data.synthetic`` asks for and nobody has drawn yet; the first rank draws, the others wait."""
    synthetic = recipe.data.synthetic
    if synthetic is None:
        return
    assert isinstance(recipe.data.train, str)  # checked with the recipe
    wanted = [(recipe.data.train, synthetic.train_images, 2 * synthetic.seed)]
    if recipe.data.valid is not None:
        wanted.append((recipe.data.valid, synthetic.valid_images, 2 * synthetic.seed + 1))
    with accelerator.main_process_first():
        for path, images, seed in wanted:
            if not (Path(path) / "dataset.json").is_file():
                _draw_and_prepare(Path(path), images=images, seed=seed)


def _draw_and_prepare(shards: Path, *, images: int, seed: int) -> None:
    """Synthetic people as an ordinary COCO dataset beside the shards, and the shards made of it like of any other."""
    drawn = shards.with_name(f"{shards.name}_coco")
    if not drawn.exists():
        say(f"drawing {images} images of synthetic people into {drawn}")
        draw_dataset(drawn, images=images, seed=seed, workers=min(os.cpu_count() or 1, 8) if images > 100 else 0)
    prepare_coco(images=drawn / "images", annotations=drawn / "person_keypoints.json", output=shards)


def open_data(recipe: Recipe, stop: StopRequest | None = None) -> tuple[Mixture, Shards | None, Shards | None]:
    """Who is trained on, who is held out, and who has no labels; the last two may be nobody.

    Their files are mapped: what is missing or damaged on one machine is found here, while all listen.

    Raises:
        UserError: one of them cannot be used, or they do not go together.
        Preempted: ``stop`` was asked for while images were decoded.
    """
    train = _open_labelled(recipe)
    valid = _open_valid(recipe, train)
    unlabelled = _open_unlabelled(recipe)
    for people in (train, valid, unlabelled):
        if people is not None:
            people.open()
    if recipe.data.decoded_cache is not None:
        for shards in (*train.datasets, valid, unlabelled):
            if shards is not None:
                shards.decoded = open_decoded(shards, recipe.data.decoded_cache, stop=stop)
    return train, valid, unlabelled


def _open_valid(recipe: Recipe, train: Mixture) -> Shards | None:
    if recipe.data.valid is None:
        return None
    valid = Shards(recipe.data.valid)
    if valid.skeleton.keypoints != train.skeleton.keypoints:
        raise ConfigError(
            f"data.valid: {valid.path} has the keypoints of skeleton {valid.skeleton.name!r}, but data.train those of "
            f"{train.skeleton.name!r}"
        )
    valid = with_boxes(valid, recipe.evaluate)
    _refuse_nobody("data.valid", valid)
    return valid


def _open_labelled(recipe: Recipe) -> Mixture:
    labelled = recipe.data.labelled
    weights = [dataset.weight for dataset in labelled.values() if dataset.weight is not None]
    streaming, window = recipe.data.streaming, recipe.data.stream_window
    opened = {
        path: open_training(dataset.shards, streaming=streaming, window=window) for path, dataset in labelled.items()
    }
    for path, shards in opened.items():
        _refuse_nobody(path, shards)
    return Mixture(tuple(opened.values()), tuple(weights) or None)


def _open_unlabelled(recipe: Recipe) -> Shards | None:
    """People to learn from without labels: a detector's, or those of the shards."""
    options = recipe.data.unlabelled
    if options is None:
        return None
    shards = open_training(options.shards, streaming=recipe.data.streaming, window=recipe.data.stream_window)
    if options.boxes is not None:
        shards = open_detections(shards, options.boxes, threshold=options.box_threshold)
    _refuse_nobody("data.unlabelled.shards", shards)
    return shards


def _refuse_nobody(field: str, shards: Shards) -> None:
    if not len(shards):
        raise ConfigError(
            f"{field}: {shards.path} has images, but nobody in them; find people with `fpd-accel detect` and name "
            "the file as data.unlabelled.boxes, or evaluate.boxes"
        )
