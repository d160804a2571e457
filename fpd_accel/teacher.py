"""The teacher: a finished network that is only ever asked. It cannot train, and nothing that is saved contains it."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fpd_accel.compilation import compile_network
from fpd_accel.config import Compile
from fpd_accel.data.batch import Normalization
from fpd_accel.fold import fold_norm as fold
from fpd_accel.fp8 import to_float8_linears
from fpd_accel.models.base import PoseModel
from fpd_accel.outputs import Output, each

PRODUCTS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # layers that autocast computes in bfloat16


class Teacher:
    """A frozen network in evaluation mode, from crops to the outputs of its stages.

    Not a module, so that no optimizer, wrapper or checkpoint of the student ever finds its parameters. Weights and
    buffers never change: gradients are off, and the network declines ``train()``.

    Attributes:
        network: from normalised images to the outputs of its stages, float32, in the precision that it teaches in.
        model: the same without that.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str = "cpu",
        normalization: Normalization | None = None,
        precision: torch.dtype = torch.float32,
        compile: Compile = "none",
        cuda_graphs: bool = False,
        shard: bool = False,
        fold_norm: bool = False,
        fp8: bool = False,
    ) -> None:
        """``precision``: float32, or bfloat16 for autocast. ``compile`` and ``cuda_graphs``: see
        :func:`compile_network`.

        ``shard``: each rank keeps a part of the weights, and the parts that the network names as its ``units`` are
        gathered one at a time; all ranks have to ask together. ``fold_norm`` (see ``fold.py``) and ``fp8`` (``fp8.py``)
        change the network in place, which is then no longer what was trained: save it before.

        Raises:
            ConfigError: ``fp8``, but the network has no such layers.
        """
        self.model = model.eval()
        if fold_norm:
            fold(self.model)
        if fp8:
            to_float8_linears(self.model.to(device))
        self.model.requires_grad_(False)
        if precision == torch.bfloat16 and not shard:  # autocast keeps no copy of weights that do not learn
            for module in self.model.modules():
                if isinstance(module, PRODUCTS):
                    module.to(torch.bfloat16)
        if not shard:
            self.model.to(device)
        else:  # each part goes to the device by itself, and no device ever holds the whole
            for unit in (*(model.unit_modules() if isinstance(model, PoseModel) else ()), model):
                fully_shard(unit, reshard_after_forward=True)
        self.model.train = self._decline  # type: ignore[method-assign]
        self.normalization = normalization or Normalization()
        self.device, self.precision = torch.device(device), precision
        # What is gathered under inference mode cannot be gathered into anywhere else, say in an evaluation.
        self._without_gradients = torch.no_grad if shard else torch.inference_mode
        compile_network(self.model, compile, cuda_graphs=cuda_graphs)
        self.network = InPrecision(self.model, self.device, precision)

    def __call__(self, crops: UInt8[Tensor, "batch height width 3"]) -> tuple[Output, ...]:
        """Every stage's output, float32, as ordinary tensors that a student's loss may save for its backward pass."""
        with self._without_gradients():
            stages = self.network(self.normalization(crops))
        # Outside the context: an inference tensor cannot enter autograd.
        return tuple(each(stage, Tensor.clone) for stage in stages)

    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002
        """Declines: the teacher stays in evaluation mode whatever ``mode`` says."""
        return self

    def _decline(self, mode: bool = True) -> nn.Module:  # noqa: ARG002
        return self.model


class InPrecision(nn.Module):
    """A network whose forward is in float32, or by autocast in bfloat16, and whose outputs are float32 either way."""

    def __init__(self, model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
        super().__init__()
        self.model, self.device, self.precision = model, device, precision

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Output, ...]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            stages = self.model(images)
        return tuple(each(stage, Tensor.float) for stage in stages)
