"""Convert experiment files of the original implementation to one recipe, whose comments list the differences."""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from fpd_accel.config.loading import check_recipe
from fpd_accel.config.schema import Recipe
from fpd_accel.errors import ConfigError
from fpd_accel.import_config.text import Line, has_labels, initial_weights, write_text
from fpd_accel.import_config.yacs import EXTRA, Experiment, plain, read_yaml, show
from fpd_accel.models.names import MODELS

KEYPOINTS = {"coco": 17, "mpii": 16}  # by dataset of the original
HRNET_WIDTHS, RESNET_DEPTHS = (
    sorted(int(name.removeprefix(family)) for name in MODELS if name.startswith(family))
    for family in ("hrnet_w", "pose_resnet_")
)
HRNET_STAGES = {2: (2, 1), 3: (3, 4), 4: (4, 3)}  # stage: (branches, exchange modules)


def import_config(
    student: str | os.PathLike[str], overrides: Sequence[str] = (), *, teacher: str | os.PathLike[str] | None = None
) -> tuple[Recipe, str]:
    """Return the recipe of the original's experiment files, and its text with comments.

    Args:
        student: The file that the original takes as `--cfg`.
        overrides: Keys and values in turn, `["TRAIN.LR", "0.001", ...]`, which replace values of `student`.
        teacher: The file that the original takes as `--tcfg`; as there, the student's settings are its defaults.

    Raises:
        ConfigError: A file cannot be read, or a setting is unknown, of the wrong type, contradictory, or without a
            counterpart here; the message lists every mistake with its key and file.
    """
    trees = _read_files([student] if teacher is None else [student, teacher])
    experiment = Experiment()
    experiment.merge(trees[0], str(student))
    experiment.override(overrides)
    teacher_experiment = None
    if teacher is not None:
        teacher_experiment = Experiment(dict(experiment.values), dict(experiment.sources), wrong=set(experiment.wrong))
        teacher_experiment.merge(trees[1], str(teacher))

    lines = _convert(experiment, teacher_experiment)
    made_from = [["--cfg", str(student)], [] if teacher is None else ["--tcfg", str(teacher)], overrides]
    text = write_text(lines, experiment, teacher_experiment, made_from)
    recipe = _check(text, lines)
    mistakes = dict.fromkeys(experiment.mistakes + (teacher_experiment.mistakes if teacher_experiment else []))
    if mistakes or recipe is None:
        raise ConfigError("\n  ".join([f"{student}: cannot be converted to a recipe", *mistakes]))
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
    """Return the recipe in a text; if it is wrong, refuse the keys that its wrong values come from and return None."""
    try:
        return check_recipe(yaml.safe_load(text), source="recipe", check_files=False)
    except ConfigError as error:
        for mistake in str(error).splitlines()[1:]:
            path, _, problem = mistake.strip().partition(": ")
            line = next((line for line in lines if f"{path}.".startswith(f"{line.path}.")), lines[0])
            line.experiment.refuse(line.key, f"{problem} ({path} of a recipe)")
    return None


def _convert(experiment: Experiment, teacher_experiment: Experiment | None) -> list[Line]:
    """Return every value that a recipe takes from the settings, in the order of a recipe's sections."""
    distils = _distils(experiment, teacher_experiment)
    student = _architecture(experiment)
    teacher = _architecture(teacher_experiment) if teacher_experiment and distils else None
    _refuse_unsupported(experiment, teacher_experiment if distils else None)
    name = f"{experiment['DATASET.DATASET']}_{f'{teacher}_to_' if distils else ''}{student}"
    return [
        Line("run.name", name, experiment, "DATASET.DATASET", "and the networks"),
        *_data(experiment),
        Line("codec.sigma", float(experiment["MODEL.SIGMA"]), experiment, "MODEL.SIGMA", "cells of the heatmap"),
        *_student(experiment, student),
        *(_teacher(experiment, teacher_experiment, teacher) if teacher_experiment and distils else []),
        Line("distill.mode", "fpd" if distils else "normal", experiment, "KD.TRAIN_TYPE"),
        *([Line("distill.alpha", experiment["KD.ALPHA"], experiment, "KD.ALPHA")] if distils else []),
        *_train(experiment),
        *_optim(experiment),
        *_evaluate(experiment),
        Line("log.every_steps", experiment["PRINT_FREQ"], experiment, "PRINT_FREQ"),
    ]


