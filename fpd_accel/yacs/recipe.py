"""From experiment files of the original implementation to one recipe, with what differs said in its comments."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fpd_accel.config import Evaluate, Recipe, Student, check_recipe
from fpd_accel.errors import ConfigError
from fpd_accel.yacs.architecture import find_architecture
from fpd_accel.yacs.notes import Start, has_labels, recipe_has
from fpd_accel.yacs.settings import Experiment, read_yaml, show
from fpd_accel.yacs.text import Line, write_text

KEYPOINTS = {"coco": 17, "mpii": 16}  # datasets of the original


def import_config(
    student: str | os.PathLike[str], overrides: Sequence[str] = (), *, teacher: str | os.PathLike[str] | None = None
) -> tuple[Recipe, str]:
    """The recipe that experiment files of the original amount to, and its text with comments.

    Args:
        student: what the original takes as ``--cfg``.
        overrides: keys and values in turn, ``["TRAIN.LR", "0.001", …]``, over what ``student`` says.
        teacher: what it takes as ``--tcfg``; read over the student's settings, as there.

    Raises:
        ConfigError: lists every mistake at once, each with its key and file: not readable, unknown, of the wrong type,
            contradictory, or without a counterpart here.
    """
    trees = _read_files([student] if teacher is None else [student, teacher])
    experiment = Experiment()
    experiment.merge(trees[0], str(student))
    experiment.override(overrides)
    instructor = None
    if teacher is not None:
        instructor = Experiment(dict(experiment.values), dict(experiment.sources), wrong=set(experiment.wrong))
        instructor.merge(trees[1], str(teacher))

    lines = _convert(experiment, instructor)
    files = (str(student), None if teacher is None else str(teacher))
    text = write_text(lines, experiment, instructor, files=files, overrides=overrides)
    recipe = _check(text, lines)
    mistakes = dict.fromkeys(experiment.mistakes + (instructor.mistakes if instructor else []))
    if mistakes or recipe is None:
        raise ConfigError("\n".join([f"{student}: cannot be converted to a recipe", *(f"  {m}" for m in mistakes)]))
    return recipe, text


def _read_files(paths: Sequence[str | os.PathLike[str]]) -> list[dict[Any, Any]]:
    trees, mistakes = [], []
    for path in paths:
        try:
            trees.append(read_yaml(Path(path)))
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return trees


def _check(text: str, lines: Sequence[Line]) -> Recipe | None:
    """The recipe that a text is; if none, what is wrong with a value is a mistake of the key that it comes from."""
    try:
        return check_recipe(yaml.safe_load(text), source="recipe", check_files=False)
    except ConfigError as error:
        for mistake in str(error).splitlines()[1:]:
            path, _, problem = mistake.strip().partition(": ")
            line = next((line for line in lines if f"{path}.".startswith(f"{line.path}.")), lines[0])
            line.experiment.refuse(line.key, f"{problem} ({path} of a recipe)")
    return None


def _convert(experiment: Experiment, instructor: Experiment | None) -> list[Line]:
    """Every value that a recipe takes from the settings, section by section in the order of a recipe."""
    distils = _distils(experiment, instructor)
    student = find_architecture(experiment)
    teacher = find_architecture(instructor) if instructor and distils else None
    _refuse_unsupported(experiment, instructor if distils else None)
    name = f"{experiment['DATASET.DATASET']}_{f'{teacher}_to_' if distils else ''}{student}"
    return [
        Line("run.name", name, experiment, "DATASET.DATASET", "and the networks"),
        *_data(experiment),
        Line("codec.sigma", float(experiment["MODEL.SIGMA"]), experiment, "MODEL.SIGMA", "cells of the heatmap"),
        *_student(experiment, student),
        *(_teacher(experiment, instructor, teacher) if instructor and distils else []),
        Line("distill.mode", "fpd" if distils else "normal", experiment, "KD.TRAIN_TYPE"),
        *([Line("distill.alpha", experiment["KD.ALPHA"], experiment, "KD.ALPHA")] if distils else []),
        *_train(experiment),
        *_optim(experiment),
        *_evaluate(experiment),
        Line("log.every_steps", experiment["PRINT_FREQ"], experiment, "PRINT_FREQ"),
    ]


def _distils(experiment: Experiment, instructor: Experiment | None) -> bool:
    """Whether there is a teacher; a mistake where one is asked for and not given."""
    kind = experiment["KD.TRAIN_TYPE"]
    if kind not in ("FPD", "NORMAL"):
        experiment.refuse("KD.TRAIN_TYPE", f"{show(kind)} is not a choice; choices: FPD, NORMAL")
    if kind != "FPD":
        return False
    if not experiment["KD.TEACHER"]:
        experiment.refuse("KD.TEACHER", "missing; KD.TRAIN_TYPE FPD needs the teacher's weights (.pth)")
    if instructor is None:
        experiment.mistakes.append("--tcfg: missing; KD.TRAIN_TYPE FPD needs the teacher's experiment file")
    if instructor is None or not experiment["KD.TEACHER"]:
        experiment.wrong.add("KD.TRAIN_TYPE")  # that it lacks a teacher is said already
    return True


def _refuse_unsupported(experiment: Experiment, instructor: Experiment | None) -> None:
    """Note what changes the trained weights or the score there, and has no counterpart here."""
    dataset = experiment["DATASET.DATASET"]
    if dataset not in KEYPOINTS:
        experiment.refuse("DATASET.DATASET", f"{show(dataset)} is not supported; choices: {', '.join(KEYPOINTS)}")
    for settings in filter(None, (experiment, instructor)):
        if settings["MODEL.NUM_JOINTS"] != KEYPOINTS.get(dataset) and dataset in KEYPOINTS:
            problem = (
                f"{settings['MODEL.NUM_JOINTS']}, but DATASET.DATASET {dataset} has {KEYPOINTS[dataset]} keypoints"
            )
            settings.refuse("MODEL.NUM_JOINTS", problem)
        if not settings["LOSS.USE_TARGET_WEIGHT"]:
            settings.refuse("LOSS.USE_TARGET_WEIGHT", "false is not supported: only labelled keypoints count here")
    target = experiment["MODEL.TARGET_TYPE"]
    unsupported = {
        "MODEL.TARGET_TYPE": (target != "gaussian", f"{show(target)} is not supported: targets are 'gaussian' here"),
        "LOSS.USE_DIFFERENT_JOINTS_WEIGHT": (
            experiment["LOSS.USE_DIFFERENT_JOINTS_WEIGHT"] and dataset == "coco",
            "true is not supported: all keypoints weigh the same here",
        ),
        "DATASET.SELECT_DATA": (
            experiment["DATASET.SELECT_DATA"],
            "true is not supported: everyone with a labelled keypoint is trained on here",
        ),
        "TRAIN.SHUFFLE": (
            not experiment["TRAIN.SHUFFLE"],
            "false is not supported: every epoch is a new permutation here",
        ),
        "TRAIN.NESTEROV": (
            experiment["TRAIN.NESTEROV"] and experiment["TRAIN.OPTIMIZER"] == "sgd",
            "true is not supported: SGD has plain momentum here",
        ),
        "TEST.COCO_BBOX_FILE": (
            dataset == "coco" and not experiment["TEST.USE_GT_BBOX"] and not experiment["TEST.COCO_BBOX_FILE"],
            "missing; TEST.USE_GT_BBOX false needs a detector's boxes, or set it to true",
        ),
        "TEST.SOFT_NMS": (
            experiment["TEST.SOFT_NMS"] and dataset == "coco" and not recipe_has(Evaluate, "nms"),
            "true is not supported: evaluation during training drops people that overlap, it does not score them down",
        ),
    }
    for key, (applies, problem) in unsupported.items():
        if applies:
            experiment.refuse(key, problem)


def _data(experiment: Experiment) -> list[Line]:
    dataset, train, valid = (experiment[f"DATASET.{name}"] for name in ("DATASET", "TRAIN_SET", "TEST_SET"))
    if not has_labels(train):
        experiment.refuse("DATASET.TRAIN_SET", f"{show(train)} is no set with labels to train on")
    no_labels = "" if has_labels(valid) else "no labels, so no evaluation"
    valid = f"data/{dataset}/{valid}" if has_labels(valid) else None
    half_body = experiment["DATASET.PROB_HALF_BODY"]
    workers = -(-experiment["WORKERS"] // max(len(experiment["GPUS"]), 1))

    def line(path: str, value: object, key: str, note: str = "") -> Line:
        return Line(f"data.{path}", value, experiment, key, note)

    return [
        line("train", f"data/{dataset}/{train}", "DATASET.TRAIN_SET"),
        line("valid", valid, "DATASET.TEST_SET", no_labels),
        line("input_size", _input_size(experiment), "MODEL.IMAGE_SIZE", "(width, height) there, (height, width) here"),
        line("workers", workers, "WORKERS", "for all GPUs there, per process here"),
        line("augment.flip", 0.5 if experiment["DATASET.FLIP"] else 0.0, "DATASET.FLIP"),
        line("augment.scale", experiment["DATASET.SCALE_FACTOR"], "DATASET.SCALE_FACTOR"),
        line("augment.rotation", float(experiment["DATASET.ROT_FACTOR"]), "DATASET.ROT_FACTOR"),
        line("augment.rotation_probability", 0.6, "", "no key there, but this value in the code"),
        line("augment.half_body", min(max(half_body, 0.0), 1.0), "DATASET.PROB_HALF_BODY"),
        line("augment.half_body_minimum", experiment["DATASET.NUM_JOINTS_HALF_BODY"], "DATASET.NUM_JOINTS_HALF_BODY"),
    ]


def _input_size(experiment: Experiment) -> list[int]:
    """[height, width] of a crop; the heatmap has to be a quarter of it."""
    sizes = ("MODEL.IMAGE_SIZE", "MODEL.HEATMAP_SIZE")
    for key in sizes:
        if len(experiment[key]) != 2:
            experiment.refuse(key, f"wanted width and height, not {show(experiment[key])}")
    if experiment.wrong.isdisjoint(sizes):
        image, heatmap = (experiment[key] for key in sizes)
        if image != [4 * side for side in heatmap]:
            quarter = ",".join(f"{side / 4:g}" for side in image)
            problem = f"{show(heatmap)} is not supported: a quarter of MODEL.IMAGE_SIZE {show(image)} is {quarter}"
            experiment.refuse("MODEL.HEATMAP_SIZE", problem)
    return experiment["MODEL.IMAGE_SIZE"][::-1]


def _student(experiment: Experiment, arch: str | None) -> list[Line]:
    start = Start.of(experiment)
    lines = [
        Line("student.arch", arch, experiment, "MODEL.NAME", "and MODEL.EXTRA"),
        Line("student.weights", start.finished or None, experiment, "TRAIN.CHECKPOINT"),
    ]
    if start.backbone and recipe_has(Student, "init"):
        lines.append(Line("student.init", start.backbone, experiment, "MODEL.PRETRAINED"))
    return [*lines, Line("student.color", _color(experiment), experiment, "DATASET.COLOR_RGB")]


def _teacher(experiment: Experiment, instructor: Experiment, arch: str | None) -> list[Line]:
    note = "and MODEL.EXTRA of --tcfg"
    color, same = _color(instructor), _color(instructor) == _color(experiment)
    mixed = "" if same else f"of --tcfg; the original fed it {_color(experiment)}, the student's"
    return [
        Line("teacher.arch", arch, instructor, "MODEL.NAME", note),
        Line("teacher.weights", experiment["KD.TEACHER"], experiment, "KD.TEACHER"),
        Line("teacher.color", color, instructor, "DATASET.COLOR_RGB", mixed),
    ]


def _color(experiment: Experiment) -> str:
    return "rgb" if experiment["DATASET.COLOR_RGB"] else "bgr"


def _train(experiment: Experiment) -> list[Line]:
    begin, end = experiment["TRAIN.BEGIN_EPOCH"], experiment["TRAIN.END_EPOCH"]
    per_gpu, gpus = experiment["TRAIN.BATCH_SIZE_PER_GPU"], len(experiment["GPUS"])
    if not gpus:
        experiment.refuse("GPUS", "names none; the batch is TRAIN.BATCH_SIZE_PER_GPU times their number")
    if end <= begin:
        experiment.refuse("TRAIN.END_EPOCH", f"{end} is not after TRAIN.BEGIN_EPOCH {begin}")
    since = f"less TRAIN.BEGIN_EPOCH {begin}" if begin else ""
    number = f"times {gpus}, from GPUS" if gpus > 1 else "on one GPU, from GPUS"
    key = "TRAIN.BATCH_SIZE_PER_GPU"
    return [
        Line("train.epochs", end - begin, experiment, "TRAIN.END_EPOCH", since),
        Line("train.global_batch", per_gpu * max(gpus, 1), experiment, key, number),
        Line("train.device_batch", per_gpu, experiment, key, "what BatchNorm sees, there and here"),
        Line("train.precision", "fp32", experiment, "", "as there; bf16 is faster on a GPU"),
    ]


def _optim(experiment: Experiment) -> list[Line]:
    name, milestones = experiment["TRAIN.OPTIMIZER"], experiment["TRAIN.LR_STEP"]
    if name not in ("adam", "sgd"):
        problem = f"{show(name)} is not a choice, and gives no optimizer there; choices: adam, sgd"
        experiment.refuse("TRAIN.OPTIMIZER", problem)
    schedule = "step" if milestones else "constant"
    lines = [
        Line("optim.name", name, experiment, "TRAIN.OPTIMIZER"),
        Line("optim.lr", experiment["TRAIN.LR"], experiment, "TRAIN.LR"),
    ]
    if name == "sgd":
        note = "of kernels alone here, of every parameter there"
        lines += [
            Line("optim.weight_decay", experiment["TRAIN.WD"], experiment, "TRAIN.WD", note),
            Line("optim.momentum", experiment["TRAIN.MOMENTUM"], experiment, "TRAIN.MOMENTUM"),
        ]
    return [
        *lines,
        Line("optim.schedule", schedule, experiment, "TRAIN.LR_STEP"),
        Line("optim.milestones", milestones, experiment, "TRAIN.LR_STEP", "epochs"),
        Line("optim.gamma", experiment["TRAIN.LR_FACTOR"], experiment, "TRAIN.LR_FACTOR"),
    ]


def _evaluate(experiment: Experiment) -> list[Line]:
    def line(name: str, key: str, value: object = None) -> Line:
        return Line(f"evaluate.{name}", experiment[key] if value is None else value, experiment, key)

    lines = [
        Line("evaluate.every_epochs", 1, experiment, "", "as there"),
        line("batch", "TEST.BATCH_SIZE_PER_GPU"),
        line("flip_test", "TEST.FLIP_TEST"),
        line("flip_shift", "TEST.SHIFT_HEATMAP"),
    ]
    if not experiment["TEST.POST_PROCESS"] and recipe_has(Evaluate, "refine"):
        lines.append(line("refine", "TEST.POST_PROCESS", "none"))
    if experiment["DATASET.DATASET"] == "mpii":
        return lines
    if recipe_has(Evaluate, "boxes") and has_labels(experiment["DATASET.TEST_SET"]):
        if experiment["TEST.USE_GT_BBOX"]:
            lines.append(Line("evaluate.boxes", None, experiment, "TEST.USE_GT_BBOX", "the annotated boxes"))
        else:
            lines += [line("boxes", "TEST.COCO_BBOX_FILE"), line("box_threshold", "TEST.IMAGE_THRE")]
    if recipe_has(Evaluate, "nms"):
        lines.append(line("nms", "TEST.SOFT_NMS", "soft" if experiment["TEST.SOFT_NMS"] else "hard"))
    return [*lines, line("nms_threshold", "TEST.OKS_THRE"), line("keypoint_threshold", "TEST.IN_VIS_THRE")]
