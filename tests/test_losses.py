import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import config

from fpd_accel.losses import heatmap_mse, heatmap_ohkm

FIXTURE = Path(__file__).parents[1].parent / "shared" / "reference" / "decode_losses_nms.npz"


def random_case(batch=3, joints=5):
    generator = torch.Generator().manual_seed(batch)
    predicted, target = (torch.randn(batch, joints, 6, 4, generator=generator) for _ in range(2))
    weight = torch.tensor([0.0, 1.0, 1.2, 0.0, 0.5])[:joints].repeat(batch, 1)
    return predicted, target, weight


def slow_errors(predicted, target, weight):
    """Return half the mean squared difference of the weighted heatmaps of each sample and joint, float64."""
    predicted, target, weight = (tensor.double().numpy() for tensor in (predicted, target, weight))
    errors = np.zeros(weight.shape)
    for b, k in np.ndindex(*weight.shape):
        errors[b, k] = 0.5 * np.mean((weight[b, k] * predicted[b, k] - weight[b, k] * target[b, k]) ** 2)
    return errors


@pytest.mark.skipif(not FIXTURE.is_file(), reason="no published numbers beside this checkout")
def test_losses_are_those_of_the_published_code():
    with np.load(FIXTURE) as fixture:
        heatmaps, target, teacher = (torch.tensor(fixture[name]) for name in ("heatmaps", "target", "teacher"))
        weight = torch.tensor(fixture["weight"][..., 0])
        expected = json.loads(str(fixture["losses"]))
    found = {
        "mse": heatmap_mse(heatmaps, target, weight),
        "mse_unweighted": heatmap_mse(heatmaps, target, torch.ones_like(weight)),
        "teacher_mse": heatmap_mse(heatmaps, teacher, weight),
        "ohkm_top8": heatmap_ohkm(heatmaps, target, weight, top_k=8),
    }
    for name, loss in found.items():
        assert float(loss) == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("batch", [1, 3])
def test_losses_equal_a_loop_with_zero_and_fractional_weights(batch):
    predicted, target, weight = random_case(batch)
    errors = slow_errors(predicted, target, weight)
    assert float(heatmap_mse(predicted, target, weight)) == pytest.approx(errors.mean(), rel=1e-5)
    for top_k in (1, 2, 5):
        hardest = np.sort(errors, axis=1)[:, -top_k:].sum(axis=1) / top_k
        found = heatmap_ohkm(predicted, target, weight, top_k=top_k)
        assert float(found) == pytest.approx(hardest.mean(), rel=1e-5)


def test_mining_every_joint_is_the_plain_loss():
    predicted, target, weight = random_case()
    torch.testing.assert_close(heatmap_ohkm(predicted, target, weight, top_k=5), heatmap_mse(predicted, target, weight))


def test_weight_enters_the_gradient_squared():
    predicted, target, weight = random_case()
    predicted.requires_grad_()
    heatmap_mse(predicted, target, weight).backward()
    expected = weight[..., None, None] ** 2 * (predicted.detach() - target) / predicted.numel()
    torch.testing.assert_close(predicted.grad, expected, rtol=1e-5, atol=1e-9)  # relative


def test_mining_teaches_only_the_hardest_joints():
    predicted, target, weight = random_case()
    predicted.requires_grad_()
    heatmap_ohkm(predicted, target, weight, top_k=2).backward()
    taught = predicted.grad.abs().sum(dim=(2, 3)) > 0
    hardest = np.argsort(slow_errors(predicted.detach(), target, weight), axis=1)[:, -2:]
    assert [sorted(row.nonzero()[:, 0].tolist()) for row in taught] == np.sort(hardest, axis=1).tolist()


@pytest.mark.parametrize("loss", [heatmap_mse, lambda *case: heatmap_ohkm(*case, top_k=2)], ids=["mse", "ohkm"])
def test_nobody_visible_costs_nothing_and_teaches_nothing(loss):
    predicted, target, weight = random_case(batch=1)
    predicted.requires_grad_()
    value = loss(predicted, target, torch.zeros_like(weight))
    value.backward()
    assert float(value.detach()) == 0.0
    assert not predicted.grad.any()


@pytest.mark.parametrize("loss", [heatmap_mse, lambda *case: heatmap_ohkm(*case, top_k=2)], ids=["mse", "ohkm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_are_computed_in_float32_whatever_comes_in(loss, dtype):
    predicted, target, weight = (tensor.to(dtype) for tensor in random_case())
    predicted, target = predicted * 200, target * 200  # squares beyond the range of half precision
    value = loss(predicted, target, weight)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(predicted.float(), target.float(), weight.float()), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(predicted, target, weight), value, rtol=0, atol=0)


def test_losses_read_no_value_back_from_the_device():
    # The meta device has no values: reading one back raises.
    case = [tensor.to("meta") for tensor in random_case()]
    assert heatmap_mse(*case).shape == heatmap_ohkm(*case, top_k=2).shape == ()


@pytest.mark.parametrize("top_k", [0, 6])
def test_mining_more_joints_than_there_are_is_refused(top_k):
    with pytest.raises(ValueError, match=f"between 1 and the number of joints, 5, not {top_k}"):
        heatmap_ohkm(*random_case(), top_k=top_k)


def test_shapes_that_would_broadcast_are_refused():
    predicted, target, weight = random_case()
    config.update("jaxtyping_disable", True)  # the tests' type checker would refuse them first
    try:
        for case in ((predicted, target, weight[..., None]), (predicted, target[:, :1], weight)):
            with pytest.raises(ValueError, match="expected shapes"):
                heatmap_mse(*case)
    finally:
        config.update("jaxtyping_disable", False)
