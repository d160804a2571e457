"""The loop. ``Trainer.fit`` is the whole of training, in the order it happens."""

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fpd_accel.checkpoint import optimizer_tensors, restore_optimizer, write_checkpoint
from fpd_accel.codecs import PoseCodec
from fpd_accel.config import Recipe, accumulation_steps, steps_per_epoch, total_steps
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, make_loader
from fpd_accel.decode import accuracy
from fpd_accel.distill import Distiller
from fpd_accel.errors import TrainingError
from fpd_accel.evaluation import evaluate
from fpd_accel.log import RunLog, StepMeter, say
from fpd_accel.losses import Losses
from fpd_accel.model_folder import ModelConfig, save_model
from fpd_accel.optim import create_optimizer, learning_rate, teacher_share
from fpd_accel.outputs import SimCC
from fpd_accel.report import protocol
from fpd_accel.scoring import selection_metric
from fpd_accel.teacher import Teacher
from fpd_accel.visualize import comparison, save_picture


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
    ) -> None:
        self.recipe, self.accelerator, self.train_shards, self.valid_shards = recipe, accelerator, train, valid
        self.unlabelled_shards = unlabelled
        self.provenance = provenance or {}  # what state.json says about data and teacher
        self.device_batch, self.accumulation = accumulation_steps(recipe, accelerator.num_processes)
        self.steps_per_epoch = steps_per_epoch(recipe, len(train))
        self.total_steps = total_steps(recipe, len(train))
        if recipe.train.channels_last:
            student = student.to(memory_format=torch.channels_last)
        self.model_config = ModelConfig(
            arch=recipe.student.arch,
            skeleton=train.skeleton,
            input_size=recipe.data.input_size,
            codec=recipe.codec,
            box_padding=recipe.data.box_padding,
            normalization=Normalization(color=recipe.student.color),
        )
        self.bare = student.to(accelerator.device)  # the student without wrappers: what is saved and evaluated
        optimizer = create_optimizer(self.bare, recipe.optim, accelerator.device)
        self.average = self._moving_average()  # a copy, so before Accelerate puts its own forward on the student
        self.student, self.optimizer = accelerator.prepare(self.bare, optimizer)
        self.codec = self.model_config.create_codec()
        self.distiller = Distiller(
            self.student, teacher, self.codec, mask=recipe.distill.mask, options=recipe.distill,
            normalization=self.model_config.normalization, teacher_codec=teacher_codec,
        )  # fmt: skip
        self.selection = selection_metric(train if valid is None else valid)  # the metric by which best/ is chosen
        self.protocol = protocol(valid, recipe.evaluate) if valid is not None else {}  # what best_metrics hang on
        self.step, self.best, self.best_metrics = 0, float("-inf"), dict[str, float]()
        self.meter = StepMeter(accelerator, split=unlabelled is not None)

    @property
    def directory(self) -> Path:
        return self.recipe.run.directory

    @property
    def samples(self) -> int:
        """People consumed so far: all the state that the data have."""
        return self.step * self.recipe.train.global_batch

    def fit(self) -> dict[str, float]:
        """Train from the current step to the last, and return the metrics of the best student."""
        recipe, accelerator = self.recipe, self.accelerator
        with RunLog(
            self.directory, total_steps=self.total_steps, step=self.step, tensorboard=recipe.log.tensorboard
        ) as self.log:
            if self.step == self.total_steps and self.valid_shards is not None and not self.best_metrics:
                self._evaluate()  # of a finished run, by another protocol than before
            batches = self._batches()
            self._train_mode()
            while self.step < self.total_steps:
                rate = learning_rate(
                    recipe.optim, self.step, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
                )
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                self.distiller.alpha = teacher_share(recipe.distill, self.step, total_steps=self.total_steps)
                began, waited = time.perf_counter(), 0.0
                values = torch.zeros(len(self.meter.names), device=accelerator.device)
                for micro_batch in range(self.accumulation):
                    asked = time.perf_counter()
                    batch = next(batches).to(accelerator.device)
                    waited += time.perf_counter() - asked
                    is_last = micro_batch == self.accumulation - 1
                    with nullcontext() if is_last else accelerator.no_sync(self.student):
                        losses = self.distiller(batch)
                        accelerator.backward(losses.total / self.accumulation)
                    values += self._logged(losses) / self.accumulation
                if recipe.train.clip_norm is not None:
                    accelerator.clip_grad_norm_(self.student.parameters(), recipe.train.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.average is not None:
                    self.average.update_parameters(self.bare)
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
        done = step == self.total_steps
        saving = done or step % recipe.checkpoint.every_steps == 0
        evaluating = self.valid_shards is not None and (done or self._crosses_epoch(recipe.evaluate.every_epochs))
        if saving or evaluating or step % recipe.log.every_steps == 0:
            self._flush()
        pictures = recipe.log.pictures_every_steps
        if pictures is not None and (done or step % pictures == 0):
            self._picture(batch, losses)
        if evaluating:
            self._evaluate()
            self._train_mode()
        if saving:
            self._save()

    def _logged(self, losses: Losses) -> Tensor:
        """The values of one micro-batch in the order of the meter's names, left on the device."""
        values = [losses.total.detach(), losses.pose, losses.kd, accuracy(losses.predicted, losses.target)]
        if self.unlabelled_shards is not None:
            values += [losses.kd - losses.kd_unlabelled, losses.kd_unlabelled]
        return torch.stack(values)

    def restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Put the student, its optimizer and the position in the data back to where a verified checkpoint was."""
        self.bare.load_state_dict(load_file(checkpoint / "student.safetensors"), strict=True)
        restore_optimizer(self.bare, self.optimizer.optimizer, checkpoint / "optimizer.safetensors")
        if self.average is not None:
            self.average.module.load_state_dict(load_file(checkpoint / "student_ema.safetensors"), strict=True)
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

    def _train_mode(self) -> None:
        self.student.train()
        if self.recipe.train.freeze_norm:
            for module in self.student.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _moving_average(self) -> AveragedModel | None:
        decay = self.recipe.train.ema_decay
        if decay is None:
            return None
        model = AveragedModel(self.bare, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        model.n_averaged.fill_(1)  # the initial weights are its first term; at 0 the first step would replace them
        return model.requires_grad_(False)

    def _average_buffers(self) -> None:
        """Running statistics of normalisation layers, the mean over ranks: each rank saw its own people alone."""
        if self.accelerator.num_processes == 1:
            return
        for model in (self.bare, *([] if self.average is None else [self.average.module])):
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, reduction="mean"))

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

    def _stop(self, problem: str) -> None:
        raise TrainingError(
            f"{self.directory}: {problem}; nothing was saved after it, the checkpoints before it are intact; "
            "try a lower optim.lr, optim.warmup_steps or train.clip_norm under another run.name"
        )

    def _evaluate(self) -> None:
        """Metrics on the held-out people; the best student so far goes to ``best/``."""
        assert self.valid_shards is not None
        self._average_buffers()
        model = self.bare if self.average is None else self.average.module
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
        )
        self.log.evaluation(metrics, self.step, protocol=self.protocol)
        if metrics[self.selection] > self.best:
            self.best, self.best_metrics = metrics[self.selection], {"step": self.step, **metrics}
            self._save_model("best")
            if self.accelerator.is_main_process:
                path = self.directory / "predictions" / "valid.json"
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(people), encoding="utf-8")

    def _save_model(self, name: str) -> None:
        if self.accelerator.is_main_process:
            model = self.bare if self.average is None else self.average.module
            source: dict[str, Any] = {"run": self.recipe.run.name, "step": self.step, "mode": self.recipe.distill.mode}
            source["valid"] = scores = self.best_metrics if self.best_metrics.get("step") == self.step else {}
            if scores and self.valid_shards is not None:
                source["protocol"] = self.protocol
            config = self.model_config.model_copy(update={"source": source})
            save_model(self.directory / name, model.state_dict(), config)

    def _save(self) -> None:
        finite = torch.stack([parameter.isfinite().all() for parameter in self.bare.parameters()]).all()
        if not finite:  # the step after would have shown it, one checkpoint too late
            self._stop(f"the weights after step {self.step} are not finite")
        self._average_buffers()
        optimizer = optimizer_tensors(self.bare, self.optimizer.optimizer)  # every rank takes part
        if self.accelerator.is_main_process:
            tensors = {"student": self.bare.state_dict(), "optimizer": optimizer}
            if self.average is not None:
                tensors["student_ema"] = self.average.module.state_dict()
            state = {
                "samples": self.samples,
                "best_metrics": self.best_metrics,
                "protocol": self.protocol,
                "seed": self.recipe.run.seed,
                "topology": {
                    "ranks": self.accelerator.num_processes,
                    "device_batch": self.device_batch,
                    "accumulation": self.accumulation,
                },
                **self.provenance,
            }
            write_checkpoint(
                self.directory / "checkpoints", self.step, tensors=tensors, state=state,
                keep=self.recipe.checkpoint.keep,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

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
        save_picture(self.directory / "pictures" / f"step_{self.step:08d}.png", picture)
        self.log.picture("people", picture, self.step)
