"""Write a converted recipe: a header that lists the differences, then each value with the key that it comes from.

"The original" is the code of leoxiaobin/deep-high-resolution-net.pytorch (HRNet) and its extension
ilovepose/fast-human-pose-estimation.pytorch (Fast Pose Distillation), whose programs are in `tools/`.
"""

import os
import posixpath
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fpd_accel.errors import ConfigError
from fpd_accel.files import replace_file
from fpd_accel.import_config.yacs import DEFAULTS, EXTRA, Experiment, one_line, plain

WIDTH = 120

# Why keys, given by their beginnings, never affect the trained weights or their score, whatever the other settings are.
_REASONS = {
    "a run writes to run.root/run.name here": "OUTPUT_DIR LOG_DIR",
    "never finds a checkpoint, since the original puts the time in the folder name; "
    "here, rerun the same command to resume": "AUTO_RESUME",
    "ignored; memory is always pinned when training on a GPU": "PIN_MEMORY",
    "only used in a file name": "RANK",
    "choice of kernels; affects speed and rounding, not the method": "CUDNN.",
    "never read": "MODEL.TAG_PER_JOINT LOSS.USE_OHKM LOSS.TOPK TRAIN.GAMMA1 TRAIN.GAMMA2 TRAIN.RESUME TEST.BBOX_THRE",
    "not read by tools/fpd_train.py": "LOSS.BETA LOSS.COARSE_TO_FINE KD.VALID_TYPE",
    "only used in a folder name": "DATASET.HYBRID_JOINTS_TYPE",
    "prepared data takes the place of this cache": "DATASET.CACHE_ROOT",
    "stored but never used": "TEST.NMS_THRE",
    "only read by tools/test.py; here: recipes/evaluate.py --model": "TEST.MODEL_FILE",
    "debug pictures; here log.pictures_every_steps": "DEBUG.",
}
WITHOUT_EFFECT = {
    key: reason for key in DEFAULTS for reason, keys in _REASONS.items() if key.startswith(tuple(keys.split()))
}

DETECTOR_KEYS = "TEST.COCO_BBOX_FILE TEST.IMAGE_THRE"
COCO_ONLY_KEYS = (
    "LOSS.USE_DIFFERENT_JOINTS_WEIGHT TEST.USE_GT_BBOX TEST.SOFT_NMS TEST.OKS_THRE TEST.IN_VIS_THRE " + DETECTOR_KEYS
)
HRNET_BACKBONE_LAYERS = "conv1 bn1 conv2 bn2 layer1 transition1 transition2 transition3 stage2 stage3 stage4"
# Besides MODEL.EXTRA. MODEL.NUM_JOINTS and LOSS.USE_TARGET_WEIGHT set nothing, but unsupported values are refused.
TEACHER_KEYS_READ = ("MODEL.NAME", "MODEL.NAME2", "MODEL.NUM_JOINTS", "LOSS.USE_TARGET_WEIGHT", "DATASET.COLOR_RGB")


def initial_weights(experiment: Experiment) -> tuple[str, str]:
    """Return the files (trained student, ImageNet weights of the backbone) that the original's programs load.

    At most one of them is not empty, and neither for random weights: a trained student has precedence.
    """
    checkpoint, pretrained = experiment["TRAIN.CHECKPOINT"], experiment["MODEL.PRETRAINED"]
    reads_pretrained = experiment["MODEL.INIT_WEIGHTS"] and experiment["MODEL.NAME"] != "hourglass"
    if checkpoint or not (reads_pretrained and pretrained):
        return checkpoint, ""
    return "", posixpath.join(experiment["DATA_DIR"], pretrained)


def has_labels(name: str) -> bool:
    """Return whether a data set has public labels, judged by its name: `val2017` has, `test-dev2017` has not."""
    return bool(name) and "test" not in name


def _prepare_commands(experiment: Experiment) -> Iterator[str]:
    """Yield the two lines of each shell command that converts a labelled set to `data/<dataset>/<set>`."""
    root = posixpath.join(experiment["DATA_DIR"], experiment["DATASET.ROOT"])
    dataset, train, valid = (experiment[f"DATASET.{name}"] for name in ("DATASET", "TRAIN_SET", "TEST_SET"))
    for name in filter(has_labels, dict.fromkeys((train, valid))):
        options = [("--images", posixpath.join(root, "images" if dataset == "mpii" else f"images/{name}"))]
        labels = f"annot/{name}.json" if dataset == "mpii" else f"annotations/person_keypoints_{name}.json"
        options += [("--annotations", posixpath.join(root, labels)), ("--output", f"data/{dataset}/{name}")]
        if dataset == "mpii" and name == valid:  # head sizes, for PCKh
            options.append(("--ground-truth", posixpath.join(root, f"annot/gt_{name}.mat")))
        flags = " --format mpii" if dataset == "mpii" else ""
        if dataset == "coco" and name == valid and not experiment["TEST.USE_GT_BBOX"]:
            # A detector also reports boxes in images without people, and they count in AP.
            flags = " --keep-empty-images"
        first, *further = (f"{option} {shlex.quote(one_line(value))}" for option, value in options)
        yield f"fpd-accel prepare{flags} {first} \\"
        yield f"    {' '.join(further)}"


