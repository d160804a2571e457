"""A published checkpoint -> a model folder, whole or not at all: what ``fpd-accel import-weights`` does."""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from fpd_accel.config import Codec
from fpd_accel.convert import Conversion, convert, refuse_mistakes
from fpd_accel.data.batch import Normalization
from fpd_accel.errors import ModelError, WeightsError
from fpd_accel.fixtures import Comparison, compare_with_fixtures
from fpd_accel.layouts import MMPOSE, ORIGINAL
from fpd_accel.log import warn
from fpd_accel.model_folder import ModelConfig, save_model
from fpd_accel.models import DEFAULT_INPUT_SIZE, create_model
from fpd_accel.report import show_comparisons, show_conversion
from fpd_accel.skeleton import BUILT_IN, MPII, Skeleton, load_skeleton
from fpd_accel.weights import WEIGHTS_NAME, read_tensors

SIZE_IN_NAME = re.compile(r"(?<!\d)(\d{2,4})x(\d{2,4})(?!\d)")  # pose_hrnet_w32_256x192.pth: height x width
CODEC_IN_NAME = re.compile(r"(?<![a-z0-9])(udp|dark)(?![a-z0-9])", re.IGNORECASE)  # hrnet_w32_coco_256x192_udp-aba0
MPII_INPUT_SIZE = (256, 256)  # (height, width) of the published hourglasses, and of all that is published for MPII
LARGE_SIGMA_HEIGHT = 384  # published networks for 384 x 288 were trained on heatmaps of sigma 3, the others on 2
PREPROCESSOR_NAME = "preprocessor_config.json"  # beside model.safetensors, by transformers

Color = Literal["rgb", "bgr"]
CodecName = Literal["heatmap", "dark", "udp"]
Means = tuple[float, float, float]


