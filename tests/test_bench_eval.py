"""`fpd-accel bench eval`: it runs, reports its measurements, and times nothing whose results differ."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fpd_accel import cli
from fpd_accel.bench import evaluation
from fpd_accel.bench.evaluation import Comparison, run_comparison, summarize
from fpd_accel.bench.poses import draw_boxes
from fpd_accel.bench.published import eval as published_eval
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.decode import decode_heatmaps, fuse_flip
from fpd_accel.errors import BenchError
from fpd_accel.evaluation.coco_results import Predictions, select_poses
from fpd_accel.metrics import average_precision

STEPS = ("flip fusion", "encode", "decode", "rescore + hard NMS", "rescore + soft NMS", "AP, pycocotools")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: for so little work more threads only wait for each other."""
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
    return select_poses(*arguments, **options)[1:]


def too_good(*arguments: Any) -> dict[str, float]:
    return {name: value + 1e-6 for name, value in average_precision(*arguments).items()}


@pytest.mark.parametrize(
    ("name", "wrong", "step"),
    [
        ("fuse_flip", unshifted, "flip fusion"),
        ("encode", wider, "encode"),
        ("decode_heatmaps", without_a_step, "decode"),
        ("select_poses", one_too_few, "rescore + hard NMS"),
        ("average_precision", too_good, "AP, pycocotools"),
    ],
)
def test_work_with_another_result_is_not_timed(
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
    printed = " ".join(capsys.readouterr().err.split())
    assert f"error: {step}: ours and the reference differ by" in printed
    assert not report.exists()


@pytest.mark.parametrize("difference", [0.2, math.inf, math.nan])
def test_a_comparison_is_refused_where_results_differ_or_have_other_shapes(difference: float) -> None:
    comparison = Comparison("work", int, int, lambda *_: difference, 0.1, "apples")
    with pytest.raises(BenchError, match=r"work: ours and the reference differ by \S+ apples, allowed are 0.1"):
        run_comparison(comparison, rounds=1)


def test_both_sides_of_a_comparison_take_turns() -> None:
    order: list[str] = []
    comparison = Comparison("work", lambda: order.append("slow"), lambda: order.append("fast"), lambda *_: 0.0, 0.0, "")
    seconds, _ = run_comparison(comparison, rounds=3)
    assert order == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert seconds.shape == (2, 3)
    assert seconds.min() > 0


def test_the_speed_up_is_taken_within_a_round() -> None:
    found = summarize(np.array([[4.0, 9.0, 2.0], [2.0, 1.0, 4.0]]))
    assert (found["ratio_lowest"], found["ratio"], found["ratio_highest"]) == (0.5, 2, 9)
    assert (found["reference_seconds"], found["ours_seconds"]) == (4, 2)


def test_the_reference_of_ap_reads_the_ground_truth_before_it_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = draw_boxes(12, 17)
    predictions = Predictions(np.arange(12), boxes.keypoints, boxes.visible)
    comparison = evaluation._precision_comparison(boxes, predictions, tmp_path)
    (tmp_path / "truth.json").unlink()
    monkeypatch.setattr(published_eval, "read_truth", None)
    for _ in range(2):  # the second call is independent of the first
        assert comparison.difference(comparison.reference(), comparison.ours()) <= comparison.tolerance
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_environment_is_read_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> dict[str, Any]:
        raise BenchError("read")

    monkeypatch.setattr(evaluation, "environment", read)
    monkeypatch.setattr(evaluation, "draw_boxes", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(BenchError, match="read"):
        evaluation.bench_eval(people=2)


def test_generated_boxes_leave_work_for_suppression() -> None:
    boxes = draw_boxes(12, 17)
    assert boxes.images.tolist() == [0] * 6 + [1] * 6
    truth = boxes.ground_truth()
    assert [len(truth[part]) for part in ("images", "annotations")] == [2, 6]
    in_crop = boxes.in_crop((256, 192))
    np.testing.assert_array_less(in_crop, np.broadcast_to([192 * 1.1, 256 * 1.1], in_crop.shape))
    again = in_crop[..., 0] / 192 * boxes.sizes[:, :1] + boxes.centers[:, :1] - boxes.sizes[:, :1] / 2
    np.testing.assert_allclose(again, boxes.keypoints[..., 0], atol=1e-2)  # pixels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--people", "0"], "--people 0: at least 1"),
        (["eval", "--rounds", "-1"], "--rounds -1: at least 1"),
        (["eval", "--json", "folder"], "folder: is a folder; --json is the file to write"),
        (["scale"], "bench scale: moved out of the package; in a checkout of the repository run `python tests/scale/"),
        (["scale", "--processes", "1", "2", "--json", "f"], "run `python tests/scale/scale.py` with the same options"),
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
    assert cli.main(["bench", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
