"""What networks cost, what they scored and by which protocol, as tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from fpd_accel.config import Evaluate
from fpd_accel.data.detections import Detections
from fpd_accel.data.shards import Shards
from fpd_accel.log import results
from fpd_accel.metrics import MPII_GROUPS, MPII_THRESHOLDS
from fpd_accel.model_folder import ModelConfig

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


def describe_model(name: str, config: ModelConfig) -> str:
    """One line: what a network is and what it costs."""
    parameters, macs = model_cost(config)
    return f"{name}: {config.arch}, {parameters / 1e6:.3f} M parameters, {macs / 1e9:.3f} G multiply-adds per person"


def protocol(shards: Shards, options: Evaluate) -> dict[str, Any]:
    """How people are found and counted: what has to be the same for two scores to be compared."""
    record: dict[str, Any] = {"images": len(shards.images), "boxes": "ground truth", "people": len(shards)}
    if isinstance(shards, Detections):
        record |= {
            "boxes": shards.file.name,
            "box_threshold": shards.threshold,
            "images_with_boxes": shards.num_images,
            "skipped_boxes": shards.skipped,
        }
    record |= {"flip_test": options.flip_test, "scales": list(options.scales), "nms": options.nms}
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
    return (
        f"{people}; flip test {'on' if options.flip_test else 'off'}{scales}, {suppression}{shards.skeleton.sigma_note}"
    )


def show_scores(title: str, scores: Sequence[Score]) -> None:
    """Print a table of networks: cost, and COCO's measures with PCK, or where heads were measured MPII's.

    Below it: how many people the scores come from.
    """
    table = Table(title=title, title_justify="left")
    columns = _columns(scores[0].metrics)
    for heading in ("", "network"):
        table.add_column(heading, no_wrap=True)
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
        groups = [(group, f"PCKh_{group}@0.5", 2) for group in MPII_GROUPS]
        return groups + [(name.replace(" ", "\n", 1), name, 2) for name in MPII_THRESHOLDS]
    return [(name, name, 3) for name in COLUMNS] + [(name, name, 1) for name in metrics if name.startswith("PCK")]


def _describe_people(metrics: dict[str, float]) -> str:
    return (
        f"{metrics['people_per_image_before_nms']:.2f} people per image with boxes before NMS, "
        f"{metrics['people_per_image']:.2f} after; scores {metrics['score_min']:.3f} to {metrics['score_max']:.3f}"
    )
