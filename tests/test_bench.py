"""`fpd-accel bench data`: it runs, and reports its measurements."""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fpd_accel import cli
from fpd_accel.bench import crowd, data, loaders, probe
from fpd_accel.bench.crowd import draw_crowd
from fpd_accel.bench.environment import describe, environment
from fpd_accel.bench.probe import payload
from fpd_accel.bench.variants import draw_batch
from fpd_accel.data.batch import Batch
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import READ_AHEAD, PoseStream, make_loader
from fpd_accel.errors import BenchError, DataError


@pytest.fixture
def measured_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "OPENINGS", 1)
    monkeypatch.setattr(data, "MEMORY_WORKERS", (0, 2))
    monkeypatch.setattr(data, "RATE_WORKERS", (0, 1))
    monkeypatch.setattr(probe, "REPEATS", 1)
    monkeypatch.setattr(crowd, "PHOTOGRAPHED", 10)
    monkeypatch.setattr(crowd, "PICTURES", 2)
    monkeypatch.setattr(loaders, "ROUNDS", 2)
    monkeypatch.setattr(loaders, "WORKERS", (0, 1))
    monkeypatch.setattr(loaders, "use_one_thread", lambda: None)  # for good, and of all tests that follow


@pytest.fixture
def probed_here(
    measured_little: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[dict[str, Any]]:
    """Measure little and in this process, which has imported everything, and list the options of each measurement."""
    requested = []

    def here(function: str, **options: Any) -> dict[str, Any]:
        requested.append(options)
        assert probe.main([function, json.dumps(options)]) == 0
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(data, "_probe", here)
    return requested


@pytest.fixture
def probes_end_here(measured_little: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Measure little, with the output and exit code of a process of its own."""

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "fpd_accel.bench.probe"]
        code = probe.main(command[3:])
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    monkeypatch.setattr(data, "subprocess", SimpleNamespace(run=run))


@pytest.mark.parity
def test_bench_data_prints_a_table_and_writes_the_same_as_json(
    probed_here: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "data", "--people", "7", "30", "--batch", "4", "--batches", "2"]
    paths = ["--cache", tmp_path / "cache", "--json", tmp_path / "report.json"]
    assert cli.main([*arguments, *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["bench"] == "data"
    assert report["environment"]["versions"]["torch"]
    assert report["settings"]["batch"] == 4
    small, large = report["datasets"]
    assert (small["people"], small["images"], large["people"], large["images"]) == (7, 3, 30, 12)
    for dataset in (small, large):
        assert 0 < dataset["open_seconds"] < 60
        assert set(dataset["loading"]) == {"0", "1", "2"}
        for workers, measured in dataset["loading"].items():
            assert measured["samples_per_second"] > 0
            assert all(0 < measured["first_batch_seconds"][name] < 60 for name in ("start", "far"))
            assert len(measured["worker_memory"]) == int(workers)
            sent = 4 * (256 * 192 * 3 + 17 * 3 * 4 + 4 * 4 + 8)  # crops, keypoints, regions and rows of a batch
            assert measured["read_ahead_bytes"] == int(workers) * READ_AHEAD * sent
            for memory in filter(None, measured["worker_memory"]):
                assert 0 < memory["private"] <= memory["anonymous"] * 1.5
                assert memory["anonymous"] <= memory["proportional"]
    for words in ("30 people", "12 images", "last / first", "open, s", "each of 2 workers", "samples/s, 1 worker"):
        assert words in printed
    ahead = next(line for line in printed.splitlines() if "batches read ahead, 2 workers, MB" in line)
    assert ahead.count(" 5 ") == 2  # of both datasets: 2 workers, 4 batches, 4 people, 148 kB each
    assert "batches read ahead are in shared memory and come on top" in printed
    assert f"{large['loading']['0']['samples_per_second']:,.0f}" in printed
    (compared,) = report["loaders"]
    assert (compared["people"], set(compared["compared"]["workers"])) == (10, {"0", "1"})
    assert "Loader against the published one's" in printed
    written = sorted((tmp_path / "cache").iterdir())
    assert [folder.name for folder in written] == ["people_30", "people_7", "photographs_10"]
    (decoded,) = [options["folder"] for options in probed_here if "folder" in options]
    assert Path(decoded).parent == tmp_path / "cache"
    kept = [folder.stat().st_mtime_ns for folder in written]
    assert cli.main(["bench", "data", "--people", "7", "--batches", "1", "--cache", str(tmp_path / "cache")]) == 0
    assert "last / first" not in capsys.readouterr().out
    assert [folder.stat().st_mtime_ns for folder in written] == kept  # written once


@pytest.mark.faults
def test_a_probe_is_a_process_of_its_own(tiny_shards: Path) -> None:
    found = data._probe("probe:time_opening", path=str(tiny_shards), cold=False)
    shards = Shards(tiny_shards)
    assert (found["people"], found["images"]) == (len(shards), len(shards.images))
    assert 0 < found["seconds"] < 60


class FakeLoader(Iterator[Batch]):
    """Returns a batch in 1 second; its processes take 5 to end, whether it is closed or dropped."""

    _workers = ()

    def __init__(self, clock: SimpleNamespace, happened: list[str]) -> None:
        self.clock, self.happened, self.running = clock, happened, True

    def __next__(self) -> Batch:
        self.clock.seconds += 1
        return draw_batch(2, 3, (4, 3))

    def _shutdown_workers(self) -> None:
        self._end("closed")

    def __del__(self) -> None:
        self._end("dropped")

    def _end(self, how: str) -> None:
        if self.running:
            self.running = False
            self.clock.seconds += 5
            self.happened.append(how)


def test_closing_a_loader_is_not_timed_and_comes_after_its_memory(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, happened = SimpleNamespace(seconds=0.0), list[str]()
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    monkeypatch.setattr(probe, "make_loader", lambda *_: FakeLoader(clock, happened))
    monkeypatch.setattr(probe, "memory", lambda *_: happened.append("memory"))
    found = probe.time_loading(str(tiny_shards), workers=2, batch=2, batches=7)
    assert found["first_batch_seconds"] == {"start": 1, "far": 1}
    assert found["samples_per_second"] == 2
    assert found["read_ahead_bytes"] == 2 * READ_AHEAD * payload(draw_batch(2, 3, (4, 3)))
    firsts = 2 * probe.REPEATS
    assert happened[:firsts] == ["closed"] * firsts
    assert happened[firsts] == "memory"
    assert happened[-1] == "closed"
    assert "dropped" not in happened


def test_a_loader_reads_ahead_as_many_batches_as_reported(tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    own = PoseStream(shards, input_size=(64, 48), batch_size=2)
    assert make_loader(own, 2, torch.device("cpu")).prefetch_factor == READ_AHEAD


def test_a_cold_opening_reads_every_file_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, forgotten = draw_crowd(tmp_path, 5), []

    def forget(file: int, *_: int) -> None:
        forgotten.append(str(Path(f"/proc/self/fd/{file}").readlink()))

    monkeypatch.setattr(os, "posix_fadvise", forget)
    probe.time_opening(str(shards.path), cold=True)
    assert sorted(forgotten) == sorted(str(path) for path in Path(shards.path).rglob("*") if path.is_file())
    assert {"usable.npy", "dataset.json"} < {Path(name).name for name in forgotten}


@pytest.mark.parity
def test_own_data_are_measured_where_they_are(
    probed_here: list[dict[str, Any]], tiny_shards: Path, tiny_valid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "data", "--data", str(tiny_shards), str(tiny_valid), "--batches", "1"]) == 0
    assert f"{len(Shards(tiny_valid))} people" in capsys.readouterr().out
    assert {options["path"] for options in probed_here} == {str(tiny_shards), str(tiny_valid)}


def test_a_crowd_is_ordinary_shards(tmp_path: Path) -> None:
    shards = draw_crowd(tmp_path, 50)
    assert (len(shards), len(shards.images)) == (50, 20)
    batch = PoseStream(shards, input_size=(64, 48), batch_size=50).batch(range(50))
    assert float(batch.visible.min()) == 1
    assert batch.crops.float().std() > 20  # grey levels: there is something to see
    assert draw_crowd(tmp_path / "again", 50).fingerprint == shards.fingerprint


def test_an_environment_names_machine_and_versions() -> None:
    line = describe(environment())
    for words in ("cores", "GB", "Python 3", "torch ", "datasets ", "fpd-accel "):
        assert words in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--people", "0"], "--people 0: at least 1"),
        (["--batch", "0"], "--batch 0: at least 1"),
        (["--batches", "-1"], "--batches -1: at least 1"),
        (["--data", "nowhere"], "nowhere: not a prepared dataset"),
        (["--data", "nowhere", "--people", "3"], "--data does not go with --people and --cache"),
        (["--people", "3", "--cache", "occupied/below"], "occupied/below: cannot be made"),
        (["--people", str(10**12), "--cache", "cache"], "need 5000000.0 GB, but"),
        (["--people", "3", "--json", "folder"], "folder: is a folder; --json is the file to write"),
    ],
)
def test_impossible_options_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").touch()
    (tmp_path / "folder").mkdir()
    assert cli.main(["bench", "data", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.faults
def test_shards_that_cannot_be_read_are_refused_by_the_process_that_reads_them(tmp_path: Path) -> None:
    shards = draw_crowd(tmp_path, 5)
    next((shards.path / "people").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match=r"people_5/people: cannot be opened"):
        data.bench_data([shards])


def no_memory(*_: Any) -> Batch:
    raise MemoryError("Unable to allocate 137. GiB")


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("batch", no_memory, "no memory for batches of 3 samples; lower --batch"),
        ("_keypoints", lambda _, person, *__: (person.keypoints[:, :2] - 9, person.keypoints[:, 2] > 0), "differ, so"),
    ],
)
def test_a_mistake_in_a_probe_is_one_message(
    name: str,
    wrong: Any,
    message: str,
    probes_end_here: None,
    tiny_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(data, "MEMORY_WORKERS", (0,))
    monkeypatch.setattr(data, "RATE_WORKERS", (0,))
    monkeypatch.setattr(PoseStream, name, wrong)
    arguments = ["--data", str(tiny_shards), "--batch", "3", "--batches", "1"]
    assert cli.main(["bench", "data", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {tiny_shards}: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: cannot be written: .* choose another --cache"):
        data._compare(draw_crowd(tmp_path, 5), tmp_path / "nowhere", {})


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (2, "data.decoded_cache: 5 images\nerror: no room\n", "^no room$"),
        (-9, "", "^shards: the measuring process was killed, .* lower --batch$"),
    ],
)
def test_a_probe_that_fails_is_reported_in_one_line(
    code: int, error: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.CompletedProcess([], code, "", error)
    monkeypatch.setattr(data, "subprocess", SimpleNamespace(run=lambda *_, **__: ended))
    with pytest.raises((DataError, BenchError), match=message):
        data._probe("probe:time_opening", path="shards", cold=False)
