"""The model folder: `config.json` and `model.safetensors`, all that is needed to use a network."""

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from fpd_accel.codecs import PoseCodec, create_codec
from fpd_accel.config.schema import Codec
from fpd_accel.data.batch import Normalization
from fpd_accel.errors import WeightsError
from fpd_accel.files import staged
from fpd_accel.models.create import create_model
from fpd_accel.models.names import is_custom
from fpd_accel.skeleton import Skeleton
from fpd_accel.weights.load import WEIGHTS_NAME, load_weights

CONFIG_NAME = "config.json"


class ModelConfig(BaseModel):
    """The description of a network and its training: `config.json` of a model folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arch: str  # a name of models/names.py, or package.module:Class for a network of the user's own
    arguments: dict[str, Any] = Field(default_factory=dict)  # keyword arguments of that class
    skeleton: Skeleton
    input_size: tuple[int, int]  # (height, width) pixels
    codec: Codec = Codec()  # decodes its outputs
    box_padding: float = 1.25  # factor on the person's box
    normalization: Normalization = Normalization()
    source: dict[str, Any] = Field(default_factory=dict)  # origin of the weights: run, step and scores, or a file

    def create_codec(self) -> PoseCodec:
        """Return the codec of the network's outputs."""
        return create_codec(self.codec.name, self.input_size, sigma=self.codec.sigma)

    def create_model(self) -> nn.Module:
        """Return the network with fresh weights; raise ModelError if it cannot be built."""
        return create_model(
            self.arch, self.skeleton.num_keypoints, input_size=self.input_size, arguments=self.arguments
        )


def save_model(folder: str | os.PathLike[str], weights: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Write a model folder; each file is replaced as a whole, so that a reader never sees half of one.

    Raises:
        OSError: The folder cannot be written; it keeps the files that it had.
        SafetensorError: Likewise, as safetensors reports a full disk.
    """
    folder = Path(folder)
    values = config.model_dump(mode="json", exclude=None if config.arguments else {"arguments"})
    with staged(folder / CONFIG_NAME) as description, staged(folder / WEIGHTS_NAME) as tensors:
        description.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, tensors)


def read_model_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Read the description in a model folder.

    Raises:
        WeightsError: There is none, it cannot be understood, or its network would be imported from the folder itself.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise WeightsError(f"{folder}: not a model folder (no {CONFIG_NAME})")
    try:
        config = ModelConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise WeightsError(f"{path}: damaged: {wrong}") from None
    if is_custom(config.arch):
        _refuse_code_inside(folder, config.arch)
    return config


def _refuse_code_inside(folder: Path, arch: str) -> None:
    """Raise WeightsError if Python's path would lead to code that came with the weights."""
    package = arch.partition(":")[0].partition(".")[0]
    try:
        spec = find_spec(package)
    except ValueError:  # __main__ has no specification, and is running already
        return
    places = [spec.origin, *(spec.submodule_search_locations or ())] if spec is not None else []
    if any(place is not None and Path(place).resolve().is_relative_to(folder.resolve()) for place in places):
        raise WeightsError(
            f"{folder}: its network {arch} would be imported from the folder itself; code that comes with weights is "
            f"not run: read it, then put {package} somewhere else on PYTHONPATH"
        )


def load_model(folder: str | os.PathLike[str]) -> nn.Module:
    """Return the network of a model folder, on the CPU, in evaluation mode.

    Raises:
        WeightsError: This is not a model folder, or the weights do not fit the network that it describes.
        ModelError: The network is the user's own, and cannot be imported or built here.
    """
    config = read_model_config(folder)
    model = config.create_model()
    load_weights(model, Path(folder) / WEIGHTS_NAME)
    return model.eval()
