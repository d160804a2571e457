"""From a recipe to a finished run: data, teacher, student, and the table at the end. What is missing is made."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch.nn.modules.batchnorm import _BatchNorm

from fpd_accel.compilation import eagerly
from fpd_accel.config import Evaluate, Recipe, teacher_recipe
from fpd_accel.data.lessons import Lessons
from fpd_accel.data.mixture import as_mixture
from fpd_accel.data.shards import Shards
from fpd_accel.errors import CheckpointError, ConfigError, TrainingError, local
from fpd_accel.evaluation import evaluate, with_boxes
from fpd_accel.fp8 import require_float8
from fpd_accel.guard import Guard
from fpd_accel.log import say, warn
from fpd_accel.model_folder import ModelConfig, load_model, read_model_config, save_model
from fpd_accel.processes import create_accelerator, explaining_silence, is_sharded, on_every_rank, on_first_rank
from fpd_accel.report import Score, describe_model, describe_protocol, show_scores
from fpd_accel.run_data import draw_missing_data, open_data
from fpd_accel.run_directory import RunLock, check_resume, find_checkpoint, provenance, weights_digest, write_recipe
from fpd_accel.run_networks import create_networks, freeze_teacher
from fpd_accel.stop import StopRequest
from fpd_accel.teacher import Teacher
from fpd_accel.teacher_cache import CacheBuilder
from fpd_accel.trainer import Trainer
from fpd_accel.watchdog import Watchdog

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
    draw_missing_data(recipe, accelerator)
    train, valid, unlabelled = on_every_rank(
        accelerator,
        lambda: open_data(recipe, stop),
        same=lambda opened: [people.fingerprint for people in opened if people is not None],
    )
    if recipe.distill.mode == "fpd" and recipe.teacher.recipe is not None:
        _train_missing_teacher(recipe, accelerator, stop)
    set_seed(recipe.run.seed)
    student, taught = on_every_rank(
        accelerator,
        lambda: create_networks(recipe, train),
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
        teacher = freeze_teacher(taught, recipe, accelerator) if taught else None
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


def _train_missing_teacher(recipe: Recipe, accelerator: Accelerator, stop: StopRequest | None) -> None:
    """Run the teacher's own recipe, or the rest of it, unless it has come to its end."""
    first = teacher_recipe(recipe)
    final = first.run.directory / "final" / "config.json"
    if not on_first_rank(accelerator, final.is_file):
        say(f"the teacher does not exist yet: training it by {recipe.teacher.recipe}")
        run(first, accelerator=accelerator, stop=stop)
        say(f"the teacher is trained; now its student, {recipe.run.name}")


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
        guard=trainer.guard,
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
            teacher.network,
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
