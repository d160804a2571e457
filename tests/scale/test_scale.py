"""`scale.py`: it runs, reports its measurements, and ends processes that fail or hang."""

import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scale
import scale_ranks
import torch

from fpd_accel.errors import BenchError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: for so little work more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_environment_is_read_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> dict[str, Any]:
        raise BenchError("read")

    monkeypatch.setattr(scale, "environment", read)
    monkeypatch.setattr(scale, "run_ranks", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(BenchError, match="read"):
        scale.bench_scale(scale.Scale(), tmp_path)


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 2.0])
def test_the_exponent_of_growth_is_that_of_a_power(exponent: float) -> None:
    sizes = [10, 40, 1000]
    assert scale.growth(sizes, [0.3 * size**exponent for size in sizes]) == pytest.approx(exponent, abs=1e-9)
    assert scale.growth([10], [1.0]) is None


@pytest.mark.parametrize(("rounds", "before"), [(1, [20]), (2, [300, 20])])
def test_lazy_initialisation_happens_before_the_first_timed_round(rounds: int, before: list[int]) -> None:
    order: list[int] = []
    works = {"work": {size: lambda size=size: order.append(size) for size in (300, 20)}}
    (measured,) = scale._measured(works, "people", rounds=rounds)
    assert order == before + rounds * [300, 20]
    assert measured.sizes == [300, 20]


@pytest.mark.parametrize(("rounds", "done"), [(1, 1), (2, 2), (9, scale.PROCESS_ROUNDS)])
def test_numbers_of_processes_take_turns(rounds: int, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []

    def run(processes: int, *, batch: int, steps: int) -> float:
        order.append(processes)
        return [4.0, 1.0, 2.0, 8.0, 5.0, 16.0][len(order) - 1]  # samples per second

    monkeypatch.setattr(scale, "run_ranks", run)
    measured = scale._of_processes(scale.Scale(processes=(1, 2), rounds=rounds))
    assert order == done * [1, 2]
    rates = [4.0, 2.0, 5.0], [1.0, 8.0, 16.0]
    assert measured.seconds == [statistics.median(1 / rate for rate in own[:done]) for own in rates]


@pytest.fixture
def ranks_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Train in this process, which has imported everything, for any number of processes."""
    monkeypatch.setattr(scale, "INPUT_SIZE", (64, 48))

    def here(processes: int, *, batch: int, steps: int) -> float:
        arguments = ["--batch", str(batch), "--steps", str(steps), "--input-size", "64", "48"]
        assert scale_ranks.main([*arguments, "--student", "tiny_w8", "--teacher", "tiny_w8"]) == 0
        return processes * float(json.loads(capsys.readouterr().out)["samples_per_second"])

    monkeypatch.setattr(scale, "run_ranks", here)


def test_scale_prints_a_table_and_writes_the_same_as_json(
    ranks_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--batch", "2", "--steps", "1", "--rounds", "1", "--inputs", "64x48", "96x64", "--people", "5", "40"]
    paths = ["--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "r.json")]
    sizes = ["--processes", "1", "2", "--scored", "5", "40", "--joints", "17", "133"]
    assert scale.main([*arguments, *sizes, *paths]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_bytes())
    assert report["bench"] == "scale"
    assert len(report["measurements"]) == 11
    for one in report["measurements"]:
        assert one["work"] in printed
        assert len(one["sizes"]) == 2
        assert min(one["seconds"]) > 0
        assert one["exponent"] == pytest.approx(scale.growth(one["sizes"], one["seconds"]))
        assert f"{one['exponent']:.2f}" in printed
    sizes_of = {one["work"]: (one["size"], one["sizes"]) for one in report["measurements"]}
    assert sizes_of["a sample of a tiny distillation"] == ("processes", [1, 2])
    assert sizes_of["a step of a tiny distillation"] == ("pixels", [64 * 48, 96 * 64])
    assert sizes_of["AP"] == sizes_of["open shards"] == ("people", [5, 40])


def test_each_process_knows_its_rank_and_the_first_reports_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(
        'echo "a warning"\n'
        'test "${1##*/}" = scale_ranks.py && test "$ACCELERATE_USE_CPU $RANK" = "true $LOCAL_RANK" || exit 1\n'
        'echo "{\\"samples_per_second\\": $WORLD_SIZE$RANK}"\n'
    )
    stand_in.write_text(f"#!/bin/sh\n{stand_in.read_text()}")
    stand_in.chmod(0o755)
    monkeypatch.setattr(scale.sys, "executable", str(stand_in))
    assert scale.run_ranks(2, batch=1, steps=1) == 20.0


@pytest.mark.slow
def test_two_processes_distil_together() -> None:
    assert scale.run_ranks(2, batch=2, steps=1) > 0


@pytest.mark.parametrize(("exponent", "marked"), [(1.0, False), (2.0, True)])
def test_growth_faster_than_linear_is_marked(exponent: float, marked: bool, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [10, 100]
    one = scale.Growth("work", "people", sizes, [size**exponent for size in sizes])
    report = {"environment": scale.environment(), "settings": {"batch": 1, "steps": 1, "rounds": 1}}
    scale.show_scale(report | {"measurements": [one.summary()]})
    assert ("faster than linear" in capsys.readouterr().out) == marked


def test_a_failed_process_ends_the_measurement_with_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale.sys, "executable", "false")
    with pytest.raises(BenchError, match="one of 2 processes that distil together failed"):
        scale.run_ranks(2, batch=1, steps=1)


def test_a_process_that_fails_ends_those_that_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, stand_in = tmp_path / "pipe", tmp_path / "python"
    os.mkfifo(pipe)
    stand_in.write_text(
        "#!/bin/sh\n"
        f'if test $RANK = 0; then echo $$ > "{pipe}"; exec cat "{pipe}"; fi\n'  # waits for ever
        f'read first < "{pipe}"; echo "rank $RANK of process $first cannot go on"; exit 3\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(scale.sys, "executable", str(stand_in))
    monkeypatch.setattr(scale, "TIMEOUT", 60)
    with pytest.raises(BenchError, match=r"one of 2 processes .* failed:\nrank 1 of process \d+ cannot") as failure:
        scale.run_ranks(2, batch=1, steps=1)
    first = int(str(failure.value).split(" of process ")[1].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_processes_that_hang_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, stand_in = tmp_path / "pipe", tmp_path / "python"
    os.mkfifo(pipe)
    stand_in.write_text(f'#!/bin/sh\nexec cat "{pipe}"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(scale.sys, "executable", str(stand_in))
    monkeypatch.setattr(scale, "TIMEOUT", 0)
    with pytest.raises(BenchError, match="2 processes that distil together did not finish within 0 s"):
        scale.run_ranks(2, batch=1, steps=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--joints", "17", "0"], "--joints 0: at least 1"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--inputs", "256"], "--inputs 256: wanted HEIGHTxWIDTH"),
        (["--inputs", "250x192"], "such as 256x192, both multiples of 16"),
        (["--inputs", "256x192", "64x48", "192x256"], "--inputs 256x192 192x256: equally many pixels"),
        (["--inputs", "64x48", "64x48"], "--inputs 64x48 64x48: equally many pixels"),
        (["--json", "folder"], "folder: is a folder; --json is the file to write"),
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
    (tmp_path / "folder").mkdir()
    assert scale.main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
