"""`fpd-accel bench step`: it runs, counts correctly, and times nothing whose losses differ."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fpd_accel import cli, create_model
from fpd_accel.bench import step_probe
from fpd_accel.bench.published.step import EagerStep, PublishedStep, float_batch, host_accuracy, per_joint_mse
from fpd_accel.bench.roofline import (
    Ceilings,
    Pass,
    count_layers,
    forward_passes,
    step_passes,
    summary,
    training_passes,
)
from fpd_accel.bench.step import compare_losses, spread
from fpd_accel.bench.step_probe import Memory, covered, weight_bytes
from fpd_accel.bench.variants import STAGES, OurStep, choose_precision, draw_batch
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.schema import Train
from fpd_accel.data.teacher_targets import pack
from fpd_accel.decode import heatmap_accuracy
from fpd_accel.distributed import accelerator as processes
from fpd_accel.distributed.accelerator import create_accelerator
from fpd_accel.errors import BenchError
from fpd_accel.losses import heatmap_mse
from fpd_accel.training import distiller as distill

TINY = ["bench", "step", "--student", "tiny_w8", "--teacher", "tiny_w16", "--input", "64", "64", "--rounds", "1"]
CODEC = HeatmapCodec(input_size=(64, 64), heatmap_size=(16, 16))
CPU = torch.device("cpu")


def networks(*names: str) -> list[nn.Module]:
    torch.manual_seed(0)
    return [create_model(name, 17) for name in names]


def ours() -> OurStep:
    train = Train(global_batch=2)
    return OurStep(*networks("tiny_w8", "tiny_w16"), create_accelerator("fp32"), codec=CODEC, train=train)


def published(*, teacher_gradients: bool = True) -> PublishedStep:
    return PublishedStep(*networks("tiny_w8", "tiny_w16"), CPU, teacher_gradients=teacher_gradients)


@pytest.mark.parity
def test_bench_step_prints_tables_and_writes_the_same_as_json_and_as_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "step.json"), "--picture", str(tmp_path / "step.png")]
    assert cli.main([*TINY, "--batch", "2", "--device", "cpu", *files]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "step.json").read_bytes())
    assert report["bench"] == "step"
    assert report["settings"]["precision"] in ("fp32", "bf16")
    assert all(value > 0 for value in report["ceilings"].values())
    (one,) = report["batches"]
    assert set(one["variants"]) == {"published", "published_no_grad", "eager", "ours", "ours_cached"}
    for found in one["variants"].values():
        assert found["images_per_second"]["median"] == pytest.approx(2 / found["seconds"][0])
        assert found["kernels"] > 100
    published_rate, our_rate = (one["variants"][name]["images_per_second"]["median"] for name in ("published", "ours"))
    assert one["ratios"]["ours/published"]["median"] == pytest.approx(our_rate / published_rate)
    assert set(one["ratios"]) == {
        "ours/published", "ours/published_no_grad", "ours/eager",
        "ours_cached/published", "ours_cached/published_no_grad", "ours_cached/ours",
    }  # fmt: skip
    assert list(one["stages"]) == [*STAGES, "host gap"]
    assert one["roofline"]["reached"] == pytest.approx(our_rate / one["roofline"]["images_per_second"])
    assert set(one["loss_difference"]) == set(one["variants"])
    assert max(one["loss_difference"].values()) <= report["settings"]["loss_tolerance"]
    for words in (
        "ours_cached",
        "÷ this",
        "relative difference of first-step losses from published: at most published_no_grad",
        "operators",
        "fused roofline",
        "copy (read + written)",
        f"{published_rate:.4g}",
        "host gap",
    ):
        assert words in printed
    picture = cv2.imread(str(tmp_path / "step.png"))
    assert picture.shape[0] > 400
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10  # bars of several colours


def test_ceilings_are_the_best_of_what_was_seen_around_the_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter([1e12, 3e12, 2e12])
    monkeypatch.setattr("fpd_accel.bench.step.matmul_ceiling", lambda *_: next(seen))
    monkeypatch.setattr("fpd_accel.bench.step.copy_ceiling", lambda _: 1e30)  # so that only products take time
    options = ["--batch", "2", "3", "--device", "cpu", "--precision", "fp32", "--variants", "ours"]
    assert cli.main([*TINY, *options, "--json", str(tmp_path / "step.json")]) == 0
    report = json.loads((tmp_path / "step.json").read_bytes())
    assert report["ceilings"]["matmul_tflops"] == 3
    for one in report["batches"]:
        found, rate = one["roofline"], one["variants"]["ours"]["images_per_second"]["median"]
        assert found["images_per_second"] == pytest.approx(3e12 / (1e9 * found["gflops_per_image"]))
        assert found["reached"] == pytest.approx(rate / found["images_per_second"])


@pytest.mark.gpu
def test_bench_step_runs_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    file = tmp_path / "step.json"
    assert cli.main([*TINY, "--batch", "8", "--device", "cuda", "--steps", "2", "--json", str(file)]) == 0
    (one,) = json.loads(file.read_bytes())["batches"]
    assert one["variants"]["ours"]["kernels"] > 100
    assert one["variants"]["ours"]["busy_seconds"] > 0


@pytest.mark.parity
def test_a_wrong_loss_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distill, "heatmap_mse", lambda *tensors: 1.1 * heatmap_mse(*tensors))
    file, variants = tmp_path / "step.json", ["--variants", "published_no_grad", "ours"]
    assert cli.main([*TINY, "--batch", "2", *variants, "--precision", "fp32", "--json", str(file)]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "bench step: losses before the first step differ from those of published_no_grad: ours by 1.0e-01" in printed
    assert not file.exists()


@pytest.mark.parity
def test_a_cache_with_other_outputs_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fpd_accel.bench.variants.pack", lambda heatmaps, dtype: pack(2 * heatmaps, dtype))
    assert cli.main([*TINY, "--batch", "2", "--variants", "ours", "ours_cached", "--precision", "fp32"]) == 2
    assert "differ from those of ours: ours_cached by" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("value", [1.03, math.nan, math.inf])
def test_losses_are_compared_with_those_of_the_first_variant(value: float) -> None:
    losses = {"published": [1.0, 2.0, 0.5], "ours": [1.01, 2.0, 0.5]}
    assert compare_losses(losses) == {"published": 0, "ours": pytest.approx(0.01)}
    assert compare_losses({}) == {}
    with pytest.raises(BenchError, match="ours by"):
        compare_losses(losses | {"ours": [value, 2.0, 0.5]})


@pytest.mark.faults
def test_a_variant_that_does_not_fit_is_left_out_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = PublishedStep.forward

    def full(step: PublishedStep, batch: Any) -> Any:
        if step.teacher_gradients and len(batch.images) == 4:
            raise torch.OutOfMemoryError("of 80 GB")
        return forward(step, batch)

    monkeypatch.setattr(PublishedStep, "forward", full)
    files = ["--json", str(tmp_path / "step.json"), "--picture", str(tmp_path / "step.png")]
    assert (
        cli.main(
            [
                *TINY,
                "--batch",
                "2",
                "4",
                "--variants",
                "published",
                "published_no_grad",
                "ours",
                "--precision",
                "fp32",
                *files,
            ]
        )
        == 0
    )
    small, large = json.loads((tmp_path / "step.json").read_bytes())["batches"]
    assert small["no_room"] == []
    assert large["no_room"] == ["published"]
    assert set(large["variants"]) == {"published_no_grad", "ours"}
    assert set(large["ratios"]) == {"ours/published_no_grad"}
    assert large["loss_difference"]["ours"] < 1e-5  # from published_no_grad
    printed = capsys.readouterr().out
    assert "batch 4: published: out of memory" in printed
    assert cv2.imread(str(tmp_path / "step.png")).shape[0] > 400


@pytest.mark.faults
def test_a_batch_that_does_not_fit_at_all_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = OurStep.forward

    def full(step: OurStep, batch: Any) -> Any:
        if len(batch) == 4:
            raise torch.OutOfMemoryError("of 80 GB")
        return forward(step, batch)

    monkeypatch.setattr(OurStep, "forward", full)
    files = ["--json", str(tmp_path / "step.json"), "--picture", str(tmp_path / "step.png")]
    assert cli.main([*TINY, "--batch", "2", "4", "--variants", "ours", "--precision", "fp32", *files]) == 0
    small, large = json.loads((tmp_path / "step.json").read_bytes())["batches"]
    assert set(small["variants"]) == {"ours"}
    assert (large["variants"], large["no_room"]) == ({}, ["ours"])
    assert "batch 4: ours: out of memory" in capsys.readouterr().out


def test_a_batch_too_small_to_train_on_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TINY[:-5], "--input", "16", "16", "--rounds", "1", "--batch", "1"]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "tiny_w8: cannot be trained on 1 images of 16x16" in printed
    assert "take a larger --batch or --input" in printed


def test_named_ranges_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, start: float, end: float, *, named: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name="CUDA"), is_user_annotation=named,
            time_range=SimpleNamespace(start=start, end=end),
        )  # fmt: skip

    events = [event("gemm", 0, 10), event("Memcpy HtoD", 20, 30), event("Optimizer.step#Adam.step", 0, 100, named=True)]
    profiler = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(step_probe, "profile", lambda **_: nullcontext(profiler))
    monkeypatch.setattr(step_probe, "synchronize", lambda _: None)
    found = step_probe.count_kernels(lambda: None, torch.device("cuda"))
    assert found == {"kernels": 1, "busy_seconds": pytest.approx(20e-6)}


def test_the_published_teacher_accumulates_gradients_and_the_other_does_not() -> None:
    batch = float_batch(draw_batch(2, 17, (64, 64)), CODEC)
    for teacher_gradients in (True, False):
        step = published(teacher_gradients=teacher_gradients)
        step.run([batch])
        assert all((p.grad is not None) == teacher_gradients for p in step.teacher.parameters())
    once, twice = published(), published()
    once.run([batch])
    twice.run([batch, batch])
    name = "head.weight"
    first, both = (dict(step.teacher.named_parameters())[name].grad for step in (once, twice))
    assert first is not None
    assert both is not None
    assert not torch.allclose(both, first, rtol=1e-2)


def test_all_steps_train_alike() -> None:
    batches = [draw_batch(2, 17, (64, 64), seed=seed) for seed in (0, 1)]
    theirs = [float_batch(batch, CODEC) for batch in batches]
    plain = EagerStep(*networks("tiny_w8", "tiny_w16"), CPU, precision=torch.float32)
    wanted = published().run(theirs)
    for found in (published(teacher_gradients=False).run(theirs), plain.run(theirs), ours().run(batches)):
        assert found == pytest.approx(wanted, rel=1e-3)  # the second step's: Adam divides small gradients by their size


def test_a_step_in_stages_is_the_same_step() -> None:
    batch = draw_batch(2, 17, (64, 64))
    marks: list[str] = []
    whole, pieces = ours(), ours()
    assert pieces.staged(batch, marks.append) == pytest.approx(whole.run([batch]), rel=1e-6)
    assert marks == list(STAGES)
    for a, b in zip(whole.networks[0].state_dict().values(), pieces.networks[0].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_published_loss_and_accuracy_equal_ours() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(5, 7, 12, 9, generator=generator) for _ in range(2))
    weight = torch.rand(5, 7, generator=generator).round()
    expected = heatmap_mse(predicted, target, weight)
    torch.testing.assert_close(per_joint_mse(predicted, target, weight[..., None]), expected)
    near = target + 0.5 * predicted
    accuracy = float(heatmap_accuracy(near, target))
    assert 0.2 < accuracy < 1
    assert host_accuracy(near.numpy(), target.numpy()) == pytest.approx(accuracy, abs=1e-6)


class Small(nn.Module):
    """A normalised convolution, one without normalisation, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 1, groups=2)
        self.last = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        feature = F.relu(self.norm(self.first(images)))
        return self.last(self.second(feature).mean(dim=(2, 3)))


