"""What networks cost and what they scored, as tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from fpd_accel.log import results
from fpd_accel.metrics import MPII_GROUPS, MPII_THRESHOLDS
from fpd_accel.model_folder import ModelConfig
from fpd_accel.models import create_model

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
        model = create_model(config.arch, config.skeleton.num_keypoints).eval()
        images = torch.empty(1, 3, *config.input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def describe_model(name: str, config: ModelConfig) -> str:
    """One line: what a network is and what it costs."""
    parameters, macs = model_cost(config)
    return f"{name}: {config.arch}, {parameters / 1e6:.3f} M parameters, {macs / 1e9:.3f} G multiply-adds per person"


def show_scores(title: str, scores: Sequence[Score]) -> None:
    """Print a table of networks: cost, and COCO's measures with PCK, or where heads were measured MPII's."""
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


def _columns(metrics: dict[str, float]) -> list[tuple[str, str, int]]:
    """Heading, name and digits of the measures in a table. Similarity has no place in MPII's, which has no sigmas."""
    if "PCKh@0.5" in metrics:
        groups = [(group if len(group) < 6 else f"{group[:3]}.", f"PCKh_{group}@0.5", 2) for group in MPII_GROUPS]
        return groups + [("\n".join(name.split()), name, 2) for name in MPII_THRESHOLDS]
    return [(name, name, 3) for name in COLUMNS] + [(name, name, 1) for name in metrics if name.startswith("PCK")]
