"""What networks cost and what they scored, as tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from fpd_accel.log import results
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
        model = create_model(config.arch, config.skeleton.num_keypoints, input_size=config.input_size).eval()
        images = torch.empty(1, 3, *config.input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def describe_model(name: str, config: ModelConfig) -> str:
    """One line: what a network is and what it costs."""
    parameters, macs = model_cost(config)
    return f"{name}: {config.arch}, {parameters / 1e6:.3f} M parameters, {macs / 1e9:.3f} G multiply-adds per person"


def show_scores(title: str, scores: Sequence[Score]) -> None:
    """Print a table of networks: cost, COCO's measures, and PCK in percent."""
    table = Table(title=title, title_justify="left")
    accuracies = [name for name in scores[0].metrics if name.startswith("PCK")]
    for heading in ("", "network"):
        table.add_column(heading, no_wrap=True)
    for heading in ("M params", "GMACs", *COLUMNS, *accuracies):
        table.add_column(heading, justify="right", no_wrap=True)
    for score in scores:
        parameters, macs = model_cost(score.config)
        measures = [f"{score.metrics[name]:.3f}" for name in COLUMNS]
        measures += [f"{score.metrics[name]:.1f}" for name in accuracies]
        table.add_row(score.name, score.config.arch, f"{parameters / 1e6:.2f}", f"{macs / 1e9:.3f}", *measures)
    results.print(table)
