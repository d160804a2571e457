"""Experiment trackers of a run, by `accelerator.init_trackers`: TensorBoard, Weights & Biases, MLflow, Trackio."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from accelerate.utils import LoggerType

from fpd_accel.errors import ConfigError
from fpd_accel.training.resume_rules import by_dotted_path

PROJECT = "fpd_accel"
"""Project or experiment under which trackers with a server list the runs."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if one of the trackers is not installed."""
    available = {str(LoggerType(tracker)) for tracker in get_available_trackers()}
    if missing := [name for name in names if name not in available]:
        raise ConfigError(
            f"log.trackers: {', '.join(missing)} not installed; run `pip install {' '.join(missing)}`, or leave it out"
        )


@dataclass(frozen=True)
class Trackers:
    """The trackers of one run. Accelerate holds them while the run lasts, and calls them on rank 0 alone."""

    accelerator: Accelerator
    names: Sequence[str]
    directory: Path  # the run directory, whose name is the run's; TensorBoard writes to its `tensorboard/`
    recipe: dict[str, Any]  # the resolved recipe, sent as hyperparameters
    recipe_text: str  # the same as YAML
    step: int  # that the run starts or resumes at; later values of an earlier start are replaced

    def start(self) -> None:
        """Start the trackers; the recipe is sent once, at the beginning of a run.

        Raises:
            OSError: A file cannot be written.
        """
        run_name = self.directory.name
        purge = {"purge_step": self.step + 1} if self.step else {}
        self.accelerator.trackers = []
        self.accelerator.log_with = [
            TensorBoardTracker("tensorboard", self.directory, **purge) if name == "tensorboard" else LoggerType(name)
            for name in self.names
        ]
        self.accelerator.init_trackers(
            PROJECT,
            config=flatten(self.recipe) if self.step == 0 else None,
            init_kwargs={
                "wandb": {"name": run_name, "id": run_name, "resume": "allow", "dir": str(self.directory)},
                "mlflow": {"run_name": run_name},
                "trackio": {"name": run_name},
            },
        )
        if self.step == 0 and "tensorboard" in self.names:  # the others show the recipe as the run's configuration
            self.accelerator.get_tracker("tensorboard").log({"recipe": f"```yaml\n{self.recipe_text}```"}, step=0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send scalars by tag. Values that are not finite are left out: not every tracker takes them."""
        self.accelerator.log({tag: value for tag, value in values.items() if math.isfinite(value)}, step=step)

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """Send a picture (height, width, 3), RGB uint8, to the trackers that take pictures."""
        for tracker in self.accelerator.trackers:
            if type(tracker).__dict__.get("log_images") is not None:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({tag: image[None]}, step=step, **layout)

    def finish(self) -> None:
        """Close the trackers; unlike `accelerator.end_training` this keeps the process group for a run that follows."""
        trackers, self.accelerator.trackers = self.accelerator.trackers, []
        for tracker in trackers:
            if hasattr(tracker, "writer") or tracker.name != "tensorboard":  # its start may have failed
                tracker.finish()


def flatten(values: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """Return nested sections as one dictionary by dotted path, with values that every tracker takes."""
    flat = by_dotted_path(values).items()
    return {path: value if isinstance(value, bool | int | float | str) else str(value) for path, value in flat}
