"""Our step and loader give the published results; see `published_agreement.py`."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from published_agreement import (
    Outcome,
    compare_as_timed,
    compare_exactly,
    compare_prepared,
    differences,
    exact_agreement,
    init_stable,
    our_outcome,
    published_outcome,
    timed_agreement,
)
from torch import Tensor
from torch.utils.data import default_collate

from fpd_accel.bench import variants
from fpd_accel.bench.loaders import compare_crops
from fpd_accel.bench.published.loader import PublishedDataset
from fpd_accel.bench.published.step import PublishedStep, float_batch
from fpd_accel.bench.variants import JOINTS, OurStep, Setup, StepBench, create_setup, create_variant, draw_batch
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.schema import Augment
from fpd_accel.data import batch as batches
from fpd_accel.data.batch import Normalization
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream
from fpd_accel.data.teacher_targets import pack
from fpd_accel.errors import BenchError
from fpd_accel.losses import heatmap_mse
from fpd_accel.training import distiller

pytestmark = pytest.mark.parity

TINY = ("tiny_w8", "tiny_w16", (64, 64))
NETWORKS = [
    TINY,
    pytest.param(("hrnet_w32", "hrnet_w48", (256, 192)), marks=pytest.mark.slow, id="hrnet"),
]
SIZE = (64, 48)  # (height, width) of crops
CODEC = HeatmapCodec(SIZE, (16, 12))


def stable_setup(networks: tuple[str, str, tuple[int, int]] = TINY, *, precision: Any = "fp32") -> Setup:
    student, teacher, size = networks
    variants = ("published", "ours", "ours_cached")
    bench = StepBench(student, teacher, size, (2,), 1, 1, "auto", precision, variants, "none")
    setup = create_setup(bench)
    for network in setup.networks:
        init_stable(network)
    return setup


# --- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("networks", NETWORKS)
def test_our_step_computes_the_published_losses_and_gradients_in_float64(networks: Any) -> None:
    assert exact_agreement(stable_setup(networks))["problems"] == []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["ours", "ours_cached"])
def test_a_timed_step_computes_the_published_losses_and_gradients(
    name: str, precision: str, networks: Any, device: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert timed_agreement(name, stable_setup(networks, precision=precision), 2)["problems"] == []


def _biased(predicted: Tensor) -> Tensor:
    """Return the same values with a gradient that is a thousandth larger."""
    return predicted + 1e-3 * (predicted - predicted.detach())


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda predicted, target, weight: 1.001 * heatmap_mse(predicted, target, weight), "loss total by 1.0e-03"),
        (lambda predicted, target, weight: heatmap_mse(_biased(predicted), target, weight), "the gradient by 1.0e-03"),
    ],
    ids=["another value", "another gradient"],
)
def test_a_loss_that_is_wrong_by_a_thousandth_is_found(
    wrong: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distiller, "heatmap_mse", wrong)
    assert problem in exact_agreement(stable_setup())["problems"]
    assert problem in timed_agreement("ours", stable_setup(), 2)["problems"]


def test_a_cache_with_other_outputs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "pack", lambda heatmaps, dtype: pack(2 * heatmaps, dtype))
    assert any("loss kd" in problem for problem in timed_agreement("ours_cached", stable_setup(), 2)["problems"])


def test_reading_losses_and_gradients_leaves_a_step_as_it_was() -> None:
    setup = stable_setup()
    batch = draw_batch(2, JOINTS, (64, 64))
    ours, other = create_variant("ours", setup, 2), create_variant("published", setup, 2)
    assert isinstance(ours, OurStep)
    assert isinstance(other, PublishedStep)
    before = [{name: t.clone() for name, t in step.networks[0].state_dict().items()} for step in (ours, other)]
    found = our_outcome(ours, batch), published_outcome(other, float_batch(batch, setup.codec))
    agreement = compare_as_timed(*found, found[1], "fp32")
    assert agreement["problems"] == []
    assert agreement["allowed_gradient"] == 1e-5
    for step, kept in zip((ours, other), before, strict=True):
        student, teacher = step.networks
        assert all(torch.equal(kept[name], tensor) for name, tensor in student.state_dict().items())
        assert all(parameter.grad is None for parameter in (*student.parameters(), *teacher.parameters()))


def outcome(**gradients: list[float]) -> Outcome:
    return Outcome({"total": 2.0}, {name: torch.tensor(g, dtype=torch.float64) for name, g in gradients.items()})


def test_differences_are_relative_to_the_published_step() -> None:
    right = outcome(large=[3.0, 4.0], small=[0.006, 0.008], zero=[0.0])
    wrong = Outcome({"total": 2.002}, outcome(large=[3.0, 4.0], small=[0.003, 0.004], zero=[1e-6]).gradients)
    found = differences(wrong, right)
    assert found["losses"] == {"total": pytest.approx(1e-3)}
    assert found["gradient"] == pytest.approx(math.hypot(0.005, 1e-6) / math.hypot(5, 0.01))
    floor = 0.01 * math.hypot(5, 0.01) / math.sqrt(5) * math.sqrt(2)  # above the size of the small one
    assert found["worst"] == {"parameter": "small", "error": pytest.approx(0.005 / floor)}


@pytest.mark.parametrize("value", [0.00601, math.nan])
def test_a_single_wrong_gradient_is_found(value: float) -> None:
    right, wrong = (outcome(large=[3.0, 4.0], small=[small, 0.008]) for small in (0.006, value))
    assert compare_exactly(right, right)["problems"] == []
    assert any("the gradient of small by" in problem for problem in compare_exactly(wrong, right)["problems"])


def test_a_timed_step_may_differ_as_a_plain_one_of_its_precision_does() -> None:
    right, plain, ours, wrong = (outcome(all=[100.0, value]) for value in (0.0, 0.1, 0.3, 0.5))
    assert compare_as_timed(ours, right, plain, "fp32")["problems"] == []
    assert compare_as_timed(ours, right, right, "fp32")["problems"] == ["the gradient by 3.0e-03"]
    assert compare_as_timed(wrong, right, plain, "fp32")["problems"] == ["the gradient by 5.0e-03"]
    assert compare_as_timed(wrong, right, right, "bf16")["problems"] == []


# --- the loader -----------------------------------------------------------------------------------------------------


def stream(shards: Path, **options: Any) -> PoseStream:
    settings = {"input_size": SIZE, "batch_size": 4, "augment": Augment(), "stop": 10**6} | options
    return PoseStream(Shards(shards), **settings)


def test_the_published_loader_gives_our_crops_and_the_targets_of_our_codec(tiny_shards: Path) -> None:
    count = 48  # enough for every branch: half bodies, rotated, mirrored
    own = stream(tiny_shards)
    published, batch = PublishedDataset(own, count), own.batch(range(count))
    image, target, weight, meta = default_collate([published[i] for i in range(count)])
    assert {bool(record.gates[3] <= 0.5) for record in published.records} == {True, False}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    difference = (((image * std + mean) * 255).permute(0, 2, 3, 1) - batch.crops).abs()
    assert difference.max() < 1.01  # grey level: mirroring is a view there, and part of the matrix here
    assert difference.mean() < 0.01
    seen = batch.visible > 0
    assert torch.equal(meta["joints_vis"][..., 0] > 0, seen)
    torch.testing.assert_close(
        meta["joints"][..., :2][seen].float(), batch.keypoints[seen], atol=1e-3, rtol=0
    )  # crop pixels
    heatmaps, wanted = CODEC.encode(meta["joints"][..., :2], batch.visible)
    torch.testing.assert_close(target, heatmaps, atol=1e-5, rtol=0)  # of a peak of 1
    assert torch.equal(weight[..., 0], wanted)
    assert 0 < float(wanted.mean()) < 1


def test_other_crops_are_found(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = stream(tiny_shards)
    published = PublishedDataset(own, 8)
    right = compare_crops(own, published)
    assert right["people"] == 8
    assert right["pixel_mean"] < 0.1
    assert right["pixel_max"] <= 1
    assert right["keypoint_max"] < 1e-3
    with pytest.raises(BenchError, match=r"grey levels at most and \d+\.?\d* in the mean, keypoints by \d"):
        compare_crops(stream(tiny_shards, padding=1.3), published)
    published.records[0] = dataclasses.replace(published.records[0], visible=1 - published.records[0].visible)
    with pytest.raises(BenchError, match="keypoints by inf crop pixels"):
        compare_crops(own, published)


def test_images_and_targets_of_the_same_crop_are_the_published_ones(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = PublishedDataset(stream(tiny_shards), 8)
    right = compare_prepared(CODEC, published)
    assert right["image_max"] < 1e-5  # standard deviations
    assert right["target_max"] < 1e-5  # of a peak of 1
    assert compare_prepared(dataclasses.replace(CODEC, kind="dark"), published)["target_max"] > 0.1
    monkeypatch.setattr(batches, "Normalization", partial(Normalization, color="bgr"))
    assert compare_prepared(CODEC, published)["image_max"] > 0.1
