"""Experiment files of the HRNet and Fast Pose Distillation repositories, converted to recipes. No torch here."""

from fpd_accel.yacs.recipe import import_config, write_recipe

__all__ = ["import_config", "write_recipe"]
