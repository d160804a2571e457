"""The student on its processes: copied to each or sharded over them, its optimizer, and the average of its weights.

Whatever the sharding, what comes out is the whole network: names, shapes and dtypes of a single process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from fpd_accel.checkpoint import MANIFEST, optimizer_tensors, read_tensors, restore_optimizer, sha256
from fpd_accel.compilation import compile_network
from fpd_accel.config import Compile, Optim, Train
from fpd_accel.models.base import PoseModel
from fpd_accel.optim import create_optimizer
from fpd_accel.outputs import Output, each
from fpd_accel.processes import is_sharded, on_every_rank


class Student:
    """A network prepared for training by the Accelerator.

    Attributes:
        model: what the forward goes through, wrapped as the Accelerator sees fit.
        optimizer: of its parameters; the learning rate is set in every step.
        compiled: what of the network is a graph; ``whole`` is left to whoever calls it (see :meth:`Distiller.compile`).
    """

    def __init__(self, network: nn.Module, accelerator: Accelerator, *, train: Train, optim: Optim) -> None:
        self.accelerator, self.options = accelerator, train
        if train.sync_norm:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if train.channels_last and not is_sharded(accelerator):  # FSDP2 takes contiguous parameters alone
            network = network.to(memory_format=torch.channels_last)
        self.network = network.to(accelerator.device)  # without wrappers: what is saved and evaluated
        # What is gathered block by block cannot be one graph.
        self.compiled: Compile = "units" if train.compile == "whole" and is_sharded(accelerator) else train.compile
        if self.compiled == "units":
            compile_network(self.network, self.compiled)
        if is_sharded(accelerator):
            units = (
                {type(unit).__name__ for unit in network.unit_modules()} if isinstance(network, PoseModel) else set()
            )
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(units)
            _autocast(network, accelerator)
        optimizer = create_optimizer(self.network, optim, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        # A replayed graph writes its results where it wrote them before: gradients must not live there.
        self._keep_gradients = train.cuda_graphs
        self._place_gradients()
        self.average = WeightAverage(self.network, train.ema_decay) if train.ema_decay is not None else None

    def train(self) -> None:
        """Training mode; frozen normalisation layers stay in evaluation mode."""
        self.model.train()
        if self.options.freeze_norm:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def step(self, rate: float) -> None:
        """One step of the optimizer along the accumulated gradients, at this learning rate; then none are left."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.options.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self._keep_gradients)
        if self.average is not None:
            self.average.update()

    def is_finite(self) -> bool:
        """Whether every weight is, on every rank. All ranks have to ask together, and the device is waited for."""
        finite = torch.stack([_local(p).isfinite().all() for p in self.network.parameters()]).all()
        return bool(self.accelerator.reduce(finite.float(), reduction="mean") == 1)

    def average_buffers(self) -> None:
        """Running statistics of normalisation layers become the mean over ranks: each saw its own people alone.

        They are linear in what was seen, and training does not read them, so to do this often or seldom is the same but
        for rounding.
        """
        if self.accelerator.num_processes == 1:
            return
        averages = self.average.buffers() if self.average is not None else []
        for buffer in (*self.network.buffers(), *averages):
            if buffer.is_floating_point():
                buffer.copy_(self.accelerator.reduce(buffer, reduction="mean"))

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with the weights to judge and to ship: their moving average if there is one."""
        self._gather_anew()
        if self.average is not None:
            self.average.exchange()
        try:
            yield self.network
        finally:
            self._gather_anew()
            if self.average is not None:
                self.average.exchange()

    def _gather_anew(self) -> None:
        """What a forward without a backward has gathered stays gathered, and would hide the shards from then on."""
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def weights(self) -> dict[str, Tensor]:
        """The whole network on the first rank's CPU, nothing on the others. All ranks have to ask together.

        The tensors are copies: training may go on while they are written.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole: dict[str, Any] = get_model_state_dict(self.network, options=options)
        if not self.accelerator.is_main_process:
            return {}
        on_cpu = self.accelerator.device.type == "cpu"  # from elsewhere they are copies already
        return {name: tensor.detach().clone() if on_cpu else tensor for name, tensor in whole.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by the name of its file; on the first rank, and asked for on all of them."""
        tensors = {"student": self.weights(), "optimizer": optimizer_tensors(self.network, self.optimizer.optimizer)}
        if self.average is not None:
            with self.averaged():
                tensors["student_ema"] = self.weights()
        return tensors

    def restore(self, checkpoint: Path) -> None:
        """Put back what :meth:`state` gave, whatever number of ranks and sharding it was saved by.

        Raises:
            CheckpointError: a rank cannot read it.
        """
        names = ["student", "optimizer", *(["student_ema"] if self.average is not None else [])]
        saved = on_every_rank(
            self.accelerator,
            lambda: read_tensors(checkpoint, names),
            same=lambda _: sha256(checkpoint / MANIFEST),
        )
        self._load(saved["student"])
        for parameter in self.network.parameters():  # PyTorch takes an optimizer that has some for one that has begun
            parameter.grad = None
        restore_optimizer(self.network, self.optimizer.optimizer, saved["optimizer"])
        self._place_gradients()
        if self.average is not None:
            with self.averaged():
                self._load(saved["student_ema"])

    def _place_gradients(self) -> None:
        """Where they have to stay where they are: make them before a graph does."""
        if self._keep_gradients:
            for parameter in self.network.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def _load(self, weights: dict[str, Tensor]) -> None:
        set_model_state_dict(self.network, dict(weights), options=StateDictOptions(full_state_dict=True, strict=True))


class WeightAverage:
    """Exponential moving average of a network's weights and statistics, kept beside them, sharded as they are.

    It begins at the initial weights. ``exchange`` puts the average into the network and the network's own aside; done
    twice it is undone.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self._floating = [t for t in self._tensors() if t.is_floating_point()]
        self._average = [tensor.clone() for tensor in self._floating]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._average, self._floating, 1 - self.decay)

    @torch.no_grad()
    def exchange(self) -> None:
        for own, average in zip(self._floating, self._average, strict=True):
            held = own.clone()
            own.copy_(average)
            average.copy_(held)

    def buffers(self) -> list[Tensor]:
        """The averages of floating-point buffers."""
        parameters = len(list(self.network.parameters()))
        return self._average[parameters:]

    def _tensors(self) -> list[Tensor]:
        return [_local(tensor.detach()) for tensor in (*self.network.parameters(), *self.network.buffers())]


def _autocast(network: nn.Module, accelerator: Accelerator) -> None:
    """The forward in the recipe's precision, outputs in float32: Accelerate sees to it for DDP, but not for FSDP2."""
    forward = network.forward

    def in_precision(images: Tensor) -> tuple[Output, ...]:
        with accelerator.autocast():
            stages = forward(images)
        return tuple(each(stage, Tensor.float) for stage in stages)

    network.forward = in_precision


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
