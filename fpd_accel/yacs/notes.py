"""What a converted recipe says besides its values: how to prepare the data, what differs here, what had no effect."""

import posixpath
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from fpd_accel.config import Evaluate, Section, Student
from fpd_accel.yacs.settings import EXTRA, Experiment, one_line, plain

DEBUG_PICTURES = "debug pictures; here log.pictures_every_steps"
KERNELS = "choice of kernels; it moves speed and the last bits, not the method"
NEVER_READ = "never read"
NOT_BY_TRAINING = "not read by tools/fpd_train.py"

WITHOUT_EFFECT = {
    "OUTPUT_DIR": "a run writes to run.root/run.name here",
    "LOG_DIR": "a run writes to run.root/run.name here",
    "AUTO_RESUME": "finds nothing there, as the folder is named by the time; here: type the same command again",
    "PIN_MEMORY": "always, on a GPU",
    "RANK": "part of a file name",
    "CUDNN.BENCHMARK": KERNELS,
    "CUDNN.DETERMINISTIC": KERNELS,
    "CUDNN.ENABLED": KERNELS,
    "MODEL.TAG_PER_JOINT": NEVER_READ,
    "LOSS.USE_OHKM": NEVER_READ,
    "LOSS.TOPK": NEVER_READ,
    "LOSS.BETA": NOT_BY_TRAINING,
    "LOSS.COARSE_TO_FINE": NOT_BY_TRAINING,
    "DATASET.HYBRID_JOINTS_TYPE": "part of a folder's name",
    "DATASET.CACHE_ROOT": "prepared data take the place of the cache",
    "TRAIN.GAMMA1": NEVER_READ,
    "TRAIN.GAMMA2": NEVER_READ,
    "TRAIN.RESUME": NEVER_READ,
    "TEST.BBOX_THRE": NEVER_READ,
    "TEST.NMS_THRE": "stored, then never read",
    "TEST.MODEL_FILE": "read by tools/test.py alone; here: recipes/evaluate.py --model",
    "KD.VALID_TYPE": NOT_BY_TRAINING,
    "DEBUG.DEBUG": DEBUG_PICTURES,
    "DEBUG.SAVE_BATCH_IMAGES_GT": DEBUG_PICTURES,
    "DEBUG.SAVE_BATCH_IMAGES_PRED": DEBUG_PICTURES,
    "DEBUG.SAVE_HEATMAPS_GT": DEBUG_PICTURES,
    "DEBUG.SAVE_HEATMAPS_PRED": DEBUG_PICTURES,
}
"""Keys that leave the trained weights and their score alone, whatever the other settings are."""

DETECTOR = ("TEST.COCO_BBOX_FILE", "TEST.IMAGE_THRE")
COCO_ALONE = (
    *("LOSS.USE_DIFFERENT_JOINTS_WEIGHT", "TEST.USE_GT_BBOX", "TEST.SOFT_NMS", "TEST.OKS_THRE", "TEST.IN_VIS_THRE"),
    *DETECTOR,
)
BACKBONE = {
    "conv1",
    "bn1",
    "conv2",
    "bn2",
    "layer1",
    *(f"transition{n}" for n in (1, 2, 3)),
    "stage2",
    "stage3",
    "stage4",
}
READ_OF_TEACHER = ("MODEL.NAME", "MODEL.NAME2", "MODEL.NUM_JOINTS", "LOSS.USE_TARGET_WEIGHT", "DATASET.COLOR_RGB")


@dataclass(frozen=True)
class Start:
    """What the student's weights are when training begins: one of finished, backbone or neither (from scratch)."""

    finished: str = ""  # file of a finished student
    backbone: str = ""  # file of ImageNet weights

    @staticmethod
    def of(experiment: Experiment) -> "Start":
        """As the original's programs decide it."""
        finished, backbone = experiment["TRAIN.CHECKPOINT"], experiment["MODEL.PRETRAINED"]
        initialises = experiment["MODEL.INIT_WEIGHTS"] and experiment["MODEL.NAME"] != "hourglass"
        if finished:
            return Start(finished=finished)
        return Start(backbone=posixpath.join(experiment["DATA_DIR"], backbone) if initialises and backbone else "")


