"""What a device reaches at best, in matrix products and in copies: the measure of everything else."""

import time
from collections.abc import Callable

import torch

REPEATS = 5  # of which the best counts: a ceiling is what was reached once
MATRIX = {"cpu": 1536, "cuda": 8192}  # rows and columns
COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes: far more than any cache holds
LAUNCHES = {"cpu": 1, "cuda": 10}  # in a row, so that a GPU is never without work


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product; float32 on a GPU as its convolutions do it, in TF32 or not."""
    size, launches = MATRIX[device.type], LAUNCHES[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        return 2 * size**3 * launches / _best(device, lambda: torch.mm(left, right, out=product), launches)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def copy_ceiling(device: torch.device) -> float:
    """Bytes/s through the device's memory while a large tensor is copied: what is read, and what is written."""
    launches = LAUNCHES[device.type]
    source = torch.ones(COPIED[device.type] // 4, device=device)
    copied = torch.empty_like(source)
    return 2 * source.nbytes * launches / _best(device, lambda: copied.copy_(source), launches)


def _best(device: torch.device, work: Callable[[], object], launches: int) -> float:
    """Seconds of the fastest of some repeats, after one that does not count."""
    found = []
    for _ in range(1 + REPEATS):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(launches):
            work()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])
