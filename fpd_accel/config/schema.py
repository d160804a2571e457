"""The recipe: every setting of a run, typed, with its unit and default, checked before torch is imported.

A recipe is a YAML file with the sections of `Recipe`. All paths in it are relative to the working directory, like paths
typed in a shell. `loading.py` reads recipes, `rules.py` has the rules between fields.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Compile = Literal["none", "units", "whole"]
"""How much of a network `torch.compile` turns into a graph: nothing, each repeated block, or all of it."""
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PATH, DATASETS = "a path", "several datasets"
"""The two kinds of `data.train`; both contain a space, so that no key of a recipe equals them."""


class Section(BaseModel):
    """A part of a recipe: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __hash__(self) -> int:
        """Hash by content, as equality compares, although a field may hold a dictionary."""
        return hash(self.model_dump_json())


class Run(Section):
    """Name, place and seed of a run."""

    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]  # the run directory is <root>/<name>
    root: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of initial weights, sample order and augmentation

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.root) / self.name


class Augment(Section):
    """Random geometry, drawn as the published implementation draws it (see `data/augment.py`)."""

    flip: Fraction = 0.5  # probability of mirroring
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.35  # s.d. of the factor on the box size, clipped at one s.d.
    rotation: Annotated[float, Field(ge=0, le=180)] = 45.0  # s.d. of the angle in degrees, clipped at two s.d.
    rotation_probability: Fraction = 0.6
    half_body: Fraction = 0.3  # probability of framing the upper or the lower body alone
    half_body_minimum: Positive = 8  # only for people with more visible keypoints than this
    upper_body: Fraction = 0.6915  # P(N(0, 1) < 0.5), the probability of the published code's normal draw
    views: Positive | None = None  # fixed geometries per person; None: a new one in every epoch


class Synthetic(Section):
    """Draw synthetic people if `data.train` and `data.valid` do not exist yet."""

    train_images: Positive = 1500
    valid_images: Positive = 200
    seed: Annotated[int, Field(ge=0)] = 0


class Unlabelled(Section):
    """People without labels, mixed into every batch, who are learnt from the teacher alone.

    Losses stay means over the whole batch: the labels' term shrinks with the share of labelled samples.
    """

    shards: str  # written by `fpd-accel prepare`; labels in them are not used
    # JSON of a detector's boxes, as `fpd-accel detect` writes it; None: the boxes in the shards.
    boxes: str | None = None
    box_threshold: float = 0.5  # lowest detector score of a box
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the samples of a batch


class Labelled(Section):
    """One of several datasets to train on, all with the same keypoints.

    An epoch is as many labelled samples as there are labelled people in all datasets. With weights, an epoch repeats
    people of some datasets and omits people of others; each dataset is completed before any of its people repeat.
    """

    shards: str  # written by `fpd-accel prepare`
    # Share of the labelled samples relative to the other datasets; None, for all of them: the number of people.
    weight: Annotated[float, Field(gt=0)] | None = None


def _kind_of_train(value: Any) -> str | None:
    if isinstance(value, str):
        return PATH
    return DATASETS if isinstance(value, list | tuple) and value else None


class Data(Section):
    """Datasets, crops, augmentation and loader processes."""

    # The output of `fpd-accel prepare`, the folder or URL written by `fpd-accel publish`, or a list of several.
    train: Annotated[
        Annotated[str, Tag(PATH)] | Annotated[tuple[Labelled, ...], Tag(DATASETS)],
        Discriminator(
            _kind_of_train,
            custom_error_type="kind_of_train",
            custom_error_message="is neither the path of a dataset nor a list of {shards: PATH, weight: NUMBER}",
        ),
    ]
    streaming: bool = False  # read published training images window by window instead of downloading all of them
    stream_window: Positive = 16  # row groups that are shuffled together; the local disk holds three windows
    valid: str | None = None  # shards of the held-out people; None: no evaluation
    unlabelled: Unlabelled | None = None
    synthetic: Synthetic | None = None
    input_size: tuple[Positive, Positive] = (256, 192)  # (height, width) of a crop, pixels
    box_padding: Annotated[float, Field(ge=1)] = 1.25  # factor on the person's box
    workers: Annotated[int, Field(ge=0)] = 2  # loader processes per rank
    # Shuffle images instead of people, for machines with few cores: each image is decoded once per micro-batch, whose
    # samples are less mixed (COCO: from 12 images in a batch of 32).
    group_by_image: bool = False
    # Folder on a local disk for decoded images, for machines with few cores: decoded once instead of in every epoch
    # (COCO: 50 GB).
    decoded_cache: str | None = None
    augment: Augment = Augment()

    @property
    def labelled(self) -> dict[str, Labelled]:
        """The datasets of `train` by their dotted paths in the recipe."""
        if isinstance(self.train, str):
            return {"data.train": Labelled(shards=self.train)}
        return {f"data.train.{i}.shards": dataset for i, dataset in enumerate(self.train)}


