"""Fast Pose Distillation on Hugging Face Accelerate: a large network teaches a small one to find human keypoints.

The names below are the public interface; anything else may change. They are imported when first used, so that a recipe
can be checked without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpd_accel import codecs, decode, losses, metrics
    from fpd_accel.config.loading import load_recipe
    from fpd_accel.data.coco import prepare_coco
    from fpd_accel.data.mpii import prepare_mpii
    from fpd_accel.data.shards import Shards
    from fpd_accel.evaluation.evaluate import evaluate
    from fpd_accel.models.create import create_model
    from fpd_accel.predict import Predictor
    from fpd_accel.training.distiller import Distiller
    from fpd_accel.training.teacher import Teacher
    from fpd_accel.training.trainer import Trainer
    from fpd_accel.weights.load import load_weights
    from fpd_accel.weights.model_folder import load_model

_HOMES = {
    "Distiller": "training.distiller",
    "Predictor": "predict",
    "Shards": "data.shards",
    "Teacher": "training.teacher",
    "Trainer": "training.trainer",
    "create_model": "models.create",
    "evaluate": "evaluation.evaluate",
    "load_model": "weights.model_folder",
    "load_recipe": "config.loading",
    "load_weights": "weights.load",
    "prepare_coco": "data.coco",
    "prepare_mpii": "data.mpii",
}
_MODULES = ("codecs", "decode", "losses", "metrics")

__version__ = "0.2.0"
__all__ = [
    "Distiller", "Predictor", "Shards", "Teacher", "Trainer", "codecs", "create_model", "decode", "evaluate",
    "load_model", "load_recipe", "load_weights", "losses", "metrics", "prepare_coco", "prepare_mpii",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, whether imported yet or not."""
    return sorted({*globals(), *__all__})