def test_work_of_small_layers_is_what_a_hand_counts() -> None:
    with torch.device("meta"):
        network = Small()
    layers = count_layers(network.train(), (2, 3, 8, 8))
    first, second, last = layers
    assert (first.macs, first.inputs, first.weights, first.outputs) == (128 * 27, 384, 108, 128)
    assert (second.macs, second.inputs, second.weights, second.outputs) == (192 * 2, 128, 12, 192)
    assert (last.macs, last.inputs, last.weights, last.outputs) == (2 * 5 * 6, 12, 30, 10)
    assert [layer.normalised for layer in layers] == [True, False, False]
    assert [layer.input_gradient for layer in layers] == [False, True, True]
    evaluated = count_layers(network.eval(), (2, 3, 8, 8))
    assert forward_passes(evaluated, 2)[0] == Pass("convolution forward", 2 * 3456, 2 * (384 + 108 + 128))
    assert training_passes(layers, 2) == [
        Pass("convolution forward", 2 * 3456, 2 * (384 + 108 + 128 + 128)),  # the output once more, for statistics
        Pass("convolution forward", 2 * 384, 2 * (128 + 12 + 192)),
        Pass("linear forward", 2 * 60, 2 * (12 + 30 + 10)),
        Pass("linear gradient of input", 2 * 60, 2 * (10 + 30 + 12)),
        Pass("linear gradient of weights", 2 * 60, 2 * (12 + 10) + 4 * 30),
        Pass("convolution gradient of input", 2 * 384, 2 * (192 + 12 + 128)),
        Pass("convolution gradient of weights", 2 * 384, 2 * (128 + 192) + 4 * 12),
        Pass("convolution gradient of weights", 2 * 3456, 2 * (384 + 128) + 4 * 108),
    ]


