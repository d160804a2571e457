"""How a step is looked at: its stages, its kernels and its memory, on a CPU or a GPU."""

import ctypes
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fpd_accel.bench.ceilings import synchronize

AHEAD = 200_000_000  # cycles, a tenth of a second: the device waits while the host hands it a whole step


class Stopwatch:
    """The time between marks: by events on a GPU, of which the host runs ahead, so that its own time is not in them.

    A GPU takes a thousand kernels or so in advance. Where those of a step are more, and each is done sooner than the
    host hands over the next, the GPU catches up (:meth:`host_is_ahead`), and stages have the host's time in them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.names = device, list[str]()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda._sleep(AHEAD)
        self._marks = [self._now()]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, name: str) -> None:
        """The stage of this name is over."""
        self.names.append(name)
        self._marks.append(self._now())

    def host_is_ahead(self) -> bool | None:
        """Right after the last mark: whether a GPU still has something to do; None on a CPU, which is the host."""
        return None if self.device.type != "cuda" else not self._marks[-1].query()

    def seconds(self) -> dict[str, float]:
        synchronize(self.device)
        pairs = zip(self.names, self._marks, self._marks[1:], strict=False)
        if self.device.type == "cuda":
            return {name: began.elapsed_time(ended) / 1e3 for name, began, ended in pairs}
        return {name: ended - began for name, began, ended in pairs}


def count_kernels(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Kernels of a step and the seconds in which any ran; on a CPU operators called, and None for the seconds."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        work()
        synchronize(device)
    events = list(profiler.events() or ())
    if not cuda:
        outer = [e for e in events if _is_operator(e) and not _is_operator(e.cpu_parent)]
        return {"kernels": len(outer), "busy_seconds": None}
    # Ranges that PyTorch or a program names are there too, gaps and all.
    on_device = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    kernels = [event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    spans = [(event.time_range.start, event.time_range.end) for event in on_device]
    return {"kernels": len(kernels), "busy_seconds": covered(spans) / 1e6}


def _is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Memory:
    """The most that a step needs, beside what the other variants keep meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known, self.before = True, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        _trim()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins anew
            self.before = _status("VmRSS")
        except OSError:  # not Linux, or not allowed
            self.known = False

    def peak_mb(self, *networks: nn.Module) -> float | None:
        """MB (10^6 bytes): weights of the networks, and what was done since then added to them at most.

        Gradients and moments that were made since then are in what was added. None where it cannot be known.
        """
        if not self.known:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return (weight_bytes(*networks) + max(0, peak - self.before)) / 1e6


def weight_bytes(*networks: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors: list[Tensor] = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return sum(tensor.nbytes for tensor in tensors)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _trim() -> None:
    """Give back what the C library keeps of freed memory: otherwise the next variant would seem to need none."""
    if os.name == "posix" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
