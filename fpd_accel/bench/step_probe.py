"""Instruments for a training step on a CPU or GPU: ceilings, stages, kernels and memory."""

import ctypes
import os
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

REPEATS = 5  # of which the best counts, since a ceiling is a rate that was reached once
MATRIX = {"cpu": 1536, "cuda": 8192}  # rows and columns
COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes, far more than any cache holds
LAUNCHES = {"cpu": 1, "cuda": 10}  # in a row, so that a GPU is never idle
AHEAD = 200_000_000  # cycles, a tenth of a second: the device waits while the host enqueues a whole step


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all enqueued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_work(device: torch.device, work: Callable[[], object]) -> float:
    """Return the seconds of `work`, from an idle device to an idle device."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix product; float32 on a GPU uses TF32 if convolutions do."""
    size = MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        return 2 * size**3 / _fastest(device, lambda: torch.mm(left, right, out=product))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def copy_ceiling(device: torch.device) -> float:
    """Return the bytes/s, read and written, of copying a large tensor in the device's memory."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    copied = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(device, lambda: copied.copy_(source))


def _fastest(device: torch.device, work: Callable[[], object]) -> float:
    """Return the seconds of one call of `work` in the fastest of `REPEATS` runs, after an untimed one."""
    launches = LAUNCHES[device.type]
    runs = [time_work(device, lambda: [work() for _ in range(launches)]) for _ in range(1 + REPEATS)]
    return min(runs[1:]) / launches


class Stopwatch:
    """The time between marks; on a GPU by events, while the host runs ahead, so that host time is left out.

    A GPU queues about a thousand kernels. If a step has more, and each ends before the host enqueues the next, the GPU
    catches up (`host_is_ahead`), and the stages include time of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._marks = device, list[tuple[str, Any]]()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda._sleep(AHEAD)
        self.mark("start")

    def mark(self, name: str) -> None:
        """End the stage of this name."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def host_is_ahead(self) -> bool | None:
        """Return whether a GPU is still busy; call it right after the last mark. None on a CPU, which is the host."""
        return None if self.device.type != "cuda" else not self._marks[-1][1].query()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage."""
        synchronize(self.device)
        if self.device.type == "cuda":
            return {name: began.elapsed_time(ended) / 1e3 for (_, began), (name, ended) in pairwise(self._marks)}
        return {name: ended - began for (_, began), (name, ended) in pairwise(self._marks)}


def count_kernels(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Return the kernels of a step and the seconds in which any ran; on a CPU operators, and None for the seconds."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + cuda * [ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:
        work()
        synchronize(device)
    events = list(profiler.events() or ())
    if not cuda:
        outer = [e for e in events if _is_operator(e) and not _is_operator(e.cpu_parent)]
        return {"kernels": len(outer), "busy_seconds": None}
    # Leave out ranges that PyTorch or a program names: they include gaps between kernels.
    on_device = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    kernels = [event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    spans = [(event.time_range.start, event.time_range.end) for event in on_device]
    return {"kernels": len(kernels), "busy_seconds": covered(spans) / 1e6}


def _is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Memory:
    """The peak memory of a step, without the memory that other variants hold meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.known = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        if os.name == "posix" and hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that the C library keeps would hide the variant's own
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
            self.before = _status("VmRSS")
        except OSError:  # not Linux, or not permitted
            self.known = False

    def peak_mb(self, *networks: nn.Module) -> float | None:
        """Return the weights of the networks plus the largest growth since construction, in MB (10^6 bytes).

        Gradients and moments made since then are part of the growth. None if the system does not tell it.
        """
        if not self.known:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return (weight_bytes(*networks) + max(0, peak - self.before)) / 1e6


def weight_bytes(*networks: nn.Module) -> int:
    """Return the bytes of parameters and buffers."""
    return sum(tensor.nbytes for network in networks for tensor in (*network.parameters(), *network.buffers()))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
