"""Exponential moving average of the weights of the student."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """Exponential moving average of a network's weights and buffers, sharded like the network.

    It starts at the initial weights. `swap` exchanges the average and the network's own weights; a second `swap` undoes
    the first.

    Args:
        network: Its floating-point parameters and buffers are averaged.
        decay: Weight of the average in each update.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self._floating = [t for t in self._tensors() if t.is_floating_point()]
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
        parameters = len(list(self.network.parameters()))
        return self._average[parameters:]

    def _tensors(self) -> list[Tensor]:
        return [local_part(tensor.detach()) for tensor in (*self.network.parameters(), *self.network.buffers())]


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
