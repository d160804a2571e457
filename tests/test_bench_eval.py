"""``fpd-accel bench eval`` and ``bench scale``: they run, they report what they measured, and the gate shuts."""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fpd_accel import cli
from fpd_accel.bench import evaluation, ranks, reference_eval, scale
from fpd_accel.bench.poses import draw_boxes
from fpd_accel.bench.rounds import Contest, growth, run_contest
from fpd_accel.bench.scale_options import PROCESS_ROUNDS, Scale
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.decode import decode_heatmaps, fuse_flip
from fpd_accel.errors import BenchError
from fpd_accel.metrics import average_precision
from fpd_accel.scoring import Predictions, chosen_people

STEPS = ("flip fusion", "encode", "decode", "rescore + hard NMS", "rescore + soft NMS", "AP, pycocotools")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of so little work more make waiting alone, on a busy machine much of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_bench_eval_prints_a_table_and_writes_the_same_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "eval", "--people", "20", "--batch", "8", "--rounds", "2", "--json", str(tmp_path / "r.json")]
    assert cli.main(arguments) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_bytes())
    assert report["bench"] == "eval"
    assert report["environment"]["versions"]["torch"]
    assert report["settings"]["people"] == 20
    steps = {step["name"]: step for step in report["steps"]}
    for name in STEPS:
        assert name in printed
        assert 0 <= steps[name]["difference"] <= steps[name]["tolerance"]
    for step in steps.values():
        assert len(step["ours_rounds"]) == len(step["reference_rounds"]) == 2
        assert min(*step["ours_rounds"], *step["reference_rounds"]) > 0
        assert step["ratio_lowest"] <= step["ratio"] <= step["ratio_highest"]
    both = [steps["decode"]["ours_rounds"], steps["rescore + hard NMS"]["ours_rounds"]]
    assert steps["decode + hard NMS"]["ours_rounds"] == pytest.approx(np.sum(both, axis=0))
    assert steps["encode"]["target"] == 8


def unshifted(*arguments: Any) -> torch.Tensor:
    return fuse_flip(*arguments, shift=False)


def wider(self: HeatmapCodec, *arguments: Any) -> Any:
    heatmaps, weight = HeatmapCodec.rightly(self, *arguments)  # type: ignore[attr-defined]
    return heatmaps**0.99, weight


def without_a_step(*arguments: Any) -> Any:
    return decode_heatmaps(*arguments, refine="none")


def one_too_few(*arguments: Any, **options: Any) -> Any:
    return chosen_people(*arguments, **options)[1:]


def too_good(*arguments: Any) -> dict[str, float]:
    return {name: value + 1e-6 for name, value in average_precision(*arguments).items()}


