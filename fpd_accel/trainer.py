"""The loop. ``Trainer.fit`` is the whole of training, in the order it happens."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from fpd_accel.checkpoint import CheckpointWriter, checkpoints, continue_from, write_checkpoint
from fpd_accel.codecs import PoseCodec
from fpd_accel.config import Recipe, accumulation_steps, steps_per_epoch, total_steps
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, make_loader
from fpd_accel.decode import accuracy
from fpd_accel.distill import Distiller
from fpd_accel.errors import CheckpointError, DataError, Preempted, TrainingError, UserError, local
from fpd_accel.evaluation import evaluate
from fpd_accel.files import replace_file
from fpd_accel.log import RunLog, StepMeter, say
from fpd_accel.losses import Losses
from fpd_accel.model_folder import ModelConfig, save_model
from fpd_accel.optim import learning_rate, teacher_share
from fpd_accel.outputs import SimCC
from fpd_accel.processes import Consensus, on_first_rank
from fpd_accel.report import protocol
from fpd_accel.scoring import selection_metric
from fpd_accel.stop import StopRequest
from fpd_accel.student import Student
from fpd_accel.teacher import Teacher
from fpd_accel.visualize import comparison, encode_picture
from fpd_accel.watchdog import Watchdog

HINT = "Another rank that hangs looks the same from here: see its own message. Raise train.timeout_minutes if it works."


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
        train: Shards,
        valid: Shards | None,
        unlabelled: Shards | None = None,
        teacher_codec: PoseCodec | None = None,
        provenance: dict[str, Any] | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.recipe, self.accelerator, self.train_shards, self.valid_shards = recipe, accelerator, train, valid
        self.unlabelled_shards = unlabelled
        self.shards = [shards for shards in (train, valid, unlabelled) if shards is not None]
        for shards in self.shards:
            len(shards.images)  # opened here too, and so watched, although it may be loader processes that read them
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
        self.selection = selection_metric(train if valid is None else valid)  # the metric by which best/ is chosen
        self.protocol = protocol(valid, recipe.evaluate) if valid is not None else {}  # what best_metrics hang on
        self.step, self.best, self.best_metrics = 0, float("-inf"), dict[str, float]()
        self.meter = StepMeter(accelerator, split=unlabelled is not None)
        self.stop = stop or StopRequest()
        self.problem: UserError | None = None  # met by this process, and not yet known to the others
        self.writer = CheckpointWriter(self.directory / "checkpoints", background=recipe.checkpoint.background)
        self.saved_at, self.asked_to_save = time.monotonic(), False

    @property
    def directory(self) -> Path:
        return self.recipe.run.directory

    @property
    def samples(self) -> int:
        """People consumed so far: all the state that the data have."""
        return self.step * self.recipe.train.global_batch

    @property
    def topology(self) -> dict[str, int]:
        """How a global batch is spread; ``normalised_over``: people whose statistics batch normalisation takes."""
        ranks = self.accelerator.num_processes
        return {
            "ranks": ranks,
            "device_batch": self.device_batch,
            "accumulation": self.accumulation,
            "normalised_over": self.device_batch * (ranks if self.recipe.train.sync_norm else 1),
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
                RunLog(self.directory, total_steps=self.total_steps, step=self.step, tensorboard=recipe.log.tensorboard)
            )
            self.watchdog = stack.enter_context(
                Watchdog(60 * recipe.train.timeout_minutes, rank=accelerator.process_index, hint=HINT)
            )
            self.consensus = Consensus(
                ("stop", "save", "problem"), ranks=accelerator.num_processes, minutes=recipe.train.timeout_minutes
            )
            stack.callback(self.writer.close)
            stack.enter_context(self.failures())
            if accelerator.is_main_process:
                continue_from(self.writer.directory, self.step)
            if self.step == self.total_steps and self.valid_shards is not None and not self.best_metrics:
                self._evaluate()  # of a finished run, by another protocol than before
            batches = self._batches()
            student.train()
            while self.step < self.total_steps:
                self.watchdog.alive(f"step {self.step + 1} of {self.total_steps}")
                rate = learning_rate(
                    recipe.optim, self.step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
                )
                self.distiller.alpha = teacher_share(recipe.distill, self.step, total_steps=self.total_steps)
                began, waited = time.perf_counter(), 0.0
                values = torch.zeros(len(self.meter.names), device=accelerator.device)
                for micro_batch in range(self.accumulation):
                    asked = time.perf_counter()
                    self._look_at(self.train_shards)
                    batch = next(batches).to(accelerator.device)
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
        raised = self.consensus.exchange(self._flags())
        if "problem" in raised:
            self._give_up()
        done = step == self.total_steps
        stopping = "stop" in raised and not done
        saving = done or stopping or "save" in raised or step % recipe.checkpoint.every_steps == 0
        evaluating = self.valid_shards is not None and (done or self._crosses_epoch(recipe.evaluate.every_epochs))
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
                f"{self.directory}: asked to stop ({self.stop.name or 'on another rank'}); saved at step {step} of "
                f"{self.total_steps}; the same command goes on from there"
            )

    def _flags(self) -> set[str]:
        """What this process wants all of them to do."""
        flags = {"stop"} if self.stop.name is not None else set()
        minutes = self.recipe.checkpoint.save_every_minutes
        if minutes is not None and not self.asked_to_save and self.accelerator.is_main_process:
            self.asked_to_save = time.monotonic() - self.saved_at > 60 * minutes
            flags |= {"save"} if self.asked_to_save else set()
        if self.problem is None and self.writer.failed:
            self._wait_for_writer()
        return flags | ({"problem"} if self.problem is not None else set())

    def _wait_for_writer(self) -> None:
        try:
            self.writer.wait()
        except CheckpointError as error:
            self.problem = error

    def _give_up(self) -> None:
        """End on every rank because of what one of them met."""

        def first() -> None:
            if self.problem is not None:
                raise self.problem

        on_first_rank(self.accelerator, first)
        raise (
            local(self.problem)
            if self.problem is not None
            else TrainingError(f"{self.directory}: another process ended the run; its own message says why")
        )

    @contextmanager
    def failures(self) -> Iterator[None]:
        """What is wrong with the data, or with the line to another rank, only this process knows.

        That a loader process has died is told by a signal, so that the error may come from any line of the block.
        """
        try:
            yield
        except DataError as error:  # from a loader process it comes with that one's traceback
            raise local(DataError(str(error).rstrip().rsplit("DataError: ", 1)[-1])) from None
        except RuntimeError as error:
            said = " ".join(str(error).split())
            if "DataLoader worker" in said:
                problem: UserError = DataError(
                    f"{self._suspect()}: a loader process ended ({said}); were the files changed under the job, or is "
                    f"memory short? {self._intact()}"
                )
            elif self.accelerator.num_processes > 1 and (isinstance(error, dist.DistError) or "onnection " in said):
                problem = TrainingError(
                    f"{self.directory}: another process is gone ({said}); its own message says why; {self._intact()}, "
                    "and the same command goes on"
                )
            else:
                raise
            raise local(problem) from None

    def _suspect(self) -> str:
        """The file that has changed, if one has; else the people to train on."""
        return next((changed for shards in self.shards if (changed := shards.changed())), str(self.train_shards.path))

    def _look_at(self, shards: Shards) -> None:
        """Before this process reads: a mapped file that was cut short would kill it by SIGBUS, without a word."""
        if not self.recipe.data.workers and (changed := shards.changed()) is not None:
            raise local(self._changed(changed))

    def _changed(self, changed: str) -> DataError:
        return DataError(f"{changed} while the run was reading it; {self._intact()}")

    def _intact(self) -> str:
        """What is there to go on from, the one that is being written included."""
        self._wait_for_writer()
        found = checkpoints(self.writer.directory)
        return f"{found[-1].name} is intact" if found else "there is no checkpoint yet"

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
            self.best_metrics = state["best_metrics"]
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
        )
        return iter(make_loader(stream, self.recipe.data.workers, self.accelerator.device))

    def _crosses_epoch(self, every: float | None) -> bool:
        """Whether this step went past a multiple of ``every`` epochs."""
        if every is None:
            return False
        return self.step // (every * self.steps_per_epoch) > (self.step - 1) // (every * self.steps_per_epoch)

    def _flush(self) -> None:
        records = self.meter.flush()
        self.log.train(records)
        bad = next((record for record in records if record["train_loss"] - record["train_loss"] != 0), None)
        if bad is not None:
            self._stop(f"the loss of step {bad['step']} is {bad['train_loss']}")
        for shards in self.shards:
            changed = shards.changed() if self.problem is None else None
            if changed is not None:
                self.problem = self._changed(changed)
        if self._anywhere(self.problem is not None):
            self._give_up()

    def _anywhere(self, met: bool) -> bool:
        """Whether it is so on any rank. All of them have to ask together, and the device is waited for."""
        return bool(self.accelerator.reduce(torch.tensor(float(met), device=self.accelerator.device), "sum") > 0)

    def _stop(self, problem: str) -> None:
        raise TrainingError(
            f"{self.directory}: {problem}; nothing was saved after it, the checkpoints before it are intact; "
            "try a lower optim.lr, optim.warmup_steps or train.clip_norm under another run.name"
        )

    def _evaluate(self) -> None:
        """Metrics on the held-out people; the best student so far goes to ``best/``."""
        assert self.valid_shards is not None
        self.student.average_buffers()
        self._look_at(self.valid_shards)
        with self.student.averaged() as model:
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
                watchdog=self.watchdog,
            )
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
        self.saved_at, self.asked_to_save = time.monotonic(), False
        if self.accelerator.is_main_process:
            state = {
                "samples": self.samples,
                "best_metrics": self.best_metrics,
                "protocol": self.protocol,
                "seed": self.recipe.run.seed,
                "topology": self.topology,
                **self.provenance,
            }
            write = partial(
                write_checkpoint, self.writer.directory, self.step, tensors=tensors, state=state,
                keep=self.recipe.checkpoint.keep,
            )  # fmt: skip
            try:
                self.writer.submit(write)
            except CheckpointError as error:
                self.problem = error
        if wait:
            on_first_rank(self.accelerator, self._written)

    def _written(self) -> None:
        if self.problem is not None:
            raise self.problem
        self.writer.wait()

    def _finish(self) -> None:
        self._save_model("final")
        if self.valid_shards is None:
            self._save_model("best")
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
