"""Batches that no image has to be read for, to measure what is done with them; and how large any batch is."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fpd_accel.data.batch import Batch


def draw_batch(people: int, joints: int, input_size: tuple[int, int], *, hidden: float = 0.0, seed: int = 0) -> Batch:
    """Noise for crops, and keypoints anywhere in them, of which about the share ``hidden`` is not labelled."""
    height, width = input_size
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        crops=torch.randint(0, 256, (people, height, width, 3), generator=generator, dtype=torch.uint8),
        keypoints=torch.rand(people, joints, 2, generator=generator) * torch.tensor([width, height]),
        visible=(torch.rand(people, joints, generator=generator) >= hidden).float(),
        centers=torch.rand(people, 2, generator=generator) * 600,
        sizes=torch.tensor([[float(width), float(height)]]).expand(people, 2) * 1.5,
        rows=torch.arange(people),
    )


def payload(sent: Any) -> int:
    """Bytes of the tensors that go from a worker to the process that trains."""
    if isinstance(sent, Tensor):
        return sent.nbytes
    if isinstance(sent, Batch):
        return payload(vars(sent))
    inner = sent.values() if isinstance(sent, Mapping) else sent if isinstance(sent, Sequence) else ()
    return sum(payload(one) for one in inner if not isinstance(one, str))
