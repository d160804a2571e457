"""Contradictions between the fields of a recipe, and files that a recipe names but that do not exist.

Each rule yields one message per mistake, which begins with the dotted path of the field. `SECTION_RULES` look at one
section; `contradictions` compares sections, and needs a recipe in which every section is valid.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fpd_accel.config.schema import Data, Distill, Evaluate, Optim, Recipe, Student, TeacherModel, Train
from fpd_accel.files import is_url
from fpd_accel.models.names import SIMCC_SUFFIX, input_problem, is_custom, is_model, unknown_model


def _data(data: Data) -> Iterator[str]:
    train = [] if isinstance(data.train, str) else data.train
    paths = [_normal(dataset.shards) for dataset in train]
    if len({dataset.weight is None for dataset in train}) > 1:
        yield "data.train: some datasets have a weight and some have none; give one to each, or to none"
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        yield f"data.train: {path} is listed more than once; give it a larger weight"
    if train and data.synthetic is not None:
        yield "data.synthetic: draws one dataset, but data.train is a list; name a path, or leave it out"
    if data.synthetic is not None and any(map(is_url, map(str, (data.train, data.valid)))):
        yield "data.synthetic: draws into folders, but data.train or data.valid is a URL; leave it out"
    if data.streaming and data.unlabelled is not None and data.unlabelled.boxes is not None:
        yield "data.streaming: boxes need their images at hand; leave out data.unlabelled.boxes, or streaming"
    if data.streaming and data.decoded_cache is not None:
        yield "data.decoded_cache: streamed images come and go; leave out the cache, or data.streaming"
    if any(side % 4 for side in data.input_size):
        yield f"data.input_size: {list(data.input_size)}: both sides have to be multiples of 4"


def _normal(path: str) -> str:
    return path.rstrip("/") if is_url(path) else os.path.normpath(path)


def _architecture(field: str, arch: str | None, arguments: dict[str, Any]) -> Iterator[str]:
    if arch is not None and not is_model(arch) and not is_custom(arch):
        yield f"{field}.arch: {unknown_model(arch)}"
    if arguments and (arch is None or not is_custom(arch)):
        yield f"{field}.arguments: goes with {field}.arch=package.module:Class; the name of ours says it all"


def _student(student: Student) -> Iterator[str]:
    yield from _architecture("student", student.arch, student.arguments)
    if student.weights is not None and student.init is not None:
        yield "student.weights, student.init: give one; weights are a whole network, init a backbone alone"
    if student.init is not None and (student.arch.startswith(("hourglass", "tiny")) or is_custom(student.arch)):
        yield f"student.init: no backbone of {student.arch} is published apart; use student.weights"


def _teacher(teacher: TeacherModel) -> Iterator[str]:
    yield from _architecture("teacher", teacher.arch, teacher.arguments)
    if teacher.recipe is not None and teacher.weights is not None:
        yield "teacher.weights, teacher.recipe: give one; the recipe's own run says where its weights go"
    if teacher.fp8 and teacher.shard:
        yield "teacher.fp8, teacher.shard: give one; layers in float8 are not sharded"
    if teacher.arch is not None and teacher.arch.endswith(SIMCC_SUFFIX) != (teacher.codec.name == "simcc"):
        yield f"teacher.codec.name: {teacher.codec.name!r} does not fit {teacher.arch!r}"


def _distill(distill: Distill) -> Iterator[str]:
    if (distill.alpha_schedule == "constant") != (distill.alpha_final is None):
        yield "distill.alpha_final: goes with alpha_schedule linear or cosine, and they with it"
    if distill.temperature is not None and distill.distance != "kl":
        yield "distill.temperature: goes with distill.distance=kl"


def _train(train: Train) -> Iterator[str]:
    if (train.steps is None) == (train.epochs is None):
        yield "train.steps, train.epochs: give exactly one of the two"
    if train.device_batch is not None and train.global_batch % train.device_batch:
        yield f"train.device_batch: {train.device_batch} does not divide train.global_batch ({train.global_batch})"
    if train.cuda_graphs and train.compile != "whole":
        yield f"train.cuda_graphs: goes with train.compile=whole, not {train.compile}"


def _optim(optim: Optim) -> Iterator[str]:
    if optim.schedule == "step" and not optim.milestones:
        yield "optim.milestones: schedule 'step' needs them (epochs); or use optim.schedule=constant"
    if list(optim.milestones) != sorted(set(optim.milestones)):
        yield f"optim.milestones: {list(optim.milestones)} do not increase"
    if optim.schedule == "cosine" and optim.final_lr > optim.lr:
        yield f"optim.final_lr: {optim.final_lr} is above optim.lr ({optim.lr})"


def _evaluate(evaluate: Evaluate) -> Iterator[str]:
    if 1.0 not in evaluate.scales or len(set(evaluate.scales)) < len(evaluate.scales):
        yield f"evaluate.scales: {list(evaluate.scales)}: 1.0 has to be among them, and each once"
    if evaluate.nms == "soft" and evaluate.nms_threshold == 0:
        yield "evaluate.nms_threshold: must be above 0 for soft suppression, which divides by it"


SECTION_RULES: dict[str, Callable[[Any], Iterator[str]]] = {
    "data": _data,
    "student": _student,
    "teacher": _teacher,
    "distill": _distill,
    "train": _train,
    "optim": _optim,
    "evaluate": _evaluate,
}
"""Rules about the fields of one section, by the name of the section."""


def contradictions(recipe: Recipe) -> Iterator[str]:
    """Yield each contradiction between sections."""
    train, optim, teacher = recipe.train, recipe.optim, recipe.teacher
    for field, arch in (("student.arch", recipe.student.arch), ("teacher.arch", teacher.arch)):
        if arch is not None and (problem := input_problem(arch, recipe.data.input_size)) is not None:
            yield f"data.input_size: {field}: {problem}"
    if train.steps is not None and optim.warmup_steps > train.steps:
        yield f"optim.warmup_steps: {optim.warmup_steps} is more than train.steps ({train.steps})"
    if recipe.distill.mode == "fpd" and teacher.weights is None and teacher.recipe is None:
        yield "distill.mode: 'fpd' needs a teacher; set teacher.weights, or use distill.mode=normal"
    if teacher.fp8 and train.precision != "bf16":
        yield "teacher.fp8: such layers give bfloat16; set train.precision=bf16, or leave it out"
    if recipe.evaluate.boxes is not None and recipe.data.valid is None:
        yield "evaluate.boxes: no held-out images to evaluate on; set data.valid to the shards of these images"
    if teacher.cache is not None and recipe.data.augment.views is None:
        yield (
            "teacher.cache: stores a fixed number of views of each person, but data.augment.views is not set; set it "
            "(to 4, say), or leave out the cache"
        )
    if teacher.cache is not None and recipe.data.streaming:
        yield "teacher.cache: is built from local images; leave out data.streaming, or the cache with its views"
    yield from _objective(recipe)


def _objective(recipe: Recipe) -> Iterator[str]:
    """Yield each contradiction between codec, losses and people without labels."""
    distill, simcc = recipe.distill, recipe.student.arch.endswith(SIMCC_SUFFIX)
    if simcc != (recipe.codec.name == "simcc"):
        yield (
            f"codec.name: {recipe.codec.name!r} does not fit {recipe.student.arch!r}; codec simcc goes with an "
            f"architecture that ends in {SIMCC_SUFFIX}, and with no other"
        )
    if simcc and distill.mode == "fpd" and distill.distance != "kl":
        yield "distill.distance: 'mse' compares heatmaps; a SimCC student takes distill.distance=kl"
    if simcc and distill.hard_keypoints is not None:
        yield "distill.hard_keypoints: is for heatmaps; a SimCC student does without it"
    if simcc and (recipe.evaluate.refine is not None or recipe.evaluate.scales != (1.0,)):
        yield "evaluate.refine, evaluate.scales: are for heatmaps; a SimCC student does without them"
    if recipe.data.unlabelled is not None and distill.mode != "fpd":
        yield "data.unlabelled: people without labels need a teacher: distill.mode=fpd"
    elif recipe.data.unlabelled is not None and distill.mask == "visible":
        alone = "counts labelled keypoints alone, of which data.unlabelled has none"
        yield f"distill.mask: 'visible' {alone}; use confident or all"


def teacher_contradictions(recipe: Recipe, teacher: Recipe) -> Iterator[str]:
    """Yield each contradiction between a recipe and the recipe of its teacher."""
    if teacher.run.directory == recipe.run.directory:
        yield f"teacher.recipe: {recipe.teacher.recipe}: writes to {teacher.run.directory} too; change run.name"
    if teacher.data.input_size != recipe.data.input_size:
        yield (
            f"teacher.recipe: data.input_size is {list(teacher.data.input_size)} there, "
            f"{list(recipe.data.input_size)} here; both networks see the same crop"
        )
    if (teacher.codec.name == "udp") != (recipe.codec.name == "udp"):
        yield (
            f"teacher.recipe: codec.name is {teacher.codec.name} there, {recipe.codec.name} here; UDP heatmaps use "
            "another pixel grid, so student and teacher must both use UDP"
        )
    if teacher.codec.name == "simcc" and recipe.codec.name != "simcc":
        yield "teacher.recipe: codec.name is simcc there; a heatmap student needs a heatmap teacher"
    if teacher.train.precision != recipe.train.precision:
        yield (
            f"teacher.recipe: train.precision is {teacher.train.precision} there, {recipe.train.precision} here; "
            "one command trains both in one precision, so set teacher.overrides"
        )


def missing_files(recipe: Recipe) -> Iterator[str]:
    """Yield each file of data and weights that the recipe names but that does not exist."""
    data, unlabelled = recipe.data, recipe.data.unlabelled
    datasets: dict[str, str | None] = {"data.unlabelled.shards": unlabelled.shards if unlabelled is not None else None}
    if data.synthetic is None:
        labelled: dict[str, str | None] = {path: dataset.shards for path, dataset in data.labelled.items()}
        datasets = labelled | {"data.valid": data.valid} | datasets
    for path, shards in datasets.items():
        if shards is not None and not is_url(shards) and not (Path(shards) / "dataset.json").is_file():
            yield f"{path}: {shards}: no prepared dataset there (dataset.json); write one with `fpd-accel prepare`"
    if unlabelled is not None and unlabelled.boxes is not None and not Path(unlabelled.boxes).is_file():
        yield f"data.unlabelled.boxes: {unlabelled.boxes}: no such file; `fpd-accel detect` writes one"
    student, boxes, teacher = recipe.student, recipe.evaluate.boxes, recipe.teacher
    if student.weights is not None and not Path(student.weights).exists():
        yield f"student.weights: {student.weights}: no such file or model folder"
    if boxes is not None and not Path(boxes).is_file():
        annotated = "null means the annotated boxes"
        yield f"evaluate.boxes: {boxes}: no such file; `fpd-accel detect` writes one, and {annotated}"
    if student.init is not None and not Path(student.init).exists():
        yield f"student.init: {student.init}: no such file"
    if recipe.distill.mode == "fpd" and teacher.weights is not None:
        if not Path(teacher.weights).exists():
            yield f"teacher.weights: {teacher.weights}: no such file or model folder; 'fpd' needs the teacher to exist"
        elif Path(teacher.weights).is_file() and teacher.arch is None:
            yield f"teacher.arch: missing; {teacher.weights} is a bare weights file and does not say what it is"
