"""`fpd-accel import-weights` and `fpd-accel info`: whole or not at all, what is recorded, and what a network costs."""

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from formula import fill_with_formula
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpd_accel import Predictor, load_model
from fpd_accel.cli import main
from fpd_accel.config.loading import load_recipe
from fpd_accel.errors import ConfigError, WeightsError
from fpd_accel.models.create import create_model
from fpd_accel.skeleton import COCO, load_skeleton
from fpd_accel.weights.import_weights import import_weights
from fpd_accel.weights.model_cost import describe_model, model_cost, original_gflops
from fpd_accel.weights.model_folder import ModelConfig, read_model_config, save_model
from fpd_accel.weights.pickle_reader import read_checkpoint

ROOT = Path(__file__).parents[1]
LSP = ROOT / "recipes" / "skeletons" / "lsp.yaml"


def weights_of(name: str, *, num_keypoints: int = 17, input_size: tuple[int, int] = (256, 192)) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return create_model(name, num_keypoints, input_size=input_size).state_dict()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail; return its message after checking that it is one, and no traceback."""
    assert main([str(argument) for argument in arguments]) == 2
    message = "".join(capsys.readouterr())
    assert message.count("error:") == 1
    assert "Traceback" not in message
    return message


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small hourglass as the FPD repository's training leaves it."""
    weights = weights_of("hourglass_1x16", num_keypoints=14)
    content = {
        "epoch": 140,
        "model": "hourglass",
        "best_state_dict": {f"module.{name}": tensor for name, tensor in weights.items()},
        "perf": np.float64(88.9),
        "optimizer": {"state": {}},
    }
    torch.save(content, tmp_path / "hg_256x256.pth")
    return tmp_path / "hg_256x256.pth"


# ---- what is written ----


