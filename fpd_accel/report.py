"""What networks cost, what they scored and by which protocol, as tables."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fpd_accel.codecs import SimCCCodec
from fpd_accel.config import Evaluate
from fpd_accel.convert import WRONG, Conversion, Entry
from fpd_accel.data.detections import Detections
from fpd_accel.data.shards import Shards
from fpd_accel.fixtures import Comparison
from fpd_accel.log import results
from fpd_accel.metrics import MPII_GROUPS, MPII_THRESHOLDS
from fpd_accel.model_folder import ModelConfig, read_model_config
from fpd_accel.outputs import BINS_PER_PIXEL

LISTED = 20  # missing, misshapen or left-over tensors that are listed by name, of each
STUDENT_PASSES = 3  # forwards that a step of the student costs: its backward pass is about two
COLUMNS = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR")


@dataclass(frozen=True)
class Score:
    """One row of a table: a network and what it scored."""

    name: str
    config: ModelConfig
    metrics: dict[str, float]


def model_cost(config: ModelConfig) -> tuple[int, int]:
    """Parameters, and multiply-adds of one forward for one person (convolutions and matrix products alone)."""
    with torch.device("meta"):
        model = config.create_model().eval()
        images = torch.empty(1, 3, *config.input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def original_gflops(config: ModelConfig) -> float:
    """What the published tables call GFLOPs: the original code's count, in units of 2^30, for one person.

    It multiplies the size of a layer's weight by the positions of its output, for convolutions and linear layers alone.
    For a transposed convolution of stride 2 that is four times its multiply-adds. With it HRNet-W32 has 7.1 "GFLOPs"
    and PoseResNet-50 has 8.9 at 256 x 192; multiply-adds in units of 10^9 are in :func:`model_cost`.
    """
    counted: list[int] = []

    def count(module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        positions = output.shape[:-1] if isinstance(module, nn.Linear) else output.shape[2:]
        counted.append(module.weight.numel() * positions.numel())

    with torch.device("meta"):
        model = config.create_model().eval()
        images = torch.empty(1, 3, *config.input_size)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(images)
    return sum(counted) / 2**30


def _describe_codec(config: ModelConfig) -> str:
    codec = config.create_codec()
    if isinstance(codec, SimCCCodec):
        y_bins, x_bins = (BINS_PER_PIXEL * side for side in codec.input_size)
        return f"simcc: {x_bins} bins along x, {y_bins} along y"
    return f"{codec.kind}: {codec.heatmap_size[0]} x {codec.heatmap_size[1]} cells, sigma {codec.sigma:g}"


def show_model(folder: str | Path) -> None:
    """Print what a model folder holds: cost, input, skeleton, normalisation, and where the weights come from.

    Raises:
        WeightsError: not a model folder.
    """
    config = read_model_config(folder)
    parameters, macs = model_cost(config)
    height, width = config.input_size
    pixels, skeleton = config.normalization, config.skeleton
    table = Table(show_header=False)
    rows = {
        "network": config.arch,
        "parameters": f"{parameters / 1e6:.3f} M",
        "multiply-adds": f"{macs / 1e9:.3f} G (10^9) per person: convolutions, linear layers, attention",
        "FLOPs": f"{2 * macs / 1e9:.3f} G: two per multiply-add",
        "original's GFLOPs": f"{original_gflops(config):.2f}: as the published tables count, in units of 2^30",
        "input": f"{height} x {width} (height x width), person box x {config.box_padding}",
        "output": _describe_codec(config),
        "skeleton": f"{skeleton.name}, {skeleton.num_keypoints} keypoints",
        "pixels": f"{pixels.color}, mean {_numbers(pixels.mean)}, std {_numbers(pixels.std)}",
        "source": ", ".join(f"{key}: {value}" for key, value in config.source.items()) or "not recorded",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    _print(str(folder), table)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def show_conversion(source: Path, conversion: Conversion) -> None:
    """Print what became of every tensor of a file: those that fit in groups, those that do not by name."""
    table = Table()
    table.add_column("tensors", justify="right")
    for heading in ("what became of them", "in the file", "in the network"):
        table.add_column(heading, overflow="fold")
    rows = Counter(_row(entry) for entry in conversion.entries)
    listed: Counter[str] = Counter()
    for (kind, *cells), number in rows.items():
        listed[kind] += 1
        if kind not in WRONG or listed[kind] <= LISTED:
            table.add_row(str(number), *map(escape, cells))
    for kind in WRONG:
        if listed[kind] > LISTED:
            table.add_row(str(listed[kind] - LISTED), f"{kind}: further ones", "...", "...")
    _print(f"{source.name}: {conversion.arch}, {conversion.layout} layout", table)


def _row(entry: Entry) -> tuple[str, str, str, str]:
    """(kind, what became of it, names in the file, names here): the same for all that share a row of the table."""
    what = f"{entry.kind}: {entry.note}" if entry.note else entry.kind
    match entry.kind:
        case "matched" | "set to zero":
            return entry.kind, what, "", ""
        case "missing" | "other shape":
            return entry.kind, what, "", entry.name
        case "left over":
            return entry.kind, what, entry.name, ""
        case "unread":
            return entry.kind, what, f"{entry.name.split('.')[0]}.*", ""
        case "renamed":
            there, here = (_numberless(name) for name in (entry.sources[0], entry.name))
            while there and here and there[-1] == here[-1]:  # what stays the same at the end is not worth a row each
                there, here = there[:-1], here[:-1]
            return entry.kind, what, ".".join([*there, "*"]), ".".join([*here, "*"])


def _numberless(name: str) -> list[str]:
    return ["N" if part.isdigit() else part for part in name.split(".")]


def show_comparisons(title: str, comparisons: Sequence[Comparison]) -> None:
    """Print the comparison with fixtures, one line each."""
    table = Table()
    for heading in ("", "result", ""):
        table.add_column(heading)
    for comparison in comparisons:
        table.add_row(comparison.what, comparison.result, "agrees" if comparison.agrees else "DIFFERS")
    _print(title, table)


def _print(title: str, table: Table) -> None:
    """A table under its title, which a narrow table would break into lines."""
    results.print(escape(title), soft_wrap=True)
    results.print(table)


def describe_model(name: str, config: ModelConfig) -> str:
    """One line: what a network is and what it costs."""
    parameters, macs = model_cost(config)
    return f"{name}: {config.arch}, {parameters / 1e6:.3f} M parameters, {macs / 1e9:.3f} G multiply-adds per person"


def describe_teacher_share(teacher: ModelConfig, student: ModelConfig) -> str:
    """What of a training step is the teacher's, by multiply-adds; a slow loader leaves less of the time to it."""
    of_teacher, of_student = model_cost(teacher)[1], STUDENT_PASSES * model_cost(student)[1]
    return (
        f"the teacher is {of_teacher / (of_teacher + of_student):.0%} of a step's multiply-adds "
        f"({of_teacher / 1e9:.3f} G per person; forward and backward of the student {of_student / 1e9:.3f} G)"
    )


