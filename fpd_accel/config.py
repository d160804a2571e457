"""The recipe: every knob of a run, typed, with its unit, checked before torch is imported.

A recipe is a YAML file. :func:`load_recipe` reads it, applies ``key.path=value`` overrides, and either returns a frozen
:class:`Recipe` or raises one :class:`ConfigError` that lists every mistake with its dotted path. All paths in a recipe
are relative to the working directory, as those typed in a shell are.
"""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails

from fpd_accel.errors import ConfigError

ARCHITECTURES = (
    *(f"hrnet_w{width}" for width in (18, 32, 40, 48)),
    *(f"pose_resnet_{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"tiny_w{width}" for width in (8, 16, 32, 48)),
    *(f"vitpose_{size}{head}" for size in "sblh" for head in ("", "_simple")),
)  # and hourglass_{stacks}x{features}
HOURGLASS = re.compile(r"hourglass_([1-9]\d*)x([1-9]\d*)")
SIMCC_SUFFIX = "_simcc"  # after any of them: the same network under a SimCC head

Compile = Literal["none", "units", "whole"]  # nothing, the repeated blocks of a network, or all of it as one graph

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


URL = re.compile(r"(?:[A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]*://")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of fsspec's URLs, as ``hf://datasets/user/name``, rather than a local one."""
    return URL.match(os.fspath(path)) is not None


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]  # the run directory is <root>/<name>
    root: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # initial weights, sample order and augmentation

    @property
    def directory(self) -> Path:
        return Path(self.root) / self.name


class Augment(Section):
    """Random geometry, drawn as the published implementation draws it (see ``augment.py``)."""

    flip: Fraction = 0.5  # probability of mirroring
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.35  # s.d. of the factor on the box size, clipped at one s.d.
    rotation: Annotated[float, Field(ge=0, le=180)] = 45.0  # degrees; s.d. of the angle, clipped at two s.d.
    rotation_probability: Fraction = 0.6
    half_body: Fraction = 0.3  # probability of framing the upper or the lower body alone
    half_body_minimum: Positive = 8  # only people with more visible keypoints than this
    upper_body: Fraction = 0.6915  # P(N(0, 1) < 0.5), what the published code's normal draw amounts to
    views: Positive | None = None  # geometries that are drawn for each person, once for all; None: one per epoch


class Synthetic(Section):
    """Draw people when ``data.train`` and ``data.valid`` do not exist yet."""

    train_images: Positive = 1500
    valid_images: Positive = 200
    seed: Annotated[int, Field(ge=0)] = 0


class Unlabelled(Section):
    """People without labels, mixed into every batch; only the teacher says what is right for them.

    Losses stay means over the whole batch: the labels' term shrinks with the share of those who have labels.
    """

    shards: str  # written by `fpd-accel prepare`; their labels, if there are any, are not used
    boxes: str | None = (
        None  # a detector's, COCO result JSON as `fpd-accel detect` writes; None: the boxes in the shards
    )
    box_threshold: float = 0.5  # detector's score from which on a box is used
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the people of a batch


class Labelled(Section):
    """One of several datasets to train on, all of the same keypoints.

    An epoch is as many labelled samples as there are labelled people in all of them. With weights, those of one dataset
    come more often than once in it, and not all of another; each is gone through whole before anybody comes again.
    """

    shards: str  # written by `fpd-accel prepare`
    weight: Annotated[float, Field(gt=0)] | None = None  # its part of the labelled samples, relative to the others'
    # None, and so for all: the number of its people, so that everybody comes once per epoch


PATH, DATASETS = "a path", "several datasets"  # the two kinds of `data.train`; no words that a key could be


def _kind_of_train(value: Any) -> str | None:
    if isinstance(value, str):
        return PATH
    return DATASETS if isinstance(value, list | tuple) and value else None


