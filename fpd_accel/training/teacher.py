"""The teacher: a frozen network that only predicts. It cannot train, and no checkpoint contains it."""

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fpd_accel.config.schema import Compile
from fpd_accel.data.batch import Normalization
from fpd_accel.models.base import PoseModel
from fpd_accel.models.compile import compile_network
from fpd_accel.models.fold_norm import fold_norm as fold
from fpd_accel.models.fp8 import to_float8_linears
from fpd_accel.outputs import Output, each

AUTOCAST_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # layers that autocast computes in bfloat16


class Teacher:
    """A frozen network in evaluation mode, from crops to the outputs of its stages.

    It is not an `nn.Module`, so that no optimizer, wrapper or checkpoint of the student finds its parameters. Weights
    and buffers never change: gradients are off, and `train()` has no effect.

    Args:
        model: The trained network. `fold_norm` and `fp8` change it in place: save it before.
        device: Where it runs.
        normalization: Of the crops; by default ImageNet's, RGB.
        precision: float32, or bfloat16 for autocast.
        compile: How much of it `torch.compile` turns into a graph (see `compile_network`); `auto`: the whole network
            on a GPU, block by block where it is sharded, and none on a processor.
        cuda_graphs: Whether its kernels are replayed as one launch (see `compile_network`).
        shard: Whether each rank keeps a part of the weights, gathered block by block; all ranks call it together.
        fold_norm: Whether normalisations are folded into the convolutions before them (`models/fold_norm.py`).
        fp8: Whether linear layers compute in float8 (`models/fp8.py`).

    Attributes:
        network: From normalised images to the outputs of its stages, in its precision, as float32.
        model: The same without the change of precision.
        compiled: How much of it is a graph of `torch.compile`.

    Raises:
        ConfigError: `fp8`, but the network has no linear layers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str = "cpu",
        normalization: Normalization | None = None,
        precision: torch.dtype = torch.float32,
        compile: Compile | Literal["auto"] = "none",
        cuda_graphs: bool = False,
        shard: bool = False,
        fold_norm: bool = False,
        fp8: bool = False,
    ) -> None:
        self.model = model.eval()
        if fold_norm:
            fold(self.model)
        if fp8:
            to_float8_linears(self.model.to(device))
        self.model.requires_grad_(False)
        if precision == torch.bfloat16 and not shard:  # autocast caches no bfloat16 copy of frozen weights
            for module in self.model.modules():
                if isinstance(module, AUTOCAST_LAYERS):
                    module.to(torch.bfloat16)
        if not shard:
            self.model.to(device)
        else:  # parts are moved one by one, so that no device ever holds the whole network
            for unit in (*(model.unit_modules() if isinstance(model, PoseModel) else ()), model):
                fully_shard(unit, reshard_after_forward=True)
        self.model.train = self._decline  # type: ignore[method-assign]
        self.normalization = normalization or Normalization()
        self.device, self.precision, self.sharded, self.fp8 = torch.device(device), precision, shard, fp8
        # Parameters gathered in inference mode cannot be gathered again outside of it, such as in an evaluation.
        self._without_gradients = torch.no_grad if shard else torch.inference_mode
        default: Compile = "none" if self.device.type != "cuda" else "units" if shard else "whole"
        self.compiled = default if compile == "auto" else compile
        compile_network(self.model, self.compiled, cuda_graphs=cuda_graphs)
        self.network = InPrecision(self.model, self.device, precision)

    def __call__(self, crops: UInt8[Tensor, "batch height width 3"]) -> tuple[Output, ...]:
        """Return every stage's output, float32, as ordinary tensors that a loss may save for its backward pass."""
        with self._without_gradients():
            stages = self.network(self.normalization(crops))
        # Clone outside the context: an inference tensor cannot enter autograd.
        return tuple(each(stage, Tensor.clone) for stage in stages)

    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002
        """Do nothing: the teacher stays in evaluation mode."""
        return self

    def _decline(self, mode: bool = True) -> nn.Module:  # noqa: ARG002
        return self.model


class InPrecision(nn.Module):
    """A network that runs in float32, or by autocast in bfloat16, and returns float32 in both cases."""

    def __init__(self, model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
        super().__init__()
        self.model, self.device, self.precision = model, device, precision

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Output, ...]:
        """Return the outputs of all stages for normalised images."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            stages = self.model(images)
        return tuple(each(stage, Tensor.float) for stage in stages)
