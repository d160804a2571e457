"""Text for the header comments of a converted recipe: commands that prepare data, differences, unused settings.

"The original" is the code of leoxiaobin/deep-high-resolution-net.pytorch (HRNet) and its extension
ilovepose/fast-human-pose-estimation.pytorch (Fast Pose Distillation), whose programs are in `tools/`.
"""

import posixpath
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from fpd_accel.import_config.yacs import EXTRA, Experiment, one_line, plain

DEBUG_PICTURES = "debug pictures; here log.pictures_every_steps"
KERNELS = "choice of kernels; affects speed and rounding, not the method"
NEVER_READ = "never read"
NOT_READ_IN_TRAINING = "not read by tools/fpd_train.py"

# Key -> why it never affects the trained weights or their score, whatever the other settings are.
WITHOUT_EFFECT = {
    "OUTPUT_DIR": "a run writes to run.root/run.name here",
    "LOG_DIR": "a run writes to run.root/run.name here",
    "AUTO_RESUME": (
        "never finds a checkpoint, since the original puts the time in the folder name; "
        "here, rerun the same command to resume"
    ),
    "PIN_MEMORY": "ignored; memory is always pinned when training on a GPU",
    "RANK": "only used in a file name",
    "CUDNN.BENCHMARK": KERNELS,
    "CUDNN.DETERMINISTIC": KERNELS,
    "CUDNN.ENABLED": KERNELS,
    "MODEL.TAG_PER_JOINT": NEVER_READ,
    "LOSS.USE_OHKM": NEVER_READ,
    "LOSS.TOPK": NEVER_READ,
    "LOSS.BETA": NOT_READ_IN_TRAINING,
    "LOSS.COARSE_TO_FINE": NOT_READ_IN_TRAINING,
    "DATASET.HYBRID_JOINTS_TYPE": "only used in a folder name",
    "DATASET.CACHE_ROOT": "prepared data takes the place of this cache",
    "TRAIN.GAMMA1": NEVER_READ,
    "TRAIN.GAMMA2": NEVER_READ,
    "TRAIN.RESUME": NEVER_READ,
    "TEST.BBOX_THRE": NEVER_READ,
    "TEST.NMS_THRE": "stored but never used",
    "TEST.MODEL_FILE": "only read by tools/test.py; here: recipes/evaluate.py --model",
    "KD.VALID_TYPE": NOT_READ_IN_TRAINING,
    "DEBUG.DEBUG": DEBUG_PICTURES,
    "DEBUG.SAVE_BATCH_IMAGES_GT": DEBUG_PICTURES,
    "DEBUG.SAVE_BATCH_IMAGES_PRED": DEBUG_PICTURES,
    "DEBUG.SAVE_HEATMAPS_GT": DEBUG_PICTURES,
    "DEBUG.SAVE_HEATMAPS_PRED": DEBUG_PICTURES,
}

DETECTOR_KEYS = ("TEST.COCO_BBOX_FILE", "TEST.IMAGE_THRE")
COCO_ONLY_KEYS = (
    *("LOSS.USE_DIFFERENT_JOINTS_WEIGHT", "TEST.USE_GT_BBOX", "TEST.SOFT_NMS", "TEST.OKS_THRE", "TEST.IN_VIS_THRE"),
    *DETECTOR_KEYS,
)
HRNET_BACKBONE_LAYERS = {
    *("conv1", "bn1", "conv2", "bn2", "layer1", "transition1", "transition2", "transition3"),
    *("stage2", "stage3", "stage4"),
}
# Besides MODEL.EXTRA. MODEL.NUM_JOINTS and LOSS.USE_TARGET_WEIGHT set nothing, but unsupported values are refused.
TEACHER_KEYS_READ = ("MODEL.NAME", "MODEL.NAME2", "MODEL.NUM_JOINTS", "LOSS.USE_TARGET_WEIGHT", "DATASET.COLOR_RGB")


@dataclass(frozen=True)
class InitialWeights:
    """The file of the student's initial weights; at most one field is set, and none for random weights."""

    checkpoint: str = ""  # file of a trained student, as given
    imagenet: str = ""  # file of ImageNet weights for the backbone, joined to DATA_DIR

    @staticmethod
    def from_experiment(experiment: Experiment) -> "InitialWeights":
        """Return the weights that the original's programs load; a checkpoint has precedence."""
        checkpoint, pretrained = experiment["TRAIN.CHECKPOINT"], experiment["MODEL.PRETRAINED"]
        if checkpoint:
            return InitialWeights(checkpoint=checkpoint)
        reads_pretrained = experiment["MODEL.INIT_WEIGHTS"] and experiment["MODEL.NAME"] != "hourglass"
        if not (reads_pretrained and pretrained):
            return InitialWeights()
        return InitialWeights(imagenet=posixpath.join(experiment["DATA_DIR"], pretrained))


def has_labels(name: str) -> bool:
    """Return whether a data set has public labels: `val2017` has, `test-dev2017` has not.

    It is judged by "test" in the name.
    """
    return bool(name) and "test" not in name


