"""From a recipe to a finished run: data, teacher, student, and the table at the end. What is missing is made."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fpd_accel.compilation import eagerly
from fpd_accel.config import Evaluate, Recipe, teacher_recipe, teacher_weights
from fpd_accel.convert import load_backbone
from fpd_accel.data.batch import Normalization
from fpd_accel.data.coco import prepare_coco
from fpd_accel.data.lessons import Lessons
from fpd_accel.data.mixture import Mixture, as_mixture
from fpd_accel.data.shards import Shards
from fpd_accel.data.synthetic import draw_dataset
from fpd_accel.data.window import open_training
from fpd_accel.errors import CheckpointError, ConfigError, TrainingError, local
from fpd_accel.evaluation import evaluate, open_detections, with_boxes
from fpd_accel.fp8 import float8_layers, require_float8
from fpd_accel.guard import Guard
from fpd_accel.log import say, warn
from fpd_accel.model_folder import ModelConfig, load_model, read_model_config, save_model
from fpd_accel.models import PoseModel, create_model
from fpd_accel.models.simcc import SimCCModel
from fpd_accel.processes import create_accelerator, explaining_silence, is_sharded, on_every_rank, on_first_rank
from fpd_accel.report import Score, describe_model, describe_protocol, show_scores
from fpd_accel.run_directory import RunLock, check_resume, find_checkpoint, provenance, weights_digest, write_recipe
from fpd_accel.stop import StopRequest
from fpd_accel.teacher import Teacher
from fpd_accel.teacher_cache import CacheBuilder
from fpd_accel.trainer import Trainer
from fpd_accel.watchdog import Watchdog
from fpd_accel.weights import load_weights

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)


def run(
    recipe: Recipe, *, resume: str = "auto", accelerator: Accelerator | None = None, stop: StopRequest | None = None
) -> list[Score]:
    """Do what a recipe says; return the rows of the table at the end: the teacher, where there is one, and the student.

    Args:
        resume: ``auto`` continues a run that has begun; ``none`` refuses one that has; or a checkpoint's directory.
        stop: tells of a signal that asks for the end.

    Raises:
        UserError: anything outside the program that is wrong; the message says what to do.
        Preempted: ``stop`` was asked for; where the run is has been saved.
    """
    accelerator = accelerator or create_accelerator(
        recipe.train.precision, parallel=recipe.train.parallel, timeout_minutes=recipe.train.timeout_minutes
    )
    with explaining_silence(accelerator, str(recipe.run.directory)):
        return _run(recipe, accelerator, resume=resume, stop=stop)


def _run(recipe: Recipe, accelerator: Accelerator, *, resume: str, stop: StopRequest | None) -> list[Score]:
    if recipe.train.sync_norm and accelerator.device.type != "cuda":
        raise TrainingError("train.sync_norm: statistics are shared on GPUs alone; leave it out")
    if recipe.train.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        raise TrainingError("train.cuda_graphs: for one process on a GPU alone; leave it out")
    if recipe.distill.mode == "fpd" and recipe.teacher.fp8:
        require_float8(accelerator.device)
    _draw_missing_data(recipe, accelerator)
    train, valid, unlabelled = on_every_rank(
        accelerator,
        lambda: _opened(*_open_data(recipe), _open_unlabelled(recipe)),
        same=lambda opened: [people.fingerprint for people in opened if people is not None],
    )
    if recipe.distill.mode == "fpd" and recipe.teacher.recipe is not None:
        _train_missing_teacher(recipe, accelerator, stop)
    set_seed(recipe.run.seed)

    def networks() -> tuple[PoseModel, tuple[ModelConfig, nn.Module] | None]:
        student = _create_student(recipe, train.skeleton.num_keypoints)
        taught = _open_teacher(recipe, train) if recipe.distill.mode == "fpd" else None
        hard = recipe.distill.hard_keypoints
        if hard is not None and hard > train.skeleton.num_keypoints:
            raise ConfigError(
                f"distill.hard_keypoints: {hard}, but {train.path} has {train.skeleton.num_keypoints} keypoints"
            )
        if taught is not None:
            _check_objective(recipe, student, taught)
        return student, taught

    student, taught = on_every_rank(
        accelerator,
        networks,
        same=lambda made: [weights_digest(network.state_dict()) for network in (made[0], *(made[1] or ())[1:])],
    )
    shards = [people for people in (train, valid, unlabelled) if people is not None]
    guard = Guard(recipe, accelerator, shards=shards, stop=stop)
    with RunLock(recipe.run.directory) as lock, _disk_errors(recipe), guard.awake():
        origin = provenance(
            recipe,
            data=train,
            unlabelled=unlabelled.fingerprint if unlabelled is not None else None,
            teacher=(taught[0], taught[1].state_dict()) if taught else None,
        )

        def find() -> tuple[Path | None, dict[str, Any]]:
            checkpoint = find_checkpoint(recipe, resume)
            return checkpoint, check_resume(recipe, checkpoint, people=len(train), provenance=origin)

        def begin() -> tuple[Path | None, dict[str, Any]]:
            if not recipe.run.directory.exists():
                find()  # before the lock, so that a new run which is refused leaves no directory
            lock.acquire()
            checkpoint, state = find()  # of a new run again: another job may have begun it, and ended, meanwhile
            write_recipe(recipe)
            if taught is not None and checkpoint is None:  # later it is known to be the same
                save_model(recipe.run.directory / "teacher", taught[1].state_dict(), taught[0])
            return checkpoint, state

        guard.watchdog.alive("looking for the checkpoint to go on from")
        checkpoint, state = on_first_rank(accelerator, begin)
        guard.watchdog.alive("preparing the networks")
        teacher = _freeze(taught, recipe, accelerator) if taught else None
        trainer = Trainer(
            recipe,
            accelerator,
            student=student,
            teacher=teacher,
            train=train,
            valid=valid,
            unlabelled=unlabelled,
            teacher_codec=taught[0].create_codec() if taught is not None else None,
            provenance=origin,
            guard=guard,
        )
        if checkpoint is not None:
            guard.watchdog.alive(f"reading {checkpoint.name}")
            trainer.restore(checkpoint, state)
            _say_where(trainer, checkpoint, state)
        _announce(trainer, taught[0] if taught else None)
        if taught is not None and teacher is not None and trainer.step < trainer.total_steps:
            trainer.lessons = _open_cache(trainer, taught[0], teacher)
        best = trainer.fit()
        scores = []
        if taught is not None and teacher is not None and valid is not None and recipe.evaluate.teacher:
            metrics = _evaluate_teacher(recipe, taught[0], teacher, valid, accelerator, guard.watchdog)
            scores.append(Score("teacher", taught[0], metrics))
        scores.append(Score("student", trainer.model_config, best))
    accelerator.free_memory()
    if accelerator.is_main_process and valid is not None:
        show_scores(
            f"{recipe.run.name} ({recipe.distill.mode}), held out: {describe_protocol(valid, recipe.evaluate)}", scores
        )
    return scores


@contextmanager
def _disk_errors(recipe: Recipe) -> Iterator[None]:
    """A disk that takes no more is nothing that the program did."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        raise local(
            CheckpointError(
                f"{recipe.run.directory}: cannot be written: {error}; the checkpoints in it are intact; make room and "
                "run the same command again"
            )
        ) from None