def test_the_roofline_adds_what_each_pass_waits_for() -> None:
    passes = [Pass("bound by arithmetic", 100, 10), Pass("bound by memory", 10, 100), Pass("optimizer", 0, 40)]
    ceilings = Ceilings(flops=10.0, bytes=20.0)
    found = summary(passes, ceilings, 34)
    assert found["seconds"] == 10 + 5 + 2
    assert found["images_per_second"] == 2
    assert found["memory_bound_share"] == pytest.approx(7 / 17)


@pytest.mark.parametrize(("name", "published_gmacs"), [("hrnet_w32", 7.62), ("hrnet_w48", 15.68)])
@pytest.mark.parity
def test_multiply_adds_are_the_published_ones(name: str, published_gmacs: float) -> None:
    with torch.device("meta"):
        network = create_model(name, 17).eval()
    assert sum(layer.macs for layer in count_layers(network, (1, 3, 256, 192))) / 1e9 == pytest.approx(
        published_gmacs, rel=5e-3
    )


@pytest.mark.parametrize("name", ["tiny_w8", "pose_resnet_18", "hourglass_1x16", "vitpose_s", "vitpose_s_simple"])
@pytest.mark.parity
def test_flops_of_forward_and_backward_are_those_that_pytorch_counts(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name, 17, input_size=(64, 64)).train()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(2, 3, 64, 64, device="meta"))[-1].sum().backward()
    passes = training_passes(count_layers(network, (2, 3, 64, 64)), 4)
    assert sum(one.flops for one in passes) == counter.get_total_flops()


