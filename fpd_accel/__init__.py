"""Fast Pose Distillation on Hugging Face Accelerate: a large network teaches a small one to find human keypoints.

The names below are the public interface; anything else may change. They are imported when first used, so that a recipe
can be checked without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpd_accel import codecs, decode, losses, metrics
    from fpd_accel.config import load_recipe
    from fpd_accel.data.coco import prepare_coco
    from fpd_accel.data.mpii import prepare_mpii
    from fpd_accel.distill import Distiller
    from fpd_accel.evaluation import evaluate
    from fpd_accel.model_folder import load_model
    from fpd_accel.models import create_model
    from fpd_accel.predict import Predictor
    from fpd_accel.trainer import Trainer
    from fpd_accel.weights import load_weights

_HOMES = {
    "Distiller": "distill",
    "Predictor": "predict",
    "Trainer": "trainer",
    "create_model": "models",
    "evaluate": "evaluation",
    "load_model": "model_folder",
    "load_recipe": "config",
    "load_weights": "weights",
    "prepare_coco": "data.coco",
    "prepare_mpii": "data.mpii",
}
_MODULES = ("codecs", "decode", "losses", "metrics")

__version__ = "0.1.0"
__all__ = [
    "Distiller",
    "Predictor",
    "Trainer",
    "codecs",
    "create_model",
    "decode",
    "evaluate",
    "load_model",
    "load_recipe",
    "load_weights",
    "losses",
    "metrics",
    "prepare_coco",
    "prepare_mpii",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