def protocol(shards: Shards, options: Evaluate) -> dict[str, Any]:
    """How people are found and counted: what has to be the same for two scores to be compared."""
    record: dict[str, Any] = {
        "data_sha256": shards.annotated.fingerprint,
        "images": len(shards.images),
        "boxes": "ground truth",
        "people": len(shards),
    }
    if isinstance(shards, Detections):
        record |= {
            "boxes": shards.file.name,
            "box_threshold": shards.threshold,
            "images_with_boxes": shards.num_images,
            "skipped_boxes": shards.skipped,
        }
    record |= {
        "flip_test": options.flip_test,
        "flip_shift": options.flip_shift,
        "scales": list(options.scales),
        "stages": options.stages,
        "refine": options.refine or "codec",
        "keypoint_threshold": options.keypoint_threshold,
        "nms": options.nms,
    }
    return record if options.nms == "none" else record | {"nms_threshold": options.nms_threshold}


def describe_protocol(shards: Shards, options: Evaluate) -> str:
    """:func:`protocol` in words, for the title of a table."""
    people = f"{len(shards)} people in {len(shards.images)} images of {shards.path}, ground-truth boxes"
    if isinstance(shards, Detections):
        skipped = shards.skipped.get("unknown_image", 0)
        people = (
            f"{len(shards)} detector boxes (score >= {shards.threshold:g}) of {shards.file.name} in "
            f"{shards.num_images} of {len(shards.images)} images of {shards.path}"
            + (f", {skipped} boxes of other images left out" if skipped else "")
        )
    suppression = {
        "hard": f"OKS-NMS {options.nms_threshold:g}",
        "soft": f"soft OKS-NMS {options.nms_threshold:g}",
        "none": "no NMS",
    }[options.nms]
    scales = "" if options.scales == (1.0,) else f", scales {' '.join(f'{scale:g}' for scale in options.scales)}"
    usual, chosen = Evaluate(), []
    if options.flip_test and options.flip_shift != usual.flip_shift:
        chosen.append("mirrored heatmaps not shifted")
    if options.stages != usual.stages:
        chosen.append(f"{options.stages} of the stages")
    if options.refine is not None:
        chosen.append(f"refinement {options.refine}")
    if options.keypoint_threshold != usual.keypoint_threshold:
        chosen.append(f"keypoints score from {options.keypoint_threshold:g}")
    unusual = "".join(f", {choice}" for choice in chosen)
    flip = f"flip test {'on' if options.flip_test else 'off'}"
    return f"{people}; {flip}{scales}{unusual}, {suppression}{shards.skeleton.sigma_note}"


