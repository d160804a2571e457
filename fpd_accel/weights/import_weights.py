"""Convert a published checkpoint to a model folder: `fpd-accel import-weights`."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from fpd_accel.config.schema import Codec
from fpd_accel.console import warn
from fpd_accel.data.batch import Normalization
from fpd_accel.errors import ModelError, WeightsError
from fpd_accel.files import sha256, staged_folder
from fpd_accel.models.names import DEFAULT_INPUT_SIZE, input_problem
from fpd_accel.skeleton import BUILT_IN, MPII, Skeleton, load_skeleton
from fpd_accel.weights.convert import Conversion, convert, refuse_mistakes
from fpd_accel.weights.load import WEIGHTS_NAME, read_tensors
from fpd_accel.weights.model_folder import ModelConfig, save_model
from fpd_accel.weights.naming import MMPOSE, ORIGINAL
from fpd_accel.weights.tables import show_conversion

SIZE_IN_NAME = re.compile(r"(?<!\d)(\d{2,4})x(\d{2,4})(?!\d)")  # pose_hrnet_w32_256x192.pth: height x width
CODEC_IN_NAME = re.compile(r"(?<![a-z0-9])(udp|dark)(?![a-z0-9])", re.IGNORECASE)  # hrnet_w32_coco_256x192_udp-aba0
MPII_INPUT_SIZE = (256, 256)  # (height, width) of the published hourglasses, and of all published MPII networks
LARGE_SIGMA_HEIGHT = 384  # pixels; published networks for 384 x 288 were trained on heatmaps of sigma 3, others on 2
PREPROCESSOR_NAME = "preprocessor_config.json"  # written by transformers beside model.safetensors

Color = Literal["rgb", "bgr"]
CodecName = Literal["heatmap", "dark", "udp"]


@dataclass(frozen=True)
class Imported:
    """The result of an import: the model folder's description, and how it came about."""

    config: ModelConfig
    conversion: Conversion
    reasons: Mapping[str, str]  # of "color", "codec" and "normalization": given, read from where, or assumed


