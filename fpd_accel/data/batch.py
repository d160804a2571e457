"""Batches as the loader hands them to the device: uint8 crops with their keypoints, and their normalization."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int64, Shaped, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Crops of B people; targets and normalised images are computed from them on the device."""

    crops: UInt8[Tensor, "batch height width 3"]  # RGB
    keypoints: Float[Tensor, "batch joint 2"]  # (x, y) in crop pixels; undefined where not visible
    visible: Float[Tensor, "batch joint"]  # 1 where labelled (hidden or not), else 0
    centers: Float[Tensor, "batch 2"]  # (x, y) of the cropped regions, image pixels
    sizes: Float[Tensor, "batch 2"]  # (width, height) of the cropped regions, image pixels
    rows: Int64[Tensor, " batch"]  # row of each person in the shards that it is from
    labelled: Float[Tensor, " batch"] | None = None  # 1 labelled, 0 unlabelled; None: all are labelled
    # Heatmaps as the teacher cache stores them, and in uint8 their scales (see teacher_targets.py); None: no cache.
    teacher_targets: Shaped[Tensor, "batch stage joint heatmap_height heatmap_width"] | None = None
    scales: Float32[Tensor, "batch stage joint 2"] | None = None

    def __len__(self) -> int:
        return self.crops.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device; the copy is asynchronous if the batch is in pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory."""
        return self._map(Tensor.pin_memory)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None by their names."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(**{name: function(tensor) for name, tensor in self.tensors().items()})


class DeviceCopy:
    """Asynchronous copies of batches to a device; on a GPU in a CUDA stream of their own, beside the previous step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device, ready for use on the current stream."""
        if self._stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._stream):
            copied = batch.to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in copied.tensors().values():
            tensor.record_stream(current)  # so that its memory is not reused before the work queued so far is done
        return copied


@dataclass(frozen=True)
class Normalization:
    """The pixel format of a network: scaled to 0..1, minus `mean`, divided by `std`, in the channel order `color`."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet, RGB
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    color: Literal["rgb", "bgr"] = "rgb"

    def __call__(self, crops: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
        """Return the normalised images of uint8 crops."""
        images = crops.permute(0, 3, 1, 2)
        if self.color == "bgr":
            images = images.flip(1)
        mean, std = (_per_channel(values, crops.device) for values in (self.mean, self.std))
        return (images.float() - mean) / std


@cache
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Return the values times 255 as a tensor, cached per device: a copy to a GPU waits for all work queued there."""
    with torch.inference_mode(False):  # the tensor may be created for a teacher and serve its student too
        return torch.tensor(values, device=device).mul(255).view(3, 1, 1)
