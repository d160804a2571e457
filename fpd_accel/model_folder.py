"""The model folder: ``config.json`` and ``model.safetensors``, all that is needed to use a network."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fpd_accel.codecs import PoseCodec, create_codec
from fpd_accel.config import Codec
from fpd_accel.data.batch import Normalization
from fpd_accel.errors import WeightsError
from fpd_accel.files import flush, replace_file
from fpd_accel.models import PoseModel, create_model
from fpd_accel.skeleton import Skeleton
from fpd_accel.weights import WEIGHTS_NAME, load_weights


class ModelConfig(BaseModel):
    """What a network is and what it was trained on; ``config.json`` of a model folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arch: str
    skeleton: Skeleton
    input_size: tuple[int, int]  # (height, width) pixels
    codec: Codec = Codec()  # what its outputs mean
    box_padding: float = 1.25
    normalization: Normalization = Normalization()
    source: dict[str, Any] = Field(default_factory=dict)  # where the weights come from: run, step, scores

    def create_codec(self) -> PoseCodec:
        return create_codec(self.codec, self.input_size)

    def create_model(self) -> PoseModel:
        """The network with fresh weights."""
        return create_model(self.arch, self.skeleton.num_keypoints, input_size=self.input_size)


def save_model(folder: str | os.PathLike[str], weights: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Write a model folder; each file is replaced as a whole, so that a reader never meets half of one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".{WEIGHTS_NAME}"
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, staged)
        flush(staged)
        staged.replace(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError):
        staged.unlink(missing_ok=True)
        raise
    replace_file(folder / "config.json", json.dumps(config.model_dump(mode="json"), indent=2) + "\n")


def read_model_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The description in a model folder.

    Raises:
        WeightsError: there is none, or it cannot be understood.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder}: not a model folder (no config.json)")
    try:
        return ModelConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise WeightsError(f"{path}: damaged: {wrong}") from None


def load_model(folder: str | os.PathLike[str]) -> PoseModel:
    """The network of a model folder, on the CPU, in evaluation mode.

    Raises:
        WeightsError: not a model folder, or its weights do not fit what it says it is.
    """
    config = read_model_config(folder)
    model = config.create_model()
    load_weights(model, Path(folder) / WEIGHTS_NAME)
    return model.eval()
