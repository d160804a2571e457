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

from fpd_accel.config.loading import teacher_recipe
from fpd_accel.config.schema import Recipe
from fpd_accel.console import say, warn
from fpd_accel.data.mixture import Mixture, as_mixture
from fpd_accel.data.open import draw_missing_data, open_data
from fpd_accel.data.shards import Shards
from fpd_accel.data.teacher_targets import TeacherTargets
from fpd_accel.distributed.accelerator import (
    create_accelerator,
    is_sharded,
    run_on_all,
    run_on_main,
    translate_comm_errors,
)
from fpd_accel.distributed.preemption import StopSignal
from fpd_accel.errors import CheckpointError, TrainingError, this_rank_only
from fpd_accel.evaluation.tables import Score, describe_protocol, show_scores
from fpd_accel.files import is_url
from fpd_accel.models.fp8 import require_float8
from fpd_accel.skeleton import COCO
from fpd_accel.training.networks import check_networks, create_networks, freeze_teacher
from fpd_accel.training.resume import begin, provenance, weights_digest
from fpd_accel.training.run_lock import RunLock
from fpd_accel.training.teacher import Teacher
from fpd_accel.training.teacher_cache.build import CacheBuilder
from fpd_accel.training.trackers import require_trackers
from fpd_accel.training.trainer import Trainer, supervise
from fpd_accel.weights.model_cost import describe_model
from fpd_accel.weights.model_folder import ModelConfig

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)


def run(
    recipe: Recipe, *, resume: str = "auto", accelerator: Accelerator | None = None, stop: StopSignal | None = None
) -> list[Score]:
    """Run a recipe to its end; return the rows of the final table: the teacher, if there is one, and the student.

    Args:
        recipe: The run to start or to resume.
        resume: `auto` continues from the newest whole checkpoint, `none` refuses a run that has begun; or the
            directory of a checkpoint.
        accelerator: By default built for the recipe.
        stop: Tells of a signal that asks for the end.

    Raises:
        UserError: Something outside the program is wrong; the message says what to do.
        Preempted: `stop` was set; the run has saved a checkpoint.
    """
    accelerator = accelerator or create_accelerator(
        recipe.train.precision, parallel=recipe.train.parallel, timeout_minutes=recipe.train.timeout_minutes
    )
    with translate_comm_errors(accelerator, str(recipe.run.directory)):
        return _run(recipe, accelerator, resume=resume, stop=stop)


def _run(recipe: Recipe, accelerator: Accelerator, *, resume: str, stop: StopSignal | None) -> list[Score]:
    _check_environment(recipe, accelerator)
    train, valid, unlabelled = data = _open_data(recipe, accelerator, stop)
    if recipe.distill.mode == "fpd" and recipe.teacher.recipe is not None:
        _train_missing_teacher(recipe, accelerator, stop)
    set_seed(recipe.run.seed)
    student, teacher = run_on_all(
        accelerator,
        lambda: create_networks(recipe, train.skeleton),
        same=lambda made: [weights_digest(network.state_dict()) for network in (made[0], *(made[1] or ())[1:])],
    )
    supervisor = supervise(recipe, accelerator, data, stop)
    with RunLock(recipe.run.directory) as lock, _disk_errors(recipe.run.directory), supervisor.guarded():
        origin = provenance(recipe, data=train, unlabelled=unlabelled, teacher=teacher)
        supervisor.watchdog.alive("looking for the checkpoint to go on from")
        checkpoint, state = run_on_main(
            accelerator,
            lambda: begin(recipe, lock, resume=resume, people=len(train), provenance=origin, teacher=teacher),
        )
        supervisor.watchdog.alive("preparing the networks")
        frozen = freeze_teacher(teacher, recipe, accelerator) if teacher is not None else None
        trainer = Trainer(
            recipe,
            accelerator,
            student=student,
            teacher=frozen,
            train=train,
            valid=valid,
            unlabelled=unlabelled,
            teacher_codec=teacher.config.create_codec() if teacher is not None else None,
            provenance=origin,
            supervisor=supervisor,
        )
        if checkpoint is not None:
            supervisor.watchdog.alive(f"reading {checkpoint.name}")
            trainer.restore(checkpoint, state)
            _announce_resume(trainer, checkpoint, state)
        _announce(trainer, teacher.config if teacher is not None else None, frozen)
        if teacher is not None and frozen is not None:
            trainer.teacher_targets = _open_cache(trainer, teacher.config, frozen)
        best, scores = trainer.fit(), []
        if teacher is not None and frozen is not None and valid is not None and recipe.evaluate.teacher:
            scores.append(Score("teacher", teacher.config, trainer.score(frozen.network, teacher.config, valid)[0]))
        scores.append(Score("student", trainer.model_config, best))
    accelerator.free_memory()
    if accelerator.is_main_process and valid is not None:
        title = f"{recipe.run.name} ({recipe.distill.mode}), held out: {describe_protocol(valid, recipe.evaluate)}"
        show_scores(title, scores)
    return scores