class Data(Section):
    train: Annotated[
        Annotated[str, Tag(PATH)] | Annotated[tuple[Labelled, ...], Tag(DATASETS)],
        Discriminator(
            _kind_of_train,
            custom_error_type="kind_of_train",
            custom_error_message="is neither the path of a dataset nor a list of {shards: PATH, weight: NUMBER}",
        ),
    ]  # what `fpd-accel prepare` wrote, the folder or URL of what `fpd-accel publish` wrote, or a list of several
    streaming: bool = False  # images to train on are read where they were published, a window at a time, not cached
    stream_window: Positive = 16  # row groups that are mixed with each other; thrice as many lie on the local disk
    valid: str | None = None  # shards of the held-out people; None: never evaluate
    unlabelled: Unlabelled | None = None  # more people to train on, with the teacher alone
    synthetic: Synthetic | None = None
    input_size: tuple[Positive, Positive] = (256, 192)  # (height, width) of a crop, pixels
    box_padding: Annotated[float, Field(ge=1)] = 1.25  # factor on the person's box
    workers: Annotated[int, Field(ge=0)] = 2  # loader processes per rank
    group_by_image: bool = False  # shuffle images, not people: each is decoded once per micro-batch, whose people are
    # then less mixed (COCO: 12 images in a batch of 32); for where cores are short
    decoded_cache: str | None = None  # folder on a local disk for the images' pixels, so that they are decoded once and
    # not in every epoch (COCO: 50 GB); for where cores are short
    augment: Augment = Augment()

    @property
    def labelled(self) -> dict[str, Labelled]:
        """The datasets of ``train`` by their dotted paths in the recipe."""
        if isinstance(self.train, str):
            return {"data.train": Labelled(shards=self.train)}
        return {f"data.train.{i}.shards": dataset for i, dataset in enumerate(self.train)}


class Codec(Section):
    """How keypoints become targets and outputs keypoints (see ``codecs.py``)."""

    name: Literal["heatmap", "dark", "udp", "simcc"] = "heatmap"
    sigma: Annotated[float, Field(gt=0)] | None = None  # cells of 4 pixels, None: 2; simcc: bins, None: sqrt(side / 8)


class Student(Section):
    arch: str
    weights: str | None = None  # start from a finished student: model folder, .safetensors or .pth; strict
    init: str | None = None  # or from a classification network's backbone (HRNet, ResNet, ViT); the head starts fresh
    color: Literal["rgb", "bgr"] = "rgb"  # channel order that it takes


class TeacherCache(Section):
    """Keep what the teacher says of all ``data.augment.views`` of each person on disk, and read it in training.

    For a teacher much larger than its student, and runs of many more epochs than views, as several runs of one teacher
    are. What is learnt differs from the same views without a cache by the rounding of ``dtype`` alone.
    """

    dtype: Literal["bf16", "uint8"] = (
        "bf16"  # 2 bytes per cell, to 1/256 of its value; or 1, to 1/510 of the map's range
    )
    folder: str | None = None  # on a disk that all machines share; None: <run.root>/teacher_cache


class TeacherModel(Section):
    weights: str | None = None  # model folder, or .safetensors / .pth together with `arch`
    arch: str | None = None  # only for a bare weights file; a model folder knows its own
    color: Literal["rgb", "bgr"] = "rgb"  # likewise: channel order that it takes
    codec: Codec = Codec()  # likewise: how it was trained to say where a keypoint is
    recipe: str | None = None  # trained first, with distill.mode=normal, when the weights do not exist yet
    overrides: tuple[str, ...] = ()  # of that recipe: "key.path=value"
    compile: Compile = "none"  # torch.compile; of the training steps alone
    shard: bool = False  # over the ranks, gathered block by block: for a teacher too large for one device
    fold_norm: bool = True  # normalisations folded into the convolutions before them; the same outputs to rounding
    fp8: bool = False  # ViTPose: linear layers in float8, within some 5 % of its heatmaps; never measured on a GPU
    cache: TeacherCache | None = None  # ask it once per view of a person, before training; None: in every step


