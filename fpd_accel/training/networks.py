"""The networks of a recipe: a student to train, and a teacher that fits the data, the student and the losses."""

from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from fpd_accel.config.loading import teacher_recipe, teacher_weights
from fpd_accel.config.schema import Recipe, TeacherModel
from fpd_accel.config.schema import Student as StudentOptions
from fpd_accel.console import say
from fpd_accel.data.batch import Normalization
from fpd_accel.errors import ConfigError
from fpd_accel.models.base import SimCCModel
from fpd_accel.models.create import create_model, probe_model
from fpd_accel.models.fp8 import float8_layers
from fpd_accel.skeleton import Skeleton
from fpd_accel.training.teacher import Teacher
from fpd_accel.weights.convert import load_backbone
from fpd_accel.weights.load import load_weights
from fpd_accel.weights.model_folder import ModelConfig, load_model, read_model_config


class TeacherNetwork(NamedTuple):
    """The network of a teacher, on the CPU, and its description."""

    config: ModelConfig
    network: nn.Module


def check_networks(recipe: Recipe, skeleton: Skeleton) -> None:
    """Build student and teacher on the meta device, run them once there, and compare them.

    Called before anything is drawn, trained or written, so that a recipe whose networks do not fit costs nothing.

    Raises:
        UserError: A network cannot be built, does not take the input size, has other outputs than a pose network, or
            student, teacher and losses do not go together.
    """
    student, num_keypoints = recipe.student, skeleton.num_keypoints
    stages = len(probe_model(student.arch, num_keypoints, recipe.data.input_size, student.arguments).outputs)
    hard = recipe.distill.hard_keypoints
    if hard is not None and hard > num_keypoints:
        raise ConfigError(f"distill.hard_keypoints: {hard}, but the data have {num_keypoints} keypoints")
    if recipe.distill.mode == "fpd" and (teacher := _describe_teacher(recipe, skeleton)) is not None:
        _check_teacher(recipe, teacher, skeleton, student_stages=stages)


def create_networks(recipe: Recipe, skeleton: Skeleton) -> tuple[nn.Module, TeacherNetwork | None]:
    """Create the student, and for distillation read the teacher; both on the CPU.

    Raises:
        UserError: Weights cannot be used, or student, teacher, data and losses do not go together.
    """
    student = _create_student(recipe.student, skeleton.num_keypoints, recipe.data.input_size)
    if recipe.distill.mode != "fpd":
        return student, None
    path = teacher_weights(recipe)
    if recipe.teacher.recipe is not None and not path.is_dir():
        raise ConfigError(
            f"teacher.recipe: its run is finished, but {path} is gone; remove {path.parent} to train the teacher "
            "again, or name its weights as teacher.weights"
        )
    config = _describe_teacher(recipe, skeleton)
    assert config is not None
    if path.is_dir():
        network = load_model(path)
    else:
        network = config.create_model()
        load_weights(network, path)
    if recipe.teacher.fp8:
        float8_layers(network)  # raises where there are none
    return student, TeacherNetwork(config, network)


def describe_student(recipe: Recipe, network: nn.Module, skeleton: Skeleton) -> ModelConfig:
    """Return the description that model folders of this student carry, by which `load_model` builds it again.

    Raises:
        ConfigError: The recipe's `student` section describes another network.
    """
    student, data = recipe.student, recipe.data
    config = ModelConfig(
        arch=student.arch,
        arguments=student.arguments,
        skeleton=skeleton,
        input_size=data.input_size,
        codec=recipe.codec,
        box_padding=data.box_padding,
        normalization=Normalization(color=student.color),
    )
    described = probe_model(student.arch, skeleton.num_keypoints, data.input_size, student.arguments).model
    kind = f"{type(network).__module__}:{type(network).__qualname__}"
    if type(described) is not type(network) or _shapes(described) != _shapes(network):
        hint = "" if isinstance(network, type(described)) else f"; set student.arch={kind} and student.arguments"
        raise ConfigError(
            f"student.arch: the recipe says {student.arch}, but the network to train is another one ({kind}), so model "
            f"folders of this run could not be loaded{hint}"
        )
    return config


def freeze_teacher(teacher: TeacherNetwork, recipe: Recipe, accelerator: Accelerator) -> Teacher:
    """Put the teacher on its device: frozen, and folded, compiled or sharded as the recipe says."""
    options, train = recipe.teacher, recipe.train
    shard = options.shard and accelerator.num_processes > 1
    network = teacher.network
    if train.channels_last and not shard:  # FSDP2 takes contiguous parameters alone
        network = network.to(memory_format=torch.channels_last)
    frozen = Teacher(
        network,
        device=accelerator.device,
        normalization=teacher.config.normalization,
        precision=torch.bfloat16 if train.precision == "bf16" else torch.float32,
        compile=options.compile,
        cuda_graphs=train.cuda_graphs,
        shard=shard,
        fold_norm=options.fold_norm,
        fp8=options.fp8,
    )
    if not shard:
        frozen.network = accelerator.prepare_model(frozen.network, evaluation_mode=True)
    return frozen


