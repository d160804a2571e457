"""Experiment trackers of a run, by `accelerator.init_trackers`: TensorBoard, Weights & Biases, MLflow, Trackio."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, get_available_trackers
from accelerate.utils import LoggerType

from fpd_accel.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

PROJECT = "fpd_accel"
"""Project or experiment under which trackers with a server list the runs."""
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if one of the trackers is not installed."""
    available = {str(LoggerType(tracker)) for tracker in get_available_trackers()}
    if missing := [name for name in names if name not in available]:
        raise ConfigError(
            f"log.trackers: {', '.join(missing)} not installed; run `pip install {' '.join(missing)}`, or leave it out"
        )


class Trackers:
    """The trackers of one run. Accelerate calls them on rank 0 alone.

    Args:
        accelerator: Starts them and holds them while the run lasts.
        names: Of the trackers.
        directory: The run directory; TensorBoard writes to its `tensorboard/`.
        run_name: Under which trackers with a server list the run.
        recipe: The resolved recipe, sent as hyperparameters.
        recipe_text: The same as YAML.
        step: The step that the run starts or resumes at; later values of an earlier start are replaced.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        names: Sequence[str],
        *,
        directory: Path,
        run_name: str,
        recipe: Mapping[str, Any],
        recipe_text: str,
        step: int,
    ) -> None:
        self._accelerator, self._names, self._directory, self._run_name = accelerator, names, directory, run_name
        self._recipe, self._recipe_text, self._step = recipe, recipe_text, step

    def start(self) -> None:
        """Start the trackers; the recipe is sent once, at the beginning of a run.

        Raises:
            OSError: A file cannot be written.
        """
        purge = {"purge_step": self._step + 1} if self._step else {}
        self._accelerator.trackers = []
        self._accelerator.log_with = [
            TensorBoardTracker("tensorboard", self._directory, **purge) if name == "tensorboard" else LoggerType(name)
            for name in self._names
        ]
        self._accelerator.init_trackers(
            PROJECT,
            config=flatten(self._recipe) if self._step == 0 else None,
            init_kwargs={
                "wandb": {"name": self._run_name, "id": self._run_name, "resume": "allow", "dir": str(self._directory)},
                "mlflow": {"run_name": self._run_name},
                "trackio": {"name": self._run_name},
            },
        )
        if self._step == 0 and "tensorboard" in self._names:  # the others show the recipe as the run's configuration
            self._accelerator.get_tracker("tensorboard").log({"recipe": f"```yaml\n{self._recipe_text}```"}, step=0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send scalars by tag. Values that are not finite are left out: not every tracker takes them."""
        self._accelerator.log({tag: value for tag, value in values.items() if math.isfinite(value)}, step=step)

    def picture(self, tag: str, image: "np.ndarray", step: int) -> None:
        """Send a picture (height, width, 3), RGB uint8, to the trackers that take pictures."""
        for tracker in self._accelerator.trackers:
            if type(tracker).__dict__.get("log_images") is not None:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({tag: image[None]}, step=step, **layout)

    def finish(self) -> None:
        """Close the trackers; unlike `accelerator.end_training` this keeps the process group for a run that follows."""
        trackers: list[GeneralTracker] = self._accelerator.trackers
        self._accelerator.trackers = []
        for tracker in trackers:
            if hasattr(tracker, "writer") or tracker.name != "tensorboard":  # its start may have failed
                tracker.finish()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested sections as one dictionary by dotted path, with values that every tracker takes."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
