"""torch.compile in one place: what becomes a graph, and that evaluation does without.

A graph is for one size of batch, one mode of the network and one precision; each further one would be compiled too, for
minutes. So only training runs graphs, always on full batches, and everything else runs :func:`eagerly`.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fpd_accel.config import Compile, Recipe
from fpd_accel.models.base import PoseModel

VARIANTS = 64  # of one piece of code, that is of the shapes of a block in student and teacher; PyTorch gives up after 8


def compile_network(network: nn.Module, what: Compile, *, cuda_graphs: bool = False) -> None:
    """Compile in place, so that names stay as they are: the network whole, or each of its ``units`` for itself.

    Units of equal shape share one graph. That is compiled in a fraction of the time, and gives up what could be fused
    across their borders. A network that names no units is compiled whole.
    """
    if what == "none":
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    units = network.unit_modules() if what == "units" and isinstance(network, PoseModel) else []
    for module in units or [network]:
        module.compile(**compile_options(cuda_graphs=cuda_graphs))


def compile_options(*, cuda_graphs: bool) -> dict[str, Any]:
    """Arguments of torch.compile: one size of batch, and kernels launched one by one or replayed as one launch."""
    # A cached constant becomes one of the graph, as it should.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`-wrapped function")
    return {"dynamic": False, "mode": "reduce-overhead" if cuda_graphs else "default"}


def eagerly(recipe: Recipe) -> AbstractContextManager[object]:
    """While it is open no graph of this recipe's networks runs and none is compiled; they stay for afterwards."""
    if recipe.train.compile == recipe.teacher.compile == "none":
        return nullcontext()  # without a compiler there is no need to import it
    return torch.compiler.set_stance("force_eager")