def import_weights(
    source: str | Path,
    output: str | Path,
    *,
    arch: str | None = None,
    skeleton: str | Path = "coco",
    input_size: tuple[int, int] | None = None,
    color: Color | None = None,
    codec: CodecName | None = None,
    sigma: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Imported:
    """Write a model folder with the weights of a published checkpoint, and print a table of all its tensors.

    The arguments are those of the command, whose help says what stands in for those left out. `source` is a `.pth`,
    `.pt`, `.tar` or `.safetensors` file, or a folder with `model.safetensors`; `input_size` is (height, width).

    Raises:
        UserError: The file cannot be read safely, is of no known network, or does not match it tensor by tensor;
            skeleton or size do not fit; the output exists. Nothing is written.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WeightsError(f"{output}: exists; give --output a new folder")
    _check_numbers(input_size, sigma)
    keypoints = load_skeleton(skeleton)
    conversion = _convert(source, arch, input_size)
    _check_skeleton(source, conversion, keypoints)
    size = _choose_input_size(source, conversion, input_size)
    if (problem := input_problem(conversion.arch, size)) is not None:
        raise ModelError(f"--input-size: {problem}")
    file = source / WEIGHTS_NAME if source.is_dir() else source
    large = size[0] >= LARGE_SIGMA_HEIGHT and not conversion.arch.startswith("vitpose")
    reasons: dict[str, str] = {}
    name, reasons["codec"] = _choose_codec(source, conversion, codec)
    order, reasons["color"] = _choose_color(conversion, color)
    normalization, reasons["normalization"] = _choose_normalization(source, order, mean, std)
    config = ModelConfig(
        arch=conversion.arch,
        skeleton=keypoints,
        input_size=size,
        codec=Codec(name=name, sigma=sigma or (3.0 if large else 2.0)),
        normalization=normalization,
        source={"file": source.name, "sha256": sha256(file), "layout": conversion.layout},
    )
    _write(output, conversion, config)
    return Imported(config, conversion, reasons)


def _write(output: Path, conversion: Conversion, config: ModelConfig) -> None:
    folder = output.resolve()  # "." has no name to put another beside
    try:
        if folder.exists():  # an empty folder stays, for the command may run in it
            save_model(folder, conversion.weights, config)
        else:
            with staged_folder(folder, own="importing") as staging:
                save_model(staging, conversion.weights, config)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{output}: cannot be written: {error}") from None


def _check_numbers(input_size: tuple[int, int] | None, sigma: float | None) -> None:
    if input_size is not None and min(input_size) <= 0:
        raise ModelError(f"--input-size: wanted a positive height and width, not {input_size[0]} {input_size[1]}")
    if sigma is not None and not (math.isfinite(sigma) and sigma > 0):
        raise WeightsError(f"--sigma: wanted a positive number of heatmap cells, not {sigma}")


def _convert(source: Path, arch: str | None, input_size: tuple[int, int] | None) -> Conversion:
    """Convert a file and print the result; raise WeightsError unless all of it fits and is finite."""
    tensors = read_tensors(source)
    try:
        conversion = convert(tensors, arch=arch, input_size=input_size)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    show_conversion(source, conversion)
    refuse_mistakes(conversion, source)
    broken = [name for name, tensor in conversion.weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(f"{source}: {len(broken)} tensors hold numbers that are not finite, such as {broken[0]}")
    return conversion


def _check_skeleton(source: Path, conversion: Conversion, skeleton: Skeleton) -> None:
    found = conversion.num_keypoints
    if found == skeleton.num_keypoints:
        return
    fitting = " or ".join(f"--skeleton {name}" for name, known in BUILT_IN.items() if known.num_keypoints == found)
    raise WeightsError(
        f"{source}: finds {found} keypoints, but skeleton {skeleton.name!r} has {skeleton.num_keypoints}; give "
        f"{fitting + ', or ' if fitting else ''}--skeleton a YAML file with its keypoints in their order"
    )


def _choose_color(conversion: Conversion, given: Color | None) -> tuple[Color, str]:
    """Return the channel order and the reason for it; the first networks took images as OpenCV reads them."""
    if given is not None:
        return given, "given"
    if conversion.layout == ORIGINAL.name and conversion.arch.startswith(("hourglass_", "pose_resnet_")):
        return "bgr", "assumed: the Hourglass and PoseResNet of the HRNet and FPD repositories were trained on it"
    return "rgb", "assumed"


def _choose_codec(source: Path, conversion: Conversion, given: CodecName | None) -> tuple[CodecName, str]:
    """Return the codec and the reason for it."""
    if given is not None:
        return given, "given"
    if conversion.arch.startswith("vitpose"):
        return "udp", "as every published ViTPose"
    if conversion.layout == MMPOSE.name:
        words = {word.lower() for word in CODEC_IN_NAME.findall(source.name)}
        if words:  # both words mean UDP, which decodes as DARK does
            return "udp" if "udp" in words else "dark", "from the name"
        warn(f"{source.name} does not say udp or dark, so plain heatmaps are assumed (--codec)")
    return "heatmap", "assumed"


def _choose_normalization(
    source: Path, color: Color, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Normalization, str]:
    """Return the normalisation and the reason for it."""
    path, reason = source / PREPROCESSOR_NAME, "ImageNet's, assumed"
    stored: dict[str, Any] = {"image_mean": Normalization().mean, "image_std": Normalization().std}
    if path.is_file() and (mean is None or std is None):
        reason = f"from {PREPROCESSOR_NAME}"
        stored |= _read_preprocessor(path)
        if not stored.get("do_normalize", True):
            stored = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    stored_mean = _three(stored["image_mean"], f"{path}: image_mean")
    stored_std = _three(stored["image_std"], f"{path}: image_std", positive=True)
    if mean is not None or std is not None:
        reason = "given" if mean is not None and std is not None else f"given in part, else {reason}"
    chosen_mean = stored_mean if mean is None else _three(mean, "--mean")
    chosen_std = stored_std if std is None else _three(std, "--std", positive=True)
    return Normalization(mean=chosen_mean, std=chosen_std, color=color), reason


def _read_preprocessor(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable as JSON: {error}; give --mean and --std") from None
    if not isinstance(stored, dict):
        raise WeightsError(f"{path}: wanted a mapping with image_mean and image_std; give --mean and --std")
    return stored


def _three(values: object, name: str, *, positive: bool = False) -> tuple[float, float, float]:
    """Return three numbers from 0 to 1; raise WeightsError for anything else."""
    try:
        first, second, third = (float(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise WeightsError(f"{name}: wanted three numbers, not {values}") from None
    numbers = (first, second, third)
    if not all(0 <= number <= 1 for number in numbers) or (positive and min(numbers) == 0):
        raise WeightsError(
            f"{name}: wanted numbers from 0 to 1{', not 0' if positive else ''}, not {values}; divide numbers of "
            "0..255 by 255"
        )
    return numbers


def _choose_input_size(source: Path, conversion: Conversion, given: tuple[int, int] | None) -> tuple[int, int]:
    if known := given or conversion.input_size:
        return known
    if named := SIZE_IN_NAME.search(source.name):
        return int(named[1]), int(named[2])
    mpii = conversion.arch.startswith("hourglass_") or conversion.num_keypoints == MPII.num_keypoints
    height, width = MPII_INPUT_SIZE if mpii else DEFAULT_INPUT_SIZE
    warn(f"{source.name} does not say which input size it was trained on; taking {height} x {width} (--input-size)")
    return height, width