def _differences(experiment: Experiment) -> Iterator[str]:
    """Yield the differences that matter when results are compared with the original's."""
    yield (
        "Learning rate: the original steps its schedule at the start of an epoch. With PyTorch 1.0, which it asks for, "
        "the rate falls from the epochs of TRAIN.LR_STEP on, as here. With PyTorch 1.1 or newer it falls one epoch "
        "earlier than that."
    )
    yield (
        "Random numbers: here they are a function of seed, epoch and person. The original sets no seed, and with "
        "PyTorch 1.0 all its loader processes draw the same NumPy numbers, and the same again in each epoch."
    )
    yield "The last, smaller batch of an epoch is filled here with the first people of the next epoch."
    checkpoint, imagenet = initial_weights(experiment)
    if not (checkpoint or experiment["MODEL.INIT_WEIGHTS"] or experiment["MODEL.NAME"] == "hourglass"):
        there = "MODEL.INIT_WEIGHTS false leaves PyTorch's initial weights"
        yield f"{there}; here a network is initialised as in its paper."
    if imagenet and not _all_layers(experiment):
        layers = plain(experiment["MODEL.EXTRA.PRETRAINED_LAYERS"])
        yield f"MODEL.EXTRA.PRETRAINED_LAYERS {layers}: here all layers with matching ImageNet weights load them."
    if experiment["DATASET.DATA_FORMAT"] == "zip":
        yield "DATASET.DATA_FORMAT zip: zip archives are not read here; unpack the images before `fpd-accel prepare`."


