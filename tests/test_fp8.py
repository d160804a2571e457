"""Linear layers in float8: rounding, scales, the product, a whole transformer, and who may ask for them."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_distill import random_batch
from torch import Tensor, nn

from fpd_accel import create_model
from fpd_accel.config.loading import load_recipe
from fpd_accel.errors import ConfigError, TrainingError
from fpd_accel.models.fp8 import FLOAT8, Float8Linear, require_float8, to_float8, to_float8_linears
from fpd_accel.training.teacher import Teacher

BLOCKS = 2  # of twelve


def transformer(arch: str = "vitpose_s_simple") -> nn.Module:
    """Freshly initialised, but for a head that gives heatmaps of about 1 where the published one gives 0.001."""
    torch.manual_seed(0)
    model = create_model(arch, 17, input_size=(64, 64)).eval()
    backbone = (model.network if arch.endswith("simcc") else model).backbone
    backbone.blocks = backbone.blocks[:BLOCKS]
    for name, module in model.named_modules():
        if "head" in name and isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, in standard deviations of what is expected."""
    return float((found.float() - expected).square().mean().sqrt() / expected.std())


def nearest_float8(value: float) -> float:
    """The E4M3 value nearest to one: 3 bits of mantissa, steps of 2**-9 below 2**-6; by arithmetic alone."""
    exponent = max(-6, torch.tensor(abs(value)).log2().floor().int().item()) if value else -6
    step = 2.0 ** (exponent - 3)
    return round(value / step) * step


def test_rows_are_rounded_to_three_bits_below_their_own_largest_value() -> None:
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1], [0], [7], [1e4]])
    values, scale = to_float8(rows)
    assert values.dtype == FLOAT8
    assert scale.shape == (5, 1)
    torch.testing.assert_close(scale[:, 0] * 448, rows.abs().amax(1).clamp(min=448e-12 / 448), rtol=1e-6, atol=0)
    for row in range(5):
        expected = [nearest_float8(float(value / scale[row])) for value in rows[row]]
        assert values[row].float().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    large = rows.abs() > 2.0**-14 * rows.abs().amax(1, keepdim=True)
    error = (values.float() * scale - rows).abs() / rows.abs().clamp(min=1e-30)
    assert float(error[large].max()) <= 2**-4  # of the value itself


def test_a_float8_layer_is_the_product_of_the_rounded_values() -> None:
    torch.manual_seed(0)
    linear, tokens = nn.Linear(64, 48), torch.randn(2, 7, 64)
    layer = Float8Linear(linear)
    (weight, weight_scale), (rows, scale) = to_float8(linear.weight.detach()), to_float8(tokens.flatten(0, 1))
    exact = (rows.double() * scale) @ (weight.double() * weight_scale).T + linear.bias.detach().double()
    found = layer(tokens)
    assert found.shape == (2, 7, 48)
    assert found.dtype == torch.bfloat16
    # bfloat16 has 8 bits: half a step of the result, and of the bias.
    torch.testing.assert_close(found.flatten(0, 1).double(), exact, rtol=2**-8, atol=2**-8)
    assert layer.state_dict().keys() == linear.state_dict().keys()
    assert not list(layer.parameters())


def test_a_layer_without_bias_has_none_in_float8_either() -> None:
    torch.manual_seed(0)
    linear, tokens = nn.Linear(64, 32, bias=False), torch.randn(3, 64)
    layer = Float8Linear(linear)
    assert layer.bias is None
    assert relative(layer(tokens), linear(tokens).detach()) < 0.06  # a rounding of 2.6 % on either side of the product


def test_a_float8_teacher_gives_the_heatmaps_of_the_exact_one_to_a_twentieth() -> None:
    model, batch = transformer(), random_batch()
    names = model.state_dict().keys()
    exact = Teacher(copy.deepcopy(model))(batch.crops)[0]
    rounded = Teacher(copy.deepcopy(model), precision=torch.bfloat16)(batch.crops)[0]
    teacher = Teacher(model, precision=torch.bfloat16, fp8=True)
    found = teacher(batch.crops)[0]
    # Root mean square, of their standard deviation: 0.015 with two blocks and the simple head, 0.042 with twelve and
    # the classic one; 0.004 and 0.007 for bfloat16 alone.
    assert relative(rounded, exact) < relative(found, exact) < 0.05
    assert found.dtype == torch.float32
    assert teacher.model.state_dict().keys() == names


