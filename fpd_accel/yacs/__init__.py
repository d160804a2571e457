"""Experiment files of the HRNet and Fast Pose Distillation repositories, converted to recipes. No torch here."""

from fpd_accel.yacs.recipe import import_config
from fpd_accel.yacs.text import write_recipe

__all__ = ["import_config", "write_recipe"]
