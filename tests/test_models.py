"""Every architecture: names, shapes and outputs of the published networks, gradients, and what they refuse."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from formula import fill_with_formula
from torch.utils.flop_counter import FlopCounterMode

from fpd_accel.errors import ModelError
from fpd_accel.models.create import create_model
from fpd_accel.models.names import MODELS, find_architecture, model_names
from fpd_accel.models.vitpose import Attention

PUBLISHED = [
    "hourglass_4x128",
    "hourglass_8x256",
    "hrnet_w32",
    "hrnet_w48",
    "pose_resnet_50",
    "pose_resnet_101",
    "pose_resnet_152",
]
EVERY_MODEL = [*MODELS, "hourglass_1x32", "hourglass_3x32"]
SMALLEST = ("hrnet_w18", "pose_resnet_18", "vitpose_s", "vitpose_s_simple")  # of their families
LARGE_MODELS = [name for name in MODELS if not name.startswith("tiny") and name not in SMALLEST]


def published(name: str, shared: Path) -> dict:
    return json.loads((shared / "reference" / "state_dicts" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parity
def test_parameter_names_and_shapes_equal_the_published_checkpoints(name: str, shared: Path) -> None:
    record = published(name, shared)
    with torch.device("meta"):
        model = create_model(name, record["num_keypoints"]).eval()
    ours = {entry: list(tensor.shape) for entry, tensor in model.state_dict().items()}
    assert ours == dict(record["state_dict"])
    assert sum(parameter.numel() for parameter in model.parameters()) == record["num_parameters"]
    outputs = model(torch.empty(1, 3, 64, 64, device="meta"))
    assert len(outputs) == record["num_outputs"]
    assert {tuple(heatmaps.shape) for heatmaps in outputs} == {(1, record["num_keypoints"], 16, 16)}


@pytest.mark.parity
@pytest.mark.parametrize("name", ["hrnet_w32", "pose_resnet_50", "hourglass_4x128"])
def test_outputs_equal_the_published_implementation(name: str, shared: Path) -> None:
    record = published(name, shared)
    model = create_model(name, record["num_keypoints"]).eval()
    fill_with_formula(model)
    width, height = record["image_size_wh"]
    images = np.random.RandomState(7).standard_normal((1, 3, height, width)).astype(np.float32)
    with torch.inference_mode():
        outputs = model(torch.from_numpy(images))
    with np.load(shared / "reference" / f"{name}.npz") as expected:
        assert len(outputs) == len(expected.files)
        for number, heatmaps in enumerate(outputs):
            truth = expected[f"out{number}"]
            largest = np.abs(truth).max()
            # 1e-5 of the largest heatmap value; float32 rounding across kernels gives about 2e-6.
            np.testing.assert_allclose(heatmaps.numpy(), truth, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.parity if name in LARGE_MODELS else ()) for name in EVERY_MODEL]
)
def test_every_model_gives_a_tuple_of_quarter_size_heatmaps_and_all_parameters_get_gradients(name: str) -> None:
    torch.manual_seed(0)
    # The large ones run on shapes alone, which still shows a parameter that no output depends on.
    device = "meta" if name in LARGE_MODELS else "cpu"
    with torch.device(device):
        model = create_model(name, 5, input_size=(64, 128))
        outputs = model(torch.randn(2, 3, 64, 128))
    stages = int(name.removeprefix("hourglass_")[0]) if name.startswith("hourglass") else 1
    assert isinstance(outputs, tuple)
    assert [heatmaps.shape for heatmaps in outputs] == [(2, 5, 64 // model.stride, 128 // model.stride)] * stages
    torch.stack(outputs).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.is_meta or torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("name", ["hrnet_w48", "pose_resnet_152", "hourglass_4x128", "vitpose_b", "vitpose_h_simple"])
@pytest.mark.parametrize("input_size", [(384, 288), (256, 256)])
@pytest.mark.parity
def test_large_models_take_the_other_published_input_sizes(name: str, input_size: tuple[int, int]) -> None:
    height, width = input_size
    with torch.device("meta"):
        model = create_model(name, 17, input_size=input_size).eval()
        images = torch.empty(1, 3, height, width)
    if width % model.input_multiple:  # four halvings after the first two do not meet again: not published at 384 x 288
        assert name.startswith("hourglass")
        with pytest.raises(ModelError, match="multiples of 64, not 384 x 288"):
            model(images)
        return
    assert {tuple(heatmaps.shape) for heatmaps in model(images)} == {(1, 17, height // 4, width // 4)}


@pytest.mark.parametrize("name", ["hrnet_w18", "pose_resnet_18", "hourglass_1x32", "tiny_w8", "vitpose_s_simple"])
def test_the_smallest_models_compute_finite_heatmaps_at_other_input_sizes(name: str) -> None:
    torch.manual_seed(0)
    for input_size in ((256, 256),) if name.startswith("hourglass") else ((384, 288), (256, 256)):
        model = create_model(name, 3, input_size=input_size).eval()
        with torch.inference_mode():
            heatmaps = model(torch.randn(1, 3, *input_size))[-1]
        assert heatmaps.shape == (1, 3, input_size[0] // 4, input_size[1] // 4)
        assert torch.isfinite(heatmaps).all()
        assert heatmaps.std() > 0


def test_vision_transformer_takes_only_the_size_that_its_positions_are_for() -> None:
    with torch.device("meta"):
        model = create_model("vitpose_b", 17, input_size=(256, 192))
        with pytest.raises(ModelError, match=r"for images of 256 x 192 .* not 192 x 256; create it with"):
            model(torch.empty(1, 3, 192, 256))
        with pytest.raises(ModelError, match="multiples of 16, not 250 x 192"):
            create_model("vitpose_b", 17, input_size=(250, 192))


@pytest.mark.parametrize("name", ["hrnet_w18", "pose_resnet_18", "hourglass_1x32", "tiny_w8", "vitpose_s"])
def test_heatmaps_of_one_image_do_not_depend_on_the_others_in_eval_mode(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 3, input_size=(64, 64)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        together, alone = model(images)[-1][:1], model(images[:1])[-1]
    # Absolute difference in heatmap units; kernels may sum in another order for another batch size.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6 + 1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("name", ["hrnet_w18", "pose_resnet_18", "vitpose_s"])
def test_published_initialisation_draws_heads_with_a_deviation_of_a_thousandth(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 17)
    head = {entry.removeprefix("keypoint_head."): tensor for entry, tensor in model.state_dict().items()}
    # Relative error of a standard deviation estimated from n draws is about 1 / sqrt(2 n): 306 or more draws, 4 sigma.
    assert float(head["final_layer.weight"].std()) == pytest.approx(1e-3, rel=0.17)
    assert not head["final_layer.bias"].any()
    inner = "deconv_layers.3.weight" if not name.startswith("hrnet") else "stage4.2.branches.3.3.conv2.weight"
    assert float(head[inner].std()) == pytest.approx(1e-3, rel=0.01)  # 186,624 draws or more


def test_tiny_model_learns_to_point_at_a_bright_spot_within_sixty_steps() -> None:
    torch.manual_seed(0)
    model = create_model("tiny_w8", 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    position = torch.arange(16.0)

    def spots(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = torch.randint(2, 14, (2, count, 1)).float()
        near_x, near_y = torch.exp(-((position - x) ** 2) / 4), torch.exp(-((position - y) ** 2) / 4)
        heatmaps = (near_y[:, :, None] * near_x[:, None, :])[:, None]
        images = torch.nn.functional.interpolate(heatmaps, scale_factor=4.0).repeat(1, 3, 1, 1)
        return images + 0.1 * torch.randn_like(images), heatmaps

    for _ in range(60):
        images, heatmaps = spots(16)
        loss = (model(images)[-1] - heatmaps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, heatmaps = spots(64)
    with torch.inference_mode():
        predicted = model(images)[-1]
    same = predicted.flatten(1).argmax(1) == heatmaps.flatten(1).argmax(1)
    assert float(same.float().mean()) > 0.9  # fraction of spots found to the heatmap pixel; chance is 1 in 144


def test_wider_tiny_models_cost_more_and_narrow_ones_stay_cheap() -> None:
    giga_macs = {}
    for name in ("tiny_w8", "tiny_w16", "tiny_w32", "tiny_w48"):
        with torch.device("meta"):
            model, images = create_model(name, 17).eval(), torch.empty(1, 3, 128, 96)
        with FlopCounterMode(display=False) as counter:
            model(images)
        giga_macs[name] = counter.get_total_flops() / 2e9  # multiply-adds of convolutions, 128 x 96 pixels
    assert 0.02 < giga_macs["tiny_w16"] < 0.04
    assert 0.2 < giga_macs["tiny_w48"] < 0.3
    assert sorted(giga_macs, key=giga_macs.__getitem__) == list(giga_macs)


def test_unknown_name_is_answered_with_the_nearest_one_and_all_choices() -> None:
    with pytest.raises(ModelError, match=r"'hrnet_w33' is not an architecture; did you mean 'hrnet_w32'\?") as caught:
        create_model("hrnet_w33", 17)
    assert isinstance(caught.value, ValueError)
    assert all(name in str(caught.value) for name in [*MODELS, "hourglass_{stacks}x{features}"])
    assert "hourglass_{stacks}x{features}" in model_names()
    with pytest.raises(ModelError, match=r"did you mean 'pose_resnet_50'\?"):
        create_model("PoseResNet_50", 17)
    with pytest.raises(ModelError, match=r"'zzz' is not an architecture; choose from"):
        create_model("zzz", 17)


def test_sizes_that_make_no_network_are_refused() -> None:
    with pytest.raises(ModelError, match=r"multiple of 4 and at least 8, not 126"):
        create_model("hourglass_4x126", 17)
    with pytest.raises(ModelError, match=r"at least 1 stack, not 0"):
        create_model("hourglass_0x128", 17)
    for name in ("tiny_w8", "hourglass_1x32"):
        with pytest.raises(ModelError, match=r"num_keypoints must be at least 1, not 0"):
            create_model(name, 0)


@pytest.mark.parametrize(
    ("name", "multiple"),
    [("hrnet_w18", 32), ("pose_resnet_18", 32), ("hourglass_1x32", 64), ("tiny_w8", 16), ("vitpose_s", 16)],
)
def test_input_size_off_the_multiple_is_refused_before_any_computation(name: str, multiple: int) -> None:
    with torch.device("meta"):
        model = create_model(name, 3, input_size=(multiple, 2 * multiple))
        assert model.input_multiple == multiple
        architecture = find_architecture(name)
        assert architecture is not None
        assert architecture.multiple == multiple  # what recipes are checked by
        assert model(torch.empty(2, 3, multiple, 2 * multiple))[-1].shape == (2, 3, multiple // 4, multiple // 2)
        for height, width in ((multiple + 8, multiple), (multiple, multiple - 4), (0, multiple)):
            message = rf"multiples of {multiple}, not {height} x {width} \(height x width\)"
            with pytest.raises(ModelError, match=message):
                model(torch.empty(2, 3, height, width))


@pytest.mark.parametrize("name", ["pose_resnet_18", "tiny_w8", "vitpose_s_simple"])
@pytest.mark.parity
def test_models_are_captured_as_one_graph_with_the_same_result(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 3, input_size=(64, 64)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images)[0]
        captured = torch.export.export(model, (images,)).module()(images)[0]
    assert torch.equal(captured, expected)


def plain_attention(layer: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Softmax attention as Dosovitskiy et al. (ICLR 2021, appendix A) write it, one head after the other."""
    width = tokens.shape[-1]
    query, key, value = layer.qkv(tokens).split(width, dim=-1)
    heads = []
    for head in range(layer.heads):
        part = slice(head * width // layer.heads, (head + 1) * width // layer.heads)
        similarity = query[..., part] @ key[..., part].transpose(1, 2) / (width / layer.heads) ** 0.5
        heads.append(similarity.softmax(-1) @ value[..., part])
    return layer.proj(torch.cat(heads, dim=-1))


def test_attention_equals_softmax_attention_written_out() -> None:
    torch.manual_seed(0)
    layer, tokens = Attention(48, heads=3).eval(), 3 * torch.randn(2, 20, 48)
    with torch.inference_mode():
        torch.testing.assert_close(layer(tokens), plain_attention(layer, tokens), rtol=0, atol=1e-6)  # of values near 1


def test_attention_copies_nothing_between_its_layers() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        called: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    layer, tokens = Attention(48, heads=3).eval(), torch.randn(2, 20, 48)
    with torch.no_grad(), Record():  # inference mode does not show what attention consists of
        layer(tokens)
    views = {"view", "_unsafe_view", "t", "permute", "unbind", "transpose"}
    assert set(Record.called) - views == {"addmm", "_scaled_dot_product_flash_attention_for_cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attention_alone_can_run_a_vision_transformer_in_bfloat16() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    model, images = create_model("vitpose_s", 17).eval().cuda(), torch.randn(2, 3, 256, 192, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it cannot
            found = model(images)[0]
        with sdpa_kernel(SDPBackend.MATH):
            expected = model(images)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
