"""The teacher cache: outputs are read back as they were computed, and training on them has the same curve."""

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import launch
from safetensors.torch import load_file

from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Augment
from fpd_accel.data.augment import view_in_epoch
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream
from fpd_accel.data.teacher_targets import CacheLayout, TeacherTargets, pack, unpack
from fpd_accel.distributed.preemption import StopSignal
from fpd_accel.distributed.watchdog import Watchdog
from fpd_accel.errors import CheckpointError, DataError, Preempted
from fpd_accel.models.create import create_model
from fpd_accel.skeleton import COCO
from fpd_accel.training.checkpoint import checkpoints
from fpd_accel.training.teacher import Teacher
from fpd_accel.training.teacher_cache import build as teacher_cache
from fpd_accel.weights.model_folder import ModelConfig, load_model, save_model

ROOT = Path(__file__).parents[1]
VIEWS = 3
CURVE = ("train_loss", "train_pose_loss", "train_kd_pose_loss")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    config = ModelConfig(arch="tiny_w16", skeleton=COCO, input_size=(64, 64))
    torch.manual_seed(0)
    save_model(tmp_path / "teacher", create_model("tiny_w16", 17).state_dict(), config)
    return tmp_path / "teacher"


@pytest.fixture
def distilling(tiny_recipe: Callable[..., Path], teacher: Path) -> Callable[..., Path]:
    """Return a function that writes a recipe with `VIEWS` views of each person, and with a cache if one is given."""

    def write(name: str, cache: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Path:
        values: dict[str, dict[str, Any]] = {
            "data": {"valid": None, "augment": {"views": VIEWS}},
            "teacher": {"weights": str(teacher), "cache": cache},
            "distill": {"mode": "fpd"},
            "train": {"steps": 4, "global_batch": 8},
        }
        for section, more in sections.items():
            values[section] = {**values.get(section, {}), **more}
        return tiny_recipe(file_name=f"{name}.yaml", run={"name": name}, **values)

    return write


def train(recipe: Path, *overrides: str, stop: StopSignal | None = None) -> None:
    from fpd_accel.training.run import run

    run(load_recipe(recipe, overrides), stop=stop)


def curve(directory: Path) -> list[list[float]]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [[record[name] for name in CURVE] for record in records if record["kind"] == "train"]


def folders(root: Path) -> list[Path]:
    return sorted(path for path in (root / "teacher_cache").iterdir() if path.is_dir())


def layout(folder: Path) -> CacheLayout:
    return CacheLayout.model_validate(json.loads((folder / "cache.json").read_text())["layout"])


def heatmaps() -> torch.Tensor:
    """Return heatmaps of a teacher: noise around 0 with peaks of different heights; one is constant, one is zero."""
    generator = torch.Generator().manual_seed(0)
    maps = 0.02 * torch.randn(4, 2, 3, 16, 12, generator=generator)
    maps[..., 5, 5] += torch.rand(4, 2, 3, generator=generator) * 2
    maps[0, 0, 0], maps[0, 0, 1] = 0.25, 0.0
    return maps


def test_bf16_keeps_each_value_to_a_256th_of_itself() -> None:
    maps = heatmaps()
    packed, scales = pack(maps, "bf16")
    assert packed.dtype == torch.bfloat16
    assert scales is None
    found = torch.stack(unpack(packed, scales), dim=1)
    assert found.dtype == torch.float32
    assert ((found - maps).abs() <= maps.abs() / 256).all()
    again, _ = pack(found, "bf16")  # what came from bf16, as under train.precision=bf16, is kept exactly
    assert again.equal(packed)


def test_uint8_keeps_each_value_to_a_510th_of_its_heatmaps_range() -> None:
    maps = heatmaps()
    packed, scales = pack(maps, "uint8")
    assert packed.dtype == torch.uint8
    found = torch.stack(unpack(packed, scales), dim=1)
    span = maps.amax(dim=(-2, -1)) - maps.amin(dim=(-2, -1))
    error = (found - maps).abs().amax(dim=(-2, -1))
    assert (error <= span / 510 + 1e-6).all()  # 1e-6: float32's last digits of values up to 2
    assert (error > span / 600).any()  # the bound is not a loose one
    assert found[0, 0, 0].equal(maps[0, 0, 0])  # flat
    assert found[0, 0, 1].equal(maps[0, 0, 1])


def test_each_view_of_a_person_comes_once_in_as_many_epochs_in_an_order_of_its_own() -> None:
    orders = []
    for person in range(40):
        seen = [view_in_epoch(7, epoch, person, views=VIEWS) for epoch in range(4 * VIEWS)]
        for cycle in range(4):
            assert sorted(seen[cycle * VIEWS : (cycle + 1) * VIEWS]) == list(range(VIEWS))
        orders.append(tuple(seen))
    assert len(set(orders)) > 30
    first = np.bincount([order[0] for order in orders], minlength=VIEWS)
    assert first.min() >= 5  # each about a third of 40
    assert view_in_epoch(7, 5, 3, views=64) != view_in_epoch(7, 5, 3, source=1, views=64)


def test_crops_with_views_are_those_of_as_many_epochs_without(tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    people = len(shards)

    def crops(views: int | None, epochs: int) -> dict[int, set[bytes]]:
        stream = PoseStream(
            shards, input_size=(32, 32), batch_size=people, augment=Augment(views=views), seed=3, stop=epochs * people
        )
        found: dict[int, set[bytes]] = {}
        for batch in stream:
            for row, crop in zip(batch.rows.tolist(), batch.crops, strict=True):
                found.setdefault(row, set()).add(crop.numpy().tobytes())
        return found

    assert crops(VIEWS, 2 * VIEWS) == crops(None, VIEWS)
    different = [len(seen) for seen in crops(VIEWS, VIEWS).values()]
    assert np.mean(different) > VIEWS - 0.5  # some draws are the same: angles of 0, and scales on their bounds


@pytest.mark.parity
def test_cached_run_gives_the_curve_of_the_uncached_one_up_to_rounding(
    distilling: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(distilling("uncached"))
    for dtype in ("bf16", "uint8"):
        train(distilling(dtype, {"dtype": dtype}))
        # Relative; of both terms, after up to four steps of Adam on them.
        np.testing.assert_allclose(curve(tmp_path / dtype), curve(tmp_path / "uncached"), rtol=5e-3)
    assert {layout(folder).views for folder in folders(tmp_path)} == {VIEWS}
    forward = Teacher.__call__
    for dtype in ("bf16", "uint8"):  # with a teacher of the same rounding, only that of float32 is left
        monkeypatch.setattr(
            Teacher,
            "__call__",
            lambda self, crops, dtype=dtype: unpack(*pack(torch.stack(forward(self, crops), 1), dtype)),
        )
        train(distilling(f"rounded_{dtype}"))
        np.testing.assert_allclose(curve(tmp_path / dtype), curve(tmp_path / f"rounded_{dtype}"), rtol=1e-4)


def test_the_teacher_does_not_run_in_training_and_a_second_run_reads_the_same_cache(
    distilling: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches: list[int] = []
    forward = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, crops: (batches.append(len(crops)), forward(self, crops))[1])
    train(distilling("first", {}))
    people = len(Shards(str(load_recipe(tmp_path / "first.yaml").data.train)))
    records = VIEWS * people
    assert records <= sum(batches) < records + 8  # whole batches of 8
    messages = capsys.readouterr().err
    size = f"{records * 17 * 16 * 16 * 2 / 1e3:.1f} kB"
    assert f"{VIEWS} views x {people} people x 17 heatmaps of 16 x 16, bf16: {size}" in messages
    assert f"pays for itself after {VIEWS} epochs" in messages
    assert "too short to pay" in messages  # four steps are less than three epochs
    batches.clear()
    train(distilling("second", {}))
    assert not batches
    assert curve(tmp_path / "first") == curve(tmp_path / "second")
    assert "complete" in capsys.readouterr().err


def test_cache_holds_the_teachers_own_heatmaps_of_every_dataset_and_of_people_without_labels(
    distilling: Callable[..., Path], teacher: Path, tiny_shards: Path, tiny_valid: Path, tmp_path: Path
) -> None:
    data = {
        "train": [{"shards": str(tiny_shards), "weight": 1}, {"shards": str(tiny_valid), "weight": 3}],
        "unlabelled": {"shards": str(tiny_valid), "share": 0.25},
    }
    train(distilling("mixed", {}, data=data, distill={"mask": "all"}, train={"steps": 2}))
    (folder,) = folders(tmp_path)
    train_shards, valid = Shards(tiny_shards), Shards(tiny_valid)
    assert layout(folder).people == (len(train_shards), len(valid), len(valid))
    network, targets = Teacher(load_model(teacher)), TeacherTargets(folder, layout(folder))

    stream = PoseStream(
        Mixture((train_shards, valid), (1, 3)), input_size=(64, 64), batch_size=16, augment=Augment(views=VIEWS),
        unlabelled=valid, share=0.25, teacher_targets=targets, stop=320,
    )  # fmt: skip
    for batch in stream:
        assert batch.teacher_targets is not None
        wanted = network(batch.crops)[-1]
        # Relative: bf16; absolute: convolutions of other batches.
        torch.testing.assert_close(unpack(batch.teacher_targets, batch.scales)[0], wanted, rtol=1 / 256, atol=1e-5)


@pytest.mark.faults
def test_build_that_is_stopped_goes_on_with_the_parts_that_are_missing(
    distilling: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "PART_BYTES", 1)  # the smallest possible parts
    train(distilling("whole", {"folder": str(tmp_path / "other")}, train={"steps": 1, "global_batch": 8}))
    stop = StopSignal()
    stop.name = "SIGTERM"
    with pytest.raises(Preempted, match="what is finished of it is kept"):
        train(distilling("stopped", {}, train={"steps": 1, "global_batch": 8}), stop=stop)
    (folder,) = folders(tmp_path)
    assert len(list(folder.glob("part_*"))) == 1
    kept = folder / "part_00000.safetensors"
    stamp = kept.stat().st_mtime_ns
    half, others = (folder / f".part_00001.safetensors.{name}.writing" for name in ("0a1b2c3d", "4e5f6a7b"))
    for staged in (half, others):
        staged.write_bytes(b"half of a part that was being written when it was kil")
    os.utime(half, (0, 0))
    (folder / "part_00002.safetensors").write_bytes(kept.read_bytes()[:-1])  # and one that lost its end
    train(distilling("stopped", {}, train={"steps": 1, "global_batch": 8}))
    assert not half.exists()
    assert others.exists()  # another process may be writing it
    assert kept.stat().st_mtime_ns == stamp
    (whole,) = (path for path in (tmp_path / "other").iterdir() if path.is_dir())
    parts = sorted(path.name for path in whole.glob("part_*"))
    assert len(parts) > 3
    assert [path.name for path in sorted(folder.glob("part_*"))] == parts
    for name in parts:
        found, wanted = (load_file(path / name) for path in (folder, whole))
        assert all(found[key].equal(wanted[key]) for key in wanted), name
    assert curve(tmp_path / "whole") == curve(tmp_path / "stopped")


@pytest.mark.faults
def test_settings_that_change_heatmaps_make_another_cache_and_the_run_names_them(
    distilling: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(distilling("one", {}, train={"steps": 1}))
    others = {"data.augment.rotation=10": "augment.rotation", "teacher.cache.dtype=uint8": "dtype"}
    for number, (override, name) in enumerate(others.items(), start=2):
        train(tmp_path / "one.yaml", f"run.name=run_{number}", override)
        assert f"was built with other {name}\n" in capsys.readouterr().err
        assert len(folders(tmp_path)) == number


@pytest.mark.faults
def test_other_code_or_other_usable_people_make_another_cache(
    distilling: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(distilling("one", {}, train={"steps": 1}))
    usable = Shards(load_recipe(tmp_path / "one.yaml").data.train).usable
    monkeypatch.setattr(Shards, "usable", usable[1:])
    train(tmp_path / "one.yaml", "run.name=two")
    assert "was built with other usable_sha256\n" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(teacher_cache, "code_digest", lambda: "another")
    train(tmp_path / "one.yaml", "run.name=three")
    assert "was built with other code_sha256\n" in capsys.readouterr().err
    assert len(folders(tmp_path)) == 3


def test_the_key_covers_all_code_that_determines_crops_and_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fpd_accel"
    shutil.copytree(Path(teacher_cache.__file__).parents[2], package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(teacher_cache, "__file__", str(package / "training/teacher_cache/build.py"))
    before = teacher_cache.code_digest.__wrapped__()
    for name in ("geometry.py", "models/tiny.py"):
        (package / name).write_text((package / name).read_text() + "\n")
        after = teacher_cache.code_digest.__wrapped__()
        assert after != before, name
        before = after
    (package / "training" / "trainer.py").write_text("")
    assert teacher_cache.code_digest.__wrapped__() == before


def test_the_watchdog_of_the_run_is_told_of_every_batch_of_a_build(
    distilling: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[Watchdog, str]] = []
    signs: list[tuple[Watchdog, str]] = []
    forward, alive = Teacher.__call__, Watchdog.alive

    def record(watchdog: Watchdog, doing: str) -> None:
        heard.append((watchdog, doing))
        alive(watchdog, doing)

    def after_a_sign_of_life(teacher: Teacher, crops: torch.Tensor) -> Any:
        signs.append(heard.pop())  # one sign of life per batch
        return forward(teacher, crops)

    monkeypatch.setattr(Watchdog, "alive", record)
    monkeypatch.setattr(Teacher, "__call__", after_a_sign_of_life)
    train(distilling("built", {}, train={"steps": 1, "global_batch": 4}))
    assert len(signs) > 3
    assert all(doing.startswith("part ") for _, doing in signs)
    of_the_run = {watchdog for watchdog, doing in heard if doing.startswith("step ")}
    assert {watchdog for watchdog, _ in signs} == of_the_run


def test_a_cache_that_differs_from_its_key_is_refused_with_the_difference(
    distilling: Callable[..., Path], tmp_path: Path
) -> None:
    train(distilling("one", {}, train={"steps": 1}))
    (folder,) = folders(tmp_path)
    description = json.loads((folder / "cache.json").read_text())
    description["key"]["teacher_sha256"] = "0"
    description["key"]["augment"]["flip"] = 0.1
    (folder / "cache.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"it differs in augment\.flip, teacher_sha256; remove the folder"):
        train(tmp_path / "one.yaml", "run.name=two")
    (folder / "cache.json").write_text("{")
    with pytest.raises(DataError, match=r"cache\.json: damaged"):
        train(tmp_path / "one.yaml", "run.name=three")


def test_a_cache_that_does_not_fit_on_the_disk_is_refused_before_the_teacher_runs(
    distilling: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 1000, 1000))
    monkeypatch.setattr(Teacher, "__call__", lambda *_: pytest.fail("the teacher ran"))
    wanted = r"kB more are needed .* where 1\.0 kB are free; .*views below 3 or teacher\.cache\.dtype to uint8"
    with pytest.raises(DataError, match=wanted):
        train(distilling("full", {}))


@pytest.mark.faults
def test_a_part_that_vanishes_in_training_is_named(distilling: Callable[..., Path], tmp_path: Path) -> None:
    train(distilling("one", {}, train={"steps": 1}))
    (folder,) = folders(tmp_path)
    targets = TeacherTargets(folder, layout(folder))
    targets.read([0])
    part = targets.path(0)
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"part_00000.safetensors: cannot be read \(cut short\)"):
        targets.read([len(targets.layout.records_of(0)) - 1])
    part.unlink()
    with pytest.raises(DataError, match=r"No such file"):
        targets.read([0])


@pytest.mark.faults
def test_a_run_with_a_cache_resumes_mid_epoch_bit_for_bit_and_may_drop_the_cache(
    distilling: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {
        "checkpoint": {"every_steps": 2},
        "data": {"valid": None, "augment": {"views": VIEWS}, "workers": 1},
    }
    train(distilling("whole", {}, **sections))
    train(distilling("resumed", {}, **sections), "train.steps=2")
    train(tmp_path / "resumed.yaml")
    assert curve(tmp_path / "whole") == curve(tmp_path / "resumed")
    ends = [
        load_file(checkpoints(tmp_path / name / "checkpoints")[-1] / "student.safetensors")
        for name in ("whole", "resumed")
    ]
    assert all(ends[0][key].equal(ends[1][key]) for key in ends[0])
    train(tmp_path / "resumed.yaml", "teacher.cache=null", "train.steps=5")
    assert "changed since the run began: teacher.cache.dtype: bf16 -> None" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(CheckpointError, match=r"data\.augment\.views: 3 -> 4"):
        train(tmp_path / "resumed.yaml", "data.augment.views=4", "train.steps=6")


@pytest.mark.parity
def test_every_stage_of_a_teacher_is_cached_where_each_is_compared(
    distilling: Callable[..., Path], tiny_shards: Path, tmp_path: Path
) -> None:
    config = ModelConfig(arch="hourglass_2x16", skeleton=COCO, input_size=(64, 64))
    save_model(tmp_path / "stacked", create_model("hourglass_2x16", 17).state_dict(), config)
    recipe = distilling(
        "each", {}, student={"arch": "hourglass_2x16"}, distill={"mode": "fpd", "teacher_stage": "each"},
        train={"steps": 1, "global_batch": 2}, data={"valid": None, "augment": {"views": 1}},
    )  # fmt: skip
    train(recipe, f"teacher.weights={tmp_path / 'stacked'}")
    (folder,) = folders(tmp_path)
    stream = PoseStream(
        Shards(tiny_shards), input_size=(64, 64), batch_size=2, augment=Augment(views=1),
        teacher_targets=TeacherTargets(folder, layout(folder)),
    )  # fmt: skip
    batch = next(iter(stream))
    assert batch.teacher_targets is not None
    found, wanted = unpack(batch.teacher_targets, batch.scales), Teacher(load_model(tmp_path / "stacked"))(batch.crops)
    assert len(found) == len(wanted) == 2
    for stages in zip(found, wanted, strict=True):
        torch.testing.assert_close(*stages, rtol=1 / 256, atol=1e-5)


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_two_processes_build_a_cache_together_that_one_reads(
    distilling: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"train": {"steps": 3, "global_batch": 8, "freeze_norm": True}, "log": {"every_steps": 1}}
    recipe = distilling("two", {}, **sections)
    launch(2, [["train_in_small_parts", str(recipe), []]])
    (folder,) = folders(tmp_path)
    assert layout(folder).parts % 2 == 1  # so that in the last round one rank has no part
    assert len(list(folder.glob("part_*"))) == layout(folder).parts
    monkeypatch.setattr(Teacher, "__call__", lambda *_: pytest.fail("the teacher ran"))
    train(distilling("one", {}, **sections))
    np.testing.assert_allclose(curve(tmp_path / "one"), curve(tmp_path / "two"), rtol=1e-5)


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_a_folder_that_machines_do_not_share_is_refused_before_the_teacher_runs(
    distilling: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = distilling("apart", {"folder": "own"})
    messages = launch(2, [["train_on_machines_apart", str(recipe), str(tmp_path / "machine")]], expected=2)
    assert "own/" in messages
    assert "is not the same folder here as on the first machine; set teacher.cache.folder" in messages
    assert not list((tmp_path / "machine_0").rglob("part_*"))
    assert not list((tmp_path / "machine_0").rglob(".seen_by_all*"))
