"""Our loader beside the published one, and the ways in which it is faster without changing a pixel."""

import itertools
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import default_collate

from fpd_accel.bench import loaders
from fpd_accel.bench.crowd import draw_crowd
from fpd_accel.bench.probe import payload
from fpd_accel.bench.published.loader import PublishedDataset
from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Augment
from fpd_accel.data import stream as stream_module
from fpd_accel.data.arrow_columns import BytesColumn, Column
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, by_image
from fpd_accel.errors import BenchError
from fpd_accel.geometry import crop_matrix, mirror_matrix
from fpd_accel.training import run_log as log

SIZE = (64, 48)  # (height, width) of crops


def stream(shards: Shards, **options: Any) -> PoseStream:
    return PoseStream(shards, **{"input_size": SIZE, "batch_size": 4, "augment": Augment(), "stop": 10**6} | options)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return draw_crowd(tmp_path_factory.mktemp("crowd"), 40)


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a comparison, without workers."""
    monkeypatch.setattr(loaders, "ROUNDS", 1)
    monkeypatch.setattr(loaders, "WORKERS", (0,))
    monkeypatch.setattr(loaders, "use_one_thread", lambda: None)  # for good, and of all tests that follow


# --- the published loader -----------------------------------------------------------------------------------------


def shifted(*arguments: Any, **options: Any) -> np.ndarray:
    return np.add(crop_matrix(*arguments, **options), [[0, 0, 0.5], [0, 0, 0]])  # crop pixels to the right


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("crop_matrix", shifted, "keypoints by 0.5 crop pixels"),
        ("mirror_matrix", lambda matrix, width: mirror_matrix(matrix, width + 1), "grey levels at most"),
    ],
)
def test_loaders_that_differ_are_not_timed(
    name: str,
    wrong: Callable[..., Any],
    message: str,
    crowd: Shards,
    one_round: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, name, wrong)
    monkeypatch.setattr(loaders, "make_loader", None)
    with pytest.raises(BenchError, match=message):
        loaders.compare_loaders(crowd.path, tmp_path, input_size=SIZE, batch=4, batches=1)
    assert not list(tmp_path.iterdir())  # nothing was decoded for it either


def test_bytes_of_a_batch_are_those_of_its_tensors(tiny_shards: Path) -> None:
    own = stream(Shards(tiny_shards), batch_size=2)
    pixels, joints = SIZE[0] * SIZE[1] * 3, own.skeleton.num_keypoints
    assert payload(own.batch(range(2))) == 2 * (pixels + joints * 3 * 4 + 4 * 4 + 8)
    batch = default_collate([PublishedDataset(own, 2)[i] for i in range(2)])
    heatmaps, meta = joints * 16 * 12 * 4, 2 * joints * 3 * 8 + 2 * 4 + 2 * 8 + 3 * 8
    found = payload(batch)
    assert found >= 2 * (pixels * 4 + heatmaps + joints * 4)
    assert found <= 2 * (pixels * 4 + heatmaps + joints * 4 + meta)


def test_a_comparison_gives_each_ratio_of_what_it_timed(
    crowd: Shards,
    one_round: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepared = []
    prepare = loaders.prepare
    monkeypatch.setattr(loaders, "prepare", lambda batch, codec: prepared.append(len(batch)) or prepare(batch, codec))  # type: ignore[func-returns-value]
    found = loaders.compare_loaders(crowd.path, tmp_path, input_size=SIZE, batch=4, batches=2)
    measured = found["workers"]["0"]
    rates = {name: rate["median"] for name, rate in measured["samples_per_second"].items()}
    assert rates.keys() == {"ours", "prepared", "reference", "grouped", "decoded"}
    assert prepared == [4, 4, 4]  # the first batch and the two that are timed, of one variant
    for name in ("ours", "prepared", "grouped", "decoded"):
        assert measured["ratio"][name]["median"] == pytest.approx(rates[name] / rates["reference"])
    assert found["bytes_per_sample"]["ours"] < found["bytes_per_sample"]["reference"] / 4
    kept = [crowd.columns(["image_row"], [stream(crowd).place(sample).row])["image_row"] for sample in range(12)]
    assert found["decoded_bytes"] == len(np.unique(kept)) * 120 * 160 * 3  # of the three batches that are read
    loaders.show_loaders("crowd", len(crowd), found)
    printed = capsys.readouterr().out
    for rate in rates.values():
        assert f"{rate:,.0f} (" in printed
    for words in ("ours, with normalising and targets", "left to the device", "other people per batch", "from memory"):
        assert words in printed


def test_no_more_batches_are_compared_than_the_cache_has_room_for(
    crowd: Shards, one_round: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = stream(crowd)
    rows = [int(crowd.columns(["image_row"], [own.place(sample).row])["image_row"][0]) for sample in range(40)]

    def fitting(most: int) -> int:
        monkeypatch.setattr(loaders, "CACHE_AT_MOST", most)
        return loaders.batches_per_round(own, 50)

    def decoded(batches: int) -> int:
        return len(set(rows[: 4 * batches])) * 120 * 160 * 3

    assert decoded(2) < decoded(3) < decoded(4)
    assert fitting(decoded(3)) == fitting(decoded(4) - 1) == 2  # and one before them
    assert fitting(decoded(10)) == 50  # again and again from the same images
    with pytest.raises(
        BenchError, match=r"the decoded images of 2 batches of 4 samples take more than .* lower --batch"
    ):
        fitting(decoded(2) - 1)


# --- rows of columns ----------------------------------------------------------------------------------------------


def chunked(values: list[Any], kind: pa.DataType) -> pa.ChunkedArray:
    """The values in chunks, some of them empty and one a slice of a longer array."""
    sliced = pa.array([values[0], *values[2:5], values[0]], kind)[1:4]
    return pa.chunked_array([pa.array(values[:2], kind), pa.array([], kind), sliced, pa.array(values[5:], kind)])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_rows_of_bytes_are_those_that_were_written(kind: pa.DataType) -> None:
    values = [b"abc", b"", b"d", b"efgh", b"", b"ij", b"k"]
    column = BytesColumn(chunked(values, kind))
    for row in (6, 0, 1, 3, 2, 4, 5):
        assert column[row].tobytes() == values[row]


def test_rows_of_numbers_are_those_that_were_written() -> None:
    values = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    rows = [8, 3, 3, 0, 5, 2]
    lists = Column(chunked(values.tolist(), pa.list_(pa.float32(), 4)))
    np.testing.assert_array_equal(lists[rows], values[rows])
    assert lists[rows].dtype == np.float32
    single = Column(chunked(list(range(9)), pa.int64()))
    assert single[rows].tolist() == rows


# --- one decoding for all people of an image ----------------------------------------------------------------------


def test_an_image_is_decoded_once_for_all_its_people_of_a_batch(crowd: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = stream_module.decode_image
    monkeypatch.setattr(stream_module, "decode_image", lambda data, rows: decoded.append(rows) or decode(data))  # type: ignore[func-returns-value]
    own = stream(crowd)
    together = own.batch(range(40))
    assert len(decoded) == len(crowd.images)
    for sample in (0, 7, 39):
        alone = own.batch(range(sample, sample + 1))
        assert torch.equal(alone.crops[0], together.crops[sample])
        assert torch.equal(alone.keypoints[0], together.keypoints[sample])


def test_people_of_one_image_are_neighbours_and_each_person_comes_once() -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 60, 200)
    order = generator.permutation(200).astype(np.int32)
    found = by_image(order, images)
    assert sorted(found.tolist()) == list(range(200))
    runs = [image for image, _ in itertools.groupby(images[found].tolist())]
    assert len(runs) == len(set(runs)) == len(np.unique(images))
    position = {int(person): place for place, person in enumerate(order)}
    for image in runs:  # among themselves they have the order they had
        own = [position[int(person)] for person in found if images[person] == image]
        assert own == sorted(own)


def test_images_of_many_people_come_no_earlier_than_others() -> None:
    images = np.array([0] * 9 + list(range(1, 10)))  # ten images, nine people in the first
    generator = np.random.default_rng(0)
    ranks = []
    for _ in range(600):
        found = images[by_image(generator.permutation(18), images)].tolist()
        ranks.append([image for image, _ in itertools.groupby(found)].index(0))
    assert np.mean(ranks) == pytest.approx(4.5, abs=0.6)  # five standard errors


def test_a_grouped_epoch_has_each_person_once_on_any_ranks_and_after_a_resume(crowd: Shards) -> None:
    def people(own: PoseStream) -> list[list[int]]:
        return [batch.rows.tolist() for batch in own]

    whole = people(stream(crowd, group_by_image=True, stop=80))
    first, second = whole[:10], whole[10:]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(40))
    assert first != second
    assert people(stream(crowd, group_by_image=True, start=28, stop=80)) == whole[7:]
    ranks = [people(stream(crowd, group_by_image=True, stop=80, rank=rank, ranks=2)) for rank in range(2)]
    assert [batch for both in zip(*ranks, strict=True) for batch in both] == whole
    runs = [image for image, _ in itertools.groupby(crowd.image_rows[list(chain(*first))].tolist())]
    assert len(runs) == len(crowd.images)
    ungrouped = people(stream(crowd, stop=40))
    assert list(chain(*ungrouped)) == [int(crowd.usable[k]) for k in crowd.order(0, 0, source=0)]


def test_grouping_is_a_knob_that_alters_the_result(tiny_recipe: Callable[..., Path]) -> None:
    from fpd_accel.training.resume_rules import differences

    plain = load_recipe(tiny_recipe())
    grouped = load_recipe(tiny_recipe(data={"group_by_image": True}))
    altering, _ = differences(plain.model_dump(mode="json"), grouped.model_dump(mode="json"))
    assert altering == ["data.group_by_image: False -> True"]


# --- the time of a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "device"), [((0.04, 0.01), 0.0), ((0.0, 0.01), 0.1), ((0.01, 0.0), 0.3)])
def test_a_device_that_is_behind_counts_as_the_steps_and_not_as_the_loaders(
    host: tuple[float, float], device: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(log.time, "perf_counter", lambda: now)

    class Behind:  # reading its values waits for the device
        def reduce(self, values: torch.Tensor, **_: str) -> torch.Tensor:
            nonlocal now
            now += device
            return values

    meter = log.StepMeter(Behind())  # type: ignore[arg-type]
    for step in range(4):
        meter.add(torch.zeros(4), step=step, data_time=host[0], step_time=host[1])
    records = meter.flush()
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    for record in records:
        assert record["data_time"] + record["step_time"] == pytest.approx(sum(host) + device / 4)
        assert record["data_time"] == pytest.approx(max(0.0, host[0] - device / 4))


# --- how many workers would do ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("load", [0.31, 1.0, 2.9])  # seconds that one process needs for the people of a step
def test_as_many_workers_suffice_as_keep_up_with_the_device(workers: int, load: float) -> None:
    step = 0.2  # seconds on the device
    waited = max(load / workers - step, 0) if workers else load
    found = log.sufficient_workers(waited, step, workers=workers)
    if waited:
        assert load / found <= step * (1 + 1e-9)
        assert found == 1 or load / (found - 1) > step
    else:
        assert found <= max(workers, 1)


@pytest.mark.parametrize(("cores", "few"), [(16, False), (4, True)])
def test_a_warning_names_the_number_of_workers_that_suffices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cores: int, few: bool
) -> None:
    monkeypatch.setattr(log, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    names = (*log.StepMeter.NAMES, "lr")
    record = dict.fromkeys(names, 0.1) | {"epoch": 0.5, "samples": 100, "data_time": 1.5, "step_time": 0.5}
    records = [{**record, "step": step, "data_time": 1.5 if step > 1 else 60.0} for step in range(1, 13)]
    with log.RunLog(tmp_path, total_steps=12, step=0, workers=2, trackers=Mock(log.Trackers)) as run_log:
        run_log.train(records[:6])
        run_log.train(records[6:])
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("waiting for data") == 1
    assert "75 % of the time" in said  # the first step, in which everything starts, left out
    assert "it gives 50 samples/s with data.workers=2, the device could take 200: data.workers=8 would suffice" in said
    assert f"this machine has {cores} cores for 2 ranks" in said
    assert ("too few" in said) == few