def show_scores(title: str, scores: Sequence[Score]) -> None:
    """Print a table of networks: cost, and COCO's measures with PCK, or where heads were measured MPII's.

    Below it: how many people the scores come from.
    """
    table = Table(title=title, title_justify="left")
    columns = _columns(scores[0].metrics)
    table.add_column("", overflow="fold")  # of a wide table a folder's name gives way, and no number
    table.add_column("network", no_wrap=True)
    for heading in ("M params", "GMACs", *(heading for heading, _, _ in columns)):
        table.add_column(heading, justify="right", no_wrap=True)
    for score in scores:
        parameters, macs = model_cost(score.config)
        measures = [f"{score.metrics[name]:.{digits}f}" for _, name, digits in columns]
        table.add_row(score.name, score.config.arch, f"{parameters / 1e6:.2f}", f"{macs / 1e9:.3f}", *measures)
    results.print(table)
    for score in scores:
        if "people_per_image" in score.metrics:  # not in those of a run that was begun before it was measured
            results.print(f"{score.name}: {_describe_people(score.metrics)}", soft_wrap=True, markup=False)


def _columns(metrics: dict[str, float]) -> list[tuple[str, str, int]]:
    """Heading, name and digits of the measures in a table. Similarity has no place in MPII's, which has no sigmas."""
    if "PCKh@0.5" in metrics:
        groups = [(group if len(group) < 6 else f"{group[:3]}.", f"PCKh_{group}@0.5", 2) for group in MPII_GROUPS]
        return groups + [("\n".join(name.split()), name, 2) for name in MPII_THRESHOLDS]
    return [(name, name, 3) for name in COLUMNS] + [(name, name, 1) for name in metrics if name.startswith("PCK")]


def _describe_people(metrics: dict[str, float]) -> str:
    return (
        f"{metrics['people_per_image_before_nms']:.2f} people per image with boxes before NMS, "
        f"{metrics['people_per_image']:.2f} after; scores {metrics['score_min']:.3f} to {metrics['score_max']:.3f}"
    )
