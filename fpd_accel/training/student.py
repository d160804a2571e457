"""The student on several processes: copied or sharded, with its optimizer and the moving average of its weights.

Saved weights are those of the whole network, with the names, shapes and dtypes of a single process, however it is
sharded.
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

from fpd_accel.config.schema import Compile, Optim, Train
from fpd_accel.distributed.accelerator import is_sharded, run_on_all
from fpd_accel.files import sha256
from fpd_accel.models.base import PoseModel
from fpd_accel.models.compile import compile_network
from fpd_accel.outputs import Output, each
from fpd_accel.training.checkpoint import MANIFEST, optimizer_tensors, read_tensors, restore_optimizer
from fpd_accel.training.optim import create_optimizer


class Student:
    """A network prepared for training by the Accelerator.

    Attributes:
        network: Without wrappers: what is saved and evaluated.
        model: The wrapped network, which forward passes of training go through.
        optimizer: Of its parameters; the learning rate is set in every step.
        compiled: How much of the network is a graph; `whole` is compiled by `Distiller.compile`.
    """

    def __init__(self, network: nn.Module, accelerator: Accelerator, *, train: Train, optim: Optim) -> None:
        self.accelerator, self.options = accelerator, train
        if train.sync_norm:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if train.channels_last and not is_sharded(accelerator):  # FSDP2 takes contiguous parameters alone
            network = network.to(memory_format=torch.channels_last)
        self.network = network.to(accelerator.device)
        # A network that FSDP2 gathers block by block cannot be one graph.
        self.compiled: Compile = "units" if train.compile == "whole" and is_sharded(accelerator) else train.compile
        if self.compiled == "units":
            compile_network(self.network, self.compiled)
        if is_sharded(accelerator):
            units = network.unit_modules() if isinstance(network, PoseModel) else []
            names = sorted({type(unit).__name__ for unit in units})
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names
            _autocast(network, accelerator)
        optimizer = create_optimizer(self.network, optim, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self._place_gradients()
        self.average = WeightAverage(self.network, train.ema_decay) if train.ema_decay is not None else None

    def train(self) -> None:
        """Switch to training mode; frozen normalisation layers stay in evaluation mode."""
        self.model.train()
        if self.options.freeze_norm:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def step(self, rate: float) -> None:
        """Clip the accumulated gradients, take an optimizer step at this learning rate, and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.options.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.options.cuda_graphs)
        if self.average is not None:
            self.average.update()

    def is_finite(self) -> bool:
        """Return whether all weights are finite, on all ranks. All ranks call it together, and wait for the device."""
        finite = torch.stack([local_part(p).isfinite().all() for p in self.network.parameters()]).all()
        return bool(self.accelerator.reduce(finite.float(), reduction="mean") == 1)

    def average_buffers(self) -> None:
        """Average the running statistics of normalisation layers over ranks, each of which saw its own samples.

        They are linear in the batch statistics, and training does not read them, so the result does not depend on how
        often this is called, except for rounding.
        """
        if self.accelerator.num_processes == 1:
            return
        averages = self.average.buffers() if self.average is not None else []
        for buffer in (*self.network.buffers(), *averages):
            if buffer.is_floating_point():
                buffer.copy_(self.accelerator.reduce(buffer, reduction="mean"))

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Give the network with the weights to evaluate and save: their moving average if there is one."""
        self._swap_average()
        try:
            yield self.network
        finally:
            self._swap_average()

    def _swap_average(self) -> None:
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # FSDP2 frees the parameters gathered by an evaluation only in the backward pass
        if self.average is not None:
            self.average.swap()

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the whole network on the CPU of rank 0, and nothing on the others. All ranks take part.

        The tensors are copies: training may continue while they are written.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole: dict[str, Any] = get_model_state_dict(self.network, options=options)
        if not self.accelerator.is_main_process:
            return {}
        on_cpu = self.accelerator.device.type == "cpu"  # from other devices they are copies already
        return {name: tensor.detach().clone() if on_cpu else tensor for name, tensor in whole.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint by the name of their file, on rank 0. All ranks take part."""
        tensors = {"student": self.weights(), "optimizer": optimizer_tensors(self.network, self.optimizer.optimizer)}
        if self.average is not None:
            with self.averaged():
                tensors["student_ema"] = self.weights()
        return tensors

    def restore(self, checkpoint: Path) -> None:
        """Load the tensors of a checkpoint that any number of ranks wrote, sharded or not, and rank 0 verified.

        Raises:
            CheckpointError: A rank cannot read it.
        """
        names = ["student", "optimizer", *(["student_ema"] if self.average is not None else [])]
        saved = run_on_all(
            self.accelerator,
            lambda: read_tensors(checkpoint, names, verified=self.accelerator.is_main_process),
            same=lambda _: sha256(checkpoint / MANIFEST),
        )
        self._load(saved["student"])
        for parameter in self.network.parameters():  # PyTorch takes gradients for a sign that the optimizer has state
            parameter.grad = None
        restore_optimizer(self.network, self.optimizer.optimizer, saved["optimizer"])
        self._place_gradients()
        if self.average is not None:
            with self.averaged():
                self._load(saved["student_ema"])

    def _place_gradients(self) -> None:
        """Give gradients memory of their own: a replayed CUDA graph overwrites its earlier results."""
        if self.options.cuda_graphs:
            for parameter in self.network.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def _load(self, weights: dict[str, Tensor]) -> None:
        set_model_state_dict(self.network, dict(weights), options=StateDictOptions(full_state_dict=True, strict=True))


def _autocast(network: nn.Module, accelerator: Accelerator) -> None:
    """Run the forward pass under autocast and return float32: Accelerate does this for DDP, but not for FSDP2."""
    forward = network.forward

    def in_precision(images: Tensor) -> tuple[Output, ...]:
        with accelerator.autocast():
            stages = forward(images)
        return tuple(each(stage, Tensor.float) for stage in stages)

    network.forward = in_precision


class WeightAverage:
    """Exponential moving average of a network's weights and buffers, sharded like the network.

    It starts at the initial weights, and has the weight `decay` in each update. `swap` exchanges the average and the
    network's own weights; a second `swap` undoes the first.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        tensors = [local_part(tensor.detach()) for tensor in (*network.parameters(), *network.buffers())]
        self._floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        self._average = [tensor.clone() for tensor in self._floating]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        torch._foreach_lerp_(self._average, self._floating, 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the weights of the network."""
        for own, average in zip(self._floating, self._average, strict=True):
            held = own.clone()
            own.copy_(average)
            average.copy_(held)

    def buffers(self) -> list[Tensor]:
        """Return the averages of the floating-point buffers."""
        return self._average[len(list(self.network.parameters())) :]


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