def _say_where(trainer: Trainer, checkpoint: Path, state: dict[str, Any]) -> None:
    """Where a resumed run stands, and what another number of processes means to it."""
    recipe = trainer.recipe
    if trainer.step == trainer.total_steps:
        say(
            f"{recipe.run.directory}: finished already, at step {trainer.step}; to go on, raise train.steps or "
            "train.epochs"
        )
        return
    say(f"resuming {recipe.run.directory} from {checkpoint.name}: step {trainer.step} of {trainer.total_steps}")
    before, now = state["topology"], trainer.topology
    if before["ranks"] != now["ranks"]:
        say(f"on {now['ranks']} processes, before on {before['ranks']}: the same people in every step")
    seen = before.get("normalised_over", before["device_batch"])
    normalised = any(isinstance(module, _BatchNorm) for module in trainer.student.network.modules())
    if normalised and not recipe.train.freeze_norm and seen != now["normalised_over"]:
        warn(
            f"batch normalisation sees {now['normalised_over']} people at a time, before {seen}: the curve goes on, "
            "but not digit by digit; train.device_batch sets how many"
        )


def _draw_missing_data(recipe: Recipe, accelerator: Accelerator) -> None:
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


def _train_missing_teacher(recipe: Recipe, accelerator: Accelerator, stop: StopRequest | None) -> None:
    """Run the teacher's own recipe, or the rest of it, unless it has come to its end."""
    first = teacher_recipe(recipe)
    final = first.run.directory / "final" / "config.json"
    if not on_first_rank(accelerator, final.is_file):
        say(f"the teacher does not exist yet: training it by {recipe.teacher.recipe}")
        run(first, accelerator=accelerator, stop=stop)
        say(f"the teacher is trained; now its student, {recipe.run.name}")


