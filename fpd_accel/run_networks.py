"""The networks of a recipe: a student to be trained, and a teacher that is checked against data and student."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from fpd_accel.config import Recipe, teacher_weights
from fpd_accel.convert import load_backbone
from fpd_accel.data.batch import Normalization
from fpd_accel.data.mixture import Mixture
from fpd_accel.errors import ConfigError
from fpd_accel.fp8 import float8_layers
from fpd_accel.log import say
from fpd_accel.model_folder import ModelConfig, load_model, read_model_config
from fpd_accel.models import PoseModel, create_model
from fpd_accel.models.simcc import SimCCModel
from fpd_accel.teacher import Teacher
from fpd_accel.weights import load_weights


def create_networks(recipe: Recipe, train: Mixture) -> tuple[PoseModel, tuple[ModelConfig, nn.Module] | None]:
    """The student, and for distillation the teacher with its description; both on the CPU.

    Raises:
        UserError: weights cannot be used, or student, teacher, data and losses do not go together.
    """
    student = _create_student(recipe, train.skeleton.num_keypoints)
    taught = _open_teacher(recipe, train) if recipe.distill.mode == "fpd" else None
    hard = recipe.distill.hard_keypoints
    if hard is not None and hard > train.skeleton.num_keypoints:
        raise ConfigError(
            f"distill.hard_keypoints: {hard}, but {train.path} has {train.skeleton.num_keypoints} keypoints"
        )
    if taught is not None:
        _check_objective(recipe, student, taught)
    return student, taught


def _create_student(recipe: Recipe, num_keypoints: int) -> PoseModel:
    """A student with fresh weights, with all of a file's, or with the backbone of a classification network."""
    student = create_model(recipe.student.arch, num_keypoints, input_size=recipe.data.input_size)
    weights = recipe.student.weights
    if weights is not None:
        load_weights(student, weights)
    if weights is not None and (Path(weights) / "config.json").is_file():
        normalization = read_model_config(weights).normalization
        color = normalization.color
        if color != recipe.student.color:
            raise ConfigError(f"student.weights: {weights} takes {color} images; set student.color={color}")
        if normalization != Normalization(color=color):
            raise ConfigError(
                f"student.weights: {weights} takes images of mean {normalization.mean} and std {normalization.std}, "
                "but students are trained on ImageNet's; such a network can be a teacher"
            )
    if recipe.student.init is not None:
        network = student.network if isinstance(student, SimCCModel) else student
        say(f"student.init: {load_backbone(network, recipe.student.init)}")
    return student


def _open_teacher(recipe: Recipe, train: Mixture) -> tuple[ModelConfig, nn.Module]:
    """The teacher's network and description, checked against the data and the student's input."""
    path = teacher_weights(recipe)
    if recipe.teacher.recipe is not None and not path.is_dir():
        raise ConfigError(
            f"teacher.recipe: its run has come to its end, but {path} is gone; remove {path.parent}, to train the "
            "teacher again, or name its weights as teacher.weights"
        )
    model: nn.Module
    if path.is_dir():
        config, model = read_model_config(path), load_model(path)
        if recipe.teacher.arch not in (None, config.arch):
            raise ConfigError(f"teacher.arch: {recipe.teacher.arch}, but {path} is a {config.arch}; leave it out")
    else:
        assert recipe.teacher.arch is not None  # checked with the recipe
        config = ModelConfig(
            arch=recipe.teacher.arch,
            skeleton=train.skeleton,
            input_size=recipe.data.input_size,
            codec=recipe.teacher.codec,
            normalization=Normalization(color=recipe.teacher.color),
        )
        model = config.create_model()
        load_weights(model, path)
    if config.skeleton.keypoints != train.skeleton.keypoints:
        raise ConfigError(
            f"teacher.weights: {path} was trained on skeleton {config.skeleton.name!r} "
            f"({config.skeleton.num_keypoints} keypoints), but the data have {train.skeleton.name!r} "
            f"({train.skeleton.num_keypoints})"
        )
    if config.input_size != recipe.data.input_size:
        raise ConfigError(
            f"teacher.weights: {path} takes {list(config.input_size)} (height, width), but data.input_size is "
            f"{list(recipe.data.input_size)}; both networks see the same crop"
        )
    if recipe.teacher.fp8:
        float8_layers(model)  # says so where there are none
    return config, model


def _check_objective(recipe: Recipe, student: PoseModel, taught: tuple[ModelConfig, nn.Module]) -> None:
    """What the student's output and the teacher's ask of each other, and both of the losses."""
    config, teacher = taught
    if config.codec.name == "simcc" and recipe.codec.name != "simcc":
        raise ConfigError(
            f"teacher: {config.arch} puts out SimCC's distributions, from which heatmaps cannot be made; "
            "take a heatmap teacher, or a SimCC student"
        )
    if config.codec.name == "simcc" and recipe.teacher.cache is not None:
        raise ConfigError(f"teacher.cache: keeps heatmaps alone, but {config.arch} is a SimCC teacher; leave it out")
    if (config.codec.name == "udp") != (recipe.codec.name == "udp"):
        raise ConfigError(
            f"teacher: it was trained with codec {config.codec.name!r}, the student has {recipe.codec.name!r}; udp "
            "lays its cells elsewhere than the others do, so that their outputs cannot be compared"
        )
    if recipe.distill.teacher_stage == "each" and teacher.num_stages != student.num_stages:
        raise ConfigError(
            f"distill.teacher_stage: 'each' needs as many stages in the teacher ({config.arch}: {teacher.num_stages}) "
            f"as in the student ({recipe.student.arch}: {student.num_stages}); use last"
        )


def freeze_teacher(taught: tuple[ModelConfig, nn.Module], recipe: Recipe, accelerator: Accelerator) -> Teacher:
    """The teacher on its device, folded, compiled or sharded as the recipe says; it learns nothing any more."""
    config, model = taught
    shard = recipe.teacher.shard and accelerator.num_processes > 1
    if recipe.train.channels_last and not shard:  # FSDP2 takes contiguous parameters alone
        model = model.to(memory_format=torch.channels_last)
    return Teacher(
        model,
        device=accelerator.device,
        normalization=config.normalization,
        precision=torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32,
        compile=recipe.teacher.compile,
        cuda_graphs=recipe.train.cuda_graphs,
        shard=shard,
        fold_norm=recipe.teacher.fold_norm,
        fp8=recipe.teacher.fp8,
    )
