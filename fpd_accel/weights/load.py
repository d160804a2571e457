"""Load the weights of a file into a model, strictly: all of them, or none and an error that lists the differences."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fpd_accel.errors import WeightsError
from fpd_accel.models.base import PoseModel
from fpd_accel.models.create import create_model
from fpd_accel.models.names import DEFAULT_INPUT_SIZE, is_model
from fpd_accel.weights.naming import ORIGINAL, VITPOSE, recognise_layout
from fpd_accel.weights.pickle_reader import read_checkpoint
from fpd_accel.weights.recognise import Shapes, input_size_of, recognise

WEIGHTS_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".pth", ".pt", ".tar")
COUNTER = ".num_batches_tracked"
SHOWN = 4


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights of a file into the model, strictly; the model keeps its device and precision.

    One exception: a file without any normalisation counters, as PyTorch before 0.4.1 wrote (the published
    `pose_resnet_*.pth.tar` are such files), fits; the counters become zero. No computation here reads them.

    `path` is a `.safetensors` file, a folder with `model.safetensors`, or a `.pth`, `.pt` or `.tar` of PyTorch, from
    which only tensors are unpickled.

    Raises:
        WeightsError: The file is missing, unreadable, or differs from the model in names or shapes. The model is
            unchanged.
    """
    path = Path(path)
    tensors, state = read_tensors(path), model.state_dict()
    if not any(name.endswith(COUNTER) for name in tensors):
        tensors |= {name: torch.zeros_like(value) for name, value in state.items() if name.endswith(COUNTER)}
    shapes, wanted = shapes_of(tensors), shapes_of(state)
    if shapes != wanted:
        raise WeightsError(f"{path}: the weights do not fit {type(model).__name__}: {misfit(model, shapes, wanted)}")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise WeightsError(f"{path}: {name} is stored in a form that cannot be copied into a model")
    model.load_state_dict(tensors, strict=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file or model folder, on the CPU; raise WeightsError if it cannot be read."""
    if path.is_dir():
        if not (path / WEIGHTS_NAME).is_file():
            raise WeightsError(f"{path}: a folder without {WEIGHTS_NAME}, so not a model folder")
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return read_checkpoint(path)
    if path.suffix.lower() != ".safetensors":
        raise WeightsError(
            f"{path}: weights are read from .safetensors, {', '.join(PICKLE_SUFFIXES)} or a model folder"
        )
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged, or not a safetensors file ({error})") from error


def misfit(model: nn.Module, shapes: Shapes, wanted: Shapes) -> str:
    """Return advice, counts and examples for a file whose names and shapes are not the model's."""
    misshapen = [name for name in wanted if name in shapes and shapes[name] != wanted[name]]
    differences = {
        f"of {len(wanted)} missing in the file": [name for name in wanted if name not in shapes],
        "unknown to the model": sorted(name for name in shapes if name not in wanted),
        "of another shape": [f"{n} is {shapes[n]} in the file, {wanted[n]} in the model" for n in misshapen],
    }
    lines = [f"  {len(entries)} {kind}: {listing(entries)}" for kind, entries in differences.items() if entries]
    return "\n".join([advice(model, shapes, wanted), *lines])


def listing(entries: Sequence[str]) -> str:
    """Return the first few entries, with dots if there are more."""
    return ", ".join([*entries[:SHOWN], *["..."] * (len(entries) > SHOWN)])


def advice(model: nn.Module, shapes: Shapes, wanted: Shapes) -> str:
    """Return the probable mistake and the remedy, from the names and shapes of the file and of the model."""
    if not isinstance(model, PoseModel):
        return "they are of another model"
    if shapes.keys() == wanted.keys() and (count := other_keypoints(shapes, wanted, model.num_keypoints)):
        return (
            f"the file has the final layer of {count} keypoints, the model has {model.num_keypoints}; "
            f"create the model with num_keypoints={count}"
        )
    if sum(shapes.get(name) == shape for name, shape in wanted.items()) > 0.9 * len(wanted):
        return "they are incomplete, or of a variant of this architecture; load a file that was saved from this one"
    try:
        layout = recognise_layout(shapes)
    except WeightsError as error:
        return str(error)
    if layout not in (ORIGINAL, VITPOSE):
        return f"its names are those of {layout.name}; make a model folder of it with `fpd-accel import-weights`"
    if name := known_architecture(shapes, model.num_keypoints):
        return f"these look like weights of another architecture, {name}; create that model, or load another file"
    return "these look like weights of another architecture; load a file that was saved from this one"


def other_keypoints(shapes: Shapes, wanted: Shapes, num_keypoints: int) -> int | None:
    """Return the file's number of keypoints if it is the only difference from the model, else None."""
    pairs = {pair for name, shape in wanted.items() for pair in zip_longest(shapes[name], shape)}
    differences = [(theirs, ours) for theirs, ours in pairs if theirs != ours]
    return differences[0][0] if len(differences) == 1 and differences[0][1] == num_keypoints else None


def known_architecture(shapes: Shapes, num_keypoints: int) -> str | None:
    """Return the name of the architecture with the file's parameters, whatever the number of keypoints, or None."""
    name = recognise(shapes)
    if name is None or not is_model(name):
        return None
    stored = {name: shape for name, shape in shapes.items() if not name.endswith(COUNTER)}
    candidate = model_shapes(name, num_keypoints, input_size=input_size_of(shapes) or DEFAULT_INPUT_SIZE)
    known = {name: shape for name, shape in candidate.items() if not name.endswith(COUNTER)}
    same = known == stored or (known.keys() == stored.keys() and other_keypoints(stored, known, num_keypoints))
    return name if same else None


def model_shapes(name: str, num_keypoints: int, *, input_size: tuple[int, int] = DEFAULT_INPUT_SIZE) -> Shapes:
    """Return the names and shapes of a network's state dict, built without memory or initialisation."""
    with torch.device("meta"):
        return shapes_of(create_model(name, num_keypoints, input_size=input_size).state_dict())


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    """Return the names and shapes of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