class Distill(Section):
    mode: Literal["fpd", "normal"] = "fpd"  # fpd: teacher and labels; normal: labels alone, by the same loop
    alpha: Fraction = 0.5  # weight of the teacher's term; 1 - alpha of the labels' term
    alpha_final: Fraction | None = None  # where the schedule ends; None: alpha throughout
    alpha_schedule: Literal["constant", "linear", "cosine"] = "constant"
    mask: Literal["visible", "all", "confident"] = "visible"  # keypoints of the teacher's term: the labelled ones, ...
    confidence: Fraction = 0.3  # ... or those whose peak of the teacher is above this
    distance: Literal["mse", "kl"] = "mse"  # of the teacher's term; SimCC students take kl
    temperature: Annotated[float, Field(gt=0)] | None = None  # kl: divides both; None: 0.1 for heatmaps, 1 for SimCC
    teacher_stage: Literal["last", "each"] = "last"  # that a student's stage is compared with
    hard_keypoints: Positive | None = None  # labels' term: only so many of each person's worst (OHKM); None: all


class Train(Section):
    steps: Positive | None = None  # optimizer steps; or:
    epochs: Annotated[float, Field(gt=0)] | None = None  # times as many labelled samples as there are training people
    global_batch: Positive  # people per optimizer step, over all ranks
    device_batch: Positive | None = None  # people per forward on one rank; None: global_batch / ranks
    precision: Literal["fp32", "bf16"] = "fp32"  # of forward and backward; losses are always fp32
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # of the gradient; None: no clipping
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # per step; None: no moving average of the weights
    freeze_norm: bool = False  # keep the running statistics of normalisation layers, and use them
    channels_last: bool = True  # memory format of images and convolutions
    compile: Compile = "none"  # torch.compile; whole: student, targets and losses are one graph, units: losses another
    cuda_graphs: bool = False  # whole: replay a step's kernels as one launch; one process on a GPU, for small batches
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"  # student copied to each rank, or sharded; auto: as launched
    sync_norm: bool = False  # batch normalisation over the people of all ranks; GPUs alone, each layer waits
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0  # without progress, after which a process ends with a message


class Optim(Section):
    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # adam, adamw
    momentum: Fraction = 0.9  # sgd
    schedule: Literal["constant", "step", "cosine"] = "step"
    milestones: tuple[Annotated[float, Field(gt=0)], ...] = ()  # epochs at which lr is multiplied by gamma
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    final_lr: Annotated[float, Field(ge=0)] = 0.0  # cosine ends here
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # lr rises linearly from lr / warmup_steps


class Evaluate(Section):
    every_epochs: Annotated[float, Field(gt=0)] | None = 1.0  # None: only at the end
    batch: Positive = 32  # people per forward on one rank
    flip_test: bool = True  # average with the mirrored image's heatmaps
    flip_shift: bool = True  # move the mirrored heatmaps right by one cell, as the published protocol does; not udp
    refine: Literal["none", "quarter", "dark"] | None = None  # step below a cell; None: the codec's own
    stages: Literal["last", "mean"] = "last"  # of a network with several
    scales: tuple[Annotated[float, Field(gt=0)], ...] = (
        1.0,
    )  # of the region cropped; the mean of their heatmaps counts
    boxes: str | None = None  # a detector's boxes in data.valid's images, COCO result JSON; None: the annotated boxes
    box_threshold: float = 0.0  # detector's score from which on a box is used
    nms: Literal["hard", "soft", "none"] = "hard"  # what becomes of several poses of one person, by OKS
    nms_threshold: Fraction = 0.9  # hard: OKS above which the lower-scored of two poses is dropped; soft: of the decay
    keypoint_threshold: Fraction = 0.2  # heatmap score above which a keypoint counts in a person's score
    teacher: bool = True  # evaluate the teacher too, once, for the table at the end


class Log(Section):
    every_steps: Positive = 20  # values stay on the device in between
    pictures_every_steps: Positive | None = 500  # None: no pictures
    tensorboard: bool = True