def _open_data(recipe: Recipe) -> tuple[Mixture, Shards | None]:
    train = _open_labelled(recipe)
    valid = Shards(recipe.data.valid) if recipe.data.valid is not None else None
    if valid is not None and valid.skeleton.keypoints != train.skeleton.keypoints:
        raise ConfigError(
            f"data.valid: {valid.path} has the keypoints of skeleton {valid.skeleton.name!r}, but data.train those of "
            f"{train.skeleton.name!r}"
        )
    if valid is not None:
        valid = with_boxes(valid, recipe.evaluate)
        _refuse_nobody("data.valid", valid)
    return train, valid


def _opened(
    train: Mixture, valid: Shards | None, unlabelled: Shards | None
) -> tuple[Mixture, Shards | None, Shards | None]:
    """The same, their files mapped: what is missing or damaged on one machine is found while all listen."""
    for people in (train, valid, unlabelled):
        if people is not None:
            people.open()
    return train, valid, unlabelled


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


def _create_student(recipe: Recipe, num_keypoints: int) -> PoseModel:
    """A student with fresh weights, with all of a file's, or with the backbone of a classification network."""
    student = create_model(recipe.student.arch, num_keypoints, input_size=recipe.data.input_size)
    weights = recipe.student.weights
    if weights is not None:
        load_weights(student, weights)
    if weights is not None and (Path(weights) / "config.json").is_file():
        normalization = read_model_config(weights).normalization
        color = normalization.color
        if color != recipe.student.color:
            raise ConfigError(f"student.weights: {weights} takes {color} images; set student.color={color}")
        if normalization != Normalization(color=color):
            raise ConfigError(
                f"student.weights: {weights} takes images of mean {normalization.mean} and std {normalization.std}, "
                "but students are trained on ImageNet's; such a network can be a teacher"
            )
    if recipe.student.init is not None:
        network = student.network if isinstance(student, SimCCModel) else student
        say(f"student.init: {load_backbone(network, recipe.student.init)}")
    return student


def _open_teacher(recipe: Recipe, train: Mixture) -> tuple[ModelConfig, nn.Module]:
    """The teacher's network and description, checked against the data and the student's input."""
    path = teacher_weights(recipe)
    model: nn.Module
    if path.is_dir():
        config, model = read_model_config(path), load_model(path)
        if recipe.teacher.arch not in (None, config.arch):
            raise ConfigError(f"teacher.arch: {recipe.teacher.arch}, but {path} is a {config.arch}; leave it out")
    else:
        assert recipe.teacher.arch is not None  # checked with the recipe
        config = ModelConfig(
            arch=recipe.teacher.arch,
            skeleton=train.skeleton,
            input_size=recipe.data.input_size,
            codec=recipe.teacher.codec,
            normalization=Normalization(color=recipe.teacher.color),
        )
        model = config.create_model()
        load_weights(model, path)
    if config.skeleton.keypoints != train.skeleton.keypoints:
        raise ConfigError(
            f"teacher.weights: {path} was trained on skeleton {config.skeleton.name!r} "
            f"({config.skeleton.num_keypoints} keypoints), but the data have {train.skeleton.name!r} "
            f"({train.skeleton.num_keypoints})"
        )
    if config.input_size != recipe.data.input_size:
        raise ConfigError(
            f"teacher.weights: {path} takes {list(config.input_size)} (height, width), but data.input_size is "
            f"{list(recipe.data.input_size)}; both networks see the same crop"
        )
    if recipe.teacher.fp8:
        float8_layers(model)  # says so where there are none
    return config, model


def _check_objective(recipe: Recipe, student: PoseModel, taught: tuple[ModelConfig, nn.Module]) -> None:
    """What the student's output and the teacher's ask of each other, and both of the losses."""
    config, teacher = taught
    if config.codec.name == "simcc" and recipe.codec.name != "simcc":
        raise ConfigError(
            f"teacher: {config.arch} puts out SimCC's distributions, from which heatmaps cannot be made; "
            "take a heatmap teacher, or a SimCC student"
        )
    if config.codec.name == "simcc" and recipe.teacher.cache is not None:
        raise ConfigError(f"teacher.cache: keeps heatmaps alone, but {config.arch} is a SimCC teacher; leave it out")
    if (config.codec.name == "udp") != (recipe.codec.name == "udp"):
        raise ConfigError(
            f"teacher: it was trained with codec {config.codec.name!r}, the student has {recipe.codec.name!r}; udp "
            "lays its cells elsewhere than the others do, so that their outputs cannot be compared"
        )
    if recipe.distill.teacher_stage == "each" and teacher.num_stages != student.num_stages:
        raise ConfigError(
            f"distill.teacher_stage: 'each' needs as many stages in the teacher ({config.arch}: {teacher.num_stages}) "
            f"as in the student ({recipe.student.arch}: {student.num_stages}); use last"
        )