def recipe_has(section: type[Section], field: str) -> bool:
    """Whether a section of our recipes can say this; where it cannot, the comments do."""
    return field in section.model_fields


def has_labels(name: str) -> bool:
    """Whether a set of the original, such as ``val2017`` or ``test-dev2017``, can be trained or scored on."""
    return bool(name) and "test" not in name


def prepare_commands(experiment: Experiment) -> Iterator[str]:
    """The commands that turn the original's data folders into what the recipe reads."""
    root = posixpath.join(experiment["DATA_DIR"], experiment["DATASET.ROOT"])
    dataset, train, valid = (experiment[f"DATASET.{name}"] for name in ("DATASET", "TRAIN_SET", "TEST_SET"))
    for name in dict.fromkeys((train, valid)):
        if not has_labels(name):
            continue
        options = [("--images", posixpath.join(root, "images" if dataset == "mpii" else f"images/{name}"))]
        labels = f"annot/{name}.json" if dataset == "mpii" else f"annotations/person_keypoints_{name}.json"
        options += [("--annotations", posixpath.join(root, labels)), ("--output", f"data/{dataset}/{name}")]
        if dataset == "mpii" and name == valid:  # the size of heads, for PCKh
            options.append(("--ground-truth", posixpath.join(root, f"annot/gt_{name}.mat")))
        kind = " --format mpii" if dataset == "mpii" else ""
        if dataset == "coco" and name == valid and not experiment["TEST.USE_GT_BBOX"] and recipe_has(Evaluate, "boxes"):
            kind = " --keep-empty-images"  # what a detector finds there counts
        first, *further = (f"{option} {shlex.quote(one_line(value))}" for option, value in options)
        yield f"fpd-accel prepare{kind} {first} \\"
        yield f"    {' '.join(further)}"


def differences(experiment: Experiment) -> Iterator[str]:
    """What a user has to know who compares numbers."""
    boxes = experiment["DATASET.DATASET"] == "coco" and not experiment["TEST.USE_GT_BBOX"]
    if boxes and not recipe_has(Evaluate, "boxes"):
        yield (
            "Boxes at evaluation: TEST.USE_GT_BBOX false takes those of a detector, TEST.COCO_BBOX_FILE "
            f"{plain(experiment['TEST.COCO_BBOX_FILE'])}, that score TEST.IMAGE_THRE "
            f"{plain(experiment['TEST.IMAGE_THRE'])} or more. The evaluations of a training run here take ground-truth "
            "boxes, which gives a higher AP: do not compare the two."
        )
    if not experiment["TEST.POST_PROCESS"] and not recipe_has(Evaluate, "refine"):
        yield "TEST.POST_PROCESS false leaves keypoints at the heatmap's maximum; here they take the quarter step."
    yield (
        "Learning rate: the original steps its schedule at the start of an epoch. With PyTorch 1.0, which it asks for, "
        "the rate falls from the epochs of TRAIN.LR_STEP on, as here; with 1.1 and newer one epoch early."
    )
    yield (
        "Random numbers: a function of seed, epoch and person here. The original seeds nothing, and with PyTorch 1.0 "
        "its loader processes draw the same NumPy numbers as each other, in every epoch again."
    )
    yield "The last, smaller batch of an epoch is filled up here with the first people of the next."
    start = Start.of(experiment)
    if start.backbone and not recipe_has(Student, "init"):
        yield f"The student starts from scratch; the original's from MODEL.PRETRAINED {one_line(start.backbone)}."
    if start == Start() and not experiment["MODEL.INIT_WEIGHTS"] and experiment["MODEL.NAME"] != "hourglass":
        yield "MODEL.INIT_WEIGHTS false leaves PyTorch's initial weights; here a network has those of its publication."
    if start.backbone and recipe_has(Student, "init") and not _all_layers(experiment):
        layers = plain(experiment.extra("PRETRAINED_LAYERS"))
        yield f"MODEL.EXTRA.PRETRAINED_LAYERS {layers}: here every layer that fits takes the ImageNet weights."
    if experiment["DATASET.DATA_FORMAT"] == "zip":
        yield "DATASET.DATA_FORMAT zip: unpack the images before `fpd-accel prepare`."