class Checkpoint(Section):
    every_steps: Positive = 500
    save_every_minutes: Annotated[float, Field(gt=0)] | None = None  # and by the clock, since the last one
    keep: Positive = 2  # newest checkpoints on disk
    background: bool = True  # written while training goes on; costs the memory of one checkpoint


class Recipe(Section):
    """Everything that defines a run. A resolved recipe, with every default written out, is a recipe too."""

    run: Run
    data: Data
    codec: Codec = Codec()
    student: Student
    teacher: TeacherModel = TeacherModel()
    distill: Distill = Distill()
    train: Train
    optim: Optim = Optim()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()

    @property
    def heatmap_size(self) -> tuple[int, int]:
        """(height, width) of the heatmaps: every architecture has stride 4."""
        return self.data.input_size[0] // 4, self.data.input_size[1] // 4


# Stand-ins for what has no default, so that the rest of a recipe without them can be checked.
REQUIRED = (("run", "name", "a"), ("data", "train", "a"), ("student", "arch", "tiny_w8"), ("train", "global_batch", 1))


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Read a recipe, apply overrides such as ``"train.steps=10"``, and check all of it.

    ``check_files=False`` leaves out whether the files that the recipe names exist.

    Raises:
        ConfigError: lists every mistake at once, each with its dotted path.
    """
    return check_recipe(_read_yaml(Path(path)), overrides, source=str(path), check_files=check_files)


def check_recipe(
    values: dict[str, Any], overrides: Sequence[str] = (), *, source: str, check_files: bool = True
) -> Recipe:
    """The recipe that these sections make up, checked as :func:`load_recipe` does; ``source`` stands in messages."""
    mistakes: list[str] = []
    for override in overrides:
        mistakes += _apply_override(values, override)
    recipe, wrong = _validate(values)
    mistakes += wrong
    if recipe is not None:
        # Where a value fell back to its default, what follows from that default is no mistake of the user's.
        wrong_sections = {re.split(r"[.:]", mistake)[0] for mistake in wrong}
        follow_ups = _contradictions(recipe) + (_missing_files(recipe) if check_files else [])
        mistakes += [mistake for mistake in follow_ups if re.split(r"[.:]", mistake)[0] not in wrong_sections]
    if mistakes or recipe is None:
        raise ConfigError(
            "\n".join([f"{source}: this recipe cannot be used", *(f"  {mistake}" for mistake in mistakes)])
        )
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every field, defaults included. Reading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def teacher_recipe(recipe: Recipe, *, check_files: bool = True) -> Recipe:
    """The recipe that ``teacher.recipe`` names, as it is run: with its overrides and ``distill.mode=normal``."""
    if recipe.teacher.recipe is None:
        raise ConfigError("teacher.recipe: not set, so there is no way to train the teacher")
    overrides = [*recipe.teacher.overrides, "distill.mode=normal"]
    return load_recipe(recipe.teacher.recipe, overrides, check_files=check_files)


def teacher_weights(recipe: Recipe) -> Path:
    """Where the teacher's weights are, or will be once ``teacher.recipe`` has run: its ``best/`` model folder."""
    if recipe.teacher.weights is not None:
        return Path(recipe.teacher.weights)
    return teacher_recipe(recipe, check_files=False).run.directory / "best"


def accumulation_steps(recipe: Recipe, ranks: int) -> tuple[int, int]:
    """People per forward on one rank, and forwards per optimizer step, that make up ``train.global_batch``.

    Raises:
        ConfigError: the global batch does not divide; the message gives the nearest global batches that do.
    """
    total, per_device = recipe.train.global_batch, recipe.train.device_batch
    unit = ranks * (per_device or 1)
    if total % unit:
        lower, upper = total // unit * unit, (total // unit + 1) * unit
        choices = f"{lower} or {upper}" if lower else str(upper)
        product = f"{ranks} ranks" if per_device is None else f"{ranks} ranks x {per_device} people per device"
        raise ConfigError(
            f"train.global_batch: {total} does not divide by {product}; use {choices}, or change train.device_batch"
        )
    per_device = per_device or total // ranks
    return per_device, total // (ranks * per_device)


