"""The objective follows the first steps of the published implementation, and has the properties that it should."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from formula import fill_with_formula
from torch import nn

from fpd_accel import Distiller, create_model
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.decode import heatmap_accuracy
from fpd_accel.losses import heatmap_mse
from fpd_accel.training.teacher import Teacher

CODEC = HeatmapCodec(input_size=(64, 64), heatmap_size=(16, 16), sigma=1.5)


def random_batch(people: int = 3, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        crops=torch.randint(0, 256, (people, 64, 64, 3), dtype=torch.uint8, generator=generator),
        keypoints=torch.rand(people, 17, 2, generator=generator) * 64,
        visible=(torch.rand(people, 17, generator=generator) > 0.3).float(),
        centers=torch.full((people, 2), 32.0),
        sizes=torch.full((people, 2), 64.0),
        rows=torch.arange(people),
    )


class InDouble(nn.Module):
    """A network that computes in float64, so that three steps do not depend on the rounding of the machine."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.network(images.double())


@pytest.mark.parity
@pytest.mark.timeout(240)
def test_three_training_steps_follow_the_published_implementation(shared: Path) -> None:
    fixture = np.load(shared / "reference" / "coco_val_inputs.npz")
    expected = json.loads((shared / "reference" / "fpd_trajectory.json").read_text())
    student, teacher = create_model("pose_resnet_50", 17), create_model("pose_resnet_101", 17)
    fill_with_formula(student)
    fill_with_formula(teacher)
    batch = Batch(
        crops=torch.from_numpy(fixture["crops"][:8]),
        keypoints=torch.from_numpy(fixture["joints"][:8, :, :2]).float(),
        visible=torch.from_numpy(fixture["joints_vis"][:8, :, 0]).float(),
        centers=torch.zeros(8, 2),
        sizes=torch.ones(8, 2),
        rows=torch.arange(8),
    )
    distiller = Distiller(InDouble(student).train(), InDouble(teacher), HeatmapCodec(), alpha=0.5)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)
    rows = []
    for _ in range(3):
        losses = distiller(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        rows.append([losses.pose, losses.kd, losses.total, heatmap_accuracy(losses.predicted, losses.target)])
    found = np.array([[float(value.detach()) for value in row] for row in rows])
    wanted = np.array(expected["resnet50_from_resnet101"])  # pose, kd, total, pck of each step
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)  # relative: before the first update
    # Absolute. Adam divides each gradient by its own size, so rounding grows: the third step's losses differ by up to
    # 0.7 % between one and two threads and with and without oneDNN; the fixture lies among those.
    np.testing.assert_allclose(found[:, :3], wanted[:, :3], atol=1e-3)
    np.testing.assert_allclose(found[:2, 3], wanted[:2, 3], atol=2.5e-3)  # a joint of one person is 0.0014
    # The third accuracy is a matter of rounding: weights changed by 1e-7 of themselves move it from 0.017 to 0.032 in
    # float64, and the settings above from 0 to 0.033 in float32, in which the fixture was made and has 0.023.
    assert found[2, 3] < 0.05


def test_loss_is_the_weighted_sum_over_stages_against_the_teachers_last_stage() -> None:
    torch.manual_seed(0)
    student, teacher = create_model("hourglass_2x16", 17).eval(), create_model("hourglass_3x16", 17).eval()
    batch = random_batch()
    losses = Distiller(student, teacher, CODEC, alpha=0.3)(batch)
    target, weight = CODEC.encode(batch.keypoints, batch.visible)
    images = Distiller(student, None, CODEC).normalization(batch.crops)
    teacher_output = teacher(images)[-1].detach()
    pose = sum(heatmap_mse(stage, target, weight) for stage in student(images))
    kd = sum(heatmap_mse(stage, teacher_output, weight) for stage in student(images))
    torch.testing.assert_close(losses.pose, pose.detach())
    torch.testing.assert_close(losses.kd, kd.detach())
    torch.testing.assert_close(losses.total, 0.7 * pose + 0.3 * kd)


def test_teacher_declines_to_train_and_never_changes() -> None:
    torch.manual_seed(0)
    student, teacher = create_model("tiny_w8", 17), create_model("tiny_w16", 17)
    distiller = Distiller(student, teacher, CODEC)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller.train()
    teacher.train()
    for seed in range(5):
        optimizer.zero_grad()
        distiller(random_batch(seed=seed)).total.backward()
        optimizer.step()
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_teacher_is_in_no_state_dict_and_no_optimizer() -> None:
    student, teacher = create_model("tiny_w8", 17), create_model("tiny_w16", 17)
    distiller = Distiller(student, Teacher(teacher), CODEC)
    assert distiller.state_dict().keys() == {f"student.{name}" for name in student.state_dict()}
    assert {id(p) for p in distiller.parameters()} == {id(p) for p in student.parameters()}


def test_alpha_one_leaves_the_labels_without_influence_on_the_gradient() -> None:
    torch.manual_seed(0)
    student, teacher = create_model("tiny_w8", 17), create_model("tiny_w16", 17)
    distiller = Distiller(student, teacher, CODEC, alpha=1.0)
    batch = random_batch()
    gradients = []
    for keypoints in (batch.keypoints, batch.keypoints.flip(0)):
        moved = Batch(**{**vars(batch), "keypoints": keypoints, "visible": torch.ones_like(batch.visible)})
        student.zero_grad()
        distiller(moved).total.backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_teacher_heatmaps_can_enter_the_backward_pass() -> None:
    teacher = Teacher(create_model("tiny_w8", 17))
    (teacher_output,) = teacher(random_batch().crops)
    scale = torch.ones((), requires_grad=True)
    (scale * teacher_output).sum().backward()
    assert not teacher_output.is_inference()
    assert scale.grad is not None


@pytest.mark.parametrize(("alpha", "mask"), [(1.5, "visible"), (-0.1, "visible"), (0.5, "everything")])
def test_impossible_objectives_are_refused(alpha: float, mask: str) -> None:
    from jaxtyping import TypeCheckError

    with pytest.raises((ValueError, TypeCheckError)):
        Distiller(create_model("tiny_w8", 17), None, CODEC, alpha=alpha, mask=mask)  # type: ignore[arg-type]


class EveryLayer(nn.Module):
    """The kinds of layers in the networks: a strided and a transposed convolution, a linear layer of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.place = nn.Conv2d(3, 8, 8, stride=8), nn.Parameter(torch.randn(64, 8))
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.larger, self.batch_norm = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 17, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.place
        tokens = tokens + self.linear(self.norm(tokens))
        return (self.head(self.batch_norm(self.larger(tokens.transpose(1, 2).unflatten(2, (8, 8))))),)


@pytest.mark.parametrize("create", [lambda: create_model("tiny_w8", 17), EveryLayer], ids=["tiny_w8", "every layer"])
def test_a_bfloat16_teacher_equals_autocast_on_its_float32_weights(create: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, crops = create().eval(), random_batch().crops
    teacher = Teacher(copy.deepcopy(model), precision=torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(Normalization()(crops))[-1].float()
    found = teacher(crops)[-1]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(teacher.network(Normalization()(crops))[-1], expected)  # as it is evaluated