def _architecture(experiment: Experiment) -> str | None:
    """Return the architecture that `MODEL.NAME` and `MODEL.EXTRA` describe; if there is none, refuse them."""
    family = experiment["MODEL.NAME"]
    if "MODEL.NAME" in experiment.wrong:
        return None
    if family not in EXTRA:
        meant = "".join(f"did you mean {near!r}? " for near in get_close_matches(family.lower(), EXTRA, n=1))
        experiment.refuse("MODEL.NAME", f"{show(family)} is not supported; {meant}choices: {', '.join(EXTRA)}")
        return None
    name = {"pose_hrnet": _hrnet, "pose_resnet": _pose_resnet, "hourglass": _hourglass}[family](experiment)
    read = {"MODEL.NAME2", *(f"MODEL.EXTRA.{key}" for key in EXTRA[family])}
    if read.isdisjoint(experiment.wrong):
        return name
    experiment.wrong.add("MODEL.NAME")  # the wrong network is reported already
    return None


def _hrnet(experiment: Experiment) -> str:
    channels = experiment["MODEL.EXTRA.STAGE2.NUM_CHANNELS"]
    width = channels[0] if channels and channels[0] in HRNET_WIDTHS else None
    if channels is not None and width is None:
        widths = ", ".join(map(str, HRNET_WIDTHS))
        problem = f"{show(channels)} is not supported; the first must be one of {widths}"
        experiment.refuse("MODEL.EXTRA.STAGE2.NUM_CHANNELS", problem)
    wanted: dict[str, Any] = {"FINAL_CONV_KERNEL": 1}
    for stage, (branches, modules) in HRNET_STAGES.items():
        wanted |= {
            f"STAGE{stage}.NUM_MODULES": modules,
            f"STAGE{stage}.NUM_BRANCHES": branches,
            f"STAGE{stage}.NUM_BLOCKS": [4] * branches,
            f"STAGE{stage}.BLOCK": "BASIC",
            f"STAGE{stage}.FUSE_METHOD": "SUM",
        }
        if width is not None:
            wanted[f"STAGE{stage}.NUM_CHANNELS"] = [width * 2**branch for branch in range(branches)]
    wanted.setdefault("STAGE2.NUM_CHANNELS", channels)
    _compare(experiment, wanted, f"the HRNet of width {width}" if width else "every HRNet")
    return f"hrnet_w{width}"


def _pose_resnet(experiment: Experiment) -> str:
    depth = experiment["MODEL.EXTRA.NUM_LAYERS"]
    if depth is not None and depth not in RESNET_DEPTHS:
        depths = ", ".join(map(str, RESNET_DEPTHS))
        experiment.refuse("MODEL.EXTRA.NUM_LAYERS", f"{depth} is not supported; choices: {depths}")
    wanted = {
        "FINAL_CONV_KERNEL": 1,
        "DECONV_WITH_BIAS": False,
        "NUM_DECONV_LAYERS": 3,
        "NUM_DECONV_FILTERS": [256] * 3,
        "NUM_DECONV_KERNELS": [4] * 3,
        "NUM_LAYERS": depth,
    }
    _compare(experiment, wanted, "the published PoseResNets")
    return f"pose_resnet_{depth}"


