"""Batch sizes and numbers of steps that follow from a recipe."""

from fpd_accel.config.schema import Data, Train
from fpd_accel.errors import ConfigError


def accumulation_steps(train: Train, ranks: int) -> tuple[int, int]:
    """Return (samples per forward on one rank, forwards per optimizer step) that make up `train.global_batch`.

    Raises:
        ConfigError: The global batch does not divide; the message gives the nearest global batches that do.
    """
    total, per_device = train.global_batch, train.device_batch
    unit = ranks * (per_device or 1)
    if total % unit:
        lower, upper = total // unit * unit, (total // unit + 1) * unit
        choices = f"{lower} or {upper}" if lower else str(upper)
        product = f"{ranks} ranks" if per_device is None else f"{ranks} ranks x {per_device} samples per device"
        raise ConfigError(
            f"train.global_batch: {total} does not divide by {product}; use {choices}, or change train.device_batch"
        )
    per_device = per_device or total // ranks
    return per_device, total // (ranks * per_device)


def total_steps(train: Train, data: Data, people: int) -> int:
    """Return the optimizer steps of a run on this many labelled training people."""
    if train.steps is not None:
        return train.steps
    return max(1, round((train.epochs or 0) * steps_per_epoch(train, data, people)))


def steps_per_epoch(train: Train, data: Data, people: int) -> float:
    """Return the optimizer steps that take as many labelled samples as there are labelled people."""
    share = data.unlabelled.share if data.unlabelled is not None else 0.0
    return people / (train.global_batch * (1 - share))