def test_command_writes_a_model_folder_that_says_where_it_came_from(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / "hourglass"
    folder.parent.mkdir()
    command = ["import-weights", checkpoint, "--output", folder, "--skeleton", LSP, "--color", "bgr"]
    assert main([str(word) for word in command]) == 0
    printed = "".join(capsys.readouterr())
    assert "hourglass_1x16, HRNet and FPD repositories layout" in printed
    assert "matched" in printed
    assert "256 x 256" in printed
    config = read_model_config(folder)
    assert (config.arch, config.input_size, config.codec.sigma) == ("hourglass_1x16", (256, 256), 2.0)
    assert (config.skeleton, config.normalization.color) == (load_skeleton(LSP), "bgr")
    assert config.source["file"] == "hg_256x256.pth"
    assert len(config.source["sha256"]) == 64
    assert_same(load_model(folder).state_dict(), weights_of("hourglass_1x16", num_keypoints=14))
    assert [path.name for path in folder.parent.iterdir()] == ["hourglass"]


def test_colour_order_of_the_source_is_obeyed(tmp_path: Path) -> None:
    model = create_model("tiny_w8", 17)
    fill_with_formula(model)
    save_file(model.state_dict(), tmp_path / "tiny_64x64.safetensors")
    for color in ("rgb", "bgr"):
        import_weights(tmp_path / "tiny_64x64.safetensors", tmp_path / color, color=color)
    image = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    box = np.array([[0.0, 0.0, 64.0, 64.0]])
    rgb, bgr = (Predictor(tmp_path / color, flip_test=False) for color in ("rgb", "bgr"))
    assert not np.array_equal(rgb(image, box).scores, bgr(image, box).scores)
    assert np.array_equal(rgb(image[..., ::-1].copy(), box).scores, bgr(image, box).scores)


def test_input_size_comes_from_the_command_then_the_weights_then_the_file_name(tmp_path: Path) -> None:
    def size(name: str, arch: str, **options: tuple[int, int]) -> tuple[int, int]:
        save_file(weights_of(arch, input_size=(256, 256)), tmp_path / name)
        config = import_weights(tmp_path / name, tmp_path / f"{name}_out", **options).config
        assert config.codec.sigma == (3.0 if config.input_size[0] == 384 else 2.0)  # as the published ones were trained
        return config.input_size

    assert size("a_384x288.safetensors", "tiny_w8") == (384, 288)
    assert size("b_384x288.safetensors", "tiny_w8", input_size=(128, 96)) == (128, 96)
    assert size("c_384x288.safetensors", "vitpose_s_simple") == (256, 256)
    assert size("d.safetensors", "tiny_w8") == (256, 192)


def mmpose(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under MMPose's names."""
    return {("head." if name.startswith(("final", "deconv")) else "backbone.") + name: t for name, t in weights.items()}


@pytest.mark.parametrize(
    ("arch", "of_mmpose", "color"),
    [("pose_resnet_18", False, "bgr"), ("hourglass_1x16", False, "bgr"), ("pose_resnet_18", True, "rgb")],
)
def test_colour_order_is_assumed_as_the_published_networks_were_trained(
    arch: str, of_mmpose: bool, color: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_of(arch)
    save_file(mmpose(weights) if of_mmpose else weights, tmp_path / "a_udp_256x256.safetensors")
    command = ["import-weights", str(tmp_path / "a_udp_256x256.safetensors"), "--output"]
    assert main([*command, str(tmp_path / "assumed")]) == 0
    assert f"{color} (assumed" in capsys.readouterr().err
    assert read_model_config(tmp_path / "assumed").normalization.color == color
    other = {"rgb": "bgr", "bgr": "rgb"}[color]
    assert main([*command, str(tmp_path / "given"), "--color", other]) == 0
    assert f"{other} (given)" in capsys.readouterr().err
    assert read_model_config(tmp_path / "given").normalization.color == other


def test_codec_of_an_mmpose_network_comes_from_the_command_then_the_file_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = mmpose(weights_of("pose_resnet_18"))
    cases = [
        ("td-hm_res18_udp-8xb64-210e_coco-256x192-73ede547.safetensors", (), "udp (from the name), sigma 2"),
        ("res18_coco_384x288_dark-07f147eb.safetensors", (), "dark (from the name), sigma 3"),
        ("res18_coco_256x192_UDP.safetensors", ("--codec", "dark"), "dark (given), sigma 2"),
        ("res18_udp_384x288.safetensors", ("--sigma", "2.5"), "udp (from the name), sigma 2.5"),
        ("darker_res18_256x192.safetensors", (), "heatmap (assumed), sigma 2"),
    ]
    for number, (name, options, words) in enumerate(cases):
        save_file(weights, tmp_path / name)
        assert main(["import-weights", str(tmp_path / name), "--output", str(tmp_path / f"{number}"), *options]) == 0
        printed = capsys.readouterr().err
        assert printed.splitlines()[-1].endswith(f"codec {words}")
        assert ("does not say udp or dark" in " ".join(printed.split())) == ("assumed" in words)
        codec = read_model_config(tmp_path / f"{number}").codec
        assert (codec.name, f"{codec.sigma:g}") == (words.split()[0], words.split()[-1])


def test_vitpose_is_taken_as_trained_by_udp_with_sigma_2(tmp_path: Path) -> None:
    save_file(weights_of("vitpose_s_simple", input_size=(384, 288)), tmp_path / "a.safetensors")
    imported = import_weights(tmp_path / "a.safetensors", tmp_path / "out")
    assert (imported.config.codec.name, imported.config.codec.sigma) == ("udp", 2.0)
    assert (imported.config.input_size, imported.reasons["codec"]) == ((384, 288), "as every published ViTPose")


def test_normalisation_comes_from_the_command_then_the_transformers_folder(
    tmp_path: Path, tiny_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "folder"
    source.mkdir()
    save_file(weights_of("tiny_w8"), source / "model.safetensors")
    preprocessor = source / "preprocessor_config.json"
    preprocessor.write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 1]}))
    command = ["import-weights", str(source), "--input-size", "64", "64", "--output"]
    assert main([*command, str(tmp_path / "told")]) == 0
    assert "mean 0.5 0.4 0.3, std 0.25 0.5 1 (from preprocessor_config.json)" in capsys.readouterr().err
    told = read_model_config(tmp_path / "told").normalization
    assert (told.mean, told.std) == ((0.5, 0.4, 0.3), (0.25, 0.5, 1.0))
    given = import_weights(source, tmp_path / "given", input_size=(64, 64), mean=(0, 0, 0), std=(1, 1, 1)).config
    assert (given.normalization.mean, given.normalization.std) == ((0, 0, 0), (1, 1, 1))
    assert "0..255 by 255" in refusal(capsys, *command, tmp_path / "no", "--mean", 123.7, 116.3, 103.5)
    assert "not 0" in refusal(capsys, *command, tmp_path / "no", "--std", 0, 1, 1)
    for damaged in ("[]", "{", '{"image_mean": 0.5}'):
        preprocessor.write_text(damaged)
        assert "preprocessor_config.json" in refusal(capsys, *command, tmp_path / "no")
    from fpd_accel.training.run import run

    with pytest.raises(ConfigError, match="but students are trained on ImageNet's"):
        run(load_recipe(tiny_recipe(student={"arch": "tiny_w8", "weights": str(tmp_path / "told")})))


