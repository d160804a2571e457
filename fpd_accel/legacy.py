"""What the published trainers left behind: their `.pth` checkpoints, read without running what is pickled in them."""

import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpd_accel.errors import WeightsError

WRAPPERS = ("state_dict", "best_state_dict", "model")
PARALLEL_PREFIX = "module."


class Ignored:
    """Stands in for NumPy's numbers and arrays and for MMEngine's log while unpickling, and forgets them.

    The published trainers keep the best score beside the weights as a NumPy number; MMPose 1.x keeps the skeleton as
    NumPy arrays and the history of its losses. Reading past them this way takes no code of theirs and none of the file.
    """

    def __init__(self, *arguments: object) -> None:
        """Accept whatever the pickle passes."""

    def __new__(cls, *arguments: object) -> "Ignored":  # noqa: ARG004
        """Likewise, where the pickle skips the initialisation."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Accept whatever the pickle sets."""


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (Ignored, name)
    for name in (
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        "numpy.dtype",
        "numpy.ndarray",
        "mmengine.logging.history_buffer.HistoryBuffer",
    )
]


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict out of a `.pth` file, on the CPU.

    The weights may lie in the file directly or under `state_dict`, `best_state_dict` or `model`, which training
    checkpoints have beside optimizer and epoch; the `module.` that data-parallel training puts before every name is
    taken off. Only tensors and plain containers are unpickled: no code in the file can run.

    Raises:
        WeightsError: The file is missing, damaged, needs more than tensors and plain containers, or has no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    try:
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
            # PyTorch remarks on unusual content before it refuses or returns it; the checks below say all that matters.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Broken bytes make the unpickler raise nearly anything.
        raise WeightsError(f"{path}: {unreadable(path, error)}") from error

    if isinstance(content, Mapping):
        wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        content = content if wrapper is None else content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path}: no weights in it: its content is {describe(content)}")
    strangers = [name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strangers:
        raise WeightsError(
            f"{path}: no state dict in it: {strangers[0]!r} is {describe(content[strangers[0]])}, not a tensor; "
            f"weights are looked for at the top and under {', '.join(WRAPPERS)}"
        )
    if all(name.startswith(PARALLEL_PREFIX) for name in content):
        return {name.removeprefix(PARALLEL_PREFIX): tensor for name, tensor in content.items()}
    return dict(content)


MMENGINE_HINT = (
    " (what MMPose 1.x keeps beside the weights, its meta and message_hub, is not needed: there, "
    "torch.save(checkpoint['state_dict'], 'weights.pth') leaves it out)"
)


def unreadable(path: Path, error: Exception) -> str:
    """Return the reason a file could not be unpickled, in one line for its owner."""
    if path.stat().st_size == 0:
        return "the file is empty"
    if not isinstance(error, pickle.UnpicklingError):
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return f"damaged, or not a PyTorch checkpoint ({type(error).__name__}: {reason[:200]})"
    # PyTorch's own text suggests to unpickle without its guard, the one thing not to do with a file from elsewhere.
    if needed := re.search(r"GLOBAL ([\w.]+) (?:was not|whose)", str(error)):
        return (
            f"refused, because unpickling it would run code: it needs {needed[1]}; load it where you trust it, "
            f"save the bare state_dict there, and use that file{MMENGINE_HINT if needed[1].startswith('mm') else ''}"
        )
    return "damaged, or not a PyTorch checkpoint"


def describe(value: object) -> str:
    """Return the kind of a value, and how many entries it has, for messages."""
    if isinstance(value, Mapping):
        return "an empty dictionary" if not value else f"a dictionary of {len(value)} entries"
    return f"of type {type(value).__name__}"