def _unused(experiment: Experiment, teacher_experiment: Experiment | None, *, distils: bool) -> Iterator[str]:
    """Yield a line `KEY value, KEY value: reason` per reason for settings that have no place in the recipe."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in (WITHOUT_EFFECT | _conditional(experiment, distils=distils)).items():
        if key in experiment.sources and key not in experiment.wrong:
            by_reason.setdefault(reason, []).append(f"{key} {plain(experiment[key])}")
    yield from (f"{', '.join(keys)}: {reason}" for reason, keys in by_reason.items())
    if teacher_experiment is None:
        return
    if not distils:
        yield "--tcfg: KD.TRAIN_TYPE NORMAL trains without a teacher"
        return
    read = {*TEACHER_KEYS_READ, *(key for key in teacher_experiment.values if key.startswith("MODEL.EXTRA."))}
    other = [key for key, value in teacher_experiment.values.items() if key not in read and value != experiment[key]]
    if other:
        keys = ", ".join(f"{key} {plain(teacher_experiment[key])}" for key in other)
        yield f"{keys}: from --tcfg only the network and the channel order are read"


def _conditional(experiment: Experiment, *, distils: bool) -> dict[str, str]:
    """Return the keys that have no effect because of other settings, with the first reason of each."""
    family, (checkpoint, imagenet) = experiment["MODEL.NAME"], initial_weights(experiment)
    own = {f"MODEL.EXTRA.{name}" for name in EXTRA.get(family, {})}
    others = " ".join(key for key in experiment.sources if key.startswith("MODEL.EXTRA.") and key not in own)
    initial, layers = "MODEL.PRETRAINED MODEL.INIT_WEIGHTS", "MODEL.EXTRA.PRETRAINED_LAYERS"
    implied = experiment["MODEL.INIT_WEIGHTS"] and experiment["MODEL.PRETRAINED"]
    unpacked = experiment["DATASET.DATA_FORMAT"] != "zip"
    rules = (
        (experiment["TRAIN.OPTIMIZER"] == "adam", "TRAIN.WD TRAIN.MOMENTUM TRAIN.NESTEROV", "not passed to Adam"),
        (family != "hourglass", "MODEL.NAME2", "only read by the hourglass"),
        (checkpoint, initial, "TRAIN.CHECKPOINT replaces all weights"),
        (family == "hourglass", initial, "not read by the hourglass"),
        (not experiment["MODEL.INIT_WEIGHTS"], "MODEL.PRETRAINED", "MODEL.INIT_WEIGHTS is false"),
        (implied, "MODEL.INIT_WEIGHTS", "implied by MODEL.PRETRAINED"),
        (True, others, f"not read by {family}"),
        (not imagenet, layers, "no ImageNet weights are loaded"),
        (_all_layers(experiment), layers, "all layers with matching ImageNet weights load them, as here"),
        (not distils, "KD.TEACHER KD.ALPHA", "KD.TRAIN_TYPE NORMAL trains without a teacher"),
        (experiment["DATASET.DATASET"] == "mpii", COCO_ONLY_KEYS, "only read for COCO"),
        (experiment["TEST.USE_GT_BBOX"], DETECTOR_KEYS, "no detector: TEST.USE_GT_BBOX is true"),
        (unpacked, "DATASET.DATA_FORMAT", "the file name comes from the annotations, extension included"),
    )
    reasons: dict[str, str] = {}
    for holds, keys, reason in rules:
        for key in keys.split() if holds else ():
            reasons.setdefault(key, reason)
    return reasons


def _all_layers(experiment: Experiment) -> bool:
    """Return whether all layers with matching ImageNet weights load them, as they do unless an HRNet names a subset."""
    layers = experiment["MODEL.EXTRA.PRETRAINED_LAYERS"]
    if experiment["MODEL.NAME"] != "pose_hrnet" or layers is None:
        return True
    return layers[:1] == ["*"] or set(layers) >= set(HRNET_BACKBONE_LAYERS.split())


@dataclass(frozen=True)
class Line:
    """One value of a recipe, and its origin."""

    path: str  # dotted path in the recipe, such as "optim.lr"
    value: Any
    experiment: Experiment
    key: str  # key of the experiment, such as "TRAIN.LR"; empty if there is none
    note: str = ""

    @property
    def comment(self) -> str:
        """The key and its value, whether that is the default, and the note."""
        if not self.key:
            return one_line(self.note)
        default = "" if self.key in self.experiment.sources else " (default)"
        origin = f"{self.key} {plain(self.experiment[self.key])}{default}"
        return one_line("; ".join(filter(None, (origin, self.note))))


def write_text(
    lines: Sequence[Line], experiment: Experiment, teacher: Experiment | None, made_from: Sequence[Sequence[str]]
) -> str:
    """Return the recipe as YAML with comments; no text in a comment can change the values.

    `made_from` are the options of the original's command line that give the settings, in words; some may be empty.
    """
    header = [
        "# Converted by `fpd-accel import-config` from experiment files of the original implementation (yacs):",
        *(text for words in made_from for text in _comment(shlex.join(map(one_line, words)), indent="#   ")),
        "# Behind each value: the key that it comes from. Settings that the files do not have take the original's "
        "defaults.",
        "#",
        "# Data, from the original's folders:",
        *(f"#   {command}" for command in _prepare_commands(experiment)),
        "#",
    ]
    values = {line.path: line.value for line in lines}
    distils = values["distill.mode"] == "fpd"
    if distils:
        again = "a second training of a finished student" if values["student.weights"] else "other random numbers"
        header += [
            *_comment(f"The control, the same without the teacher, as a gain may also come from {again}:"),
            "#   accelerate launch recipes/distill.py --config THIS_FILE \\",
            f"#       distill.mode=normal run.name={values['run.name']}_control",
            "#",
        ]
    header += ["# Differences from the original:", *_items(_differences(experiment))]
    left_out = _items(_unused(experiment, teacher, distils=distils))
    header += ["# Left out, as without effect on the result in the original or here:", *left_out] if left_out else []
    return "\n".join([*header, *_body(lines)]) + "\n"


def write_recipe(text: str, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a recipe, whole or not at all.

    Raises:
        ConfigError: The file exists and `force` is not set, or it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path}: a folder; give the name of a file, such as {path / 'recipe.yaml'}")
    if path.exists() and not force:
        raise ConfigError(f"{path}: exists already; give another name, or --force to replace it")
    try:
        replace_file(path, text, own=str(os.getpid()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _body(lines: Sequence[Line]) -> Iterator[str]:
    """Yield the YAML, sections in the order of the lines; comments too long to follow their values precede them."""
    opened: list[str] = []
    for line in lines:
        *sections, name = line.path.split(".")
        for depth, section in enumerate(sections):
            if opened[: depth + 1] != sections[: depth + 1]:
                yield f"{'  ' * depth}{section}:"
        opened, indent = sections, "  " * len(sections)
        # PyYAML writes some line breaks of Unicode as they are, which its reader takes for ends of lines.
        printable = isinstance(line.value, str) and line.value.isprintable()
        value = yaml.safe_dump(line.value, default_flow_style=True, width=10**9, allow_unicode=printable)
        entry = f"{indent}{name}: {value.removesuffix('...' + chr(10)).strip()}"
        behind = f"{entry} # {line.comment}"
        if line.comment and len(behind) > WIDTH:
            yield from _comment(line.comment, indent=f"{indent}# ")
        yield entry if not line.comment or len(behind) > WIDTH else behind


def _items(texts: Iterator[str]) -> list[str]:
    return [line for text in texts for line in _comment(one_line(text), indent="# - ", further="#   ")]


def _comment(text: str, *, indent: str = "# ", further: str | None = None) -> list[str]:
    """Return a text as lines of comment."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=further or indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