def test_without_a_size_in_the_name_hourglasses_and_mpii_networks_are_square(tmp_path: Path) -> None:
    for arch, keypoints, skeleton, size in (
        ("hourglass_1x16", 17, "coco", (256, 256)),
        ("tiny_w8", 16, "mpii", (256, 256)),
        ("tiny_w8", 17, "coco", (256, 192)),
    ):
        save_file(weights_of(arch, num_keypoints=keypoints), tmp_path / "a.safetensors")
        output = tmp_path / f"{arch}_{keypoints}"
        assert import_weights(tmp_path / "a.safetensors", output, skeleton=skeleton).config.input_size == size


def test_numbers_that_are_not_positive_are_refused_and_a_skeleton_that_fits_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(weights_of("tiny_w8", num_keypoints=16), tmp_path / "a.safetensors")
    command = ("import-weights", tmp_path / "a.safetensors", "--output", tmp_path / "out")
    assert "wanted a positive height and width" in refusal(capsys, *command, "--input-size", -32, -32)
    assert "wanted a positive height and width" in refusal(capsys, *command, "--input-size", 64, 0)
    assert "wanted a positive number of heatmap cells" in refusal(capsys, *command, "--sigma", "nan")
    assert "give --skeleton mpii, or" in " ".join(refusal(capsys, *command).split())
    assert not (tmp_path / "out").exists()


def test_model_folder_can_be_the_empty_folder_that_the_command_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(weights_of("tiny_w8"), tmp_path / "a_64x64.safetensors")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["import-weights", "../a_64x64.safetensors", "--output", "."]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_64x64.safetensors", "here"]


def test_a_transformers_folder_and_a_file_give_the_same_model(tmp_path: Path) -> None:
    weights = weights_of("tiny_w8")
    (tmp_path / "folder").mkdir()
    save_file(weights, tmp_path / "folder" / "model.safetensors")
    imported = import_weights(tmp_path / "folder", tmp_path / "out", input_size=(64, 64))
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), weights)
    assert imported.conversion.counts == {"matched": len(weights)}


# ---- whole or not at all ----


def test_nothing_is_written_when_anything_does_not_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    weights = weights_of("tiny_w8")
    broken = dict(weights)
    broken["head.bias"] = torch.full((17,), float("nan"))
    cases = {
        "1 missing: up4.reduce.0.weight": {k: v for k, v in weights.items() if k != "up4.reduce.0.weight"},
        "1 left over: extra": weights | {"extra": torch.zeros(1)},
        "not finite, such as head.bias": broken,
        "finds 3 keypoints, but skeleton 'coco' has 17": weights_of("tiny_w8", num_keypoints=3),
        "belong to no pose network known here": {"a.weight": torch.zeros(1)},
    }
    for words, tensors in cases.items():
        save_file(tensors, tmp_path / "source.safetensors")
        message = refusal(capsys, "import-weights", tmp_path / "source.safetensors", "--output", output)
        assert words in " ".join(message.split())
        assert "source.safetensors" in message
    save_file(weights, tmp_path / "source.safetensors")
    arguments = ("import-weights", tmp_path / "source.safetensors", "--output", output)
    assert "multiples of 16" in refusal(capsys, *arguments, "--input-size", 100, 64)
    assert "'tiny_w9' is not an architecture" in refusal(capsys, *arguments, "--arch", "tiny_w9")
    assert "there is no such file" in refusal(capsys, "import-weights", tmp_path / "no.pth", "--output", output)
    assert not output.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source.safetensors"}