def unused(experiment: Experiment, instructor: Experiment | None, *, distils: bool) -> Iterator[str]:
    """Settings that were given and that the recipe does not take up, with the reason."""
    reasons = WITHOUT_EFFECT | _conditional(experiment, distils=distils)
    if experiment["DATASET.DATA_FORMAT"] != "zip":
        reasons["DATASET.DATA_FORMAT"] = "file names are those of the annotations"
    by_reason: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        if key in experiment.sources:
            by_reason.setdefault(reason, []).append(f"{key} {plain(experiment[key])}")
    yield from (f"{', '.join(keys)}: {reason}" for reason, keys in by_reason.items())
    if instructor is None:
        return
    if not distils:
        yield "--tcfg: KD.TRAIN_TYPE NORMAL has no teacher"
        return
    read = {*READ_OF_TEACHER, *(key for key in instructor.values if key.startswith("MODEL.EXTRA."))}
    other = [key for key, value in instructor.values.items() if key not in read and value != experiment[key]]
    if other:
        keys = ", ".join(f"{key} {plain(instructor[key])}" for key in other)
        yield f"{keys} of --tcfg: only its network and its colours are read"


def _conditional(experiment: Experiment, *, distils: bool) -> dict[str, str]:
    """Keys without effect because of what others say."""
    reasons: dict[str, str] = {}
    family, start = experiment["MODEL.NAME"], Start.of(experiment)
    if experiment["TRAIN.OPTIMIZER"] == "adam":
        reasons |= dict.fromkeys(("TRAIN.WD", "TRAIN.MOMENTUM", "TRAIN.NESTEROV"), "not passed to Adam")
    if family != "hourglass":
        reasons["MODEL.NAME2"] = "read by the hourglass alone"
    if start.finished:
        reasons |= dict.fromkeys(("MODEL.PRETRAINED", "MODEL.INIT_WEIGHTS"), "TRAIN.CHECKPOINT replaces all weights")
    elif family == "hourglass":
        reasons |= dict.fromkeys(("MODEL.PRETRAINED", "MODEL.INIT_WEIGHTS"), "the hourglass does not read it")
    elif not experiment["MODEL.INIT_WEIGHTS"]:
        reasons["MODEL.PRETRAINED"] = "MODEL.INIT_WEIGHTS is false"
    elif experiment["MODEL.PRETRAINED"]:
        reasons["MODEL.INIT_WEIGHTS"] = "goes with MODEL.PRETRAINED"
    own = {f"MODEL.EXTRA.{name}" for name in EXTRA.get(family, {})}
    for key in experiment.sources:
        if key.startswith("MODEL.EXTRA.") and key not in own:
            reasons[key] = f"{family} does not read it"
    if not start.backbone or not recipe_has(Student, "init"):
        reasons.setdefault("MODEL.EXTRA.PRETRAINED_LAYERS", "no ImageNet weights")
    elif _all_layers(experiment):
        reasons.setdefault("MODEL.EXTRA.PRETRAINED_LAYERS", "all that ImageNet weights fit, as here")
    if not distils:
        reasons |= dict.fromkeys(("KD.TEACHER", "KD.ALPHA"), "KD.TRAIN_TYPE NORMAL has no teacher")
    if experiment["DATASET.DATASET"] == "mpii":
        reasons |= dict.fromkeys(COCO_ALONE, "read for COCO alone")
    elif experiment["TEST.USE_GT_BBOX"]:
        reasons |= dict.fromkeys(DETECTOR, "TEST.USE_GT_BBOX is true")
        if not recipe_has(Evaluate, "boxes"):
            reasons["TEST.USE_GT_BBOX"] = "the evaluations of a training run here take ground-truth boxes"
    return reasons


def _all_layers(experiment: Experiment) -> bool:
    """Whether every layer that ImageNet weights fit takes them; the PoseResNet knows no other way."""
    layers = experiment.extra("PRETRAINED_LAYERS")
    if experiment["MODEL.NAME"] != "pose_hrnet" or layers is None:
        return True
    return layers[:1] == ["*"] or set(layers) >= BACKBONE
