"""The training loop. `Trainer.fit` is the whole of training, in the order it happens."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fpd_accel.codecs import PoseCodec
from fpd_accel.config.loading import dump_recipe
from fpd_accel.config.plan import accumulation_steps, steps_per_epoch, total_steps
from fpd_accel.config.schema import Recipe
from fpd_accel.console import say
from fpd_accel.data.batch import Batch, DeviceCopy
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, close_loader, make_loader
from fpd_accel.data.teacher_targets import TeacherTargets
from fpd_accel.decode import accuracy
from fpd_accel.distributed.accelerator import is_sharded, run_on_main
from fpd_accel.distributed.preemption import StopSignal
from fpd_accel.errors import Preempted, TrainingError
from fpd_accel.evaluation.coco_results import selection_metric
from fpd_accel.evaluation.evaluate import Compare, evaluate
from fpd_accel.evaluation.tables import eval_settings
from fpd_accel.files import replace_file
from fpd_accel.losses import Losses
from fpd_accel.models.compile import eagerly
from fpd_accel.outputs import SimCC
from fpd_accel.training.checkpoint import write_checkpoint
from fpd_accel.training.distiller import Distiller
from fpd_accel.training.networks import describe_student
from fpd_accel.training.optim import alpha_at, learning_rate
from fpd_accel.training.resume import write_recipe
from fpd_accel.training.run_log import RunLog, StepMeter
from fpd_accel.training.student import Student
from fpd_accel.training.supervisor import RunSupervisor
from fpd_accel.training.teacher import Teacher
from fpd_accel.training.trackers import Trackers
from fpd_accel.visualize import comparison, encode_picture
from fpd_accel.weights.model_folder import ModelConfig, save_model


def supervise(
    recipe: Recipe, accelerator: Accelerator, data: Iterable[Shards | Mixture | None], stop: StopSignal | None = None
) -> RunSupervisor:
    """Return the supervisor of a run that reads these datasets."""
    return RunSupervisor(
        recipe.run.directory,
        accelerator,
        shards=[people for people in data if people is not None],
        stop=stop,
        timeout_minutes=recipe.train.timeout_minutes,
        save_every_minutes=recipe.checkpoint.save_every_minutes,
        background=recipe.checkpoint.background,
        loader_processes=recipe.data.workers,
    )


class Trainer:
    """Trains a student by a recipe, alone or with a teacher, on the processes and devices of an Accelerator.

    `fit` starts at `step`, which is 0 unless `restore` put a checkpoint back before.

    Args:
        recipe: All settings; `recipe.student` has to describe `student`, so that model folders can rebuild it.
        accelerator: Built by `create_accelerator`, or any other.
        student: The network to train.
        teacher: The frozen network to learn from; None to learn from the labels alone.
        train: People to train on.
        valid: People to evaluate on; None to evaluate never.
        unlabelled: People without labels, mixed into every batch.
        teacher_codec: Of the teacher, where it differs from the student's.
        provenance: Identities of data and teacher, for `state.json`.
        supervisor: Ends all ranks together; by default one is made from the recipe.

    Raises:
        ConfigError: `recipe.student` describes another network than `student`.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        *,
        student: nn.Module,
        teacher: Teacher | None,
        train: Shards | Mixture,
        valid: Shards | None,
        unlabelled: Shards | None = None,
        teacher_codec: PoseCodec | None = None,
        provenance: dict[str, Any] | None = None,
        supervisor: RunSupervisor | None = None,
    ) -> None:
        self.recipe, self.accelerator, self.train_shards, self.valid_shards = recipe, accelerator, train, valid
        self.unlabelled_shards, self.directory = unlabelled, recipe.run.directory
        self._read = [people for people in (train, unlabelled) if people is not None]  # in every step
        self.supervisor = supervisor or supervise(recipe, accelerator, (train, valid, unlabelled))
        self.provenance = provenance or {}
        self.device_batch, self.accumulation = accumulation_steps(recipe.train, accelerator.num_processes)
        self.steps_per_epoch = steps_per_epoch(recipe.train, recipe.data, len(train))
        self.total_steps = total_steps(recipe.train, recipe.data, len(train))
        self.model_config = describe_student(recipe, student, train.skeleton)
        self.student = Student(student, accelerator, train=recipe.train, optim=recipe.optim)
        self.codec = self.model_config.create_codec()
        self.distiller = Distiller(
            self.student.model, teacher, self.codec, mask=recipe.distill.mask, options=recipe.distill,
            normalization=self.model_config.normalization, teacher_codec=teacher_codec,
        )  # fmt: skip
        if self.student.compiled != "none":
            self.distiller.compile(student=self.student.compiled == "whole", cuda_graphs=recipe.train.cuda_graphs)
        self.compiled = self.student.compiled != "none" or (teacher is not None and teacher.compiled != "none")
        self.selection = selection_metric(train if valid is None else valid)  # the metric by which best/ is selected
        self.eval_settings = eval_settings(valid, recipe.evaluate) if valid is not None else {}
        self.step, self.best_metrics = 0, dict[str, float]()
        self.evaluated = 0  # the last evaluated step
        self.meter = StepMeter(accelerator, split=unlabelled is not None)
        self.teacher_targets: TeacherTargets | None = None  # the teacher's cache, once it is built

    @property
    def topology(self) -> dict[str, int]:
        """How batch and student are spread over ranks, for `state.json`.

        `normalised_over` is the number of samples whose statistics batch normalisation takes.
        """
        ranks = self.accelerator.num_processes
        return {
            "ranks": ranks,
            "device_batch": self.device_batch,
            "accumulation": self.accumulation,
            "normalised_over": self.device_batch * (ranks if self.recipe.train.sync_norm else 1),
            "sharded": is_sharded(self.accelerator),
        }

    def fit(self) -> dict[str, float]:
        """Train from the current step to the last, and return the metrics of the best student.

        Raises:
            Preempted: A signal asked for a stop; a checkpoint has been saved.
            UserError: The run cannot continue; the checkpoints before that are intact.
        """
        recipe, accelerator, student = self.recipe, self.accelerator, self.student
        run_on_main(accelerator, lambda: write_recipe(recipe))
        with ExitStack() as stack:
            self.log = stack.enter_context(self._open_log())
            stack.enter_context(self.supervisor.training(step=self.step))
            if self._evaluation_is_due():  # a stop left it undone, or the evaluation settings changed
                self._evaluate()
            batches, copy = self._batches(), DeviceCopy(accelerator.device)
            stack.callback(close_loader, batches)
            student.train()
            while self.step < self.total_steps:
                self.supervisor.watchdog.alive(f"step {self.step + 1} of {self.total_steps}")
                rate = learning_rate(
                    recipe.optim, self.step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
                )
                self.distiller.alpha = alpha_at(recipe.distill, self.step, total_steps=self.total_steps)
                began, waited = time.perf_counter(), 0.0
                values = torch.zeros(len(self.meter.names), device=accelerator.device)
                for micro_batch in range(self.accumulation):
                    requested = time.perf_counter()
                    self.supervisor.check_data_files(*self._read)
                    batch = copy(next(batches))
                    waited += time.perf_counter() - requested
                    is_last = micro_batch == self.accumulation - 1
                    with nullcontext() if is_last else accelerator.no_sync(student.model):
                        losses = self.distiller(batch)
                        accelerator.backward(losses.total / self.accumulation)
                    values += self._logged(losses) / self.accumulation
                student.step(rate)
                self.step += 1
                self.meter.add(
                    values, step=self.step, epoch=self.step / self.steps_per_epoch, lr=rate,
                    alpha=self.distiller.alpha, samples=recipe.train.global_batch,
                    data_time=waited, step_time=time.perf_counter() - began - waited,
                )  # fmt: skip
                self._after_step(batch, losses)
            self._finish()
        return self.best_metrics

    def _after_step(self, batch: Batch, losses: Losses) -> None:
        """Log, evaluate, save and stop where it is time; nothing is saved before the losses so far are finite."""
        recipe, step = self.recipe, self.step
        flags = self.supervisor.sync_flags()
        done = step == self.total_steps
        stopping = "stop" in flags and not done
        saving = done or stopping or "save" in flags or step % recipe.checkpoint.every_steps == 0
        evaluating = self._evaluation_is_due() and not stopping  # a preempted job has no time for an evaluation
        if saving or evaluating or step % recipe.log.every_steps == 0:
            self._flush()
        pictures = recipe.log.pictures_every_steps
        if pictures is not None and (done or step % pictures == 0):
            self._picture(batch, losses)
        if evaluating:
            self._evaluate()
            self.student.train()
        if saving:
            self._save(wait=done or stopping)
        if stopping:
            asked_by = self.supervisor.stop.name or "on another rank"
            raise Preempted(
                f"{self.directory}: asked to stop ({asked_by}); saved at step {step} "
                f"of {self.total_steps}; the same command goes on from there"
            )

    def _logged(self, losses: Losses) -> Tensor:
        """Return the values of one micro-batch in the order of the meter's names, on the device."""
        values = [losses.total.detach(), losses.pose, losses.kd, accuracy(losses.predicted, losses.target)]
        if self.unlabelled_shards is not None:
            values += [losses.kd - losses.kd_unlabelled, losses.kd_unlabelled]
        return torch.stack(values)

    def restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Put student, optimizer and position back to where a checkpoint, verified on rank 0, was by its `state.json`.

        Raises:
            CheckpointError: A rank cannot read it.
        """
        self.student.restore(checkpoint)
        self.step = state["step"]
        if state.get("protocol") == self.eval_settings:
            self.best_metrics, self.evaluated = state["best_metrics"], state.get("evaluated", self.step)
        else:
            say("evaluation settings changed: earlier scores are discarded and best/ is selected again")

    def _open_log(self) -> RunLog:
        recipe = self.recipe
        trackers = Trackers(
            self.accelerator, recipe.log.trackers, directory=self.directory,
            recipe=recipe.model_dump(mode="json"), recipe_text=dump_recipe(recipe), step=self.step,
        )  # fmt: skip
        return RunLog(
            self.directory, total_steps=self.total_steps, step=self.step, workers=recipe.data.workers, trackers=trackers
        )

    def _batches(self) -> Iterator[Batch]:
        stream = PoseStream(
            self.train_shards,
            input_size=self.recipe.data.input_size,
            batch_size=self.device_batch,
            augment=self.recipe.data.augment,
            padding=self.recipe.data.box_padding,
            seed=self.recipe.run.seed,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            start=self.step * self.recipe.train.global_batch,
            stop=self.total_steps * self.recipe.train.global_batch,
            unbiased=self.codec.unbiased,
            unlabelled=self.unlabelled_shards,
            share=self.recipe.data.unlabelled.share if self.recipe.data.unlabelled is not None else 0.0,
            group_by_image=self.recipe.data.group_by_image,
            teacher_targets=self.teacher_targets,
        )
        return iter(make_loader(stream, self.recipe.data.workers, self.accelerator.device))

    def _evaluation_is_due(self) -> bool:
        """Return whether an evaluation is due: at the end, and past each multiple of `evaluate.every_epochs`."""
        if self.valid_shards is None or self.step in (0, self.evaluated):
            return False
        every = self.recipe.evaluate.every_epochs
        if self.step == self.total_steps or every is None:
            return self.step == self.total_steps
        return self.step // (every * self.steps_per_epoch) > (self.step - 1) // (every * self.steps_per_epoch)

    def _flush(self) -> None:
        records = self.meter.flush()
        self.log.train(records)
        bad = next((record for record in records if record["train_loss"] - record["train_loss"] != 0), None)
        if bad is not None:
            self._stop(f"the loss of step {bad['step']} is {bad['train_loss']}")
        self.supervisor.check_all_data_files()

    def _stop(self, problem: str) -> None:
        raise TrainingError(
            f"{self.directory}: {problem}; nothing was saved after it, the checkpoints before it are intact; "
            "try a lower optim.lr, optim.warmup_steps or train.clip_norm under another run.name"
        )

    def score(
        self, network: nn.Module, config: ModelConfig, valid: Shards, compare: Compare | None = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return the metrics of student or teacher on held-out people, and the people found (see `evaluate`)."""
        with eagerly(self.compiled):
            return evaluate(
                network,
                valid,
                codec=config.create_codec(),
                normalization=config.normalization,
                padding=self.recipe.data.box_padding,
                options=self.recipe.evaluate,
                compare=compare,
                workers=self.recipe.data.workers,
                accelerator=self.accelerator,
                watchdog=self.supervisor.watchdog,
            )

    def _evaluate(self) -> None:
        """Evaluate on the held-out people; the best student so far goes to `best/`."""
        assert self.valid_shards is not None
        self.student.average_buffers()
        self.supervisor.check_data_files(self.valid_shards)
        with self.student.averaged() as network:
            metrics, people = self.score(network, self.model_config, self.valid_shards, self.distiller.compare)
        self.evaluated = self.step
        self.log.evaluation(metrics, self.step, protocol=self.eval_settings)
        if metrics[self.selection] > self.best_metrics.get(self.selection, float("-inf")):
            self.best_metrics = {"step": self.step, **metrics}
            self._save_model("best")
            if self.accelerator.is_main_process:
                replace_file(self.directory / "predictions" / "valid.json", json.dumps(people))

    def _save_model(self, name: str) -> None:
        with self.student.averaged():
            weights = self.student.weights()  # every rank takes part
        if self.accelerator.is_main_process:
            source: dict[str, Any] = {"run": self.recipe.run.name, "step": self.step, "mode": self.recipe.distill.mode}
            source["valid"] = scores = self.best_metrics if self.best_metrics.get("step") == self.step else {}
            if scores and self.valid_shards is not None:
                source["protocol"] = self.eval_settings
            config = self.model_config.model_copy(update={"source": source})
            save_model(self.directory / name, weights, config)

    def _save(self, *, wait: bool) -> None:
        """Start writing a checkpoint; with `wait`, return when it is on the disk."""
        if not self.student.is_finite():  # the next loss would show it, one checkpoint too late
            self._stop(f"the weights after step {self.step} are not finite")
        self.student.average_buffers()
        tensors = self.student.state()
        state = {
            "samples": self.step * self.recipe.train.global_batch,  # all the state that the data have
            "best_metrics": self.best_metrics,
            "evaluated": self.evaluated,
            "protocol": self.eval_settings,
            "seed": self.recipe.run.seed,
            "topology": self.topology,
            **self.provenance,
        }
        write = partial(
            write_checkpoint, self.directory / "checkpoints", self.step, tensors=tensors, state=state,
            keep=self.recipe.checkpoint.keep,
        )  # fmt: skip
        self.supervisor.save(write, wait=wait)

    def _finish(self) -> None:
        if self.valid_shards is None:
            self._save_model("best")
        self._save_model("final")  # last: its presence tells that best/ is the finished teacher
        self.accelerator.wait_for_everyone()
        say(f"finished {self.directory} at step {self.step}")

    def _picture(self, batch: Batch, losses: Losses) -> None:
        """Draw ground truth, student and teacher side by side, for the first samples of the last batch of rank 0."""
        if not self.accelerator.is_main_process:
            return
        target = losses.target
        if isinstance(target, SimCC):
            target = target.map(lambda probabilities: probabilities.clamp(min=1e-9).log())  # a network gives logits
        outputs = {"ground truth": (target, self.codec), "student": (losses.predicted, self.codec)}
        if losses.teacher_output is not None:
            outputs["teacher"] = (losses.teacher_output, self.distiller.teacher_codec)
        picture = comparison(batch, outputs, self.train_shards.skeleton)
        replace_file(self.directory / "pictures" / f"step_{self.step:08d}.png", encode_picture(picture, ".png"))
        self.log.trackers.picture("people", picture, self.step)