class Codec(Section):
    """How keypoints become targets, and outputs become keypoints (see `codecs.py`)."""

    name: Literal["heatmap", "dark", "udp", "simcc"] = "heatmap"
    sigma: Annotated[float, Field(gt=0)] | None = None  # cells of 4 pixels, None: 2; simcc: bins, None: sqrt(side / 8)


class Student(Section):
    """The network to train and its initial weights."""

    arch: str  # a name of models/names.py, or package.module:Class for a network of your own
    arguments: dict[str, Any] = Field(default_factory=dict)  # of that class, beside `num_keypoints` and `input_size`
    weights: str | None = None  # a finished student to start from: model folder, .safetensors or .pth; loaded strictly
    init: str | None = None  # or the backbone of a classification network (HRNet, ResNet, ViT); the head starts fresh
    color: Literal["rgb", "bgr"] = "rgb"  # channel order of the input


class TeacherCache(Section):
    """Store the teacher's heatmaps for all `data.augment.views` of each person, and read them in training.

    Worthwhile for a teacher much larger than its student, and if there are many more epochs than views, as in several
    runs of one teacher. Results differ from those without a cache by the rounding of `dtype` alone.
    """

    # bf16: 2 bytes per cell, error up to 1/256 of its value; uint8: 1 byte, up to 1/510 of the heatmap's range.
    dtype: Literal["bf16", "uint8"] = "bf16"
    folder: str | None = None  # on a disk that all machines share; None: <run.root>/teacher_cache


class TeacherModel(Section):
    """The teacher: its weights, or the recipe that trains it, and how it runs.

    `arch`, `arguments`, `color` and `codec` describe a bare weights file; a model folder has its own description.
    """

    weights: str | None = None  # model folder, or .safetensors / .pth together with `arch`
    arch: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    color: Literal["rgb", "bgr"] = "rgb"
    codec: Codec = Codec()
    recipe: str | None = None  # trained first, with distill.mode=normal, if the weights do not exist yet
    overrides: tuple[str, ...] = ()  # of that recipe: "key.path=value"
    # torch.compile in training steps; auto: `whole` on a GPU (`units` if sharded), `none` on a processor.
    compile: Compile | Literal["auto"] = "auto"
    shard: bool = False  # over the ranks, gathered block by block: for a teacher too large for one device
    fold_norm: bool = True  # fold normalisations into the convolutions before them; equal outputs except for rounding
    fp8: bool = False  # ViTPose: linear layers in float8, heatmaps within about 5 %; never measured on a GPU
    cache: TeacherCache | None = None  # None: run the teacher in every step


class Distill(Section):
    """The objective (see `training/distiller.py`)."""

    mode: Literal["fpd", "normal"] = "fpd"  # fpd: teacher and labels; normal: labels alone, by the same loop
    alpha: Fraction = 0.5  # weight of the teacher's term; the labels' term has 1 - alpha
    alpha_final: Fraction | None = None  # at the end of the schedule; None: alpha throughout
    alpha_schedule: Literal["constant", "linear", "cosine"] = "constant"
    # Keypoints of the teacher's term: the labelled ones, all, or those whose peak is above `confidence`.
    mask: Literal["visible", "all", "confident"] = "visible"
    confidence: Fraction = 0.3
    distance: Literal["mse", "kl"] = "mse"  # of the teacher's term; SimCC students need kl
    temperature: Annotated[float, Field(gt=0)] | None = None  # kl: divides both; None: 0.1 for heatmaps, 1 for SimCC
    teacher_stage: Literal["last", "each"] = "last"  # the teacher's stage that a student's stage is compared with
    hard_keypoints: Positive | None = None  # labels' term: only this many of each person's worst (OHKM); None: all


