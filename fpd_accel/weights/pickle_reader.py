"""Read the `.pth` checkpoints of published trainers without running code that is pickled in them."""

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
    """A stand-in for NumPy's numbers and arrays and for MMEngine's log while unpickling; it keeps no values.

    The published trainers store the best score beside the weights as a NumPy number; MMPose 1.x stores the skeleton as
    NumPy arrays, and the history of its losses. With stand-ins, neither their code nor code of the file runs.
    """

    def __init__(self, *arguments: object) -> None:
        """Accept any arguments."""

    def __setstate__(self, state: object) -> None:
        """Accept any state."""


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (Ignored, name)
    for name in (
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        "numpy.dtype",
        "numpy.ndarray",
        "mmengine.logging.history_buffer.HistoryBuffer",
    )
]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a `.pth` file, on the CPU.

    The weights may be at the top of the file or under `state_dict`, `best_state_dict` or `model`, as in training
    checkpoints with optimizer and epoch. The prefix `module.` of data-parallel training is removed. Only tensors and
    plain containers are unpickled, so no code in the file can run.

    Raises:
        WeightsError: The file is damaged, needs more than tensors and plain containers, or has no weights.
    """
    try:
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
            # PyTorch warns of unusual content before it refuses or returns it; the checks below report all of it.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise nearly any type
        raise WeightsError(f"{path}: {unreadable(path, error)}") from error

    if isinstance(content, Mapping):
        wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        content = content if wrapper is None else content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path}: no weights in it: its content is {describe(content)}")
    others = [name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        raise WeightsError(
            f"{path}: no state dict in it: {others[0]!r} is {describe(content[others[0]])}, not a tensor; "
            f"weights are looked for at the top and under {', '.join(WRAPPERS)}"
        )
    if all(name.startswith(PARALLEL_PREFIX) for name in content):
        return {name.removeprefix(PARALLEL_PREFIX): tensor for name, tensor in content.items()}
    return dict(content)


def unreadable(path: Path, error: Exception) -> str:
    """Return the reason why a file could not be unpickled, in one line."""
    if path.stat().st_size == 0:
        return "the file is empty"
    if not isinstance(error, pickle.UnpicklingError):
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        return f"damaged, or not a PyTorch checkpoint ({type(error).__name__}: {reason[:200]})"
    # PyTorch's own message advises to unpickle without its guard, which is unsafe for a file from elsewhere.
    if needed := re.search(r"GLOBAL ([\w.]+) (?:was not|whose)", str(error)):
        hint = (
            " (the meta and message_hub that MMPose 1.x stores beside the weights are not needed: "
            "torch.save(checkpoint['state_dict'], 'weights.pth') leaves them out)"
        )
        return (
            f"refused, because unpickling it would run code: it needs {needed[1]}; if you trust it, load it with its "
            f"own library, save the bare state_dict, and use that file{hint if needed[1].startswith('mm') else ''}"
        )
    return "damaged, or not a PyTorch checkpoint"


def describe(value: object) -> str:
    """Return the type of a value and its number of entries, for messages."""
    if isinstance(value, Mapping):
        return "an empty dictionary" if not value else f"a dictionary of {len(value)} entries"
    return f"of type {type(value).__name__}"