def _freeze(taught: tuple[ModelConfig, nn.Module], recipe: Recipe, accelerator: Accelerator) -> Teacher:
    config, model = taught
    shard = recipe.teacher.shard and accelerator.num_processes > 1
    if recipe.train.channels_last and not shard:  # FSDP2 takes contiguous parameters alone
        model = model.to(memory_format=torch.channels_last)
    return Teacher(
        model,
        device=accelerator.device,
        normalization=config.normalization,
        precision=torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32,
        compile=recipe.teacher.compile,
        cuda_graphs=recipe.train.cuda_graphs,
        shard=shard,
        fold_norm=recipe.teacher.fold_norm,
        fp8=recipe.teacher.fp8,
    )


def _open_cache(trainer: Trainer, config: ModelConfig, teacher: Teacher) -> Lessons | None:
    """What the teacher says of every view, if the recipe wants it kept; asked now where nobody has yet."""
    recipe = trainer.recipe
    if recipe.teacher.cache is None:
        return None
    builder = CacheBuilder(
        recipe,
        trainer.accelerator,
        options=recipe.teacher.cache,
        teacher=teacher,
        config=config,
        digest=trainer.provenance["teacher_sha256"],
        train=as_mixture(trainer.train_shards),
        unlabelled=trainer.unlabelled_shards,
        batch_size=trainer.device_batch,
        stop=trainer.guard.stop,
    )
    with trainer.guard.explaining():
        remaining = (trainer.total_steps - trainer.step) * recipe.train.global_batch
        return builder.open(student=trainer.model_config, samples=remaining)


def _evaluate_teacher(
    recipe: Recipe,
    config: ModelConfig,
    teacher: Teacher,
    valid: Shards,
    accelerator: Accelerator,
    watchdog: Watchdog,
) -> dict[str, float]:
    with eagerly(recipe):
        metrics, _ = evaluate(
            teacher.model,
            valid,
            codec=config.create_codec(),
            normalization=teacher.normalization,
            padding=recipe.data.box_padding,
            options=recipe.evaluate,
            workers=recipe.data.workers,
            accelerator=accelerator,
            watchdog=watchdog,
        )
    return metrics


def _announce(trainer: Trainer, teacher: ModelConfig | None) -> None:
    """What both networks cost, and what is about to happen."""
    if teacher is not None:
        say(describe_model("teacher", teacher))
    say(describe_model("student", trainer.model_config))
    recipe = trainer.recipe
    say(
        f"{recipe.run.directory}: {trainer.total_steps} steps of {recipe.train.global_batch} people "
        f"({trainer.accelerator.num_processes} x {trainer.device_batch}, accumulated {trainer.accumulation} times) "
        f"out of {as_mixture(trainer.train_shards)}, {recipe.train.precision} on {trainer.accelerator.device}"
        f"{', sharded (FSDP2)' if is_sharded(trainer.accelerator) else ''}"
        f"{trainer.train_shards.skeleton.sigma_note}"
    )
    compiled = {"student": trainer.student.compiled}
    if teacher is not None:
        compiled["teacher"] = recipe.teacher.compile
    if parts := [f"{name} ({what})" for name, what in compiled.items() if what != "none"]:
        say(
            f"compiling {', '.join(parts)}: the first step waits for it, minutes for a large network; PyTorch keeps "
            "the result for later runs"
        )


def evaluate_folder(
    folder: str, data: str, *, options: Evaluate | None = None, workers: int = 0, precision: str = "fp32"
) -> tuple[Score | None, list[dict[str, Any]]]:
    """Score a model folder on prepared people, print the table, and return it with the people found.

    The score is None on every rank but the first.

    Raises:
        UserError: folder, data or boxes cannot be used, or folder and data have different keypoints.
    """
    options = options or Evaluate()
    config, shards = read_model_config(folder), Shards(data)
    if config.skeleton.keypoints != shards.skeleton.keypoints:
        raise ConfigError(
            f"{folder} finds the keypoints of skeleton {config.skeleton.name!r} ({config.skeleton.num_keypoints}), but "
            f"{data} has {shards.skeleton.name!r} ({shards.skeleton.num_keypoints})"
        )
    shards = with_boxes(shards, options)
    accelerator = create_accelerator(precision, parallel="ddp")  # there is nothing to shard
    metrics, people = evaluate(
        accelerator.prepare_model(load_model(folder).to(accelerator.device), evaluation_mode=True),
        shards,
        codec=config.create_codec(),
        normalization=config.normalization,
        padding=config.box_padding,
        options=options,
        workers=workers,
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:
        return None, people
    score = Score(str(folder), config, metrics)
    show_scores(describe_protocol(shards, options), [score])
    return score, people
