"""What a teacher said is read back as it was said, and a run that reads it learns what one that asks does."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fpd_accel import cache_key, teacher_cache
from fpd_accel.augment import view_in_epoch
from fpd_accel.checkpoint import checkpoints
from fpd_accel.config import Augment, load_recipe
from fpd_accel.data.lessons import Layout, Lessons, pack, unpack
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream
from fpd_accel.errors import CheckpointError, ConfigError, DataError, Preempted
from fpd_accel.model_folder import ModelConfig, load_model, save_model
from fpd_accel.models import create_model
from fpd_accel.skeleton import COCO
from fpd_accel.stop import StopRequest
from fpd_accel.teacher import Teacher
from fpd_accel.watchdog import Watchdog

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
    """A function that writes a recipe with VIEWS views of each person, and with a cache where asked."""

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


def train(recipe: Path, *overrides: str, stop: StopRequest | None = None) -> None:
    from fpd_accel.run import run

    run(load_recipe(recipe, overrides), stop=stop)


def on_two_ranks(task: list[Any]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, str(ROOT / "tests" / "ranks.py"), json.dumps([task])],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def curve(directory: Path) -> list[list[float]]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [[record[name] for name in CURVE] for record in records if record["kind"] == "train"]


def folders(root: Path) -> list[Path]:
    return sorted(path for path in (root / "teacher_cache").iterdir() if path.is_dir())


def layout(folder: Path) -> Layout:
    return Layout.model_validate(json.loads((folder / "cache.json").read_text())["layout"])


def heatmaps() -> torch.Tensor:
    """Of a teacher: a little noise below and above 0, peaks of different heights; one flat, one of nothing at all."""
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


def test_each_view_of_a_person_comes_once_in_as_many_epochs_and_people_are_not_in_step() -> None:
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


def test_crops_with_views_are_those_of_so_many_epochs_without(tiny_shards: Path) -> None:
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


def test_cached_run_gives_the_curve_of_the_uncached_one_up_to_rounding(
    distilling: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(distilling("asked"))
    for dtype in ("bf16", "uint8"):
        train(distilling(dtype, {"dtype": dtype}))
        # Relative; of both terms, by weights that came of four of Adam's steps on them.
        np.testing.assert_allclose(curve(tmp_path / dtype), curve(tmp_path / "asked"), rtol=5e-3)
    assert {layout(folder).views for folder in folders(tmp_path)} == {VIEWS}
    ask = Teacher.__call__
    for dtype in ("bf16", "uint8"):  # against a teacher that is rounded alike only float32's own rounding is left
        monkeypatch.setattr(
            Teacher, "__call__", lambda self, crops, dtype=dtype: unpack(*pack(torch.stack(ask(self, crops), 1), dtype))
        )
        train(distilling(f"rounded_{dtype}"))
        np.testing.assert_allclose(curve(tmp_path / dtype), curve(tmp_path / f"rounded_{dtype}"), rtol=1e-4)


def test_teacher_is_not_asked_in_training_and_a_second_run_reads_the_first_ones_cache(
    distilling: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []
    ask = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, crops: (asked.append(len(crops)), ask(self, crops))[1])
    train(distilling("first", {}))
    people = len(Shards(str(load_recipe(tmp_path / "first.yaml").data.train)))
    records = VIEWS * people
    assert records <= sum(asked) < records + 8  # whole batches of 8
    said = capsys.readouterr().err
    size = f"{records * 17 * 16 * 16 * 2 / 1e3:.1f} kB"
    assert f"{VIEWS} views x {people} people x 17 heatmaps of 16 x 16, bf16: {size}" in said
    assert f"pays for itself after {VIEWS} epochs" in said
    assert "too short to pay" in said  # four steps are no three epochs
    asked.clear()
    train(distilling("second", {}))
    assert not asked
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
    network, lessons = Teacher(load_model(teacher)), Lessons(folder, layout(folder))

    stream = PoseStream(
        Mixture((train_shards, valid), (1, 3)), input_size=(64, 64), batch_size=16, augment=Augment(views=VIEWS),
        unlabelled=valid, share=0.25, lessons=lessons, stop=320,
    )  # fmt: skip
    for batch in stream:
        assert batch.lessons is not None
        wanted = network(batch.crops)[-1]
        # Relative: bf16; absolute: convolutions of other batches.
        torch.testing.assert_close(unpack(batch.lessons, batch.scales)[0], wanted, rtol=1 / 256, atol=1e-5)


def test_build_that_is_stopped_goes_on_with_the_parts_that_are_missing(
    distilling: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "PART_BYTES", 1)  # the smallest parts there can be
    train(distilling("whole", {"folder": str(tmp_path / "other")}, train={"steps": 1, "global_batch": 8}))
    stop = StopRequest()
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
    assert others.exists()  # perhaps of a process that is at it
    assert kept.stat().st_mtime_ns == stamp
    (whole,) = (path for path in (tmp_path / "other").iterdir() if path.is_dir())
    parts = sorted(path.name for path in whole.glob("part_*"))
    assert len(parts) > 3
    assert [path.name for path in sorted(folder.glob("part_*"))] == parts
    for name in parts:
        found, wanted = (load_file(path / name) for path in (folder, whole))
        assert all(found[key].equal(wanted[key]) for key in wanted), name
    assert curve(tmp_path / "whole") == curve(tmp_path / "stopped")


def test_what_would_make_other_heatmaps_makes_another_cache_and_the_run_says_why(
    distilling: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(distilling("one", {}, train={"steps": 1}))
    others = {"data.augment.rotation=10": "augment.rotation", "teacher.cache.dtype=uint8": "dtype"}
    for number, (override, name) in enumerate(others.items(), start=2):
        train(tmp_path / "one.yaml", f"run.name=run_{number}", override)
        assert f"was built with other {name}\n" in capsys.readouterr().err
        assert len(folders(tmp_path)) == number


def test_other_code_or_other_people_who_can_be_used_make_another_cache(
    distilling: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(distilling("one", {}, train={"steps": 1}))
    usable = Shards(load_recipe(tmp_path / "one.yaml").data.train).usable
    monkeypatch.setattr(Shards, "usable", usable[1:])
    train(tmp_path / "one.yaml", "run.name=two")
    assert "was built with other usable_sha256\n" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(cache_key, "code_digest", lambda: "another")
    train(tmp_path / "one.yaml", "run.name=three")
    assert "was built with other code_sha256\n" in capsys.readouterr().err
    assert len(folders(tmp_path)) == 3


def test_code_that_decides_on_crops_and_outputs_is_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fpd_accel"
    shutil.copytree(Path(cache_key.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache_key, "__file__", str(package / "cache_key.py"))
    before = cache_key.code_digest.__wrapped__()
    for name in ("geometry.py", "models/tiny.py"):
        (package / name).write_text((package / name).read_text() + "\n")
        after = cache_key.code_digest.__wrapped__()
        assert after != before, name
        before = after
    (package / "trainer.py").write_text("")
    assert cache_key.code_digest.__wrapped__() == before


def test_the_runs_own_watchdog_hears_of_every_batch_that_a_build_asks_about(
    distilling: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[Watchdog, str]] = []
    asked: list[tuple[Watchdog, str]] = []
    ask, alive = Teacher.__call__, Watchdog.alive

    def noting(watchdog: Watchdog, doing: str) -> None:
        heard.append((watchdog, doing))
        alive(watchdog, doing)

    def after_a_sign_of_life(teacher: Teacher, crops: torch.Tensor) -> Any:
        asked.append(heard.pop())  # each ask takes one: a sign of life is not enough for two
        return ask(teacher, crops)

    monkeypatch.setattr(Watchdog, "alive", noting)
    monkeypatch.setattr(Teacher, "__call__", after_a_sign_of_life)
    train(distilling("built", {}, train={"steps": 1, "global_batch": 4}))
    assert len(asked) > 3
    assert all(doing.startswith("part ") for _, doing in asked)
    of_the_run = {watchdog for watchdog, doing in heard if doing.startswith("step ")}
    assert {watchdog for watchdog, _ in asked} == of_the_run


def test_cache_that_is_not_what_its_folder_is_named_after_is_refused_by_the_name_of_the_difference(
    distilling: Callable[..., Path], tmp_path: Path
) -> None:
    train(distilling("one", {}, train={"steps": 1}))
    (folder,) = folders(tmp_path)
    description = json.loads((folder / "cache.json").read_text())
    description["key"]["teacher_sha256"] = "0"
    description["key"]["augment"]["flip"] = 0.1
    (folder / "cache.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"other there: augment\.flip, teacher_sha256; remove the folder"):
        train(tmp_path / "one.yaml", "run.name=two")
    (folder / "cache.json").write_text("{")
    with pytest.raises(DataError, match=r"cache\.json: damaged"):
        train(tmp_path / "one.yaml", "run.name=three")


def test_cache_that_does_not_fit_on_the_disk_is_refused_before_the_teacher_is_asked(
    distilling: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 1000, 1000))
    monkeypatch.setattr(Teacher, "__call__", lambda *_: pytest.fail("asked"))
    wanted = r"kB more are needed .* where 1\.0 kB are free; .*views below 3 or teacher\.cache\.dtype to uint8"
    with pytest.raises(DataError, match=wanted):
        train(distilling("full", {}))


def test_part_that_vanishes_in_training_ends_it_with_its_name(distilling: Callable[..., Path], tmp_path: Path) -> None:
    train(distilling("one", {}, train={"steps": 1}))
    (folder,) = folders(tmp_path)
    lessons = Lessons(folder, layout(folder))
    lessons.read([0])
    part = lessons.path(0)
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"part_00000.safetensors: cannot be read \(cut short\)"):
        lessons.read([len(lessons.layout.records_of(0)) - 1])
    part.unlink()
    with pytest.raises(DataError, match=r"No such file"):
        lessons.read([0])


def test_run_with_a_cache_resumes_mid_epoch_bit_for_bit_and_may_lose_or_gain_it(
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


def test_every_stage_of_a_teacher_is_kept_where_each_is_compared(
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
        lessons=Lessons(folder, layout(folder)),
    )  # fmt: skip
    batch = next(iter(stream))
    assert batch.lessons is not None
    found, wanted = unpack(batch.lessons, batch.scales), Teacher(load_model(tmp_path / "stacked"))(batch.crops)
    assert len(found) == len(wanted) == 2
    for stages in zip(found, wanted, strict=True):
        torch.testing.assert_close(*stages, rtol=1 / 256, atol=1e-5)


def test_cache_without_views_or_with_a_stream_or_of_a_simcc_teacher_is_refused(
    distilling: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = distilling("wrong", {})
    with pytest.raises(ConfigError) as refused:
        load_recipe(recipe, ["data.augment.views=null", "data.streaming=true", "teacher.cache.dtype=fp4"])
    assert "teacher.cache.dtype: 'fp4' is not a choice" in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        load_recipe(recipe, ["data.augment.views=null", "data.streaming=true"])
    assert str(refused.value).count("teacher.cache:") == 2
    config = ModelConfig(
        arch="tiny_w16_simcc", skeleton=COCO, input_size=(64, 64), codec={"name": "simcc"},  # type: ignore[arg-type]
    )  # fmt: skip
    network = create_model("tiny_w16_simcc", 17, input_size=(64, 64))
    save_model(tmp_path / "simcc", network.state_dict(), config)
    overrides = [f"teacher.weights={tmp_path / 'simcc'}", "student.arch=tiny_w8_simcc", "codec.name=simcc"]
    with pytest.raises(ConfigError, match=r"teacher\.cache: keeps heatmaps alone"):
        train(recipe, *overrides, "distill.distance=kl")


@pytest.mark.timeout(200)
def test_two_processes_build_a_cache_together_that_one_reads(
    distilling: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"train": {"steps": 3, "global_batch": 8, "freeze_norm": True}, "log": {"every_steps": 1}}
    recipe = distilling("two", {}, **sections)
    done = on_two_ranks(["train_in_small_parts", str(recipe), []])
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = folders(tmp_path)
    assert layout(folder).parts % 2 == 1  # so that in the last turn one of them has none of its own
    assert len(list(folder.glob("part_*"))) == layout(folder).parts
    monkeypatch.setattr(Teacher, "__call__", lambda *_: pytest.fail("asked"))
    train(distilling("one", {}, **sections))
    np.testing.assert_allclose(curve(tmp_path / "one"), curve(tmp_path / "two"), rtol=1e-5)


@pytest.mark.timeout(200)
def test_a_folder_that_machines_do_not_share_is_noticed_before_the_teacher_is_asked(
    distilling: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = distilling("apart", {"folder": "own"})
    done = on_two_ranks(["train_on_machines_apart", str(recipe), str(tmp_path / "machine")])
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "own/" in said
    assert "is not the same folder here as on the first machine; set teacher.cache.folder" in said
    assert not list((tmp_path / "machine_0").rglob("part_*"))
    assert not list((tmp_path / "machine_0").rglob(".seen_by_all*"))