def prepare_commands(experiment: Experiment) -> Iterator[str]:
    """Yield shell commands that convert each labelled set to `data/<dataset>/<set>`.

    Each command is two lines, of which the first ends in a backslash.
    """
    root = posixpath.join(experiment["DATA_DIR"], experiment["DATASET.ROOT"])
    dataset, train, valid = (experiment[f"DATASET.{name}"] for name in ("DATASET", "TRAIN_SET", "TEST_SET"))
    for name in dict.fromkeys((train, valid)):
        if not has_labels(name):
            continue
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


def differences(experiment: Experiment) -> Iterator[str]:
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
    initial = InitialWeights.from_experiment(experiment)
    if not (initial.checkpoint or experiment["MODEL.INIT_WEIGHTS"] or experiment["MODEL.NAME"] == "hourglass"):
        yield (
            "MODEL.INIT_WEIGHTS false leaves PyTorch's initial weights; here a network is initialised as in its paper."
        )
    if initial.imagenet and not _all_layers(experiment):
        layers = plain(experiment.extra("PRETRAINED_LAYERS"))
        yield f"MODEL.EXTRA.PRETRAINED_LAYERS {layers}: here all layers with matching ImageNet weights load them."
    if experiment["DATASET.DATA_FORMAT"] == "zip":
        yield "DATASET.DATA_FORMAT zip: zip archives are not read here; unpack the images before `fpd-accel prepare`."


def unused(experiment: Experiment, teacher_experiment: Experiment | None, *, distils: bool) -> Iterator[str]:
    """Yield a line per reason for settings in the files that have no place in the recipe.

    A line is `KEY value, KEY value: reason`.

    Args:
        experiment: The settings of `--cfg` and the overrides.
        teacher_experiment: The settings of `--tcfg`, which default to those of `experiment`; None without that file.
        distils: Whether KD.TRAIN_TYPE asks for distillation.
    """
    reasons = WITHOUT_EFFECT | _conditional(experiment, distils=distils)
    if experiment["DATASET.DATA_FORMAT"] != "zip":
        reasons["DATASET.DATA_FORMAT"] = "the file name comes from the annotations, extension included"
    by_reason: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        if key in experiment.sources:
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
    """Return the keys that have no effect because of other settings, with the reason."""
    reasons: dict[str, str] = {}
    family, initial = experiment["MODEL.NAME"], InitialWeights.from_experiment(experiment)
    if experiment["TRAIN.OPTIMIZER"] == "adam":
        reasons |= dict.fromkeys(("TRAIN.WD", "TRAIN.MOMENTUM", "TRAIN.NESTEROV"), "not passed to Adam")
    if family != "hourglass":
        reasons["MODEL.NAME2"] = "only read by the hourglass"
    if initial.checkpoint:
        reasons |= dict.fromkeys(("MODEL.PRETRAINED", "MODEL.INIT_WEIGHTS"), "TRAIN.CHECKPOINT replaces all weights")
    elif family == "hourglass":
        reasons |= dict.fromkeys(("MODEL.PRETRAINED", "MODEL.INIT_WEIGHTS"), "not read by the hourglass")
    elif not experiment["MODEL.INIT_WEIGHTS"]:
        reasons["MODEL.PRETRAINED"] = "MODEL.INIT_WEIGHTS is false"
    elif experiment["MODEL.PRETRAINED"]:
        reasons["MODEL.INIT_WEIGHTS"] = "implied by MODEL.PRETRAINED"
    own = {f"MODEL.EXTRA.{name}" for name in EXTRA.get(family, {})}
    for key in experiment.sources:
        if key.startswith("MODEL.EXTRA.") and key not in own:
            reasons[key] = f"not read by {family}"
    if not initial.imagenet:
        reasons.setdefault("MODEL.EXTRA.PRETRAINED_LAYERS", "no ImageNet weights are loaded")
    elif _all_layers(experiment):
        reasons.setdefault(
            "MODEL.EXTRA.PRETRAINED_LAYERS", "all layers with matching ImageNet weights load them, as here"
        )
    if not distils:
        reasons |= dict.fromkeys(("KD.TEACHER", "KD.ALPHA"), "KD.TRAIN_TYPE NORMAL trains without a teacher")
    if experiment["DATASET.DATASET"] == "mpii":
        reasons |= dict.fromkeys(COCO_ONLY_KEYS, "only read for COCO")
    elif experiment["TEST.USE_GT_BBOX"]:
        reasons |= dict.fromkeys(DETECTOR_KEYS, "no detector: TEST.USE_GT_BBOX is true")
    return reasons


def _all_layers(experiment: Experiment) -> bool:
    """Return whether all layers with matching ImageNet weights load them.

    True unless an HRNet names a subset; None or "*" names none.
    """
    layers = experiment.extra("PRETRAINED_LAYERS")
    if experiment["MODEL.NAME"] != "pose_hrnet" or layers is None:
        return True
    return layers[:1] == ["*"] or set(layers) >= HRNET_BACKBONE_LAYERS