def total_steps(recipe: Recipe, people: int) -> int:
    """Optimizer steps of a run over this many labelled training people."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return max(1, round((recipe.train.epochs or 0) * steps_per_epoch(recipe, people)))


def steps_per_epoch(recipe: Recipe, people: int) -> float:
    """Optimizer steps of as many labelled samples as there are people: without weights, everybody comes once."""
    unlabelled = recipe.data.unlabelled
    return people / (recipe.train.global_batch * (1 - (unlabelled.share if unlabelled is not None else 0.0)))


# Fields that leave the trained weights alone: they may change when a run is resumed. Data and teacher are compared by
# content, not by path, and the length of the run by the schedule it gives (see run_directory.py); initial weights have
# done their part. How a global batch is spread over devices matters to batch normalisation alone, and is said there.
FREE_ON_RESUME = (
    "run.name", "run.root", "data.train", "data.valid", "data.workers", "data.decoded_cache", "data.synthetic",
    "data.unlabelled.shards", "data.unlabelled.boxes", "student.weights", "student.init", "teacher.weights",
    "teacher.arch", "teacher.color", "teacher.codec", "teacher.recipe", "teacher.overrides", "teacher.compile",
    "teacher.shard", "teacher.fold_norm", "teacher.cache", "train.steps", "train.epochs", "train.device_batch",
    "train.parallel", "train.timeout_minutes", "train.compile", "train.cuda_graphs", "evaluate", "log", "checkpoint",
)  # fmt: skip


def differences(old: Recipe, new: Recipe) -> tuple[list[str], list[str]]:
    """Fields that differ, as ``path: old -> new``: those that alter the result, and those that do not."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    altering: list[str] = []
    harmless: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            free = any(key == name or key.startswith(f"{name}.") for name in FREE_ON_RESUME)
            (harmless if free else altering).append(f"{key}: {before.get(key)} -> {after.get(key)}")
    return altering, harmless


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(f"{path}: no such recipe" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections ({', '.join(Recipe.model_fields)})")
    return values


def _apply_override(values: dict[str, Any], override: str) -> list[str]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [f"{override}: an override is key.path=value"]
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        if not isinstance(values[parent], dict):
            return [f"{key}: {parent!r} is a value, not a section"]
        values = values[parent]
    try:
        values[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date, and is none
        return [f"{key}: {text!r} is not a YAML value"]
    return []


def _validate(values: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    """The recipe, or what could be saved of it by leaving out the wrong values, and every mistake of type or name."""
    try:
        return Recipe.model_validate(values), []
    except ValidationError as error:
        details = error.errors()
    mistakes = [_explain(detail) for detail in details]
    for detail in details:
        _remove(values, detail["loc"])
    for section, key, value in REQUIRED:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values[section].setdefault(key, value)
    try:
        return Recipe.model_validate(values), mistakes
    except ValidationError:
        return None, mistakes


def _remove(values: Any, location: tuple[int | str, ...]) -> None:
    for key in location[:-1]:
        if not isinstance(values, dict) or not isinstance(values.get(key), dict):
            break
        values, location = values[key], location[1:]
    if isinstance(values, dict):
        values.pop(location[0], None)


def _explain(detail: ErrorDetails) -> str:
    location, value = tuple(key for key in detail["loc"] if key not in (PATH, DATASETS)), detail["input"]
    path = ".".join(map(str, location))
    match detail["type"]:
        case "extra_forbidden":
            names = _names_at(location[:-1])
            return f"{path}: unknown key; {_did_you_mean(str(location[-1]), names)}"
        case "missing":
            return f"{path}: missing; it has no default"
        case "literal_error":
            choices = [choice.strip("'") for choice in re.split(r", | or ", detail["ctx"]["expected"])]
            return f"{path}: {value!r} is not a choice; {_did_you_mean(str(value), choices)}"
        case "model_type" | "model_attributes_type":
            return f"{path}: {value!r} is not a section with keys {', '.join(_names_at(location))}"
        case _:
            text = detail["msg"].replace("Input should", "should").replace("String should", "should")
            return f"{path}: {value!r} {text}"


def _names_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for key in location:
        if isinstance(key, int):  # of a list, which was unpacked with its field
            continue
        inner = _unpacked(model.model_fields[key].annotation)
        model = next(kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)


def _unpacked(annotation: Any) -> list[Any]:
    """A type and those that it is made of: ``Section`` is found in ``Section | None`` and ``tuple[Section, ...]``."""
    return [annotation, *(inner for argument in get_args(annotation) for inner in _unpacked(argument))]


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}choices: {', '.join(choices)}"


def _contradictions(recipe: Recipe) -> list[str]:
    """What is wrong between fields that are each right."""
    mistakes = []
    train, optim, distill, teacher = recipe.train, recipe.optim, recipe.distill, recipe.teacher
    for path, arch in (("student.arch", recipe.student.arch), ("teacher.arch", teacher.arch)):
        network = arch.removesuffix(SIMCC_SUFFIX) if arch is not None else None
        if network is not None and network not in ARCHITECTURES and not HOURGLASS.fullmatch(network):
            choices = (*ARCHITECTURES, "hourglass_{stacks}x{features}", f"any of them with {SIMCC_SUFFIX}")
            mistakes.append(f"{path}: {arch!r} is no architecture; {_did_you_mean(arch or '', choices)}")
    if recipe.student.weights is not None and recipe.student.init is not None:
        mistakes.append("student.weights, student.init: give one; weights are a whole network, init a backbone alone")
    if (train.steps is None) == (train.epochs is None):
        mistakes.append("train.steps, train.epochs: give exactly one of the two")
    if train.device_batch is not None and train.global_batch % train.device_batch:
        mistakes.append(
            f"train.device_batch: {train.device_batch} does not divide train.global_batch ({train.global_batch})"
        )
    if train.cuda_graphs and train.compile != "whole":
        mistakes.append(f"train.cuda_graphs: goes with train.compile=whole, not {train.compile}")
    if recipe.student.init is not None and recipe.student.arch.startswith(("hourglass", "tiny")):
        mistakes.append(f"student.init: no backbone of {recipe.student.arch} is published apart; use student.weights")
    mistakes += _train_contradictions(recipe.data)
    if recipe.data.synthetic is not None and any(map(is_url, map(str, (recipe.data.train, recipe.data.valid)))):
        mistakes.append("data.synthetic: draws into folders, but data.train or data.valid is a URL; leave it out")
    if recipe.data.streaming and recipe.data.unlabelled is not None and recipe.data.unlabelled.boxes is not None:
        mistakes.append(
            "data.streaming: boxes need their images at hand; leave out data.unlabelled.boxes, or streaming"
        )
    if recipe.data.streaming and recipe.data.decoded_cache is not None:
        mistakes.append("data.decoded_cache: streamed images come and go; leave out the cache, or data.streaming")
    if teacher.cache is not None and recipe.data.augment.views is None:
        mistakes.append(
            "teacher.cache: keeps so many views of each person as there are, but data.augment.views is not set; set "
            "it (to 4, say), or leave out the cache"
        )
    if teacher.cache is not None and recipe.data.streaming:
        mistakes.append(
            "teacher.cache: is built from images at hand; leave out data.streaming, or the cache with its views"
        )
    if any(side % 4 for side in recipe.data.input_size):
        mistakes.append(f"data.input_size: {list(recipe.data.input_size)}: both sides have to be multiples of 4")
    if optim.schedule == "step" and not optim.milestones:
        mistakes.append("optim.milestones: schedule 'step' needs them (epochs); or use optim.schedule=constant")
    if list(optim.milestones) != sorted(set(optim.milestones)):
        mistakes.append(f"optim.milestones: {list(optim.milestones)} do not increase")
    if optim.schedule == "cosine" and optim.final_lr > optim.lr:
        mistakes.append(f"optim.final_lr: {optim.final_lr} is above optim.lr ({optim.lr})")
    if train.steps is not None and optim.warmup_steps > train.steps:
        mistakes.append(f"optim.warmup_steps: {optim.warmup_steps} is more than train.steps ({train.steps})")
    if (distill.alpha_schedule == "constant") != (distill.alpha_final is None):
        mistakes.append("distill.alpha_final: goes with alpha_schedule linear or cosine, and they with it")
    if distill.mode == "fpd" and teacher.weights is None and teacher.recipe is None:
        mistakes.append("distill.mode: 'fpd' needs a teacher; set teacher.weights, or use distill.mode=normal")
    if teacher.recipe is not None and teacher.weights is not None:
        mistakes.append("teacher.weights, teacher.recipe: give one; the recipe's own run says where its weights go")
    if teacher.fp8 and train.precision != "bf16":
        mistakes.append("teacher.fp8: such layers give bfloat16; set train.precision=bf16, or leave it out")
    if teacher.fp8 and teacher.shard:
        mistakes.append("teacher.fp8, teacher.shard: give one; layers in float8 are not sharded")
    if 1.0 not in recipe.evaluate.scales or len(set(recipe.evaluate.scales)) < len(recipe.evaluate.scales):
        mistakes.append(f"evaluate.scales: {list(recipe.evaluate.scales)}: 1.0 has to be among them, and each once")
    if recipe.evaluate.boxes is not None and recipe.data.valid is None:
        mistakes.append("evaluate.boxes: there is nobody to evaluate on; set data.valid to the shards of these images")
    if recipe.evaluate.nms == "soft" and recipe.evaluate.nms_threshold == 0:
        mistakes.append("evaluate.nms_threshold: 0 leaves nobody beside the best; soft suppression divides by it")
    return mistakes + _objective_contradictions(recipe)


def _train_contradictions(data: Data) -> list[str]:
    """The same for a list of datasets."""
    if isinstance(data.train, str):
        return []
    mistakes, paths = [], [_normal(dataset.shards) for dataset in data.train]
    if len({dataset.weight is None for dataset in data.train}) > 1:
        mistakes.append("data.train: some have a weight and some have none; give one to each, or to none")
    repeated = sorted({path for path in paths if paths.count(path) > 1})
    mistakes += [f"data.train: {path} is listed more than once; give it a larger weight" for path in repeated]
    if data.synthetic is not None:
        mistakes.append("data.synthetic: draws one dataset, but data.train is a list; name a path, or leave it out")
    return mistakes


def _normal(path: str) -> str:
    return path.rstrip("/") if is_url(path) else os.path.normpath(path)


def _objective_contradictions(recipe: Recipe) -> list[str]:
    """The same for what the codec, the losses and unlabelled people ask of each other."""
    mistakes = []
    distill, teacher, simcc = recipe.distill, recipe.teacher, recipe.student.arch.endswith(SIMCC_SUFFIX)
    if simcc != (recipe.codec.name == "simcc"):
        mistakes.append(
            f"codec.name: {recipe.codec.name!r} does not fit {recipe.student.arch!r}; codec simcc goes with an "
            f"architecture that ends in {SIMCC_SUFFIX}, and with no other"
        )
    if simcc and distill.mode == "fpd" and distill.distance != "kl":
        mistakes.append("distill.distance: 'mse' compares heatmaps; a SimCC student takes distill.distance=kl")
    if simcc and distill.hard_keypoints is not None:
        mistakes.append("distill.hard_keypoints: is for heatmaps; a SimCC student does without it")
    if distill.temperature is not None and distill.distance != "kl":
        mistakes.append("distill.temperature: goes with distill.distance=kl")
    if simcc and (recipe.evaluate.refine is not None or recipe.evaluate.scales != (1.0,)):
        mistakes.append("evaluate.refine, evaluate.scales: are for heatmaps; a SimCC student does without them")
    if teacher.arch is not None and teacher.arch.endswith(SIMCC_SUFFIX) != (teacher.codec.name == "simcc"):
        mistakes.append(f"teacher.codec.name: {teacher.codec.name!r} does not fit {teacher.arch!r}")
    if recipe.data.unlabelled is not None and distill.mode != "fpd":
        mistakes.append("data.unlabelled: needs a teacher, who alone says what is right for them: distill.mode=fpd")
    elif recipe.data.unlabelled is not None and distill.mask == "visible":
        mistakes.append(
            "distill.mask: 'visible' counts labelled keypoints alone, of which data.unlabelled has none; "
            "use confident or all"
        )
    return mistakes


def _missing_files(recipe: Recipe) -> list[str]:
    mistakes = []
    unlabelled = recipe.data.unlabelled
    drawn = recipe.data.synthetic is not None
    for path, shards in (
        *((path, None if drawn else dataset.shards) for path, dataset in recipe.data.labelled.items()),
        ("data.valid", None if drawn else recipe.data.valid),
        ("data.unlabelled.shards", unlabelled.shards if unlabelled is not None else None),
    ):
        if shards is not None and not is_url(shards) and not (Path(shards) / "dataset.json").is_file():
            mistakes.append(
                f"{path}: {shards}: no prepared dataset there (dataset.json); write one with `fpd-accel prepare`"
            )
    if unlabelled is not None and unlabelled.boxes is not None and not Path(unlabelled.boxes).is_file():
        mistakes.append(f"data.unlabelled.boxes: {unlabelled.boxes}: no such file; `fpd-accel detect` writes one")
    if recipe.student.weights is not None and not Path(recipe.student.weights).exists():
        mistakes.append(f"student.weights: {recipe.student.weights}: no such file or model folder")
    if recipe.evaluate.boxes is not None and not Path(recipe.evaluate.boxes).is_file():
        mistakes.append(
            f"evaluate.boxes: {recipe.evaluate.boxes}: no such file; `fpd-accel detect` writes one, and null means the "
            "annotated boxes"
        )
    if recipe.student.init is not None and not Path(recipe.student.init).exists():
        mistakes.append(f"student.init: {recipe.student.init}: no such file")
    teacher = recipe.teacher
    if recipe.distill.mode != "fpd":
        return mistakes
    if teacher.weights is not None and not Path(teacher.weights).exists():
        mistakes.append(
            f"teacher.weights: {teacher.weights}: no such file or model folder; 'fpd' needs the teacher to exist"
        )
    if teacher.weights is not None and Path(teacher.weights).is_file() and teacher.arch is None:
        mistakes.append(f"teacher.arch: missing; {teacher.weights} is a bare weights file and does not say what it is")
    if teacher.recipe is not None:
        try:
            first = teacher_recipe(recipe)
            if first.run.directory == recipe.run.directory:
                mistakes.append(
                    f"teacher.recipe: {teacher.recipe}: writes to {first.run.directory} too; change run.name"
                )
            if first.data.input_size != recipe.data.input_size:
                mistakes.append(
                    f"teacher.recipe: data.input_size is {list(first.data.input_size)} there, "
                    f"{list(recipe.data.input_size)} here; both networks see the same crop"
                )
            if (first.codec.name == "udp") != (recipe.codec.name == "udp"):
                mistakes.append(
                    f"teacher.recipe: codec.name is {first.codec.name} there, {recipe.codec.name} here; udp lays its "
                    "cells elsewhere than the others do"
                )
            if first.codec.name == "simcc" and recipe.codec.name != "simcc":
                mistakes.append("teacher.recipe: codec.name is simcc there, from which heatmaps cannot be learnt")
            if first.train.precision != recipe.train.precision:
                mistakes.append(
                    f"teacher.recipe: train.precision is {first.train.precision} there, {recipe.train.precision} here; "
                    "one command trains both in one precision, so set teacher.overrides"
                )
        except ConfigError as error:
            mistakes += [f"teacher.recipe: {line.strip()}" for line in str(error).splitlines()]
    return mistakes
