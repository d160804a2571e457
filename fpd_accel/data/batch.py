"""What the loader hands to the device: uint8 crops and the numbers that belong to them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Int64, Shaped, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B people. Targets and normalised images are made from it on the device."""

    crops: UInt8[Tensor, "batch height width 3"]  # RGB
    keypoints: Float[Tensor, "batch joint 2"]  # (x, y) in crop pixels; anything where not visible
    visible: Float[Tensor, "batch joint"]  # 1 where labelled, hidden or not
    centers: Float[Tensor, "batch 2"]  # of the crop's region, image pixels
    sizes: Float[Tensor, "batch 2"]  # (width, height) of the region, image pixels
    rows: Int64[Tensor, " batch"]  # of the people in their shards; of a mixture, in those that each is from
    labelled: Float[Tensor, " batch"] | None = None  # 1 or 0 where people without labels are mixed in; None: all are
    lessons: Shaped[Tensor, "batch stage joint heatmap_height heatmap_width"] | None = (
        None  # as the teacher's cache has
    )
    scales: Float32[Tensor, "batch stage joint 2"] | None = None  # what belongs to them in uint8 (see lessons.py)

    def __len__(self) -> int:
        return self.crops.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; the copy overlaps with what follows if the batch is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory from other uses until what this stream was given so far is done."""
        for tensor in self._tensors().values():
            tensor.record_stream(stream)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **changed)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class DeviceCopy:
    """Brings batches to a device. To a GPU on a stream of their own: the copy runs beside the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch; whoever computes on the current stream need not wait for it."""
        if self._stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._stream):
            copied = batch.to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        copied.record_stream(current)
        return copied


@dataclass(frozen=True)
class Normalization:
    """How a network wants its pixels: scaled to 0..1, minus ``mean``, over ``std``, in this channel order."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet, RGB
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    color: Literal["rgb", "bgr"] = "rgb"

    def __call__(self, crops: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
        images = crops.permute(0, 3, 1, 2)
        if self.color == "bgr":
            images = images.flip(1)
        mean, std = (_per_channel(values, crops.device) for values in (self.mean, self.std))
        return (images.float() - mean) / std


@cache
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Once per device: copying numbers to a GPU waits for all that it has been given to do."""
    with torch.inference_mode(False):  # a tensor made for a teacher has to serve its student too
        return torch.tensor(values, device=device).mul(255).view(3, 1, 1)