@pytest.mark.parametrize(
    ("name", "wrong", "step"),
    [
        ("fuse_flip", unshifted, "flip fusion"),
        ("encode", wider, "encode"),
        ("decode_heatmaps", without_a_step, "decode"),
        ("chosen_people", one_too_few, "rescore + hard NMS"),
        ("average_precision", too_good, "AP, pycocotools"),
    ],
)
def test_what_computes_something_else_is_not_timed(
    name: str,
    wrong: Callable[..., Any],
    step: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "encode":
        monkeypatch.setattr(HeatmapCodec, "rightly", HeatmapCodec.encode, raising=False)
        monkeypatch.setattr(HeatmapCodec, "encode", wrong)
    else:
        monkeypatch.setattr(evaluation, name, wrong)
    report = tmp_path / "report.json"
    assert cli.main(["bench", "eval", "--people", "8", "--rounds", "1", "--json", str(report)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"error: {step}: ours and the reference differ by" in said
    assert not report.exists()


@pytest.mark.parametrize("difference", [0.2, math.inf, math.nan])
def test_a_contest_is_refused_where_results_differ_or_cannot_be_compared(difference: float) -> None:
    contest = Contest("work", int, int, lambda *_: difference, 0.1, "apples")
    with pytest.raises(BenchError, match=r"work: ours and the reference differ by \S+ apples, allowed are 0.1"):
        run_contest(contest, rounds=1)


def test_the_two_of_a_contest_take_turns() -> None:
    order: list[str] = []
    contest = Contest("work", lambda: order.append("slow"), lambda: order.append("fast"), lambda *_: 0.0, 0.0, "")
    times, _ = run_contest(contest, rounds=3)
    assert order == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert len(times.ratios) == 3


def test_the_reference_of_ap_reads_the_ground_truth_before_it_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = draw_boxes(12, 17)
    predictions = Predictions(np.arange(12), boxes.keypoints, boxes.visible)
    contests = list(evaluation._precision_contests(boxes, predictions, tmp_path))
    (tmp_path / "truth.json").unlink()
    monkeypatch.setattr(reference_eval, "read_truth", None)
    for contest in contests:
        for _ in range(2):  # what the first leaves in it does not matter to the second
            assert contest.difference(contest.reference(), contest.ours()) <= contest.tolerance
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_environment_is_asked_for_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> dict[str, Any]:
        raise BenchError("asked")

    for module, first in ((evaluation, "draw_boxes"), (scale, "run_ranks")):
        monkeypatch.setattr(module, "environment", asked)
        monkeypatch.setattr(module, first, lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(BenchError, match="asked"):
        evaluation.bench_eval(people=2)
    with pytest.raises(BenchError, match="asked"):
        scale.bench_scale(Scale(), tmp_path)


def test_generated_boxes_leave_work_for_suppression() -> None:
    boxes = draw_boxes(12, 17)
    assert boxes.images.tolist() == [0] * 6 + [1] * 6
    truth = boxes.ground_truth()
    assert [len(truth[part]) for part in ("images", "annotations")] == [2, 6]
    in_crop = boxes.in_crop((256, 192))
    np.testing.assert_array_less(in_crop, np.broadcast_to([192 * 1.1, 256 * 1.1], in_crop.shape))
    again = in_crop[..., 0] / 192 * boxes.sizes[:, :1] + boxes.centers[:, :1] - boxes.sizes[:, :1] / 2
    np.testing.assert_allclose(again, boxes.keypoints[..., 0], atol=1e-2)  # pixels


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 2.0])
def test_the_exponent_of_growth_is_that_of_a_power(exponent: float) -> None:
    sizes = [10, 40, 1000]
    assert growth(sizes, [0.3 * size**exponent for size in sizes]) == pytest.approx(exponent, abs=1e-9)
    assert growth([10], [1.0]) is None


@pytest.mark.parametrize(("rounds", "before"), [(1, [20]), (2, [300, 20])])
def test_what_is_made_once_is_made_before_the_first_round_that_counts(rounds: int, before: list[int]) -> None:
    order: list[int] = []
    works = {"work": {size: lambda size=size: order.append(size) for size in (300, 20)}}
    (measured,) = scale._measured(works, "people", rounds=rounds)
    assert order == before + rounds * [300, 20]
    assert measured.sizes == [300, 20]


@pytest.mark.parametrize(("rounds", "done"), [(1, 1), (2, 2), (9, PROCESS_ROUNDS)])
def test_numbers_of_processes_take_turns(rounds: int, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []

    def run(processes: int, *, batch: int, steps: int) -> float:
        order.append(processes)
        return [4.0, 1.0, 2.0, 8.0, 5.0, 16.0][len(order) - 1]  # people per second

    monkeypatch.setattr(scale, "run_ranks", run)
    measured = scale._of_processes(Scale(processes=(1, 2), rounds=rounds))
    assert order == done * [1, 2]
    rates = [4.0, 2.0, 5.0], [1.0, 8.0, 16.0]
    assert measured.seconds == [statistics.median(1 / rate for rate in own[:done]) for own in rates]


@pytest.fixture
def ranks_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Train in this process, which has imported everything, whatever the number of processes."""
    monkeypatch.setattr(scale, "INPUT_SIZE", (64, 48))

    def here(processes: int, *, batch: int, steps: int) -> float:
        arguments = ["--batch", str(batch), "--steps", str(steps), "--input-size", "64", "48"]
        assert ranks.main([*arguments, "--student", "tiny_w8", "--teacher", "tiny_w8"]) == 0
        return processes * float(json.loads(capsys.readouterr().out)["samples_per_second"])

    monkeypatch.setattr(scale, "run_ranks", here)


def test_bench_scale_prints_a_table_and_writes_the_same_as_json(
    ranks_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--batch", "2", "--steps", "1", "--rounds", "1", "--inputs", "64x48", "96x64", "--people", "5", "40"]
    paths = ["--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "r.json")]
    sizes = ["--processes", "1", "2", "--scored", "5", "40", "--joints", "17", "133"]
    assert cli.main(["bench", "scale", *arguments, *sizes, *paths]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_bytes())
    assert report["bench"] == "scale"
    assert len(report["measurements"]) == 11
    for one in report["measurements"]:
        assert one["work"] in printed
        assert len(one["sizes"]) == 2
        assert min(one["seconds"]) > 0
        assert one["exponent"] == pytest.approx(growth(one["sizes"], one["seconds"]))
        assert f"{one['exponent']:.2f}" in printed
    sizes_of = {one["work"]: (one["size"], one["sizes"]) for one in report["measurements"]}
    assert sizes_of["a person of a tiny distillation"] == ("processes", [1, 2])
    assert sizes_of["a step of a tiny distillation"] == ("pixels", [64 * 48, 96 * 64])
    assert sizes_of["AP"] == sizes_of["open shards"] == ("people", [5, 40])


def test_each_process_knows_its_rank_and_the_first_tells_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(
        'echo "a warning"\n'
        'test "$1 $2" = "-m fpd_accel.bench.ranks" && test "$ACCELERATE_USE_CPU $RANK" = "true $LOCAL_RANK" || exit 1\n'
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
def test_what_grows_faster_than_linearly_is_marked(
    exponent: float, marked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [10, 100]
    one = scale.Growth("looking", "people", sizes, [size**exponent for size in sizes])
    report = {"environment": scale.environment(), "settings": {"batch": 1, "steps": 1, "rounds": 1}}
    scale.show_scale(report | {"measurements": [one.summary()]})
    assert ("faster than linear" in capsys.readouterr().out) == marked


def test_processes_that_fail_end_the_measurement_with_what_they_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale.sys, "executable", "false")
    with pytest.raises(BenchError, match="one of 2 processes that distil together failed"):
        scale.run_ranks(2, batch=1, steps=1)


def test_a_process_that_fails_ends_those_that_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, stand_in = tmp_path / "pipe", tmp_path / "python"
    os.mkfifo(pipe)
    stand_in.write_text(
        "#!/bin/sh\n"
        f'if test $RANK = 0; then echo $$ > "{pipe}"; exec cat "{pipe}"; fi\n'  # waits: nobody will write to it
        f'read first < "{pipe}"; echo "rank $RANK of process $first cannot go on"; exit 3\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(scale.sys, "executable", str(stand_in))
    monkeypatch.setattr(scale, "PATIENCE", 60)
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
    monkeypatch.setattr(scale, "PATIENCE", 0)
    with pytest.raises(BenchError, match="2 processes that distil together did not finish within 0 s"):
        scale.run_ranks(2, batch=1, steps=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--people", "0"], "--people 0: at least 1"),
        (["eval", "--rounds", "-1"], "--rounds -1: at least 1"),
        (["eval", "--json", "folder"], "folder: is a folder; --json is the file to write"),
        (["scale", "--joints", "17", "0"], "--joints 0: at least 1"),
        (["scale", "--steps", "0"], "--steps 0: at least 1"),
        (["scale", "--inputs", "256"], "--inputs 256: wanted HEIGHTxWIDTH"),
        (
            ["scale", "--inputs", "250x192"],
            "such as 256x192, both multiples of 16",
        ),
        (
            ["scale", "--inputs", "256x192", "64x48", "192x256"],
            "--inputs 256x192 192x256: equally many pixels",
        ),
        (["scale", "--inputs", "64x48", "64x48"], "--inputs 64x48 64x48: equally many pixels"),
        (["scale", "--json", "folder"], "folder: is a folder; --json is the file to write"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert cli.main(["bench", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