def test_a_step_is_the_teacher_forward_and_three_times_the_student() -> None:
    with torch.device("meta"):
        student, teacher = create_model("tiny_w8", 17), create_model("tiny_w16", 17)
    macs = [sum(layer.macs for layer in count_layers(each, (2, 3, 64, 64))) for each in (student, teacher)]
    images = count_layers(student, (2, 3, 64, 64))[0].macs  # no gradient of the images
    passes = step_passes(student, teacher, batch=2, input_size=(64, 64), element=2)
    assert sum(one.flops for one in passes) == 2 * (macs[1] + 3 * macs[0] - images)
    assert passes[-1] == Pass("optimizer", 0, 28 * sum(parameter.numel() for parameter in student.parameters()))


def test_time_in_which_kernels_overlap_counts_once() -> None:
    assert covered([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5
    assert covered([]) == 0


def test_spread_is_median_and_quartiles() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3, "low": 2, "high": 4}
    assert spread([7.0]) == {"median": 7, "low": 7, "high": 7}


def test_memory_is_the_weights_and_what_the_step_took_for_a_moment() -> None:
    network, memory = nn.Linear(999, 1000), Memory(CPU)
    if not memory.known:
        pytest.skip("this system does not let a process reset its high-water mark")
    torch.ones(50_000_000).sum()
    peak = memory.peak_mb(network)
    assert peak is not None
    assert weight_bytes(network) == 4_000_000
    assert 200 <= peak < 260


def test_precision_is_reduced_where_the_hardware_has_it() -> None:
    assert choose_precision("bf16", CPU) == ("bf16", "as requested")
    precision, reason = choose_precision("auto", CPU)
    assert (precision == "bf16") == processes.multiplies_bf16(CPU)
    assert "processor" in reason


@pytest.mark.parametrize(
    ("machine", "of_onednn", "of_processor", "expected"),
    [
        ("x86_64", True, True, True),
        ("x86_64", True, False, False),  # AVX-512 without bfloat16, which oneDNN emulates
        ("x86_64", False, True, False),
        ("aarch64", True, False, True),
        ("aarch64", False, False, False),
    ],
)
def test_bf16_is_what_library_and_processor_have(
    machine: str, of_onednn: bool, of_processor: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: of_onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: of_processor)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert processes.multiplies_bf16(CPU) is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch 0: at least 1"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--picture", "step.txt"], "step.txt: a picture is a .png or .jpg file"),
        (["--json", "."], ".: is a folder; --json is the file to write"),
        (["--picture", "folder.png"], "folder.png: is a folder; --picture is the file to write"),
        (["--student", "hrnet_w33"], "'hrnet_w33' is not an architecture; did you mean 'hrnet_w32'?"),
        (["--input", "60", "64"], "multiples of 16, not 60 x 64"),
        (["--student", "tiny_w8_simcc"], "tiny_w8_simcc: the published step supports heatmaps only"),
    ],
)
def test_impossible_options_are_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert cli.main([*TINY, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([*TINY, "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch sees no GPU here" in capsys.readouterr().err
