"""Normalisations folded into convolutions: the same network, for each that has any, and what stays as it is."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distill import random_batch
from torch import nn

from fpd_accel import create_model
from fpd_accel.config.loading import load_recipe
from fpd_accel.models.fold_norm import fold_norm
from fpd_accel.models.names import MODELS
from fpd_accel.training.teacher import Teacher

# The first of each class, and what the same class builds otherwise.
FIRST = {architecture.target: name for name, architecture in reversed(MODELS.items())}.values()
FAMILIES = [*FIRST, "pose_resnet_50", "vitpose_s_simple", "hourglass_2x16", "tiny_w8_simcc"]


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def trained(name: str) -> nn.Module:
    """A network whose normalisations have statistics, factors and offsets as after training."""
    torch.manual_seed(0)
    model = create_model(name, 3, input_size=(64, 64)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_network_gives_the_same_outputs_without_normalisations_after_convolutions(name: str) -> None:
    model = trained(name)
    folded, images = copy.deepcopy(model), torch.randn(1, 3, 64, 64)
    bottlenecks = sum(type(module).__name__ == "PreActivationBottleneck" for module in model.modules())
    assert fold_norm(folded) == norms(model) - bottlenecks
    assert norms(folded) == bottlenecks  # the first normalisation of each has no convolution before it
    with torch.inference_mode():
        for outputs, expected in zip(folded(images), model(images), strict=True):
            pairs = zip(outputs, expected, strict=True) if name.endswith("simcc") else [(outputs, expected)]
            for mine, theirs in pairs:
                # Of the largest output: float32 rounding of another order gives about 3e-6.
                assert float((mine - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


def test_what_follows_no_convolution_of_as_many_channels_stays() -> None:
    unlike = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    assert fold_norm(unlike.eval()) == 1
    assert [type(module).__name__ for module in unlike] == ["Conv2d", "ReLU", "BatchNorm2d", "Conv2d", "Identity"]
    of_the_batch = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold_norm(of_the_batch) == 0


class ReluBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(images).relu())


def test_classes_whose_order_is_not_known_stay() -> None:
    assert fold_norm(nn.Sequential(ReluBetween(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()) == 1


def test_wrong_statistics_would_be_noticed() -> None:
    model = trained("tiny_w8")
    folded, images = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    fold_norm(folded)
    model.stem[1].running_var.mul_(1.01)
    with torch.inference_mode():
        difference = float((folded(images)[0] - model(images)[0]).abs().max() / model(images)[0].abs().max())
    assert difference > 1e-4


def test_a_teacher_folds_on_request_alone_and_does_not_train() -> None:
    model, batch = trained("tiny_w8"), random_batch()
    folded = Teacher(copy.deepcopy(model), fold_norm=True)
    asked = Teacher(model)
    assert norms(asked.model) > 0 == norms(folded.model)
    assert not any(parameter.requires_grad for parameter in folded.model.parameters())
    torch.testing.assert_close(folded(batch.crops)[0], asked(batch.crops)[0], rtol=0, atol=1e-5)


def test_a_run_keeps_the_weights_that_the_teacher_was_trained_to(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    from fpd_accel.skeleton import COCO
    from fpd_accel.training.run import run
    from fpd_accel.weights.model_folder import ModelConfig, save_model

    config = ModelConfig(arch="tiny_w16", skeleton=COCO, input_size=(64, 64))
    torch.manual_seed(0)
    save_model(tmp_path / "taught", config.create_model().state_dict(), config)
    recipe = tiny_recipe(teacher={"weights": str(tmp_path / "taught")}, distill={"mode": "fpd"}, train={"steps": 2})
    scores = {}
    for fold in ("true", "false"):
        changes = [f"teacher.fold_norm={fold}", f"run.name=fold_{fold}"]
        scores[fold] = run(load_recipe(recipe, changes))[0].metrics
        saved, given = (load_file(folder / "model.safetensors") for folder in (
            tmp_path / f"fold_{fold}" / "teacher", tmp_path / "taught"
        ))  # fmt: skip
        assert saved.keys() == given.keys()
        assert all(torch.equal(saved[name], given[name]) for name in given)
    assert scores["true"] == pytest.approx(scores["false"], abs=1e-6)