def _hourglass(experiment: Experiment) -> str:
    stacks, features = experiment["MODEL.EXTRA.NUM_STACKS"], experiment["MODEL.EXTRA.NUM_FEATURES"]
    if stacks is not None and stacks < 1:
        experiment.refuse("MODEL.EXTRA.NUM_STACKS", f"{stacks} is not supported; at least 1")
    if features is not None and (features < 8 or features % 4):
        experiment.refuse("MODEL.EXTRA.NUM_FEATURES", f"{features} is not supported; a multiple of 4, at least 8")
    if (name := experiment["MODEL.NAME2"]) != "hourglass":
        experiment.refuse("MODEL.NAME2", f"{show(name)} is not supported; the published networks are 'hourglass'")
    wanted = {"NUM_STACKS": stacks, "NUM_FEATURES": features, "NUM_BLOCKS": 1}
    _compare(experiment, wanted, "the published Hourglass networks")
    return f"hourglass_{stacks}x{features}"


def _compare(experiment: Experiment, wanted: dict[str, Any], network: str) -> None:
    """Refuse the values of `MODEL.EXTRA` that are missing, or not those of the published network."""
    for name, value in wanted.items():
        key = f"MODEL.EXTRA.{name}"
        if experiment[key] is None:
            experiment.refuse(key, f"missing; MODEL.NAME {experiment['MODEL.NAME']} needs it")
        elif experiment[key] != value:
            experiment.refuse(key, f"{show(experiment[key])} is not supported; {network} has {show(value)}")


def _distils(experiment: Experiment, teacher_experiment: Experiment | None) -> bool:
    """Return whether there is a teacher; refuse the settings if it is missing."""
    kind = experiment["KD.TRAIN_TYPE"]
    if kind not in ("FPD", "NORMAL"):
        experiment.refuse("KD.TRAIN_TYPE", f"{show(kind)} is not a choice; choices: FPD, NORMAL")
    if kind != "FPD":
        return False
    if not experiment["KD.TEACHER"]:
        experiment.refuse("KD.TEACHER", "missing; KD.TRAIN_TYPE FPD needs the teacher's weights (.pth)")
    if teacher_experiment is None:
        experiment.mistakes.append("--tcfg: missing; KD.TRAIN_TYPE FPD needs the teacher's experiment file")
    if teacher_experiment is None or not experiment["KD.TEACHER"]:
        experiment.wrong.add("KD.TRAIN_TYPE")  # the missing teacher is reported already
    return True


def _refuse_unsupported(experiment: Experiment, teacher_experiment: Experiment | None) -> None:
    """Refuse settings that change the original's weights or score and have no counterpart here."""
    dataset = experiment["DATASET.DATASET"]
    if dataset not in KEYPOINTS:
        experiment.refuse("DATASET.DATASET", f"{show(dataset)} is not supported; choices: {', '.join(KEYPOINTS)}")
    for settings in filter(None, (experiment, teacher_experiment)):
        if settings["MODEL.NUM_JOINTS"] != KEYPOINTS.get(dataset) and dataset in KEYPOINTS:
            wanted = f"DATASET.DATASET {dataset} has {KEYPOINTS[dataset]} keypoints"
            settings.refuse("MODEL.NUM_JOINTS", f"{settings['MODEL.NUM_JOINTS']}, but {wanted}")
        if not settings["LOSS.USE_TARGET_WEIGHT"]:
            settings.refuse("LOSS.USE_TARGET_WEIGHT", "false is not supported: only labelled keypoints count here")
    if (target := experiment["MODEL.TARGET_TYPE"]) != "gaussian":
        experiment.refuse("MODEL.TARGET_TYPE", f"{show(target)} is not supported: targets are 'gaussian' here")
    unsupported = (
        ("LOSS.USE_DIFFERENT_JOINTS_WEIGHT", True, dataset == "coco", "all keypoints weigh the same here"),
        ("DATASET.SELECT_DATA", True, True, "every person with a labelled keypoint is a training sample here"),
        ("TRAIN.SHUFFLE", False, True, "every epoch is a new permutation here"),
        ("TRAIN.NESTEROV", True, experiment["TRAIN.OPTIMIZER"] == "sgd", "SGD has plain momentum here"),
    )
    for key, value, is_read, reason in unsupported:
        if is_read and experiment[key] is value:
            experiment.refuse(key, f"{plain(value)} is not supported: {reason}")
    if dataset == "coco" and not experiment["TEST.USE_GT_BBOX"] and not experiment["TEST.COCO_BBOX_FILE"]:
        problem = "missing; TEST.USE_GT_BBOX false needs a detector's boxes, or set it to true"
        experiment.refuse("TEST.COCO_BBOX_FILE", problem)