def test_a_folder_with_something_in_it_is_left_alone(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = checkpoint.parent / "mine"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert "give --output a new folder" in refusal(capsys, "import-weights", checkpoint, "--output", output)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


class Malicious:
    """Unpickled without a guard, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_a_malicious_checkpoint_is_refused_and_nothing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_recipe: Callable[..., Path]
) -> None:
    marker, source = tmp_path / "executed", tmp_path / "malicious.pth"
    torch.save({"state_dict": weights_of("tiny_w8"), "meta": Malicious(marker)}, source)
    message = refusal(capsys, "import-weights", source, "--output", tmp_path / "out")
    assert "refused, because unpickling it would run code: it needs" in message
    assert "mkdir" in message
    recipe = tiny_recipe(student={"arch": "pose_resnet_18", "init": str(source)})
    from fpd_accel.training.run import run

    with pytest.raises(WeightsError, match="refused, because unpickling it would run code"):
        run(load_recipe(recipe))
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    torch.load(source, weights_only=False)  # the file is indeed armed
    assert marker.exists()


# ---- what MMPose 1.x keeps beside the weights ----


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> type:
    """A class of a library that is not installed, there just for writing a checkpoint with an object of it."""
    module, _, kind = name.rpartition(".")
    parents = [module.rsplit(".", depth)[0] for depth in range(module.count(".") + 1)]
    for parent in parents:
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    created = type(kind, (), {"__module__": module})
    setattr(sys.modules[module], kind, created)
    return created


def test_mmpose_metadata_is_read_past_without_code_of_theirs(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        losses = stand_in(monkeypatch, "mmengine.logging.history_buffer.HistoryBuffer")()
        losses._log_history = np.arange(3.0)
        content = {
            "meta": {"dataset_meta": {"sigmas": np.ones(17, np.float32), "num_keypoints": 17}, "cfg": "model = 1"},
            "state_dict": {f"backbone.{name}": tensor for name, tensor in weights_of("tiny_w8").items()},
            "message_hub": {"log_scalars": {"train/loss": losses}},
        }
        torch.save(content, tmp_path / "epoch_210.pth")
    assert "mmengine" not in sys.modules  # where it is read, the library is not installed
    assert_same(read_checkpoint(tmp_path / "epoch_210.pth"), content["state_dict"])


def test_other_objects_of_mmpose_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = stand_in(monkeypatch, "mmengine.config.config.Config")()
        torch.save({"state_dict": weights_of("tiny_w8"), "meta": config}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"it needs mmengine\.config\.config\.Config") as caught:
        read_checkpoint(tmp_path / "a.pth")
    assert "torch.save(checkpoint['state_dict'], 'weights.pth') leaves them out" in str(caught.value)


# ---- student.init ----


def test_a_run_starts_from_an_imagenet_backbone(tiny_recipe: Callable[..., Path], tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    import torchvision

    from fpd_accel.training.run import run

    backbone = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(backbone, tmp_path / "resnet18.pth")
    recipe = tiny_recipe(
        student={"arch": "pose_resnet_18", "init": str(tmp_path / "resnet18.pth")},
        train={"steps": 1, "freeze_norm": True},
        optim={"lr": 1e-12},
        data={"valid": None},
    )
    run(load_recipe(recipe))
    assert "student.init: 120 tensors of the backbone taken from" in capsys.readouterr().err
    trained = load_file(tmp_path / "tiny" / "final" / "model.safetensors")
    for name in ("conv1.weight", "layer4.1.bn2.running_var", "layer3.0.downsample.0.weight"):
        torch.testing.assert_close(trained[name], backbone[name], rtol=0, atol=1e-9)


def test_a_student_starts_only_with_the_colour_order_of_its_weights(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    from fpd_accel.training.run import run

    save_file(weights_of("tiny_w8"), tmp_path / "tiny_64x64.safetensors")
    import_weights(tmp_path / "tiny_64x64.safetensors", tmp_path / "model", color="bgr")
    recipe = tiny_recipe(student={"arch": "tiny_w8", "weights": str(tmp_path / "model")})
    with pytest.raises(ConfigError, match=r"takes bgr images; set student\.color=bgr"):
        run(load_recipe(recipe))
    assert not (tmp_path / "tiny").exists()


def test_student_init_is_checked_with_the_recipe(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"")
    cases = {
        "student.weights, student.init: give one": {
            "weights": str(tmp_path / "a.pth"),
            "init": str(tmp_path / "a.pth"),
        },
        "student.init: nothing.pth: no such file": {"arch": "hrnet_w18", "init": "nothing.pth"},
        "student.init: no backbone of hourglass_1x16": {"arch": "hourglass_1x16", "init": str(tmp_path / "a.pth")},
    }
    for words, student in cases.items():
        with pytest.raises(ConfigError, match=words):
            load_recipe(tiny_recipe(student=student))


# ---- what a network costs ----


@pytest.mark.parity
@pytest.mark.parametrize(
    ("arch", "published"),
    [
        ("hrnet_w32", "7.1"),
        ("hrnet_w48", "14.6"),
        ("pose_resnet_50", "8.9"),
        ("pose_resnet_101", "12.4"),
        ("pose_resnet_152", "15.7"),
    ],
)
def test_cost_equals_the_published_tables(arch: str, published: str) -> None:
    """Table 1 of the HRNet paper, 256 x 192, to its one digit, which it cuts off (8.99, 15.76) or rounds (12.38)."""
    config = ModelConfig(arch=arch, skeleton=COCO, input_size=(256, 192))
    gflops = original_gflops(config)
    assert float(published) in (int(10 * gflops) / 10, round(gflops, 1))
    if arch.startswith("hrnet"):  # no transposed convolutions: the same multiply-adds in another unit
        assert model_cost(config)[1] / 2**30 == pytest.approx(gflops, rel=1e-9)


def test_cost_of_a_vision_transformer_counts_attention() -> None:
    patches, width, depth, keypoints = 16 * 12, 768, 12, 17
    linear = depth * patches * (3 + 1 + 4 + 4) * width**2
    attention = depth * 2 * patches**2 * width  # query times key, and the weights times value
    ends = patches * 3 * 16**2 * width + 64 * 48 * 3**2 * width * keypoints
    config = ModelConfig(arch="vitpose_b_simple", skeleton=COCO, input_size=(256, 192))
    parameters, macs = model_cost(config)
    assert macs == linear + attention + ends
    assert f"{macs / 1e9:.3f} G multiply-adds" in describe_model("a", config)
    assert original_gflops(config) == (linear + ends) / 2**30  # the original counts layers alone
    assert parameters == 85_912_337


def test_info_says_what_a_model_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(arch="tiny_w8", skeleton=COCO, input_size=(128, 96), source={"file": "a [1].pth"})
    save_model(tmp_path / "model", weights_of("tiny_w8"), config)
    assert main(["info", str(tmp_path / "model")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    parameters, macs = model_cost(config)
    for words in (
        "tiny_w8",
        f"{parameters / 1e6:.3f} M",
        f"{macs / 1e9:.3f} G",
        f"{2 * macs / 1e9:.3f} G",
        f"{macs / 2**30:.2f}: as the published tables count",
        "128 x 96",
        "coco, 17 keypoints",
        "rgb, mean 0.485 0.456 0.406",
        "file: a [1].pth",
    ):
        assert words in printed, words
    source = {"run": "a", "valid": {"step": 4, "AP": 0.7123456, "AR": 1.0}, "protocol": {"scales": [1.0], "nms": None}}
    save_model(tmp_path / "model", weights_of("tiny_w8"), config.model_copy(update={"source": source}))
    assert main(["info", str(tmp_path / "model")]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "run: a valid: step 4, AP 0.7123, AR 1 protocol: scales 1, nms none" in printed
    assert "{" not in printed
    assert "not a model folder" in refusal(capsys, "info", tmp_path)
