"""A published checkpoint -> a model folder, whole or not at all: what ``fpd-accel import-weights`` does."""

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from fpd_accel.config import Codec
from fpd_accel.convert import Conversion, convert, refuse_mistakes
from fpd_accel.data.batch import Normalization
from fpd_accel.errors import ModelError, WeightsError
from fpd_accel.fixtures import Comparison, compare_with_fixtures
from fpd_accel.layouts import ORIGINAL
from fpd_accel.log import warn
from fpd_accel.model_folder import ModelConfig, save_model
from fpd_accel.models import DEFAULT_INPUT_SIZE, create_model
from fpd_accel.report import show_comparisons, show_conversion
from fpd_accel.skeleton import load_skeleton
from fpd_accel.weights import WEIGHTS_NAME, read_tensors

SIZE_IN_NAME = re.compile(r"(?<!\d)(\d{2,4})x(\d{2,4})(?!\d)")  # pose_hrnet_w32_256x192.pth: height x width
LARGE_SIGMA_HEIGHT = 384  # published networks for 384 x 288 were trained on heatmaps of sigma 3, the others on 2


@dataclass(frozen=True)
class Imported:
    """What was written, and the account of how."""

    config: ModelConfig
    conversion: Conversion
    comparisons: tuple[Comparison, ...]


def import_weights(
    source: str | Path,
    output: str | Path,
    *,
    arch: str | None = None,
    skeleton: str | Path = "coco",
    input_size: tuple[int, int] | None = None,
    color: Literal["rgb", "bgr"] = "rgb",
    codec: Literal["heatmap", "dark", "udp"] | None = None,
    verify: str | Path | None = None,
) -> Imported:
    """Write a model folder with the weights of a published checkpoint; show what became of every tensor.

    Args:
        source: ``.pth``, ``.pt``, ``.tar``, ``.safetensors`` or a folder with ``model.safetensors``.
        output: The folder to make; it must not exist yet, or be empty.
        arch: The network, where names and shapes do not tell it.
        skeleton: ``coco`` or a YAML file: what the keypoints are.
        input_size: (height, width). None: what the positions of a ViTPose say, else the numbers in the file's name,
            else 256 x 192 with a warning.
        color: Channel order that the network was trained on; the published MPII networks of the FPD repository: bgr.
        codec: How it was trained to say where a keypoint is. None: ViTPose by UDP, as all published ones were, the
            others by plain heatmaps; MMPose has networks of the others by UDP and DARK too.
        verify: A folder of fixtures (:mod:`fpd_accel.fixtures`) to compare a checkpoint of the original with.

    Raises:
        UserError: The file cannot be read safely, is of no network known here, or does not match it tensor by tensor;
            skeleton, size or fixtures do not fit; the output exists. Nothing is written then.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WeightsError(f"{output}: exists; give --output a new folder")
    people = load_skeleton(skeleton)
    tensors = read_tensors(source)
    try:
        conversion = convert(tensors, arch=arch, input_size=input_size)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    show_conversion(source, conversion)
    refuse_mistakes(conversion, source)
    _refuse_not_finite(conversion, source)
    if conversion.num_keypoints != people.num_keypoints:
        raise WeightsError(
            f"{source}: finds {conversion.num_keypoints} keypoints, but skeleton {people.name!r} has "
            f"{people.num_keypoints}; give --skeleton a YAML file with its keypoints in their order"
        )
    size = _choose_input_size(source, conversion, input_size)
    _check_size(conversion.arch, size)
    comparisons = _verify(verify, conversion, source) if verify is not None else []
    name = codec or ("udp" if conversion.arch.startswith("vitpose") else "heatmap")
    config = ModelConfig(
        arch=conversion.arch,
        skeleton=people,
        input_size=size,
        codec=Codec(name=name, sigma=3.0 if name == "heatmap" and size[0] >= LARGE_SIGMA_HEIGHT else 2.0),
        normalization=Normalization(color=color),
        source={"file": source.name, "sha256": _sha256(source), "layout": conversion.layout},
    )
    staged = output.with_name(f".{output.name}.importing")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        save_model(staged, conversion.weights, config)
        if output.exists():
            output.rmdir()
        staged.rename(output)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{output}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Imported(config, conversion, tuple(comparisons))


def _refuse_not_finite(conversion: Conversion, source: Path) -> None:
    broken = [name for name, tensor in conversion.weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(f"{source}: {len(broken)} tensors hold numbers that are not finite, such as {broken[0]}")


def _choose_input_size(source: Path, conversion: Conversion, given: tuple[int, int] | None) -> tuple[int, int]:
    if given is not None:
        return given
    if conversion.input_size is not None:
        return conversion.input_size
    if named := SIZE_IN_NAME.search(source.name):
        return int(named[1]), int(named[2])
    height, width = DEFAULT_INPUT_SIZE
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