class Train(Section):
    """Length, batch, precision and parallelism of the training."""

    steps: Positive | None = None  # optimizer steps; either this or `epochs`
    epochs: Annotated[float, Field(gt=0)] | None = None  # an epoch has one labelled sample per labelled person
    global_batch: Positive  # samples per optimizer step, over all ranks
    device_batch: Positive | None = None  # samples per forward on one rank; None: global_batch / ranks
    precision: Literal["fp32", "bf16"] = "fp32"  # of forward and backward; losses are always fp32
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # of the gradient; None: no clipping
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # per step; None: no moving average of the weights
    freeze_norm: bool = False  # keep and use the running statistics of normalisation layers
    channels_last: bool = True  # memory format of images and convolutions
    compile: Compile = "none"  # whole: student, targets and losses in one graph; units: student blocks, losses apart
    cuda_graphs: bool = False  # with compile=whole on a single GPU: replay a step as one launch, for small batches
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"  # copy the student to each rank or shard it; auto: as launched
    sync_norm: bool = False  # batch normalisation over the samples of all ranks; GPUs alone
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0  # without progress, until a process ends with a message


class Optim(Section):
    """The optimizer and the schedule of its learning rate."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # adam, adamw
    momentum: Fraction = 0.9  # sgd
    schedule: Literal["constant", "step", "cosine"] = "step"
    milestones: tuple[Annotated[float, Field(gt=0)], ...] = ()  # step: epochs at which lr is multiplied by gamma
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    final_lr: Annotated[float, Field(ge=0)] = 0.0  # cosine: lr at the end
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # lr rises linearly from lr / warmup_steps


class Evaluate(Section):
    """When and how a network is evaluated."""

    every_epochs: Annotated[float, Field(gt=0)] | None = 1.0  # None: only at the end
    batch: Positive = 32  # samples per forward on one rank
    flip_test: bool = True  # average with the heatmaps of the mirrored image
    flip_shift: bool = True  # move the mirrored heatmaps right by one cell, as published; not for udp
    refine: Literal["none", "quarter", "dark"] | None = None  # decoding below one cell; None: as the codec does
    stages: Literal["last", "mean"] = "last"  # of a network with several
    scales: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)  # of the cropped region, whose heatmaps are averaged
    boxes: str | None = None  # JSON of a detector's boxes in the images of data.valid; None: the annotated boxes
    box_threshold: float = 0.0  # lowest detector score of a box
    nms: Literal["hard", "soft", "none"] = "hard"  # OKS-based suppression of several poses of one person
    nms_threshold: Fraction = 0.9  # hard: OKS above which the lower-scored pose is dropped; soft: of the decay
    keypoint_threshold: Fraction = 0.2  # score above which a keypoint counts in a person's score
    teacher: bool = True  # evaluate the teacher too, once, for the table at the end


class Log(Section):
    """Console, pictures and experiment trackers."""

    every_steps: Positive = 20  # values stay on the device in between
    pictures_every_steps: Positive | None = 500  # None: no pictures
    trackers: tuple[Tracker, ...] = ("tensorboard",)  # by Accelerate; each has to be installed

    @model_validator(mode="before")
    @classmethod
    def _read_tensorboard(cls, values: Any) -> Any:
        """Read `log.tensorboard: true|false`, which recipes of version 0.1 have, as `log.trackers`."""
        if isinstance(values, dict) and isinstance(values.get("tensorboard"), bool):
            values = dict(values)
            tensorboard = values.pop("tensorboard")
            values.setdefault("trackers", ("tensorboard",) if tensorboard else ())
        return values


class Checkpoint(Section):
    """When checkpoints are written, and how many are kept."""

    every_steps: Positive = 500
    save_every_minutes: Annotated[float, Field(gt=0)] | None = None  # also by the clock, since the last checkpoint
    keep: Positive = 2  # newest checkpoints on disk
    background: bool = True  # write while training goes on; takes the memory of one checkpoint


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
