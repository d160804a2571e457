"""Tables of networks: their cost, their scores, and the evaluation settings behind the scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fpd_accel.config.schema import Evaluate
from fpd_accel.console import stdout
from fpd_accel.data.detections import Detections
from fpd_accel.data.shards import Shards
from fpd_accel.metrics import MPII_GROUPS, MPII_THRESHOLDS
from fpd_accel.weights.model_cost import model_cost
from fpd_accel.weights.model_folder import ModelConfig

COLUMNS = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR")


@dataclass(frozen=True)
class Score:
    """One row of a table: a network and its metrics."""

    name: str
    config: ModelConfig
    metrics: dict[str, float]  # as `evaluate` returns them


def eval_settings(shards: Shards, options: Evaluate) -> dict[str, Any]:
    """Return the data and the protocol of an evaluation; two scores are comparable only if these are equal."""
    settings: dict[str, Any] = {
        "data_sha256": shards.annotated.fingerprint,
        "images": len(shards.images),
        "boxes": "ground truth",
        "people": len(shards),
    }
    if isinstance(shards, Detections):
        settings |= {
            "boxes": shards.file.name,
            "box_threshold": shards.threshold,
            "images_with_boxes": shards.num_images,
            "skipped_boxes": shards.skipped,
        }
    settings |= {
        "flip_test": options.flip_test,
        "flip_shift": options.flip_shift,
        "scales": list(options.scales),
        "stages": options.stages,
        "refine": options.refine or "codec",
        "keypoint_threshold": options.keypoint_threshold,
        "nms": options.nms,
    }
    return settings if options.nms == "none" else settings | {"nms_threshold": options.nms_threshold}


def describe_protocol(shards: Shards, options: Evaluate) -> str:
    """Return `eval_settings` in words, for the title of a table."""
    people = f"{len(shards)} people in {len(shards.images)} images of {shards.path}, ground-truth boxes"
    if isinstance(shards, Detections):
        skipped = shards.skipped.get("unknown_image", 0)
        people = (
            f"{len(shards)} detector boxes (score >= {shards.threshold:g}) of {shards.file.name} in "
            f"{shards.num_images} of {len(shards.images)} images of {shards.path}"
            + (f", {skipped} boxes of other images left out" if skipped else "")
        )
    default, protocol = Evaluate(), [f"flip test {'on' if options.flip_test else 'off'}"]
    if options.scales != default.scales:
        protocol.append(f"scales {' '.join(f'{scale:g}' for scale in options.scales)}")
    if options.flip_test and options.flip_shift != default.flip_shift:
        protocol.append("mirrored heatmaps not shifted")
    if options.stages != default.stages:
        protocol.append(f"{options.stages} of the stages")
    if options.refine is not None:
        protocol.append(f"refinement {options.refine}")
    if options.keypoint_threshold != default.keypoint_threshold:
        protocol.append(f"keypoints score from {options.keypoint_threshold:g}")
    suppression = {"hard": "OKS-NMS", "soft": "soft OKS-NMS", "none": "no NMS"}[options.nms]
    protocol.append(suppression if options.nms == "none" else f"{suppression} {options.nms_threshold:g}")
    return f"{people}; {', '.join(protocol)}{shards.skeleton.sigma_note}"


def show_scores(title: str, scores: Sequence[Score]) -> None:
    """Print a table of networks: their cost and COCO's measures with PCK, or MPII's measures if there are head sizes.

    Below the table: how many people per image the scores come from.
    """
    table = Table(title=title, title_justify="left")
    columns = _columns(scores[0].metrics)
    table.add_column("", overflow="fold")  # in a narrow terminal the name wraps instead of a number
    table.add_column("network", no_wrap=True)
    for heading in ("M params", "GMACs", *(heading for heading, _, _ in columns)):
        table.add_column(heading, justify="right", no_wrap=True)
    for score in scores:
        parameters, macs = model_cost(score.config)
        measures = [f"{score.metrics[name]:.{digits}f}" for _, name, digits in columns]
        table.add_row(score.name, score.config.arch, f"{parameters / 1e6:.2f}", f"{macs / 1e9:.3f}", *measures)
    stdout.print(table)
    for score in scores:
        if "people_per_image" in score.metrics:  # absent from runs of older versions
            line = (
                "{}: {people_per_image_before_nms:.2f} people per image with boxes before NMS, "
                "{people_per_image:.2f} after; scores {score_min:.3f} to {score_max:.3f}"
            )
            stdout.print(line.format(score.name, **score.metrics), soft_wrap=True, markup=False)


def _columns(metrics: dict[str, float]) -> list[tuple[str, str, int]]:
    """Return heading, name and digits of each measure; MPII's table has no AP, because MPII has no OKS sigmas."""
    if "PCKh@0.5" in metrics:
        groups = [(group if len(group) < 6 else f"{group[:3]}.", f"PCKh_{group}@0.5", 2) for group in MPII_GROUPS]
        return groups + [("\n".join(name.split()), name, 2) for name in MPII_THRESHOLDS]
    return [(name, name, 3) for name in COLUMNS] + [(name, name, 1) for name in metrics if name.startswith("PCK")]