@dataclass(frozen=True)
class Imported:
    """What was written, and the account of how."""

    config: ModelConfig
    conversion: Conversion
    comparisons: tuple[Comparison, ...]
    reasons: Mapping[str, str]  # of "color", "codec" and "normalization": given, or what it was told or assumed from


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
    verify: str | Path | None = None,
) -> Imported:
    """Write a model folder with the weights of a published checkpoint; show what became of every tensor.

    Args:
        source: ``.pth``, ``.pt``, ``.tar``, ``.safetensors`` or a folder with ``model.safetensors``.
        output: The folder to make; it must not exist yet, or be empty.
        arch: The network, where names and shapes do not tell it.
        skeleton: ``coco``, ``mpii`` or a YAML file: what the keypoints are.
        input_size: (height, width). None: what the positions of a ViTPose say, else the numbers in the file's name,
            else with a warning 256 x 192, or 256 x 256 for hourglasses and the 16 keypoints of MPII.
        color: Channel order that the network was trained on. None: bgr for the Hourglass and PoseResNet of the HRNet
            and FPD repositories, whose configurations say COLOR_RGB: false; rgb for everything else.
        codec: How it was trained to say where a keypoint is. None: ViTPose by UDP, as all published ones were; of
            MMPose what the file's name says, ``udp`` or ``dark``, else with a warning plain heatmaps, as the others.
        sigma: Of its heatmaps, in cells. None: 3 from a height of 384 on, 2 below and for every ViTPose.
        mean: Subtracted from each channel of 0..1, in the order of ``color``. None: what a transformers folder's
            ``preprocessor_config.json`` says, else ImageNet's.
        std: Each channel is divided by it; likewise.
        verify: A folder of fixtures (:mod:`fpd_accel.fixtures`) to compare a checkpoint of the original with.

    Raises:
        UserError: The file cannot be read safely, is of no network known here, or does not match it tensor by tensor;
            skeleton, size or fixtures do not fit; the output exists. Nothing is written then.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WeightsError(f"{output}: exists; give --output a new folder")
    _refuse_numbers(input_size, sigma)
    people = load_skeleton(skeleton)
    tensors = read_tensors(source)
    try:
        conversion = convert(tensors, arch=arch, input_size=input_size)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    show_conversion(source, conversion)
    refuse_mistakes(conversion, source)
    _refuse_not_finite(conversion, source)
    _check_skeleton(source, conversion, people)
    size = _choose_input_size(source, conversion, input_size)
    _check_size(conversion.arch, size)
    comparisons = _verify(verify, conversion, source) if verify is not None else []
    name, codec_reason = _choose_codec(source, conversion, codec)
    order, color_reason = _choose_color(conversion, color)
    normalization, normalization_reason = _choose_normalization(source, order, mean, std)
    config = ModelConfig(
        arch=conversion.arch,
        skeleton=people,
        input_size=size,
        codec=Codec(name=name, sigma=_choose_sigma(conversion, size) if sigma is None else sigma),
        normalization=normalization,
        source={"file": source.name, "sha256": _sha256(source), "layout": conversion.layout},
    )
    _write(output, conversion, config)
    reasons = {"color": color_reason, "codec": codec_reason, "normalization": normalization_reason}
    return Imported(config, conversion, tuple(comparisons), reasons)


def _write(output: Path, conversion: Conversion, config: ModelConfig) -> None:
    folder = output.resolve()  # "." has no name to put another beside
    staged = folder.with_name(f".{folder.name}.importing")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        save_model(staged, conversion.weights, config)
        if folder.exists():  # empty; it stays, for the command may run in it
            for file in staged.iterdir():
                file.replace(folder / file.name)
        else:
            staged.rename(folder)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{output}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _refuse_numbers(input_size: tuple[int, int] | None, sigma: float | None) -> None:
    if input_size is not None and min(input_size) <= 0:
        raise ModelError(f"--input-size: wanted a positive height and width, not {input_size[0]} {input_size[1]}")
    if sigma is not None and not (math.isfinite(sigma) and sigma > 0):
        raise WeightsError(f"--sigma: wanted a positive number of heatmap cells, not {sigma}")


def _refuse_not_finite(conversion: Conversion, source: Path) -> None:
    broken = [name for name, tensor in conversion.weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(f"{source}: {len(broken)} tensors hold numbers that are not finite, such as {broken[0]}")


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
    """Channel order, and why. The first networks took images as OpenCV reads them."""
    if given is not None:
        return given, "given"
    if conversion.layout == ORIGINAL.name and conversion.arch.startswith(("hourglass_", "pose_resnet_")):
        return "bgr", "assumed: the Hourglass and PoseResNet of the HRNet and FPD repositories were trained on it"
    return "rgb", "assumed"


def _choose_codec(source: Path, conversion: Conversion, given: CodecName | None) -> tuple[CodecName, str]:
    """Codec, and why."""
    if given is not None:
        return given, "given"
    if conversion.arch.startswith("vitpose"):
        return "udp", "ViTPose's"
    if conversion.layout == MMPOSE.name:
        words = {word.lower() for word in CODEC_IN_NAME.findall(source.name)}
        if words:  # both together are UDP, which reads heatmaps as DARK does
            return "udp" if "udp" in words else "dark", "from the name"
        warn(f"{source.name} does not say udp or dark, so it is taken as trained by plain heatmaps (--codec)")
    return "heatmap", "assumed"


def _choose_sigma(conversion: Conversion, size: tuple[int, int]) -> float:
    return 3.0 if size[0] >= LARGE_SIGMA_HEIGHT and not conversion.arch.startswith("vitpose") else 2.0


def _choose_normalization(
    source: Path, color: Color, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Normalization, str]:
    """Normalisation, and why."""
    default, reason = Normalization(), "ImageNet's, assumed"
    stored_mean, stored_std = default.mean, default.std
    path = source / PREPROCESSOR_NAME
    if path.is_file() and (mean is None or std is None):
        stored = _read_preprocessor(path)
        if stored.get("do_normalize", True):
            stored_mean = _three(stored.get("image_mean", stored_mean), f"{path}: image_mean")
            stored_std = _three(stored.get("image_std", stored_std), f"{path}: image_std", positive=True)
        else:
            stored_mean, stored_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        reason = f"from {PREPROCESSOR_NAME}"
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


def _three(values: object, what: str, *, positive: bool = False) -> Means:
    """Three numbers of 0..1; raises WeightsError for anything else."""
    try:
        first, second, third = (float(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise WeightsError(f"{what}: wanted three numbers, not {values}") from None
    numbers = (first, second, third)
    if not all(0 <= number <= 1 for number in numbers) or (positive and min(numbers) == 0):
        raise WeightsError(
            f"{what}: wanted numbers from 0 to 1{', not 0' if positive else ''}, not {values}; divide those of 0..255 "
            "by 255"
        )
    return numbers


def _choose_input_size(source: Path, conversion: Conversion, given: tuple[int, int] | None) -> tuple[int, int]:
    if given is not None:
        return given
    if conversion.input_size is not None:
        return conversion.input_size
    if named := SIZE_IN_NAME.search(source.name):
        return int(named[1]), int(named[2])
    mpii = conversion.arch.startswith("hourglass_") or conversion.num_keypoints == MPII.num_keypoints
    height, width = MPII_INPUT_SIZE if mpii else DEFAULT_INPUT_SIZE
    warn(f"{source.name} does not say which input size it was trained on; taking {height} x {width} (--input-size)")
    return height, width


def _check_size(arch: str, size: tuple[int, int]) -> None:
    """Raises ModelError where the network cannot take images of this (height, width)."""
    with torch.device("meta"):
        model = create_model(arch, 1, input_size=size)
        try:
            model.check_input(torch.empty(1, 3, *size))
        except ModelError as error:
            raise ModelError(f"--input-size: {error}") from None


def _verify(folder: str | Path, conversion: Conversion, source: Path) -> list[Comparison]:
    if conversion.layout != ORIGINAL.name:
        raise WeightsError(
            f"{source}: --verify compares checkpoints of the HRNet and FPD repositories; this one is of "
            f"{conversion.layout}"
        )
    shapes = {
        entry.name: tuple(conversion.weights[entry.name].shape)
        for entry in conversion.entries
        if entry.kind in ("matched", "renamed")
    }
    comparisons = compare_with_fixtures(folder, conversion.arch, shapes, num_keypoints=conversion.num_keypoints)
    show_comparisons(f"{source.name} and the fixtures of {folder}", comparisons)
    if not all(comparison.agrees for comparison in comparisons):
        wrong = "; ".join(f"{c.what}: {c.result}" for c in comparisons if not c.agrees)
        raise WeightsError(f"{source}: does not agree with the fixtures of {folder}: {wrong}")
    return comparisons


def _sha256(source: Path) -> str:
    path = source / WEIGHTS_NAME if source.is_dir() else source
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
