"""A detector's boxes in place of the annotated ones: what of the file is used, what comes of it, what is said of it."""

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fpd_accel.check.labels import read_labels
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Evaluate
from fpd_accel.data.batch import Normalization
from fpd_accel.data.coco import prepare_coco
from fpd_accel.data.detections import Detections, read_detections, with_boxes
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, make_loader
from fpd_accel.errors import ConfigError, DataError
from fpd_accel.evaluation.coco_results import Predictions, coco_results, detection_stats, ground_truth
from fpd_accel.evaluation.evaluate import evaluate, predict
from fpd_accel.evaluation.folder import evaluate_folder
from fpd_accel.evaluation.tables import describe_protocol, eval_settings
from fpd_accel.geometry import clip_box
from fpd_accel.metrics import average_precision
from fpd_accel.models.create import create_model
from fpd_accel.skeleton import COCO
from fpd_accel.weights.model_folder import ModelConfig, save_model

SIZE = (64, 48)  # (height, width) of crops


def detection(image_id: int, bbox: list[float], score: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": 1, "bbox": bbox, "score": score, **more}


def write(folder: Path, entries: Any, name: str = "boxes.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def annotated_boxes(shards: Shards) -> list[dict[str, Any]]:
    """The boxes that the ground-truth protocol crops, cut to the image as it does, as certain detections."""
    people = shards.people[shards.usable]
    sizes = shards.images.select_columns(["width", "height"])[people["image_row"].tolist()]
    cut = [clip_box(*triple) for triple in zip(people["box"], sizes["width"], sizes["height"], strict=True)]
    return [detection(int(image), box.tolist()) for image, box in zip(people["image_id"], cut, strict=True)]


class Filters(nn.Module):
    """A network of one random convolution: what it answers hangs on every pixel of the crop."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 17, 8, stride=4, padding=2)
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.convolution(images),)


class Oracle(nn.Module):
    """A network that knows who is in a box: the annotated person of most overlap, or a made-up one where there is none.

    Its heatmaps are targets; like every detection pipeline it is asked about the boxes in the order of the file.
    """

    def __init__(self, detections: Shards, *, batch: int, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        height, width = input_size
        self.codec = HeatmapCodec(input_size, (height // 4, width // 4))
        self.detections = detections
        self.stream = iter(PoseStream(detections, input_size=input_size, batch_size=batch))
        self.truth = detections.annotated.people[:]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        batch = next(self.stream)
        assert len(batch) == len(images)
        boxes = self.detections.people[batch.rows.numpy()]
        keypoints, visible = [], []
        for i, (box, image) in enumerate(zip(boxes["box"], boxes["image_id"], strict=True)):
            points, seen = self._person(box, int(image))
            scale = self.codec.input_size[1] / float(batch.sizes[i, 0])
            middle = np.array(self.codec.input_size[::-1]) / 2
            keypoints.append((points - batch.centers[i].numpy()) * scale + middle)
            visible.append(seen)
        tensors = (torch.tensor(np.stack(values), dtype=torch.float32) for values in (keypoints, visible))
        return (self.codec.encode(*tensors)[0],)

    def _person(self, box: np.ndarray, image: int) -> tuple[np.ndarray, np.ndarray]:
        members = np.flatnonzero((self.truth["image_id"] == image) & ~self.truth["crowd"])
        overlaps = [overlap(box, self.truth["box"][member]) for member in members]
        if not overlaps or max(overlaps) < 0.3:
            return np.tile(box[:2] + box[2:] / 2, (17, 1)), np.ones(17)
        triples = self.truth["keypoints"][members[int(np.argmax(overlaps))]].reshape(17, 3)
        return triples[:, :2], triples[:, 2] > 0


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    sides = np.minimum(box[:2] + box[2:], other[:2] + other[2:]) - np.maximum(box[:2], other[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    return shared / float(box[2] * box[3] + other[2] * other[3] - shared)


@pytest.fixture(scope="module")
def shards(tiny_valid: Path) -> Shards:
    return Shards(tiny_valid)


@pytest.fixture(scope="module")
def detector_file(shared: Path) -> Path:
    return shared / "data" / "coco_sample" / "person_detections_4_images.json"


def prepare_sample(shared: Path, folder: Path, *, images: set[int] | None = None, **options: Any) -> Shards:
    """The sample of COCO, or some images of it, prepared."""
    sample = shared / "data" / "coco_sample"
    content = json.loads((sample / "person_keypoints.json").read_bytes())
    if images is not None:
        content["images"] = [image for image in content["images"] if image["id"] in images]
        content["annotations"] = [person for person in content["annotations"] if person["image_id"] in images]
    return prepare_coco(sample / "images", write(folder, content), folder / "shards", **options)


@pytest.fixture(scope="module")
def four_images(shared: Path, detector_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """The four images that the sample of detections is of."""
    images = {entry["image_id"] for entry in json.loads(detector_file.read_bytes())}
    return prepare_sample(shared, tmp_path_factory.mktemp("four"), images=images)


# --- what comes of boxes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nms", ["hard", "soft", "none"])
def test_annotated_boxes_as_detections_score_as_the_ground_truth_protocol_does(
    shards: Shards, tmp_path: Path, nms: Any
) -> None:
    options = Evaluate(batch=4, nms=nms)
    truth, people = evaluate(Filters(), shards, input_size=SIZE, options=options)
    detections = Detections(shards, write(tmp_path, annotated_boxes(shards)))
    metrics, found = evaluate(Filters(), detections, input_size=SIZE, options=options)
    assert found == people
    assert metrics == {name: value for name, value in truth.items() if not name.startswith(("PCK", "joint/"))}


def published_pose(model: nn.Module, pixels: np.ndarray, box: list[float]) -> tuple[np.ndarray, np.ndarray, float]:
    """Keypoints, their scores and the area of the region for one box, step by step as REFERENCE has it."""
    height, width = SIZE
    x, y, w, h = box
    center = np.array([x + w / 2, y + h / 2])
    w, h = (w, w * height / width) if w > h * width / height else (h * width / height, h)
    w, h = w * 1.25, h * 1.25
    # Three points: the centre, the middle of the region's upper edge, and one to the left of that at a right angle.
    source = np.float32([center, center - [0, w / 2], center - [w / 2, w / 2]])
    target = np.float32([[width / 2, height / 2], [width / 2, height / 2 - width / 2], [0, height / 2 - width / 2]])
    crop = cv2.warpAffine(pixels, cv2.getAffineTransform(source, target), (width, height))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    image = torch.tensor((crop / 255 - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        heatmaps, mirrored = (model(view)[0][0].numpy() for view in (image, image.flip(-1)))
    mirrored = mirrored[list(COCO.flip_index), :, ::-1].copy()
    mirrored[:, :, 1:] = mirrored[:, :, :-1].copy()
    keypoints, scores = [], []
    for heatmap in (heatmaps + mirrored) / 2:
        row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
        place = np.array([column, row], dtype=float)
        rows, columns = heatmap.shape
        if 1 < column < columns - 1 and 1 < row < rows - 1:
            place[0] += 0.25 * np.sign(heatmap[row, column + 1] - heatmap[row, column - 1])
            place[1] += 0.25 * np.sign(heatmap[row + 1, column] - heatmap[row - 1, column])
        keypoints.append((place - [columns / 2, rows / 2]) * w / columns + center)
        scores.append(heatmap.max())
    return np.array(keypoints), np.array(scores), w * h


def similarity(pose: np.ndarray, other: np.ndarray, area: float, other_area: float) -> float:
    terms = [
        np.exp(-((p - q) ** 2).sum() / ((2 * sigma) ** 2 * (area + other_area) / 2 * 2))
        for p, q, sigma in zip(pose, other, COCO.sigmas, strict=True)
    ]
    return float(np.mean(terms))


def test_a_detection_is_cropped_scored_and_suppressed_as_the_published_code_does(
    shards: Shards, tmp_path: Path
) -> None:
    first, second = (int(image) for image in shards.images["id"][:2])
    boxes = [  # one reaches beyond the image, and the third differs from the second by little
        detection(first, [-6.5, 20.25, 60.0, 119.5], 0.75),
        detection(second, [40.0, 10.0, 50.0, 90.0], 0.5),
        detection(second, [40.5, 10.0, 50.0, 90.0], 0.25),
    ]
    model = Filters()
    options = Evaluate(batch=2, nms_threshold=0.5)
    _, people = evaluate(model, Detections(shards, write(tmp_path, boxes)), input_size=SIZE, options=options)
    wanted = []
    for box in boxes:
        image = shards.images[first_row(shards, box["image_id"])]
        pixels = cv2.cvtColor(
            cv2.imdecode(np.frombuffer(image["bytes"], np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
        )
        keypoints, scores, area = published_pose(model, pixels, box["bbox"])
        confident = scores[scores > 0.2]
        assert len(confident) > 0
        wanted.append((box["image_id"], keypoints, scores, area, confident.mean() * box["score"]))
    assert similarity(wanted[1][1], wanted[2][1], wanted[1][3], wanted[2][3]) > 0.5
    assert [person["image_id"] for person in people] == [first, second]  # of the two alike, the better
    for person, (_, keypoints, scores, _, score) in zip(people, wanted, strict=False):
        triples = np.array(person["keypoints"]).reshape(17, 3)
        np.testing.assert_allclose(triples[:, :2], keypoints, atol=2e-3)  # image pixels
        np.testing.assert_allclose(triples[:, 2], scores, atol=2e-3)  # of heatmaps around 1; one grey level is 2e-3
        assert person["score"] == pytest.approx(score, abs=2e-3)


def first_row(shards: Shards, image_id: int) -> int:
    return list(shards.images["id"]).index(image_id)


@pytest.fixture(scope="module")
def sample_predictions(four_images: Shards, detector_file: Path) -> Predictions:
    """What a network that knows the labels finds around the 118 boxes."""
    detections = Detections(four_images, detector_file)
    found, _ = predict(
        Oracle(detections, batch=16, input_size=(128, 96)),
        detections,
        codec=HeatmapCodec((128, 96), (32, 24)),
        normalization=Normalization(),
        padding=1.25,
        options=Evaluate(batch=16, flip_test=False),
    )
    return found


def scores_of(detections: Shards, found: Predictions, **options: Any) -> dict[str, float]:
    people = coco_results(detections, found, options=Evaluate(**options), input_size=(128, 96))
    return average_precision(ground_truth(detections), people) | detection_stats(detections, found, people)


def test_the_detections_of_the_coco_sample_find_the_people_of_their_images(
    four_images: Shards, detector_file: Path, sample_predictions: Predictions
) -> None:
    detections = Detections(four_images, detector_file)
    hard, soft, unsuppressed = (
        scores_of(detections, sample_predictions, nms=nms, nms_threshold=0.5) for nms in ("hard", "soft", "none")
    )
    for metrics in (hard, soft, unsuppressed):
        assert metrics["people_per_image_before_nms"] == 118 / 4
        assert 0.9 < metrics["score_max"] <= 1
        assert 0 <= metrics["score_min"] < 0.01
        assert metrics["AR50"] == 1.0  # everybody has a box
    assert unsuppressed["people_per_image"] == 118 / 4
    assert soft["people_per_image"] == 20  # at most so many, and every image has more boxes
    assert hard["people_per_image"] < 16
    assert hard["AP"] > 0.8


def test_people_in_images_without_boxes_are_missed(
    shared: Path, detector_file: Path, four_images: Shards, sample_predictions: Predictions, tmp_path: Path
) -> None:
    sample = prepare_sample(shared, tmp_path)
    assert len(sample.images) == 40
    found = {
        len(shards): scores_of(Detections(shards, detector_file), sample_predictions)["AR50"] * len(shards)
        for shards in (four_images, sample)
    }
    assert found == pytest.approx({12: 12, 98: 12})


def test_boxes_in_an_image_without_people_are_false_alarms_if_the_image_is_kept(
    shared: Path, detector_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((shared / "data" / "coco_sample" / "person_keypoints.json").read_bytes())
    occupied = {person["image_id"] for person in content["annotations"]}
    empty = next(image["id"] for image in content["images"] if image["id"] not in occupied)
    boxes = write(tmp_path, [*json.loads(detector_file.read_bytes()), *[detection(empty, [20, 20, 100, 200])] * 2])
    images = {entry["image_id"] for entry in json.loads(boxes.read_bytes())}
    precision = {}
    for keep in (False, True):
        folder = tmp_path / str(keep)
        folder.mkdir()
        shards = prepare_sample(shared, folder, images=images, keep_empty_images=keep)
        assert len(shards.images) == 4 + keep
        assert shards.description["skipped"] == ({} if keep else {"image_empty": 1})
        capsys.readouterr()
        options = Evaluate(batch=16, flip_test=False, nms_threshold=0.5, boxes=str(boxes))
        detections = with_boxes(shards, options)
        said = capsys.readouterr().err
        assert ("AP is too high" in said) == (not keep)
        assert ("2 boxes are of images that are not in" in said) == (not keep)
        assert ("1 images without an annotated person" in said) == (not keep)
        oracle = Oracle(detections, batch=16, input_size=(128, 96))
        precision[keep] = evaluate(oracle, detections, input_size=(128, 96), options=options)[0]["AP"]
    assert precision[True] < 0.95 * precision[False]


def test_keeping_empty_images_changes_nothing_else(shared: Path, four_images: Shards, tmp_path: Path) -> None:
    content = json.loads((shared / "data" / "coco_sample" / "person_keypoints.json").read_bytes())
    shards = prepare_sample(shared, tmp_path, keep_empty_images=True)
    assert list(shards.images["id"]) == [image["id"] for image in content["images"]]
    assert shards.description["skipped"] == {}
    (tmp_path / "usual").mkdir()
    usual = prepare_sample(shared, tmp_path / "usual")
    assert shards.people[:]["id"].tolist() == usual.people[:]["id"].tolist()
    one, other = (next(iter(PoseStream(each, input_size=SIZE, batch_size=8))) for each in (shards, usual))
    assert torch.equal(one.crops, other.crops)


def test_images_alone_can_be_prepared_and_hold_a_detectors_people(shared: Path, tmp_path: Path) -> None:
    content = json.loads((shared / "data" / "coco_sample" / "person_keypoints.json").read_bytes())
    occupied = {person["image_id"] for person in content["annotations"]}
    listed = [image for image in content["images"] if image["id"] not in occupied]
    unlabelled = tmp_path / "image_info.json"
    unlabelled.write_text(json.dumps({"images": listed}))
    images, output = shared / "data" / "coco_sample" / "images", tmp_path / "shards"
    with pytest.raises(DataError, match="no list 'annotations'"):
        prepare_coco(images, unlabelled, output)
    shards = prepare_coco(images, unlabelled, output, keep_empty_images=True)
    assert (len(shards.images), len(shards)) == (len(listed), 0)
    detections = Detections(shards, write(tmp_path, [detection(listed[2]["id"], [20, 20, 100, 200], 0.7)] * 3))
    assert len(detections) == 3
    batch = next(iter(PoseStream(detections, input_size=SIZE, batch_size=3)))
    assert torch.equal(batch.crops[0], batch.crops[2])
    with pytest.raises(DataError, match="images without annotated people"):
        read_labels(shards)


# --- which boxes are used ---------------------------------------------------------------------------------------


def test_boxes_that_cannot_be_used_are_skipped_and_counted(shards: Shards, tmp_path: Path) -> None:
    image = int(shards.images["id"][3])
    good = detection(image, [-5, 1, 300, 400], 0.5)  # beyond the image on all sides, and used as it is
    entries = [
        detection(10**6, [1, 1, 9, 9]),
        {**good, "category_id": 3},
        {**good, "category_id": 90, "bbox": [1, 1, 0, 9]},
        detection(image, [1, 1, 0, 9]),
        detection(image, [1, 1, 9, -9]),
        good,
        {**good, "score": 0.4999},
    ]
    detections = Detections(shards, write(tmp_path, entries), threshold=0.5)
    assert detections.skipped == {"other_category": 2, "no_area": 2, "low_score": 1, "unknown_image": 1}
    assert (len(detections), detections.num_images, detections.usable.tolist()) == (1, 1, [0])
    person = detections.people[[0]]
    assert person["box"].tolist() == [[-5, 1, 300, 400]]
    assert (person["image_id"].tolist(), person["image_row"].tolist()) == ([image], [3])
    assert person["score"].tolist() == [0.5]
    assert person["keypoints"].shape == (1, 51)
    assert not person["keypoints"].any()
    assert detections.box_to_crop(person["box"][0], width=160, height=120).tolist() == [-5, 1, 300, 400]
    assert detections.annotated is shards


def test_every_box_is_used_without_a_threshold(shards: Shards, tmp_path: Path) -> None:
    image = int(shards.images["id"][0])
    entries = [detection(image, [1, 1, 20, 30], score) for score in (0.0, 1e-9, 1.0)]
    assert len(Detections(shards, write(tmp_path, entries))) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "not readable as JSON"),
        ("", "not readable as JSON"),
        ("\x00\xff", "not readable as JSON"),
        ("{}", "not a list of boxes in COCO's result format"),
        ('{"images": [], "annotations": []}', "not a list of boxes"),
        ("[]", "an empty list"),
        ("[3]", "box 0 of 1: 3 is not an object"),
        ('[{"image_id": 1, "bbox": [1, 2, 3, 4]}]', "category_id, score missing"),
        ([{**detection(1, [1, 2, 3, 4])}, detection("a", [1, 2, 3, 4])], "box 1 of 2: image_id is 'a', not an integer"),
        ([{**detection(1, [1, 2, 3, 4]), "category_id": None}], "category_id is None, not an integer"),
        ([detection(1, [1, 2, 3])], "four finite numbers"),
        ([detection(1, [1, 2, float("nan"), 4])], "four finite numbers"),
        ([detection(1, [1, 2, float("inf"), 4])], "four finite numbers"),
        ([detection(1, ["1", 2, 3, 4])], "four finite numbers"),
        ([detection(1, [1, 2, 3, 10**400])], "four finite numbers"),
        ([detection(1, [1, 2, 3, 1e39])], "four finite numbers"),  # infinite in single precision
        ([detection(1, {"x": 1})], "four finite numbers"),
        ([detection(1, [1, 2, 3, 4], float("nan"))], "score is nan, not a finite number"),
        ([detection(1, [1, 2, 3, 4], "high")], "score is 'high'"),
        ([detection(1, [1, 2, 3, 4], file_name=7)], "file_name is 7"),
    ],
)
def test_a_file_that_is_no_list_of_boxes_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="latin-1")
    with pytest.raises(DataError) as caught:
        read_detections(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file of boxes; `fpd-accel detect` writes one"):
        read_detections(tmp_path / "boxes.json")


def test_boxes_of_other_images_alone_are_refused_with_their_counts(shards: Shards, tmp_path: Path) -> None:
    entries = [detection(10**6, [1, 1, 9, 9]), detection(10**6 + 1, [1, 1, 9, 9]), detection(1, [1, 1, 0, 9])]
    with pytest.raises(DataError) as caught:
        Detections(shards, write(tmp_path, entries))
    assert "none of its 3 boxes can be used" in str(caught.value)
    assert "2 boxes of images that are not in the shards" in str(caught.value)
    assert "1 boxes without width or height" in str(caught.value)


def test_an_image_of_another_name_by_the_same_number_is_refused(shards: Shards, tmp_path: Path) -> None:
    image = shards.images[0]
    entry = detection(image["id"], [1, 1, 20, 30])
    Detections(shards, write(tmp_path, [{**entry, "file_name": f"elsewhere/{image['file_name']}"}]))
    with pytest.raises(DataError, match=r"box 0 is of photo\.jpg, but image .* --annotations"):
        Detections(shards, write(tmp_path, [{**entry, "file_name": "photo.jpg"}]))


# --- in the stream ----------------------------------------------------------------------------------------------


@pytest.fixture
def detections(shards: Shards, tmp_path: Path) -> Detections:
    """Seven boxes in three images, in no order."""
    ids = shards.images["id"]
    entries = [
        detection(int(ids[image]), [5.0 * k, 3.0 * k, 40.0 + k, 60.0], 0.9 - 0.1 * k)
        for k, image in enumerate((2, 0, 1, 2, 0, 0, 1))
    ]
    return Detections(shards, write(tmp_path, entries))


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 3), (2, 2), (3, 4)])
def test_ranks_share_the_boxes_and_none_is_left_out(detections: Detections, ranks: int, batch_size: int) -> None:
    streams = [
        PoseStream(detections, input_size=SIZE, batch_size=batch_size, rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    batches = [list(stream) for stream in streams]
    assert len({len(own) for own in batches}) == 1
    rows = [row for own in zip(*batches, strict=True) for batch in own for row in batch.rows.tolist()]
    assert rows[: len(detections)] == list(range(7))
    assert set(rows) == set(range(7))


def test_a_box_that_fills_up_the_last_batch_is_counted_once(detections: Detections) -> None:
    codec, options = HeatmapCodec(SIZE, (16, 12)), Evaluate(batch=4)
    found, _ = predict(Filters(), detections, codec=codec, normalization=Normalization(), padding=1.25, options=options)
    assert found.rows.tolist() == list(range(7))


def test_workers_read_what_this_process_reads(detections: Detections) -> None:
    copy = pickle.loads(pickle.dumps(detections))
    assert len(pickle.dumps(detections)) < 20_000
    here, there, worker = (
        list(make_loader(PoseStream(each, input_size=SIZE, batch_size=3), workers, torch.device("cpu")))
        for each, workers in ((detections, 0), (copy, 0), (detections, 1))
    )
    for name, value in vars(here[0]).items():
        for one, two, three in zip(here, there, worker, strict=True) if value is not None else ():
            assert torch.equal(getattr(one, name), getattr(two, name)), name
            assert torch.equal(getattr(one, name), getattr(three, name)), name
    assert not any(batch.visible.any() for batch in here)


def test_a_fingerprint_tells_boxes_and_thresholds_apart(detections: Detections, shards: Shards) -> None:
    file = detections.file
    prints = {
        each.fingerprint for each in (detections, Detections(shards, file), Detections(shards, file, threshold=0.1))
    }
    assert len(prints) == 2
    assert shards.fingerprint not in prints


# --- what is said of it -----------------------------------------------------------------------------------------


def test_the_protocol_is_said_with_every_number(
    shared: Path, detector_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = prepare_sample(shared, tmp_path)
    weights = create_model("tiny_w8", 17).state_dict()
    save_model(tmp_path / "model", weights, ModelConfig(arch="tiny_w8", skeleton=COCO, input_size=(32, 32)))
    options = Evaluate(boxes=str(detector_file), flip_test=False, nms="soft", nms_threshold=0.8, box_threshold=0.01)
    capsys.readouterr()
    score, people = evaluate_folder(str(tmp_path / "model"), str(shards.path), options=options)
    captured = capsys.readouterr()
    used = sum(entry["score"] >= 0.01 for entry in json.loads(detector_file.read_bytes()))
    assert 20 * 4 < used < 118
    shown = " ".join(captured.out.split())
    assert (
        f"{used} detector boxes (score >= 0.01) of person_detections_4_images.json in 4 of 40 images of {shards.path}; "
        "flip test off, soft OKS-NMS 0.8"
    ) in shown
    assert f"{used / 4:.2f} people per image with boxes before NMS, {len(people) / 4:.2f} after; scores 0." in shown
    assert "PCK" not in shown
    assert f"{used} boxes with a score of at least 0.01, in 4 of the 40 images" in " ".join(captured.err.split())
    assert f"skipped {118 - used} boxes whose score is below the threshold" in captured.err
    assert score is not None
    assert score.metrics["people_per_image"] == len(people) / 4


def test_the_record_says_which_boxes(shards: Shards, detections: Detections) -> None:
    usual = {
        "data_sha256": shards.fingerprint, "images": 6, "flip_shift": True, "scales": [1.0], "stages": "last",
        "refine": "codec", "keypoint_threshold": 0.2,
    }  # fmt: skip
    assert eval_settings(shards, Evaluate()) == {
        **usual, "boxes": "ground truth", "people": len(shards), "flip_test": True, "nms": "hard", "nms_threshold": 0.9,
    }  # fmt: skip
    assert eval_settings(detections, Evaluate(nms="none", flip_test=False)) == {
        **usual, "boxes": "boxes.json", "people": 7, "box_threshold": 0.0, "images_with_boxes": 3, "skipped_boxes": {},
        "flip_test": False, "nms": "none",
    }  # fmt: skip
    unusual = Evaluate(flip_shift=False, stages="mean", refine="dark", keypoint_threshold=0.1)
    assert (
        "on, mirrored heatmaps not shifted, mean of the stages, refinement dark, keypoints score from 0.1, OKS"
        in describe_protocol(shards, unusual)
    )
    assert "ground-truth boxes; flip test on, OKS-NMS 0.9" in describe_protocol(shards, Evaluate())
    assert "flip test on, scales 1 1.2, OKS" in describe_protocol(shards, Evaluate(scales=(1.0, 1.2)))
    assert "no NMS" in describe_protocol(shards, Evaluate(nms="none"))


def test_a_run_evaluates_on_a_detectors_boxes_and_records_it(
    shards: Shards, tmp_path: Path, tiny_recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from fpd_accel.training.run import run

    entries = [*annotated_boxes(shards), detection(10**6, [1, 1, 9, 9])]
    boxes = write(tmp_path, entries)
    path = tiny_recipe(evaluate={"batch": 4, "boxes": str(boxes)}, train={"steps": 1, "global_batch": 2})
    run(load_recipe(path))
    captured = capsys.readouterr()
    assert "detector boxes (score >= 0) of boxes.json in 6 of 6 images" in " ".join(captured.out.split())
    assert "1 boxes are of images that are not in" in " ".join(captured.err.split())
    records = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    (record,) = [record for record in records if record["kind"] == "valid"]
    assert record["protocol"]["boxes"] == "boxes.json"
    assert record["protocol"]["people"] == len(shards)
    assert record["protocol"]["skipped_boxes"] == {"unknown_image": 1}
    assert record["valid_people_per_image_before_nms"] == pytest.approx(len(shards) / 6)
    source = json.loads((tmp_path / "tiny" / "best" / "config.json").read_bytes())["source"]
    assert source["protocol"] == record["protocol"]
    assert "valid_loss" not in record
    assert "valid_AP" in record


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"boxes": "nowhere.json"}, "evaluate.boxes: nowhere.json: no such file; `fpd-accel detect` writes one"),
        ({"nms": "soft", "nms_threshold": 0}, "evaluate.nms_threshold: must be above 0"),
        ({"scales": [0.9, 1.1]}, "evaluate.scales: [0.9, 1.1]: 1.0 has to be among them"),
        ({"scales": [1.0, 1.0]}, "evaluate.scales: [1.0, 1.0]"),
        ({"scales": [1.0, 0.0]}, "evaluate.scales"),
        ({"nms": "weak"}, "evaluate.nms: 'weak' is not a choice"),
        ({"box_threshold": float("nan")}, "evaluate.box_threshold"),
    ],
)
def test_a_recipe_that_cannot_be_evaluated_so_is_refused(
    tiny_recipe: Any, evaluation: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(tiny_recipe(evaluate=evaluation))
    assert words in str(caught.value)


def test_boxes_without_anybody_to_evaluate_on_are_refused(tiny_recipe: Any, tmp_path: Path) -> None:
    boxes = write(tmp_path, [])
    with pytest.raises(ConfigError, match=r"evaluate\.boxes: no held-out images to evaluate on"):
        load_recipe(tiny_recipe(data={"valid": None}, evaluate={"boxes": str(boxes)}))
