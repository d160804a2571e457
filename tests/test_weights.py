"""Weights files: which load, which are refused, and that a refusal leaves the model as it was."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fpd_accel.errors import WeightsError
from fpd_accel.models.create import create_model
from fpd_accel.weights.load import load_weights
from fpd_accel.weights.pickle_reader import read_checkpoint


def random_weights(name: str, *, num_keypoints: int = 3, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {entry: tensor.clone() for entry, tensor in create_model(name, num_keypoints).state_dict().items()}


def assert_has_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def refusal(model: nn.Module, path: Path) -> str:
    """Load what must not load; return the message after checking that the model kept every value."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path)
    assert isinstance(caught.value, ValueError)
    assert str(path) in str(caught.value)
    assert_has_weights(model, before)
    return str(caught.value)


def test_safetensors_file_and_model_folder_load(tmp_path: Path) -> None:
    weights = random_weights("tiny_w8")
    save_file(weights, tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", tmp_path, str(tmp_path)):
        model = create_model("tiny_w8", 3)
        load_weights(model, path)
        assert_has_weights(model, weights)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip format", "format before PyTorch 1.6"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "best_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_forms_of_checkpoints_load(tmp_path: Path, zipped: bool, wrapper: str | None, prefix: str) -> None:
    weights = random_weights("tiny_w8")
    content: dict = {prefix + name: tensor for name, tensor in weights.items()}
    if wrapper is not None:
        # What trainers keep beside the weights; the original one has the network's name under "model".
        content = {"model": "pose_tiny", "epoch": 3, "perf": np.float64(0.7), "optimizer": {"state": {}}} | {
            wrapper: content
        }
    torch.save(content, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    model = create_model("tiny_w8", 3)
    load_weights(model, tmp_path / "checkpoint.pth")
    assert_has_weights(model, weights)


def test_checkpoint_from_before_normalisation_counters_loads_with_counters_at_zero(tmp_path: Path) -> None:
    weights = random_weights("tiny_w8")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "old.pth.tar")
    model = create_model("tiny_w8", 3)
    model(torch.randn(2, 3, 32, 32))  # one step of the counters in training mode
    load_weights(model, tmp_path / "old.pth.tar")
    assert_has_weights(model, weights)


def test_half_precision_file_fills_a_single_precision_model(tmp_path: Path) -> None:
    weights = random_weights("tiny_w8")
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(halves, tmp_path / "half.safetensors")
    model = create_model("tiny_w8", 3)
    load_weights(model, tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert torch.equal(model.state_dict()["head.weight"], halves["head.weight"].float())


def test_missing_files_and_folders_without_weights_are_named(tmp_path: Path) -> None:
    model = create_model("tiny_w8", 3)
    assert "no such file" in refusal(model, tmp_path / "nowhere.safetensors")
    assert "no such file" in refusal(model, tmp_path / "nowhere.pth")
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in refusal(model, tmp_path / "empty")
    (tmp_path / "weights.h5").write_bytes(b"something")
    assert ".safetensors, .pth" in refusal(model, tmp_path / "weights.h5")


def test_weights_of_another_architecture_are_recognised(tmp_path: Path) -> None:
    save_file(random_weights("hourglass_1x32"), tmp_path / "other.safetensors")
    model = create_model("tiny_w8", 3)
    message = refusal(model, tmp_path / "other.safetensors")
    assert "look like weights of another architecture" in message
    assert f"{len(model.state_dict())} of {len(model.state_dict())} missing" in message
    assert "unknown to the model: bn1.bias" in message

    save_file(random_weights("tiny_w16", num_keypoints=14), tmp_path / "wide.safetensors")
    message = refusal(model, tmp_path / "wide.safetensors")
    assert "another architecture, tiny_w16" in message
    assert "stem.0.weight is (8, 3, 3, 3) in the file, (4, 3, 3, 3) in the model" in message


def test_names_of_another_library_are_recognised_with_the_command_that_converts_them(tmp_path: Path) -> None:
    weights = random_weights("tiny_w8")
    save_file({f"backbone.{name}": tensor for name, tensor in weights.items()}, tmp_path / "mmpose.safetensors")
    message = refusal(create_model("tiny_w8", 3), tmp_path / "mmpose.safetensors")
    assert "its names are those of MMPose; make a model folder of it with `fpd-accel import-weights`" in message


@pytest.mark.parametrize("name", ["tiny_w8", "hourglass_2x32"])
def test_weights_for_another_number_of_keypoints_say_so(tmp_path: Path, name: str) -> None:
    save_file(random_weights(name, num_keypoints=14), tmp_path / "other.safetensors")
    message = refusal(create_model(name, 17), tmp_path / "other.safetensors")
    assert "the file has the final layer of 14 keypoints, the model has 17" in message
    assert "num_keypoints=14" in message


def test_one_missing_one_unknown_and_one_misshapen_tensor_are_each_named(tmp_path: Path) -> None:
    weights = random_weights("tiny_w8")
    del weights["up4.reduce.0.weight"]
    weights["extra.bias"] = torch.zeros(1)
    weights["head.weight"] = torch.zeros(3, 8, 3, 3)
    save_file(weights, tmp_path / "model.safetensors")
    message = refusal(create_model("tiny_w8", 3), tmp_path / "model.safetensors")
    assert "incomplete, or of a variant" in message
    assert "missing in the file: up4.reduce.0.weight" in message
    assert "1 unknown to the model: extra.bias" in message
    assert "1 of another shape: head.weight is (3, 8, 3, 3) in the file, (3, 8, 1, 1) in the model" in message


@pytest.mark.parametrize("missing", ["up4.reduce.1.num_batches_tracked", "up4.reduce.1.running_mean"])
def test_a_single_missing_buffer_is_refused(tmp_path: Path, missing: str) -> None:
    weights = random_weights("tiny_w8")
    del weights[missing]
    torch.save(weights, tmp_path / "model.pth")
    assert missing in refusal(create_model("tiny_w8", 3), tmp_path / "model.pth")


def test_tensors_that_cannot_be_copied_are_refused_before_anything_is(tmp_path: Path) -> None:
    weights = random_weights("tiny_w8")
    weights["head.bias"] = weights["head.bias"].to_sparse()
    torch.save(weights, tmp_path / "sparse.pth")
    assert "head.bias is stored in a form" in refusal(create_model("tiny_w8", 3), tmp_path / "sparse.pth")


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    model, weights = create_model("tiny_w8", 3), random_weights("tiny_w8")
    save_file(weights, tmp_path / "whole.safetensors")
    torch.save(weights, tmp_path / "whole.pth")
    for suffix in (".safetensors", ".pth"):
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        for kind, content in {
            "half": whole[: len(whole) // 2],
            "empty": b"",
            "page": b"<html>not found</html>",
        }.items():
            path = tmp_path / f"{kind}{suffix}"
            path.write_bytes(content)
            message = refusal(model, path)
            assert "damaged" in message or "empty" in message
            assert "weights_only" not in message


def test_checkpoints_without_weights_say_what_they_hold(tmp_path: Path) -> None:
    model = create_model("tiny_w8", 3)
    for content, expected in (
        ([1, 2], "of type list"),
        ({}, "an empty dictionary"),
        ({"epoch": 3}, "'epoch' is of type int"),
    ):
        torch.save(content, tmp_path / "content.pth")
        assert expected in refusal(model, tmp_path / "content.pth")


class Malicious:
    """Unpickled without a guard, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip format", "format before PyTorch 1.6"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    marker, path = tmp_path / "executed", tmp_path / "malicious.pth"
    content = {"state_dict": random_weights("tiny_w8"), "extra": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(create_model("tiny_w8", 3), path)
    assert "refused, because unpickling it would run code" in message
    assert os.mkdir.__name__ in message
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file is indeed armed
    assert marker.exists()


def test_a_whole_pickled_module_is_refused_with_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(WeightsError, match=r"it needs torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(tmp_path / "module.pth")
