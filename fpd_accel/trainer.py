"""The loop. ``Trainer.fit`` is the whole of training, in the order it happens."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fpd_accel.checkpoint import write_checkpoint
from fpd_accel.codecs import PoseCodec
from fpd_accel.compilation import eagerly
from fpd_accel.config import Recipe, accumulation_steps, steps_per_epoch, total_steps
from fpd_accel.data.batch import Batch, DeviceCopy, Normalization
from fpd_accel.data.lessons import Lessons
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, close_loader, make_loader
from fpd_accel.decode import accuracy
from fpd_accel.distill import Distiller
from fpd_accel.errors import Preempted, TrainingError
from fpd_accel.evaluation import evaluate
from fpd_accel.files import replace_file
from fpd_accel.guard import Guard
from fpd_accel.log import RunLog, StepMeter, say
from fpd_accel.losses import Losses
from fpd_accel.model_folder import ModelConfig, save_model
from fpd_accel.optim import learning_rate, teacher_share
from fpd_accel.outputs import SimCC
from fpd_accel.processes import is_sharded
from fpd_accel.report import protocol
from fpd_accel.scoring import selection_metric
from fpd_accel.student import Student
from fpd_accel.teacher import Teacher
from fpd_accel.visualize import comparison, encode_picture


class Trainer:
    """Trains a student by a recipe, alone or with a teacher, on whatever the Accelerator was given.

    The recipe's data have to exist. ``fit`` starts at ``step``; :meth:`restore` puts a checkpoint back before it.
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
        guard: Guard | None = None,
    ) -> None:
        self.recipe, self.accelerator, self.train_shards, self.valid_shards = recipe, accelerator, train, valid
        self.unlabelled_shards = unlabelled
        shards = [people for people in (train, unlabelled, valid) if people is not None]
        self._read = [people for people in (train, unlabelled) if people is not None]  # in every step
        self.guard = guard or Guard(recipe, accelerator, shards=shards)
        self.provenance = provenance or {}  # what state.json says about data and teacher
        self.device_batch, self.accumulation = accumulation_steps(recipe, accelerator.num_processes)
        self.steps_per_epoch = steps_per_epoch(recipe, len(train))
        self.total_steps = total_steps(recipe, len(train))
        self.model_config = ModelConfig(
            arch=recipe.student.arch,
            skeleton=train.skeleton,
            input_size=recipe.data.input_size,
            codec=recipe.codec,
            box_padding=recipe.data.box_padding,
            normalization=Normalization(color=recipe.student.color),
        )
        self.student = Student(student, accelerator, train=recipe.train, optim=recipe.optim)
        self.codec = self.model_config.create_codec()
        self.distiller = Distiller(
            self.student.model, teacher, self.codec, mask=recipe.distill.mask, options=recipe.distill,
            normalization=self.model_config.normalization, teacher_codec=teacher_codec,
        )  # fmt: skip
        if self.student.compiled != "none":
            self.distiller.compile(student=self.student.compiled == "whole", cuda_graphs=recipe.train.cuda_graphs)
        self.selection = selection_metric(train if valid is None else valid)  # the metric by which best/ is chosen
        self.protocol = protocol(valid, recipe.evaluate) if valid is not None else {}  # what best_metrics hang on
        self.step, self.best, self.best_metrics = 0, float("-inf"), dict[str, float]()
        self.evaluated = 0  # the last step that was
        self.meter = StepMeter(accelerator, split=unlabelled is not None)
        self.lessons: Lessons | None = None  # the teacher's cache, once it is built

    @property
    def directory(self) -> Path:
        return self.recipe.run.directory

    @property
    def samples(self) -> int:
        """People consumed so far: all the state that the data have."""
        return self.step * self.recipe.train.global_batch

    @property
    def topology(self) -> dict[str, int]:
        """How batch and student are spread; ``normalised_over``: people whose statistics batch normalisation takes."""
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
            Preempted: a signal asked for a stop; where the run is has been saved.
            UserError: it cannot go on; the checkpoints before that are intact.
        """
        recipe, accelerator, student = self.recipe, self.accelerator, self.student
        with ExitStack() as stack:
            self.log = stack.enter_context(
                RunLog(
                    self.directory,
                    total_steps=self.total_steps,
                    step=self.step,
                    tensorboard=recipe.log.tensorboard,
                    workers=recipe.data.workers,
                )
            )
            stack.enter_context(self.guard.watching(step=self.step))
            if self._evaluation_is_due():  # left undone by a stop, or done by another protocol
                self._evaluate()
            batches, copy = self._batches(), DeviceCopy(accelerator.device)
            stack.callback(close_loader, batches)
            student.train()
            while self.step < self.total_steps:
                self.guard.watchdog.alive(f"step {self.step + 1} of {self.total_steps}")
                rate = learning_rate(
                    recipe.optim, self.step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
                )
                self.distiller.alpha = teacher_share(recipe.distill, self.step, total_steps=self.total_steps)
                began, waited = time.perf_counter(), 0.0
                values = torch.zeros(len(self.meter.names), device=accelerator.device)
                for micro_batch in range(self.accumulation):
                    asked = time.perf_counter()
                    self.guard.look_at(*self._read)
                    batch = copy(next(batches))
                    waited += time.perf_counter() - asked
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
        """What happens every so many steps; nothing is saved before the losses so far are known to be finite."""
        recipe, step = self.recipe, self.step
        asked = self.guard.ask()
        done = step == self.total_steps
        stopping = "stop" in asked and not done
        saving = done or stopping or "save" in asked or step % recipe.checkpoint.every_steps == 0
        evaluating = self._evaluation_is_due() and not stopping  # whoever asks for a stop has no time for it
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
            raise Preempted(
                f"{self.directory}: asked to stop ({self.guard.stop.name or 'on another rank'}); saved at step {step} "
                f"of {self.total_steps}; the same command goes on from there"
            )

    def _logged(self, losses: Losses) -> Tensor:
        """The values of one micro-batch in the order of the meter's names, left on the device."""
        values = [losses.total.detach(), losses.pose, losses.kd, accuracy(losses.predicted, losses.target)]
        if self.unlabelled_shards is not None:
            values += [losses.kd - losses.kd_unlabelled, losses.kd_unlabelled]
        return torch.stack(values)

    def restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Put the student, its optimizer and the position in the data back to where a verified checkpoint was."""
        self.student.restore(checkpoint)
        self.step = state["step"]
        if state.get("protocol") == self.protocol:
            self.best_metrics, self.evaluated = state["best_metrics"], state.get("evaluated", self.step)
            self.best = self.best_metrics.get(self.selection, float("-inf"))
        else:
            say("evaluated otherwise than before: earlier scores do not count, best/ is chosen anew")

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
            start=self.samples,
            stop=self.total_steps * self.recipe.train.global_batch,
            unbiased=self.codec.unbiased,
            unlabelled=self.unlabelled_shards,
            share=self.recipe.data.unlabelled.share if self.recipe.data.unlabelled is not None else 0.0,
            group_by_image=self.recipe.data.group_by_image,
            lessons=self.lessons,
        )
        return iter(make_loader(stream, self.recipe.data.workers, self.accelerator.device))

    def _evaluation_is_due(self) -> bool:
        """Whether this step ends the run or went past a multiple of ``evaluate.every_epochs``, and is not evaluated."""
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
        self.guard.look_at_all()

    def _stop(self, problem: str) -> None:
        raise TrainingError(
            f"{self.directory}: {problem}; nothing was saved after it, the checkpoints before it are intact; "
            "try a lower optim.lr, optim.warmup_steps or train.clip_norm under another run.name"
        )

    def _evaluate(self) -> None:
        """Metrics on the held-out people; the best student so far goes to ``best/``."""
        assert self.valid_shards is not None
        self.student.average_buffers()
        self.guard.look_at(self.valid_shards)
        with eagerly(self.recipe), self.student.averaged() as model:
            metrics, people = evaluate(
                model,
                self.valid_shards,
                codec=self.codec,
                normalization=self.model_config.normalization,
                padding=self.recipe.data.box_padding,
                options=self.recipe.evaluate,
                compare=self.distiller.compare,
                workers=self.recipe.data.workers,
                accelerator=self.accelerator,
                watchdog=self.guard.watchdog,
            )
        self.evaluated = self.step
        self.log.evaluation(metrics, self.step, protocol=self.protocol)
        if metrics[self.selection] > self.best:
            self.best, self.best_metrics = metrics[self.selection], {"step": self.step, **metrics}
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
                source["protocol"] = self.protocol
            config = self.model_config.model_copy(update={"source": source})
            save_model(self.directory / name, weights, config)

    def _save(self, *, wait: bool) -> None:
        """Begin to write a checkpoint; with ``wait``, until it is on the disk."""
        if not self.student.is_finite():  # the step after would have shown it, one checkpoint too late
            self._stop(f"the weights after step {self.step} are not finite")
        self.student.average_buffers()
        tensors = self.student.state()
        state = {
            "samples": self.samples,
            "best_metrics": self.best_metrics,
            "evaluated": self.evaluated,
            "protocol": self.protocol,
            "seed": self.recipe.run.seed,
            "topology": self.topology,
            **self.provenance,
        }
        write = partial(
            write_checkpoint, self.directory / "checkpoints", self.step, tensors=tensors, state=state,
            keep=self.recipe.checkpoint.keep,
        )  # fmt: skip
        self.guard.save(write, wait=wait)

    def _finish(self) -> None:
        if self.valid_shards is None:
            self._save_model("best")
        self._save_model("final")  # last: whoever needs a finished teacher looks for it, and takes the best
        self.accelerator.wait_for_everyone()
        say(f"finished {self.directory} at step {self.step}")

    def _picture(self, batch: Batch, losses: Losses) -> None:
        """Ground truth, student and teacher side by side, for the first people of the last batch of rank 0."""
        if not self.accelerator.is_main_process:
            return
        target = losses.target
        if isinstance(target, SimCC):
            target = target.map(lambda probabilities: probabilities.clamp(min=1e-9).log())  # a network gives logits
        outputs = {"ground truth": (target, self.codec), "student": (losses.predicted, self.codec)}
        if losses.taught is not None:
            outputs["teacher"] = (losses.taught, self.distiller.teacher_codec)
        picture = comparison(batch, outputs, self.train_shards.skeleton)
        replace_file(self.directory / "pictures" / f"step_{self.step:08d}.png", encode_picture(picture, ".png"))
        self.log.picture("people", picture, self.step)
