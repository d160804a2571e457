"""Formula weights: each tensor is filled from its own name, so that two implementations compare without files."""

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

COUNTER = ".num_batches_tracked"


def fill_with_formula(model: nn.Module) -> None:
    """Give a model the formula weights, by the names of its state dict."""
    state = model.state_dict()
    model.load_state_dict({name: formula_weight(name, tuple(tensor.shape)) for name, tensor in state.items()})


def formula_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of this name and shape: normal numbers seeded by the CRC-32 of the name, scaled."""
    if name.endswith(COUNTER):
        return torch.zeros(shape, dtype=torch.int64)
    x: NDArray = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif name.endswith("running_mean"):
        x = 0.1 * x
    elif len(shape) == 4:
        x = x * np.sqrt(1 / (shape[1] * shape[2] * shape[3]))
    elif name.endswith("weight"):
        x = 1 + 0.1 * x
    else:
        x = 0.05 * x
    return torch.from_numpy(np.asarray(x, dtype=np.float32))