def _data(experiment: Experiment) -> list[Line]:
    dataset, train, valid = (experiment[f"DATASET.{name}"] for name in ("DATASET", "TRAIN_SET", "TEST_SET"))
    if not has_labels(train):
        experiment.refuse("DATASET.TRAIN_SET", f"{show(train)} has no labels to train on")
    no_labels = "" if has_labels(valid) else "no labels, so no evaluation"
    valid = f"data/{dataset}/{valid}" if has_labels(valid) else None
    half_body = experiment["DATASET.PROB_HALF_BODY"]
    workers = -(-experiment["WORKERS"] // max(len(experiment["GPUS"]), 1))

    def line(path: str, value: object, key: str, note: str = "") -> Line:
        return Line(f"data.{path}", value, experiment, key, note)

    return [
        line("train", f"data/{dataset}/{train}", "DATASET.TRAIN_SET"),
        line("valid", valid, "DATASET.TEST_SET", no_labels),
        line("input_size", _input_size(experiment), "MODEL.IMAGE_SIZE", "there (width, height), here (height, width)"),
        line("workers", workers, "WORKERS", "there for all GPUs, here for each process"),
        line("augment.flip", 0.5 if experiment["DATASET.FLIP"] else 0.0, "DATASET.FLIP"),
        line("augment.scale", experiment["DATASET.SCALE_FACTOR"], "DATASET.SCALE_FACTOR"),
        line("augment.rotation", float(experiment["DATASET.ROT_FACTOR"]), "DATASET.ROT_FACTOR"),
        line("augment.rotation_probability", 0.6, "", "a constant in the original's code"),
        line("augment.half_body", min(max(half_body, 0.0), 1.0), "DATASET.PROB_HALF_BODY"),
        line("augment.half_body_minimum", experiment["DATASET.NUM_JOINTS_HALF_BODY"], "DATASET.NUM_JOINTS_HALF_BODY"),
    ]


def _input_size(experiment: Experiment) -> list[int]:
    """Return [height, width] of a crop in pixels; refuse heatmaps that are not a quarter of it."""
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
    checkpoint, imagenet = initial_weights(experiment)
    return [
        Line("student.arch", arch, experiment, "MODEL.NAME", "and MODEL.EXTRA"),
        Line("student.weights", checkpoint or None, experiment, "TRAIN.CHECKPOINT"),
        *([Line("student.init", imagenet, experiment, "MODEL.PRETRAINED")] if imagenet else []),
        Line("student.color", _color(experiment), experiment, "DATASET.COLOR_RGB"),
    ]


def _teacher(experiment: Experiment, teacher_experiment: Experiment, arch: str | None) -> list[Line]:
    color, own = _color(teacher_experiment), _color(experiment)
    mixed = "" if color == own else f"of --tcfg; the original fed it {own}, the student's"
    return [
        Line("teacher.arch", arch, teacher_experiment, "MODEL.NAME", "and MODEL.EXTRA of --tcfg"),
        Line("teacher.weights", experiment["KD.TEACHER"], experiment, "KD.TEACHER"),
        Line("teacher.color", color, teacher_experiment, "DATASET.COLOR_RGB", mixed),
    ]


def _color(experiment: Experiment) -> str:
    return "rgb" if experiment["DATASET.COLOR_RGB"] else "bgr"


def _train(experiment: Experiment) -> list[Line]:
    begin, end = experiment["TRAIN.BEGIN_EPOCH"], experiment["TRAIN.END_EPOCH"]
    per_gpu, gpus = experiment["TRAIN.BATCH_SIZE_PER_GPU"], len(experiment["GPUS"])
    if not gpus:
        experiment.refuse("GPUS", "lists none; the batch is TRAIN.BATCH_SIZE_PER_GPU times their number")
    if end <= begin:
        experiment.refuse("TRAIN.END_EPOCH", f"{end} is not after TRAIN.BEGIN_EPOCH {begin}")
    since = f"less TRAIN.BEGIN_EPOCH {begin}" if begin else ""
    number = f"times {gpus}, from GPUS" if gpus > 1 else "on one GPU, from GPUS"
    key = "TRAIN.BATCH_SIZE_PER_GPU"
    return [
        Line("train.epochs", end - begin, experiment, "TRAIN.END_EPOCH", since),
        Line("train.global_batch", per_gpu * max(gpus, 1), experiment, key, number),
        Line("train.device_batch", per_gpu, experiment, key, "the batch of BatchNorm, there and here"),
        Line("train.precision", "fp32", experiment, "", "as the original; bf16 is faster on a GPU"),
    ]


def _optim(experiment: Experiment) -> list[Line]:
    name, milestones = experiment["TRAIN.OPTIMIZER"], experiment["TRAIN.LR_STEP"]
    if name not in ("adam", "sgd"):
        experiment.refuse("TRAIN.OPTIMIZER", f"{show(name)} is not a choice, there or here; choices: adam, sgd")
    note = "there of every parameter, here of kernels alone"
    sgd = [
        Line("optim.weight_decay", experiment["TRAIN.WD"], experiment, "TRAIN.WD", note),
        Line("optim.momentum", experiment["TRAIN.MOMENTUM"], experiment, "TRAIN.MOMENTUM"),
    ]
    return [
        Line("optim.name", name, experiment, "TRAIN.OPTIMIZER"),
        Line("optim.lr", experiment["TRAIN.LR"], experiment, "TRAIN.LR"),
        *(sgd if name == "sgd" else []),
        Line("optim.schedule", "step" if milestones else "constant", experiment, "TRAIN.LR_STEP"),
        Line("optim.milestones", milestones, experiment, "TRAIN.LR_STEP", "epochs"),
        Line("optim.gamma", experiment["TRAIN.LR_FACTOR"], experiment, "TRAIN.LR_FACTOR"),
    ]


def _evaluate(experiment: Experiment) -> list[Line]:
    def line(name: str, key: str, value: object = None) -> Line:
        return Line(f"evaluate.{name}", experiment[key] if value is None else value, experiment, key)

    lines = [
        Line("evaluate.every_epochs", 1, experiment, "", "as the original"),
        line("batch", "TEST.BATCH_SIZE_PER_GPU"),
        line("flip_test", "TEST.FLIP_TEST"),
        line("flip_shift", "TEST.SHIFT_HEATMAP"),
    ]
    if not experiment["TEST.POST_PROCESS"]:
        lines.append(line("refine", "TEST.POST_PROCESS", "none"))
    if experiment["DATASET.DATASET"] == "mpii":
        return lines
    if has_labels(experiment["DATASET.TEST_SET"]):
        if experiment["TEST.USE_GT_BBOX"]:
            lines.append(Line("evaluate.boxes", None, experiment, "TEST.USE_GT_BBOX", "the annotated boxes"))
        else:
            lines += [line("boxes", "TEST.COCO_BBOX_FILE"), line("box_threshold", "TEST.IMAGE_THRE")]
    return [
        *lines,
        line("nms", "TEST.SOFT_NMS", "soft" if experiment["TEST.SOFT_NMS"] else "hard"),
        line("nms_threshold", "TEST.OKS_THRE"),
        line("keypoint_threshold", "TEST.IN_VIS_THRE"),
    ]
