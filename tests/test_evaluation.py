"""Evaluation: the part after the network (rescoring, OKS-NMS, COCO's protocol), and the way from crop to image."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.schema import Evaluate
from fpd_accel.data.coco import prepare_coco
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream
from fpd_accel.errors import ModelError
from fpd_accel.evaluation.coco_results import coco_results, ground_truth, ground_truth_predictions, keypoint_accuracy
from fpd_accel.evaluation.evaluate import evaluate
from fpd_accel.metrics import average_precision
from fpd_accel.outputs import SimCC
from fpd_accel.skeleton import COCO, load_skeleton

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def coco(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    sample = shared / "data" / "coco_sample"
    return prepare_coco(
        images=sample / "images",
        annotations=sample / "person_keypoints.json",
        output=tmp_path_factory.mktemp("coco") / "shards",
        skeleton=COCO,
    )


@pytest.fixture(scope="module")
def lsp(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = shared / "data" / "lsp_extended"
    return prepare_coco(
        images=folder / "images",
        annotations=folder / "person_keypoints_val.json",
        output=tmp_path_factory.mktemp("lsp") / "shards",
        skeleton=load_skeleton(ROOT / "recipes" / "skeletons" / "lsp.yaml"),
    )


@pytest.fixture(scope="module")
def synthetic(tiny_valid: Path) -> Shards:
    return Shards(tiny_valid)


class Oracle(nn.Module):
    """A network whose heatmaps are the targets of the next batch that the evaluation reads."""

    def __init__(self, shards: Shards, codec: HeatmapCodec, *, batch: int) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))  # the device of the network
        self.codec = codec
        self.stream = iter(PoseStream(shards, input_size=codec.input_size, batch_size=batch))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        batch = next(self.stream)
        assert len(batch) == len(images)
        return (self.codec.encode(batch.keypoints, batch.visible)[0],)


@pytest.fixture(params=["coco", "lsp", "synthetic"])
def shards(request: pytest.FixtureRequest) -> Shards:
    return request.getfixturevalue(request.param)


def test_ground_truth_as_prediction_scores_one(shards: Shards) -> None:
    predictions = ground_truth_predictions(shards)
    found = coco_results(shards, predictions, options=Evaluate(), input_size=(256, 192))
    scores = average_precision(ground_truth(shards), found, shards.skeleton.sigmas)
    assert scores["AP"] == scores["AR"] == pytest.approx(1.0)
    accuracy, *_ = keypoint_accuracy(shards, predictions).values()
    assert accuracy == 100.0


def test_labels_pushed_off_their_place_do_not(shards: Shards) -> None:
    labels = ground_truth_predictions(shards)
    quarter_box = shards.people[labels.rows]["box"][:, None, 2:].max(axis=-1, keepdims=True) / 4
    moved = replace(labels, keypoints=labels.keypoints + quarter_box)
    found = coco_results(shards, moved, options=Evaluate(), input_size=(256, 192))
    assert average_precision(ground_truth(shards), found, shards.skeleton.sigmas)["AP"] < 0.2
    accuracy, *_ = keypoint_accuracy(shards, moved).values()
    assert accuracy < 20.0


def test_target_heatmaps_come_back_to_the_image_within_their_resolution(shards: Shards) -> None:
    codec = HeatmapCodec((256, 192), (64, 48))
    oracle = Oracle(shards, codec, batch=16)
    metrics, _ = evaluate(oracle, shards, input_size=(256, 192), options=Evaluate(batch=16, flip_test=False))
    assert metrics["AP50"] > 0.99
    assert metrics["AP"] > 0.9  # a cell is 4 pixels of the crop


class OneStage(nn.Module):
    """A network that returns a given object in place of a tuple of stage outputs."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.output = output

    def forward(self, *_: Tensor) -> object:
        return self.output


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.zeros(8, 17, 16, 12), "OneStage returned Tensor, but a pose network returns a non-empty tuple"),
        (SimCC(torch.zeros(8, 17, 96), torch.zeros(8, 17, 128)), "OneStage returned SimCC"),
        ({"heatmaps": torch.zeros(8, 17, 16, 12)}, "OneStage returned dict"),
        ((), "OneStage returned tuple"),
        (None, "OneStage returned NoneType"),
    ],
)
def test_a_network_without_a_tuple_of_stage_outputs_is_refused(synthetic: Shards, output: object, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        evaluate(OneStage(output), synthetic, input_size=(64, 48), options=Evaluate(batch=8))
