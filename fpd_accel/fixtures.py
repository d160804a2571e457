"""Numbers that the published implementation gave once, and whether a checkpoint and our networks agree with them.

A folder of fixtures has ``state_dicts/<arch>.json`` (names and shapes of the published checkpoints, and their input
size) and, for some architectures, ``<arch>.npz`` with the outputs for formula weights: every tensor filled from its own
name, so that two implementations can be compared without shipping weights.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpd_accel.errors import WeightsError
from fpd_accel.models import create_model
from fpd_accel.weights import COUNTER

TOLERANCE = 1e-4  # of the largest value of an output


@dataclass(frozen=True)
class Comparison:
    """One line of the fixture comparison."""

    what: str
    result: str
    agrees: bool


def compare_with_fixtures(
    folder: str | Path, arch: str, shapes: Mapping[str, tuple[int, ...]], *, num_keypoints: int
) -> list[Comparison]:
    """Compare a checkpoint's names and shapes, and our network's outputs for formula weights, with the fixtures.

    Args:
        shapes: Of the checkpoint, under the names of the original.

    Raises:
        WeightsError: The folder has no fixture for the architecture, or it cannot be read.
    """
    path = Path(folder) / "state_dicts" / f"{arch}.json"
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.json"))
        raise WeightsError(
            f"{path}: there is no fixture for {arch}" + (f"; there are {', '.join(there)}" if there else "")
        )
    try:
        record = json.loads(path.read_bytes())
        expected = {name: tuple(shape) for name, shape in record["state_dict"]}
        theirs, (width, height) = int(record["num_keypoints"]), record["image_size_wh"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not a fixture: {error!r}") from None
    comparisons = _compare_shapes(expected, shapes, theirs=theirs, ours=num_keypoints)
    outputs = Path(folder) / f"{arch}.npz"
    if not outputs.is_file():
        return [*comparisons, Comparison("outputs", f"no {outputs.name} among the fixtures", True)]
    return [*comparisons, *_compare_outputs(outputs, arch, theirs, (height, width))]


def _compare_shapes(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], *, theirs: int, ours: int
) -> list[Comparison]:
    if not any(name.endswith(COUNTER) for name in shapes):  # checkpoints of PyTorch before 0.4.1
        expected = {name: shape for name, shape in expected.items() if not name.endswith(COUNTER)}
    same = [name for name in expected if name in shapes]
    note = f" ({ours} keypoints instead of {theirs})" if ours != theirs else ""
    fitting = [name for name in same if _equal_but_for_keypoints(shapes[name], expected[name], ours, theirs)]
    beyond = len(shapes) - len(same)
    return [
        Comparison(
            "names",
            f"{len(same)} of {len(expected)} found" + (f", {beyond} more" if beyond else ""),
            len(same) == len(expected) == len(shapes),
        ),
        Comparison("shapes", f"{len(fitting)} of {len(expected)} equal{note}", len(fitting) == len(expected)),
    ]


def _equal_but_for_keypoints(
    shape: tuple[int, ...], expected: tuple[int, ...], keypoints: int, expected_keypoints: int
) -> bool:
    if len(shape) != len(expected):
        return False
    pairs = [(a, b) for a, b in zip(shape, expected, strict=True) if a != b]
    return not pairs or pairs == [(keypoints, expected_keypoints)]


def _compare_outputs(path: Path, arch: str, num_keypoints: int, input_size: tuple[int, int]) -> list[Comparison]:
    model = create_model(arch, num_keypoints, input_size=input_size).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: formula_weight(name, shape) for name, shape in shapes.items()})
    images = np.random.RandomState(7).standard_normal((1, 3, *input_size)).astype(np.float32)
    with torch.inference_mode():
        outputs = model(torch.from_numpy(images))
    comparisons: list[Comparison] = []
    with np.load(path, allow_pickle=False) as expected:
        for stage, heatmaps in enumerate(outputs):
            truth = torch.from_numpy(expected[f"out{stage}"]) if f"out{stage}" in expected.files else torch.empty(0)
            if truth.shape != heatmaps.shape:
                result = f"shape {tuple(truth.shape)}, ours {tuple(heatmaps.shape)}"
                comparisons.append(Comparison(f"stage {stage + 1}", result, False))
                continue
            difference = float((heatmaps - truth).abs().max() / truth.abs().max())
            result = f"largest difference {difference:.1e} of the largest value (tolerance {TOLERANCE:.0e})"
            comparisons.append(Comparison(f"stage {stage + 1}, formula weights", result, difference <= TOLERANCE))
    return comparisons


def formula_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of this name and shape in the fixtures: normal numbers seeded by the CRC-32 of the name, scaled."""
    if name.endswith(COUNTER):
        return torch.zeros(shape, dtype=torch.int64)
    x: NDArray = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif name.endswith("running_mean"):
        x = 0.1 * x
    elif len(shape) == 4:
        x = x * np.sqrt(1 / (shape[1] * shape[2] * shape[3]))
    elif name.endswith("weight"):
        x = 1 + 0.1 * x
    else:
        x = 0.05 * x
    return torch.from_numpy(np.asarray(x, dtype=np.float32))
