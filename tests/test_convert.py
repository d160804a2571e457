"""Published layouts of weights: the source library's own files where it installs, else names written by hand here."""

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fpd_accel.errors import WeightsError
from fpd_accel.models.base import PoseModel
from fpd_accel.models.create import create_model
from fpd_accel.models.names import MODELS
from fpd_accel.weights.convert import convert, convert_backbone, load_backbone, refuse_mistakes
from fpd_accel.weights.load import model_shapes
from fpd_accel.weights.recognise import recognise

Weights = dict[str, Tensor]


def randomise(build: Callable[[], nn.Module], *, seed: int = 0) -> nn.Module:
    """A model with values of ordinary size in every parameter and statistic, so that none can be taken for another."""
    with torch.device("meta"):  # its own initialisation is slow, and not wanted
        model = build().eval()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in model.state_dict().items():
        x = torch.randn(tensor.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            x = torch.zeros(tensor.shape, dtype=torch.int64)
        elif name.endswith("running_var"):
            x = 1 + 0.1 * x.abs()
        elif tensor.ndim > 1 and "pos" not in name:
            x = x / tensor[0].numel() ** 0.5
        else:
            x = 1 + 0.1 * x if name.endswith("weight") and tensor.ndim == 1 else 0.1 * x
        weights[name] = x
    model.load_state_dict(weights, assign=True)
    return model


@cache
def random_model(name: str, *, num_keypoints: int = 17) -> PoseModel:
    model = randomise(partial(create_model, name, num_keypoints))
    assert isinstance(model, PoseModel)
    return model


def shapes_alone(name: str, *, input_size: tuple[int, int]) -> Weights:
    """A state dict without values, where only names and shapes matter."""
    with torch.device("meta"):
        return create_model(name, 17, input_size=input_size).state_dict()


def loaded(weights: Weights, name: str) -> PoseModel:
    with torch.device("meta"):
        model = create_model(name, 17).eval()
    model.load_state_dict(weights, strict=True, assign=True)
    return model


def assert_equal(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Agree to 1e-4 of the largest value."""
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


# ---- names, written by hand and independently of the package ----


def mmpose_names(head: str) -> Callable[[str], str]:
    """MMPose keeps the final layer and the deconvolutions in a head, everything else in a backbone."""
    return lambda name: (f"{head}." if name.split(".")[0] in ("final_layer", "deconv_layers") else "backbone.") + name


def mmpretrain(weights: Weights) -> Weights:
    """A ViTPose as MMPose 1.x stores it: other names, and the class token's position folded into the patches'."""
    renamed = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[0] == "keypoint_head":
            renamed[".".join(["head", *parts[1:]])] = tensor
        elif parts[1] == "blocks":
            inner = {
                "norm1": "ln1",
                "norm2": "ln2",
                "attn.qkv": "attn.qkv",
                "attn.proj": "attn.proj",
                "mlp.fc1": "ffn.layers.0.0",
                "mlp.fc2": "ffn.layers.1",
            }[".".join(parts[3:-1])]
            renamed[f"backbone.layers.{parts[2]}.{inner}.{parts[-1]}"] = tensor
        elif parts[1] == "pos_embed":
            renamed["backbone.pos_embed"] = tensor[:, 1:] + tensor[:, :1]
        else:
            top = {"last_norm": "ln1", "patch_embed": "patch_embed.projection"}[parts[1]]
            renamed[f"backbone.{top}.{parts[-1]}"] = tensor
    return renamed


# ---- (a) the original ----


@pytest.mark.parametrize("name", ["hrnet_w18", "pose_resnet_18", "pose_resnet_50", "hourglass_2x32", "vitpose_s"])
@pytest.mark.parity
def test_converting_twice_is_the_identity(name: str, tmp_path: Path) -> None:
    weights = random_model(name, num_keypoints=16).state_dict()
    first = convert(weights)
    assert (first.arch, first.num_keypoints, first.mistakes) == (name, 16, ())
    assert_equal(first.weights, weights)
    save_file(dict(first.weights), tmp_path / "exported.safetensors")
    second = convert(load_file(tmp_path / "exported.safetensors"))
    assert_equal(second.weights, weights)
    assert second.arch == name


@pytest.mark.parametrize("name", [*MODELS, "hourglass_3x32", "hourglass_8x256"])
def test_every_network_is_recognised_by_its_names_and_shapes(name: str) -> None:
    assert recognise(model_shapes(name, 14, input_size=(128, 96))) == name


def test_counters_that_a_file_does_not_have_start_at_zero() -> None:
    weights = random_model("pose_resnet_18").state_dict()
    counters = [name for name in weights if name.endswith("num_batches_tracked")]
    conversion = convert({name: tensor for name, tensor in weights.items() if name not in counters})
    assert not conversion.mistakes
    assert conversion.counts["set to zero"] == len(counters)
    assert_equal(conversion.weights, weights)  # which are zero in a network that never trained


def test_half_precision_becomes_single_and_memory_is_its_own() -> None:
    weights = {name: t.half() for name, t in random_model("hourglass_1x32").state_dict().items()}
    conversion = convert(weights)
    assert not conversion.mistakes
    assert {tensor.dtype for tensor in conversion.weights.values()} == {torch.float32, torch.int64}
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in conversion.weights.values())


# ---- (b) MMPose ----


@pytest.mark.parity
@pytest.mark.parametrize("head", ["keypoint_head", "head"], ids=["0.x", "1.x"])
@pytest.mark.parametrize("name", ["hrnet_w18", "pose_resnet_18"])
def test_mmpose_networks_give_the_same_heatmaps(name: str, head: str) -> None:
    model = random_model(name)
    rename = mmpose_names(head)
    conversion = convert({rename(entry): tensor for entry, tensor in model.state_dict().items()})
    assert (conversion.arch, conversion.layout, conversion.mistakes) == (name, "MMPose", ())
    assert conversion.counts == {"renamed": len(model.state_dict())}
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert_close(loaded(conversion.weights, name)(images)[-1], model(images)[-1])


@pytest.mark.parity
@pytest.mark.parametrize("name", ["vitpose_s", "vitpose_s_simple"])
def test_mmpose_vitpose_gives_the_same_heatmaps_in_both_namings(name: str) -> None:
    model = random_model(name)
    images = torch.randn(1, 3, 256, 192)
    with torch.inference_mode():
        truth = model(images)[-1]
    official = convert(model.state_dict())
    newer = convert({re.sub("^keypoint_head", "head", k): v for k, v in model.state_dict().items()})
    later = convert(mmpretrain(model.state_dict()))
    for conversion, layout in ((official, "ViTPose"), (newer, "ViTPose"), (later, "MMPose 1.x ViTPose")):
        assert (conversion.arch, conversion.layout, conversion.mistakes) == (name, layout, ())
        assert conversion.input_size == (256, 192)
    assert_equal(official.weights, model.state_dict())
    assert_equal(newer.weights, model.state_dict())
    with torch.inference_mode():
        assert_close(loaded(later.weights, name)(images)[-1], truth)


def test_mmpose_drops_a_class_row_of_the_positions_and_so_do_we() -> None:
    stored = mmpretrain(shapes_alone("vitpose_s_simple", input_size=(256, 192)))
    stored["backbone.pos_embed"] = torch.randn(1, 192, 384)
    with_row = stored | {"backbone.pos_embed": torch.cat([torch.ones(1, 1, 384), stored["backbone.pos_embed"]], dim=1)}
    positions = [convert(tensors).weights["backbone.pos_embed"] for tensors in (with_row, stored)]
    assert torch.equal(*positions)
    assert not positions[0][:, 0].any()
    assert torch.equal(positions[0][:, 1:], stored["backbone.pos_embed"])
    (entry,) = [entry for entry in convert(with_row).entries if entry.name == "backbone.pos_embed"]
    assert "set to zero" in entry.note


@pytest.mark.parametrize("input_size", [(384, 288), (256, 256)])
def test_input_size_of_a_vitpose_follows_from_its_positions(input_size: tuple[int, int]) -> None:
    weights = shapes_alone("vitpose_s_simple", input_size=input_size)
    for stored in (weights, mmpretrain(weights)):
        conversion = convert(stored)
        assert conversion.input_size == input_size
        assert not conversion.mistakes
    odd = shapes_alone("vitpose_s_simple", input_size=(128, 96))
    assert [entry.name for entry in convert(odd).mistakes] == ["backbone.pos_embed"]
    assert not convert(odd, input_size=(128, 96)).mistakes
    assert not convert(mmpretrain(odd), input_size=(128, 96)).mistakes


def test_what_multi_dataset_training_leaves_in_a_vitpose_checkpoint_is_named_and_not_taken() -> None:
    weights = shapes_alone("vitpose_s", input_size=(256, 192))
    extra = {
        "backbone.cls_token": torch.zeros(1, 1, 384),
        "associate_keypoint_heads.0.final_layer.bias": torch.ones(14),
    }
    conversion = convert(weights | extra)
    assert not conversion.mistakes
    assert {entry.name for entry in conversion.entries if entry.kind == "unread"} == set(extra)
    assert conversion.weights.keys() == weights.keys()


# ---- (c) transformers ----


@pytest.fixture(scope="module")
def transformers():  # type: ignore[no-untyped-def]
    return pytest.importorskip("transformers")


def transformers_vitpose(transformers, size: str, *, simple: bool, input_size: tuple[int, int] = (256, 192)):  # type: ignore[no-untyped-def]
    width, depth, heads = {"s": (384, 12, 12), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}[size]
    backbone = transformers.VitPoseBackboneConfig(
        image_size=list(input_size),
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        out_indices=[depth],
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, use_simple_decoder=simple, num_labels=17)
    return transformers.VitPoseForPoseEstimation(config)


@pytest.mark.parity
@pytest.mark.parametrize("simple", [False, True], ids=["classic", "simple"])
def test_transformers_vitpose_gives_the_same_heatmaps(transformers, simple: bool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    theirs = randomise(lambda: transformers_vitpose(transformers, "s", simple=simple))
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    conversion = convert(stored)
    name = "vitpose_s_simple" if simple else "vitpose_s"
    assert (conversion.arch, conversion.layout, conversion.mistakes) == (name, "transformers ViTPose", ())
    taken = [source for entry in conversion.entries for source in entry.sources]
    assert sorted(taken) == sorted(stored)
    images = torch.randn(1, 3, 256, 192)
    with torch.inference_mode():
        assert_close(loaded(conversion.weights, name)(images)[-1], theirs(images).heatmaps)


@pytest.mark.parity
@pytest.mark.parametrize("size", ["b", "l", "h"])
@pytest.mark.parametrize("simple", [False, True], ids=["classic", "simple"])
def test_larger_vitposes_have_the_tensors_of_transformers(transformers, size: str, simple: bool) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        theirs = transformers_vitpose(transformers, size, simple=simple)
    conversion = convert({name: torch.empty(t.shape, device="meta") for name, t in theirs.state_dict().items()})
    assert conversion.arch == f"vitpose_{size}" + ("_simple" if simple else "")
    assert not conversion.mistakes
    with torch.device("meta"):
        ours = create_model(conversion.arch, 17)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == counts[1]


# ---- (d) ImageNet backbones ----


def features_before(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """Return the input of a layer of the model."""
    caught: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.inference_mode():
        model.eval()(images)
    return caught[0]


@pytest.mark.parity
def test_timm_hrnet_and_ours_compute_the_same_features(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = randomise(partial(timm.create_model, "hrnet_w18", pretrained=False))
    torch.save(theirs.state_dict(), tmp_path / "hrnet_w18.pth")
    ours = create_model("hrnet_w18", 17)
    head = ours.final_layer.weight.clone()
    line = load_backbone(ours, tmp_path / "hrnet_w18.pth")
    assert line.startswith("1752 tensors of the backbone taken from")
    assert "204 of classification left out, 2 of the head start fresh" in line
    assert torch.equal(ours.final_layer.weight, head)
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        stem = theirs.act2(theirs.bn2(theirs.conv2(theirs.act1(theirs.bn1(theirs.conv1(images))))))
        truth = theirs.stages(stem)[0]  # the finest branch
    assert_close(features_before(ours, ours.final_layer, images), truth)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_resnet_and_ours_compute_the_same_features(name: str, tmp_path: Path) -> None:
    import torchvision

    theirs = randomise(partial(torchvision.models.get_model, name, weights=None))
    torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
    ours = create_model(name.replace("resnet", "pose_resnet_"), 17)
    line = load_backbone(ours, tmp_path / f"{name}.pth")
    assert "2 of classification left out, 20 of the head start fresh" in line
    images = torch.randn(1, 3, 64, 96)
    assert_close(features_before(ours, ours.deconv_layers, images), features_before(theirs, theirs.avgpool, images))


@pytest.mark.parity
def test_masked_autoencoder_starts_a_vitpose_with_its_positions_resized(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from timm.layers import resample_abs_pos_embed

    theirs = randomise(partial(timm.models.VisionTransformer, embed_dim=768, depth=12, num_heads=12, num_classes=10))
    torch.save({"model": theirs.state_dict()}, tmp_path / "mae.pth")
    ours = create_model("vitpose_b", 17)
    line = load_backbone(ours, tmp_path / "mae.pth")
    assert "3 of classification left out" in line  # class token, and the classifier's weight and bias
    assert "resized from 14 x 14 patches" in line
    stored, own = theirs.state_dict(), ours.backbone.state_dict()
    for name, tensor in own.items():
        if name != "pos_embed":
            assert torch.equal(tensor, stored[name.replace("last_norm", "norm")]), name
    truth = resample_abs_pos_embed(stored["pos_embed"], (16, 12), (14, 14), antialias=False)
    torch.testing.assert_close(own["pos_embed"], truth, rtol=0, atol=1e-5)


def test_vit_small_of_other_heads_is_refused_though_its_shapes_fit() -> None:
    model = random_model("vitpose_s")
    backbone = {name.replace("last_norm", "norm"): tensor for name, tensor in model.backbone.state_dict().items()}
    with pytest.raises(WeightsError, match=r"ViT-Small .* has 6 attention heads, ViTPose-S has 12: the shapes fit"):
        convert_backbone(backbone, model)
    own = {f"backbone.{name}": tensor for name, tensor in model.backbone.state_dict().items()}
    assert convert_backbone(own, model).mistakes == ()  # under ViTPose's names, with ViTPose's heads


def test_backbone_that_is_not_the_networks_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    import torchvision

    stored = randomise(torchvision.models.resnet18).state_dict()
    model = create_model("pose_resnet_18", 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cases = {
        "1 missing: layer2.0.bn1.bias": {k: v for k, v in stored.items() if k != "layer2.0.bn1.bias"},
        "1 left over: layer5.0.conv1.weight": stored | {"layer5.0.conv1.weight": torch.zeros(1)},
        r"1 other shape: conv1.weight \(\(64, 1, 7, 7\) in the file, \(64, 3, 7, 7\)": stored
        | {"conv1.weight": stored["conv1.weight"][:, :1].contiguous()},
        "left over: layer1.2.conv1.weight, .*": randomise(torchvision.models.resnet34).state_dict(),
    }
    for message, tensors in cases.items():
        torch.save(tensors, tmp_path / "file.pth")
        with pytest.raises(WeightsError, match=message):
            load_backbone(model, tmp_path / "file.pth")
        assert_equal(model.state_dict(), before)
    with pytest.raises(WeightsError, match="no backbone of StackedHourglass is published apart"):
        convert_backbone(stored, create_model("hourglass_1x32", 3))


# ---- what is refused ----


def test_every_tensor_has_its_entry_and_what_is_wrong_is_named() -> None:
    weights = random_model("hourglass_1x32", num_keypoints=3).state_dict()
    changed = dict(weights)
    del changed["bn1.weight"]
    changed["stranger"] = torch.zeros(2)
    changed["conv1.weight"] = torch.zeros(8, 3, 3, 3)
    conversion = convert(changed)
    wrong = {entry.kind: (entry.name, entry.note) for entry in conversion.mistakes}
    assert wrong["missing"] == ("bn1.weight", "")
    assert wrong["left over"] == ("stranger", "")
    assert wrong["other shape"] == ("conv1.weight", "(8, 3, 3, 3) in the file, (8, 3, 7, 7) in the network")
    assert conversion.counts["matched"] == len(weights) - 2
    assert {name for entry in conversion.entries for name in entry.sources} == set(changed)
    with pytest.raises(WeightsError, match=r"a\.pth: not the weights of hourglass_1x32 .* nothing is taken"):
        refuse_mistakes(conversion, "a.pth")


def test_networks_that_are_not_here_are_refused_by_name() -> None:
    hourglass = {"backbone.hourglass_modules.0.up1.0.conv1.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match="MMPose's hourglass: its blocks differ"):
        convert(hourglass)
    experts = {"backbone.blocks.0.mlp.experts.0.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"a ViTPose\+ checkpoint"):
        convert(experts)
    wide = {
        "stage4.0.branches.0.0.conv1.weight": torch.zeros(30, 30, 3, 3),
        "final_layer.weight": torch.zeros(3, 30, 1, 1),
    }
    with pytest.raises(WeightsError, match="looks like hrnet_w30, which this package does not have"):
        convert(wide)
    with pytest.raises(WeightsError, match="belong to no pose network known here, so give --arch"):
        convert({"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match="to start a training run from a backbone alone"):
        convert({"conv1.weight": torch.zeros(64, 3, 3, 3)}, arch="hrnet_w18")
    twice = {"final_layer.weight": torch.zeros(3, 18, 1, 1), "head.final_layer.weight": torch.zeros(3, 18, 1, 1)}
    with pytest.raises(WeightsError, match=r"would both be named final_layer\.weight"):
        convert(twice | {"backbone.conv1.weight": torch.zeros(1)})


def test_query_key_and_value_are_joined_only_when_all_three_are_there() -> None:
    part = "backbone.encoder.layer.0.attention.attention.{}.weight"
    weights = {part.format(kind): torch.zeros(384, 384) for kind in ("query", "value")}
    stored = {"backbone.embeddings.position_embeddings": torch.zeros(1, 193, 384), **weights}
    conversion = convert(stored | {"head.conv.weight": torch.zeros(17, 384, 3, 3)}, arch="vitpose_s_simple")
    left = {entry.name for entry in conversion.mistakes if entry.kind == "left over"}
    assert left == set(weights)
