"""Images kept as pixels: the same batches and the same run as from the encoded ones, built once, whole or not."""

import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from fpd_accel.config.loading import load_recipe
from fpd_accel.data import pixel_cache as module
from fpd_accel.data.augment import Augment
from fpd_accel.data.images import decode_image
from fpd_accel.data.pixel_cache import open_decoded
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, make_loader
from fpd_accel.distributed.preemption import StopSignal
from fpd_accel.errors import ConfigError, DataError, Preempted
from fpd_accel.training.resume_rules import differences
from fpd_accel.training.run import run


def test_pixels_are_those_of_the_decoder(tiny_shards: Path, tmp_path: Path) -> None:
    shards = Shards(tiny_shards)
    decoded = pickle.loads(pickle.dumps(open_decoded(shards, tmp_path)))
    assert len(decoded) == len(np.unique(shards.image_rows)) > 5
    for row in decoded.rows.tolist():
        np.testing.assert_array_equal(decoded(row), decode_image(shards.read_images([row])[0].data))
    assert decoded.path.stat().st_size == decoded.bytes
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == [".pixels"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_encoded_images(workers: int, tiny_shards: Path, tmp_path: Path) -> None:
    encoded, kept = Shards(tiny_shards), Shards(tiny_shards)
    kept.decoded = open_decoded(kept, tmp_path)

    def batches(shards: Shards) -> list[Any]:
        stream = PoseStream(shards, input_size=(64, 64), batch_size=4, augment=Augment(), stop=20)
        return list(make_loader(stream, workers, torch.device("cpu")))

    with patch("fpd_accel.data.images._decode_jpeg", side_effect=AssertionError("decoded again")):
        found = batches(kept)
    for one, other in zip(found, batches(encoded), strict=True):
        assert one.crops.equal(other.crops)
        assert one.keypoints.equal(other.keypoints)


def test_images_that_are_not_kept_are_decoded(tiny_shards: Path, tmp_path: Path) -> None:
    shards = Shards(tiny_shards)
    first, second = np.unique(shards.image_rows)[:2].tolist()
    shards.decoded = open_decoded(shards, tmp_path, rows=np.array([second]))
    encoded, pixels = (image.data for image in shards.read_images([first, second]))
    assert encoded.ndim == 1
    assert pixels.ndim == 3
    assert open_decoded(shards, tmp_path).path != shards.decoded.path


def test_a_run_has_the_curve_of_one_without(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    scores = []
    for name, values in (("plain", {}), ("cached", {"decoded_cache": str(tmp_path / "pixels")})):
        recipe = load_recipe(tiny_recipe(data=values, run={"name": name}))
        scores.append(run(recipe)[-1].metrics)
    plain, cached = (load_recipe(tmp_path / name / "recipe.yaml") for name in ("plain", "cached"))
    assert not [
        difference
        for difference in differences(plain.model_dump(mode="json"), cached.model_dump(mode="json"))[0]
        if "decoded_cache" in difference
    ]
    assert [
        difference
        for difference in differences(plain.model_dump(mode="json"), cached.model_dump(mode="json"))[1]
        if "decoded_cache" in difference
    ]
    curves = [(tmp_path / name / "checkpoints" / "latest").parent for name in ("plain", "cached")]
    weights = [(next(curve.glob("step_*")) / "student.safetensors").read_bytes() for curve in curves]
    assert weights[0] == weights[1]
    assert scores[0] == scores[1]
    assert len(list((tmp_path / "pixels").glob("*.pixels"))) == 2  # trained on, and held out


def test_a_cache_is_built_once_and_again_after_a_kill(tiny_shards: Path, tmp_path: Path) -> None:
    path = open_decoded(Shards(tiny_shards), tmp_path).path
    with patch.object(module, "_decode_all", side_effect=AssertionError("built again")):
        open_decoded(Shards(tiny_shards), tmp_path)
    whole = path.read_bytes()
    left = path.rename(path.with_name(f".{path.name}.writing"))  # as if it had been killed before the end
    os.truncate(left, 100)
    assert open_decoded(Shards(tiny_shards), tmp_path).path.read_bytes() == whole
    assert not left.exists()


def test_a_disk_without_room_is_said_before_and_leaves_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    with (
        patch.object(module.shutil, "disk_usage", return_value=SimpleNamespace(free=0)),
        pytest.raises(DataError, match=r"data.decoded_cache: .* kB are needed and 0.0 kB are free"),
    ):
        open_decoded(Shards(tiny_shards), tmp_path)
    assert not list(tmp_path.glob("*.pixels"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(DataError, match=r"cannot be written: File too large; make room"):
            open_decoded(Shards(tiny_shards), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*pixels*"))


def test_what_a_killed_process_left_does_not_count_as_taken(tiny_shards: Path, tmp_path: Path) -> None:
    decoded = open_decoded(Shards(tiny_shards), tmp_path)
    left = decoded.path.rename(decoded.path.with_name(f".{decoded.path.name}.writing"))

    def usage(_: Path) -> SimpleNamespace:  # of a disk with room for it once
        return SimpleNamespace(free=decoded.bytes - (left.stat().st_size if left.exists() else 0))

    with patch.object(module.shutil, "disk_usage", usage):
        assert open_decoded(Shards(tiny_shards), tmp_path).is_whole()


def test_a_build_that_is_asked_to_stop_does_and_leaves_nothing(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    stop = StopSignal()
    stop.name = "SIGTERM"
    recipe = load_recipe(tiny_recipe(data={"decoded_cache": str(tmp_path / "pixels")}))
    with pytest.raises(Preempted, match=r"asked to stop \(SIGTERM\) while images were decoded"):
        run(recipe, stop=stop)
    assert not list((tmp_path / "pixels").glob("*pixels*"))


def test_a_folder_that_cannot_be_made_and_an_image_that_is_damaged(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.decoded_cache: .*file/below: cannot be written"):
        open_decoded(Shards(tiny_shards), tmp_path / "file" / "below")
    with (
        patch.object(module, "decode_image", return_value=None),
        pytest.raises(DataError, match=r"image \d+\.jpg no longer decodes; prepare it again"),
    ):
        open_decoded(Shards(tiny_shards), tmp_path)
    assert not list(tmp_path.glob("*.pixels"))


def test_a_stream_cannot_be_cached(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(data={"streaming": True, "decoded_cache": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"data\.decoded_cache: streamed images come and go"):
        load_recipe(recipe)