def _open_data(
    recipe: Recipe, accelerator: Accelerator, stop: StopSignal | None
) -> tuple[Mixture, Shards | None, Shards | None]:
    """Check the networks, draw missing synthetic data, and open (train, valid, unlabelled) on all ranks."""
    run_on_main(accelerator, lambda: _check_networks_early(recipe))
    if recipe.data.synthetic is not None:
        with accelerator.main_process_first():
            draw_missing_data(recipe.data)
    data = run_on_all(
        accelerator,
        lambda: open_data(recipe.data, recipe.evaluate, stop=stop),
        same=lambda opened: [people.fingerprint for people in opened if people is not None],
    )
    run_on_main(accelerator, lambda: check_networks(recipe, data[0].skeleton))
    return data


def _check_environment(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raise UserError for settings that this device or this environment cannot satisfy."""
    if recipe.train.sync_norm and accelerator.device.type != "cuda":
        raise TrainingError("train.sync_norm: synchronised batch normalisation needs GPUs; leave it out")
    if recipe.train.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        raise TrainingError("train.cuda_graphs: needs a single process on a GPU; leave it out")
    if recipe.distill.mode == "fpd" and recipe.teacher.fp8:
        require_float8(accelerator.device)
    require_trackers(recipe.log.trackers)


def _check_networks_early(recipe: Recipe) -> None:
    """Check the networks before anything is drawn or decoded; published data are only checked once they are open."""
    first = next(iter(recipe.data.labelled.values())).shards
    if is_url(first):
        return
    drawn = recipe.data.synthetic is None or (Path(first) / "dataset.json").is_file()
    check_networks(recipe, Shards(first).skeleton if drawn else COCO)


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Report a full disk as a CheckpointError, without a traceback."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        raise this_rank_only(
            CheckpointError(
                f"{directory}: cannot be written: {error}; the checkpoints in it are intact; make room and run the "
                "same command again"
            )
        ) from None


def _announce_resume(trainer: Trainer, checkpoint: Path, state: dict[str, Any]) -> None:
    """Print where a resumed run stands, and how another number of processes affects it."""
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
    normalised_before = before.get("normalised_over", before["device_batch"])
    has_norm = any(isinstance(module, _BatchNorm) for module in trainer.student.network.modules())
    if has_norm and not recipe.train.freeze_norm and normalised_before != now["normalised_over"]:
        warn(
            f"batch normalisation sees {now['normalised_over']} samples at a time, before {normalised_before}: the "
            "curve goes on, but not digit by digit; train.device_batch sets how many"
        )


def _train_missing_teacher(recipe: Recipe, accelerator: Accelerator, stop: StopSignal | None) -> None:
    """Run the teacher's own recipe, or the rest of it, unless it is finished."""
    own = teacher_recipe(recipe)
    final = own.run.directory / "final" / "config.json"
    if not run_on_main(accelerator, final.is_file):
        say(f"the teacher does not exist yet: training it by {recipe.teacher.recipe}")
        run(own, accelerator=accelerator, stop=stop)
        say(f"the teacher is trained; now its student, {recipe.run.name}")


def _open_cache(trainer: Trainer, config: ModelConfig, teacher: Teacher) -> TeacherTargets | None:
    """Return the teacher's cache, built where it is missing; None if the recipe wants none or the run is finished."""
    recipe, options = trainer.recipe, trainer.recipe.teacher.cache
    if options is None or trainer.step == trainer.total_steps:
        return None
    builder = CacheBuilder(
        accelerator=trainer.accelerator,
        supervisor=trainer.supervisor,
        teacher=teacher,
        config=config,
        options=options,
        root=Path(options.folder or Path(recipe.run.root) / "teacher_cache"),
        train=as_mixture(trainer.train_shards),
        unlabelled=trainer.unlabelled_shards,
        data=recipe.data,
        seed=recipe.run.seed,
        unbiased=trainer.codec.unbiased,
        precision=recipe.train.precision,
        teacher_stage=recipe.distill.teacher_stage,
        digest=trainer.provenance["teacher_sha256"],
        batch_size=trainer.device_batch,
    )
    with trainer.supervisor.translated():
        remaining = (trainer.total_steps - trainer.step) * recipe.train.global_batch
        return builder.open(student=trainer.model_config, samples=remaining)


def _announce(trainer: Trainer, config: ModelConfig | None, teacher: Teacher | None) -> None:
    """Print the cost of both networks and the plan of the run."""
    if config is not None:
        say(describe_model("teacher", config))
    say(describe_model("student", trainer.model_config))
    recipe = trainer.recipe
    say(
        f"{recipe.run.directory}: {trainer.total_steps} steps of {recipe.train.global_batch} samples "
        f"({trainer.accelerator.num_processes} x {trainer.device_batch}, accumulated {trainer.accumulation} times) "
        f"out of {as_mixture(trainer.train_shards)}, {recipe.train.precision} on {trainer.accelerator.device}"
        f"{', sharded (FSDP2)' if is_sharded(trainer.accelerator) else ''}"
        f"{trainer.train_shards.skeleton.sigma_note}"
    )
    compiled = {"student": trainer.student.compiled, "teacher": teacher.compiled if teacher is not None else "none"}
    if parts := [f"{name} ({how})" for name, how in compiled.items() if how != "none"]:
        say(
            f"compiling {', '.join(parts)}: the first step waits for it, minutes for a large network; PyTorch keeps "
            "the result for later runs"
        )
