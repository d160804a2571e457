"""Which networks torch.compile compiles, and a context in which they run without their graphs.

A graph serves one batch size, one mode of the network (training or evaluation) and one precision; each further
combination would be compiled anew, which takes minutes. So training alone runs graphs, always on full batches, and
everything else runs inside `eagerly`.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from fpd_accel.models.base import PoseModel

Compile = Literal["none", "units", "whole"]

# Graphs of one piece of code, such as a block with the shapes of student and teacher; PyTorch's own limit is 8.
VARIANTS = 64


def compile_network(network: nn.Module, scope: Compile, *, cuda_graphs: bool = False) -> None:
    """Compile a network in place, which keeps its parameter names: `whole`, or each of its `units` on its own.

    Units of equal shape share one graph, which compiles in a fraction of the time; operations are not fused across
    their borders. A network that names no units is compiled whole.
    """
    if scope == "none":
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    units = network.unit_modules() if scope == "units" and isinstance(network, PoseModel) else []
    for module in units or [network]:
        module.compile(**compile_options(cuda_graphs=cuda_graphs))


def compile_options(*, cuda_graphs: bool) -> dict[str, Any]:
    """Return the arguments of torch.compile: static shapes; with CUDA graphs, a step's kernels are one launch."""
    # A cached constant becomes a constant of the graph, as it should.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`-wrapped function")
    return {"dynamic": False, "mode": "reduce-overhead" if cuda_graphs else "default"}


def eagerly(compiled: bool) -> AbstractContextManager[object]:
    """Return a context that runs networks without their compiled graphs, which stay for later, and compiles none."""
    # The compiler takes a second to import, so it is left alone if no network is compiled.
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