def _create_student(options: StudentOptions, num_keypoints: int, input_size: tuple[int, int]) -> nn.Module:
    """Create a student with fresh weights, with those of a file, or with the backbone of a classification network."""
    student = create_model(options.arch, num_keypoints, input_size=input_size, arguments=options.arguments)
    weights = options.weights
    if weights is not None:
        load_weights(student, weights)
    if weights is not None and (Path(weights) / "config.json").is_file():
        normalization = read_model_config(weights).normalization
        color = normalization.color
        if color != options.color:
            raise ConfigError(f"student.weights: {weights} takes {color} images; set student.color={color}")
        if normalization != Normalization(color=color):
            raise ConfigError(
                f"student.weights: {weights} takes images of mean {normalization.mean} and std {normalization.std}, "
                "but students are trained on ImageNet's; such a network can be a teacher"
            )
    if options.init is not None:
        network = student.network if isinstance(student, SimCCModel) else student
        say(f"student.init: {load_backbone(network, options.init)}")
    return student


def _describe_teacher(recipe: Recipe, skeleton: Skeleton) -> ModelConfig | None:
    """Return the description of the teacher: of its folder, of the bare weights file, or of the recipe to train it.

    None if the teacher's own run is not described by a recipe any more.
    """
    teacher, path = recipe.teacher, teacher_weights(recipe)
    if (path / "config.json").is_file() or (path.is_dir() and teacher.recipe is None):
        config = read_model_config(path)
        if teacher.arch not in (None, config.arch):
            raise ConfigError(f"teacher.arch: {teacher.arch}, but {path} is a {config.arch}; leave it out")
        return config
    network: TeacherModel | StudentOptions = teacher
    codec = teacher.codec
    if teacher.recipe is not None:
        own = teacher_recipe(recipe, check_files=False)
        network, codec = own.student, own.codec
    assert network.arch is not None  # checked with the recipe
    return ModelConfig(
        arch=network.arch,
        arguments=network.arguments,
        skeleton=skeleton,
        input_size=recipe.data.input_size,
        codec=codec,
        normalization=Normalization(color=network.color),
    )


def _check_teacher(recipe: Recipe, teacher: ModelConfig, skeleton: Skeleton, *, student_stages: int) -> None:
    """Raise ConfigError unless the teacher fits the data, the student's outputs and the losses."""
    if teacher.skeleton.keypoints != skeleton.keypoints:
        raise ConfigError(
            f"teacher.weights: {teacher_weights(recipe)} was trained on skeleton {teacher.skeleton.name!r} "
            f"({teacher.skeleton.num_keypoints} keypoints), but the data have {skeleton.name!r} "
            f"({skeleton.num_keypoints})"
        )
    if teacher.input_size != recipe.data.input_size:
        raise ConfigError(
            f"teacher.weights: {teacher_weights(recipe)} takes {list(teacher.input_size)} (height, width), but "
            f"data.input_size is {list(recipe.data.input_size)}; both networks see the same crop"
        )
    if teacher.codec.name == "simcc" and recipe.codec.name != "simcc":
        raise ConfigError(
            f"teacher: {teacher.arch} puts out SimCC distributions, which a heatmap student cannot learn from; take a "
            "heatmap teacher, or a SimCC student"
        )
    if teacher.codec.name == "simcc" and recipe.teacher.cache is not None:
        raise ConfigError(f"teacher.cache: stores heatmaps alone, but {teacher.arch} is a SimCC teacher; leave it out")
    if (teacher.codec.name == "udp") != (recipe.codec.name == "udp"):
        raise ConfigError(
            f"teacher: it was trained with codec {teacher.codec.name!r}, the student has {recipe.codec.name!r}; UDP "
            "heatmaps use another pixel grid, so student and teacher must both use UDP"
        )
    stages = len(probe_model(teacher.arch, skeleton.num_keypoints, teacher.input_size, teacher.arguments).outputs)
    if recipe.distill.teacher_stage == "each" and stages != student_stages:
        raise ConfigError(
            f"distill.teacher_stage: 'each' needs as many stages in the teacher ({teacher.arch}: {stages}) as in the "
            f"student ({recipe.student.arch}: {student_stages}); use last"
        )


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