def test_blocks_alone_are_in_float8_and_their_other_parts_are_not() -> None:
    model = transformer("vitpose_s_simcc")
    to_float8_linears(model)
    kinds = {name: type(module) for name, module in model.named_modules() if not list(module.children())}
    in_float8 = {name for name, kind in kinds.items() if kind is Float8Linear}
    assert len(in_float8) == 4 * BLOCKS
    assert all(".blocks." in name for name in in_float8)
    assert {name for name, kind in kinds.items() if kind is nn.Linear} == {"mlp_head_x", "mlp_head_y"}
    assert all(value.dtype != FLOAT8 for name, value in model.state_dict().items() if "norm" in name or "head" in name)


def test_a_float8_network_is_captured_as_one_graph_with_the_same_result() -> None:
    model, images = transformer(), torch.randn(1, 3, 64, 64)
    to_float8_linears(model)
    with torch.inference_mode():
        assert torch.equal(torch.export.export(model, (images,)).module()(images)[0], model(images)[0])


def test_networks_without_such_layers_are_refused() -> None:
    for arch in ("tiny_w8", "tiny_w8_simcc"):
        with pytest.raises(ConfigError, match=r"teacher\.fp8: is for the linear layers .* this teacher has none"):
            to_float8_linears(create_model(arch, 3, input_size=(64, 64)))


def test_processors_are_refused_before_anything_is_written(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    from fpd_accel.training.run import run

    recipe = tiny_recipe(
        teacher={"recipe": str(tiny_recipe(file_name="teacher.yaml", run={"name": "teacher"})), "fp8": True,
                 "overrides": ["train.precision=bf16"]},
        distill={"mode": "fpd"}, train={"precision": "bf16"},
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"teacher\.fp8: needs an NVIDIA GPU .* 8\.9 or later .* this run uses cpu"):
        run(load_recipe(recipe, ["run.name=on_a_processor"]))
    assert not (tmp_path / "on_a_processor").exists()
    assert not (tmp_path / "teacher").exists()


def test_older_gpus_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    with pytest.raises(TrainingError, match=r"NVIDIA A100 has 8\.0; leave it out"):
        require_float8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    require_float8(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(TrainingError, match="this one is AMD's"):
        require_float8(torch.device("cuda"))


def test_contradictions_of_a_recipe_are_named(tiny_recipe: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.fp8, teacher\.shard: give one"):
        load_recipe(tiny_recipe(teacher={"fp8": True, "shard": True}))
    with pytest.raises(ConfigError, match=r"teacher\.fp8: .* set train\.precision=bf16"):
        load_recipe(tiny_recipe(teacher={"fp8": True}))


def test_float8_may_not_come_or_go_when_a_run_is_resumed_but_folding_may(tiny_recipe: Callable[..., Path]) -> None:
    from fpd_accel.training.resume_rules import differences

    before = load_recipe(tiny_recipe(train={"precision": "bf16"}))
    after = load_recipe(tiny_recipe(train={"precision": "bf16"}), ["teacher.fp8=true", "teacher.fold_norm=false"])
    altering, harmless = differences(before.model_dump(mode="json"), after.model_dump(mode="json"))
    assert altering == ["teacher.fp8: False -> True"]
    assert harmless == ["teacher.fold_norm: True -> False"]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a CUDA device of compute capability 8.9 or later",
)
@pytest.mark.parametrize("what", ["none", "whole"])
def test_a_float8_teacher_on_a_gpu_equals_the_one_on_a_processor(what: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("graphs.py")), "float8", what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 0.05  # bfloat16 in another order moves some values to the next float8
