"""Detection of people in a folder of images: images, boxes and weights; tested with random weights."""

import json
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2

from fpd_accel import cli, detect
from fpd_accel.data.coco import prepare_coco
from fpd_accel.data.detections import Detections, read_detections
from fpd_accel.detect import download_weights, find_boxes, list_images, load_detector
from fpd_accel.errors import DataError, WeightsError
from fpd_accel.skeleton import COCO

QUICK = {"min_size": 64, "max_size": 96, "rpn_pre_nms_top_n_test": 10, "rpn_post_nms_top_n_test": 10}


def write_image(path: Path, seed: int, *, height: int = 60, width: int = 80) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), cv2.resize(noise, (width, height)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three images of three sizes, and a text file."""
    path = tmp_path_factory.mktemp("images")
    for seed, (name, height) in enumerate((("img_12.png", 60), ("img_7.png", 40), ("img_300.PNG", 90))):
        write_image(path / name, seed, height=height)
    (path / "notes.txt").write_text("no image", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Return the detector with random weights and biases that make it detect people and cats everywhere."""
    torch.manual_seed(0)
    model = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91, **QUICK).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[1] = 8
        model.roi_heads.box_predictor.cls_score.bias[17] = 6
    return model


@pytest.fixture(scope="module")
def weights(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "detector.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resize images to a tenth of the usual size."""
    monkeypatch.setattr(detect, "load_detector", lambda path, **options: load_detector(path, **options, **QUICK))


class Known(nn.Module):
    """A detector that finds one person, in a box that depends on the image's size, and one dog in every image."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.batches: list[int] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.batches.append(len(images))
        assert all(image.dtype == torch.float32 and 0 <= image.min() < image.max() <= 1 for image in images)
        return [
            {
                "boxes": torch.tensor([[1.0, 2.0, 5.0, 9.0], [10.0, 5.0, image.shape[2] - 1.0, image.shape[1] - 2.0]]),
                "labels": torch.tensor([18, 1]),
                "scores": torch.tensor([0.99, 0.5]),
            }
            for image in images
        ]


@pytest.mark.parametrize(("batch", "batches"), [(1, [1, 1, 1]), (2, [2, 1]), (5, [3])])
def test_people_become_entries_with_width_and_height_and_others_do_not(
    folder: Path, batch: int, batches: list[int]
) -> None:
    detector = Known()
    found = find_boxes(detector, folder, list_images(folder), batch=batch)
    assert detector.batches == batches
    heights = {"img_12.png": 60, "img_300.PNG": 90, "img_7.png": 40}
    assert found == [
        {
            "image_id": int("".join(filter(str.isdigit, name))),
            "category_id": 1,
            "bbox": [10.0, 5.0, 69.0, height - 7.0],
            "score": 0.5,
            "file_name": name,
        }
        for name, height in heights.items()
    ]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parity
def test_boxes_are_those_of_torchvision_with_the_same_weights(
    network: nn.Module, weights: Path, folder: Path, tmp_path: Path, quick: None, suffix: str
) -> None:
    if suffix == ".pth":
        weights = tmp_path / "detector.pth"
        torch.save(network.state_dict(), weights)
    output = tmp_path / "new" / "boxes.json"
    options = ["--output", str(output), "--weights", str(weights), "--threshold", "0.3"]
    code = cli.main(["detect", str(folder), *options])
    assert code == 0
    boxes = read_detections(output)
    assert [path.name for path in output.parent.iterdir()] == ["boxes.json"]
    wanted = []
    for name in ("img_12.png", "img_300.PNG", "img_7.png"):
        pixels = cv2.cvtColor(cv2.imread(str(folder / name)), cv2.COLOR_BGR2RGB)
        with torch.no_grad():
            (people,) = network([torch.tensor(pixels / 255, dtype=torch.float32).permute(2, 0, 1)])
        wanted += [
            (name, *corners, score)
            for corners, score, label in zip(
                *(people[key].tolist() for key in ("boxes", "scores", "labels")), strict=True
            )
            if label == 1 and score >= 0.3
        ]
    assert 0 < len(wanted) < 40
    assert [box["file_name"] for box in boxes] == [name for name, *_ in wanted]
    for box, (_, x1, y1, x2, y2, score) in zip(boxes, wanted, strict=True):
        np.testing.assert_allclose(box["bbox"], [x1, y1, x2 - x1, y2 - y1], atol=0.02)  # pixels; written to 0.01
        assert box["score"] == pytest.approx(score, abs=1e-4)


def test_what_is_detected_evaluates_on_shards_of_the_same_images(folder: Path, tmp_path: Path) -> None:
    person = {"category_id": 1, "bbox": [2, 2, 30, 30], "keypoints": [9, 9, 2] * 17}
    heights = {"img_7.png": 40, "img_12.png": 60, "img_300.PNG": 90}
    content = {
        "images": [
            {"id": 50 + i, "file_name": name, "width": 80, "height": height}
            for i, (name, height) in enumerate(heights.items())
        ],
        "annotations": [{**person, "id": 1, "image_id": 50}, {**person, "id": 2, "image_id": 52}],
        "categories": [{"id": 1, "name": "person", "keypoints": list(COCO.keypoints)}],
    }
    annotations = tmp_path / "people.json"
    annotations.write_text(json.dumps(content), encoding="utf-8")
    shards = prepare_coco(folder, annotations, tmp_path / "shards")
    found = find_boxes(Known(), folder, list_images(folder, annotations))
    assert [(box["image_id"], box["file_name"]) for box in found] == list(zip((50, 51, 52), heights, strict=True))
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps(found), encoding="utf-8")
    detections = Detections(shards, boxes)
    assert detections.people[:]["image_id"].tolist() == [50, 52]
    assert detections.skipped == {"unknown_image": 1}
    unnamed = [{**box, "image_id": 52 if box["image_id"] == 50 else 50} for box in found]
    boxes.write_text(json.dumps(unnamed), encoding="utf-8")
    with pytest.raises(DataError, match=r"is of img_7\.png, but image 52 of .* is img_300\.PNG"):
        Detections(shards, boxes)


# --- images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["000000000785.jpg", "000000001000.jpg"], [785, 1000]),
        (["COCO_val2014_000000000042.jpg"], [42]),
        (["a.jpg", "b.jpg"], [1, 2]),
        (["a1.jpg", "b1.jpg"], [1, 2]),  # the numbers are equal
        (["a1.jpg", "b.jpg", "c7.jpg"], [1, 2, 3]),
    ],
)
def test_images_are_numbered_by_their_names_or_by_their_order(tmp_path: Path, names: list[str], ids: list[int]) -> None:
    for name in reversed(names):
        (tmp_path / name).touch()
    (tmp_path / "9.txt").touch()
    assert list_images(tmp_path) == dict(zip(names, ids, strict=True))


def test_images_that_cannot_be_read_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "c.png").mkdir()
    assert [
        box["file_name"] for box in find_boxes(Known(), tmp_path, {"a.png": 1, "b.png": 2, "c.png": 3, "d.png": 4})
    ] == ["a.png"]
    assert "3 of 4 images are missing or do not decode" in capsys.readouterr().err
    with pytest.raises(DataError, match="none of 1 images can be read"):
        find_boxes(Known(), tmp_path, {"d.png": 4})


# --- weights ----------------------------------------------------------------------------------------------------


def test_without_a_connection_the_message_names_the_way_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*arguments: Any, **options: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    output = tmp_path / "boxes.json"
    assert cli.main(["detect", str(folder), "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    assert (
        "https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth: cannot be downloaded"
        in message
    )
    assert "Name or service not known" in message
    assert "--weights" in message
    assert not output.exists()
    assert list((tmp_path / "cache" / "checkpoints").iterdir()) == []


def test_a_download_of_other_bytes_is_refused_and_a_cached_file_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "served.pth"
    source.write_bytes(b"something else")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.Request", lambda *_, **__: source.as_uri())
    with pytest.raises(WeightsError, match=r"invalid hash value .* --weights"):
        download_weights()
    checkpoints = tmp_path / "cache" / "checkpoints"
    assert list(checkpoints.iterdir()) == []
    cached = checkpoints / "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth"
    cached.touch()
    assert download_weights() == cached


def refusal(make: Callable[[], Any]) -> str:
    with pytest.raises(WeightsError) as caught:
        make()
    return str(caught.value)


def test_weights_of_another_detector_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "first_version.safetensors"
    other = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    save_file(other.state_dict(), path)
    message = refusal(lambda: load_detector(path))
    assert f"{path}: the weights do not fit" in message
    assert "fasterrcnn_resnet50_fpn_v2 of 91 classes" in message
    assert "there is no such file" in refusal(lambda: load_detector(tmp_path / "none.pth"))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Malicious()}, tmp_path / "detector.pth")
    assert "refused" in refusal(lambda: load_detector(tmp_path / "detector.pth"))
    assert not (tmp_path / "ran").exists()


def test_boxes_that_cannot_be_written_in_the_end_are_refused_whole(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "boxes.json"

    def look(*_: object, **__: object) -> list[Any]:
        output.mkdir()  # while images are searched
        return []

    monkeypatch.setattr("fpd_accel.detect.find_boxes", look)
    assert cli.main(["detect", str(folder), "--output", str(output), "--weights", str(weights)]) == 2
    assert "boxes.json: cannot be written: Is a directory" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [output]


# --- command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no such image folder"),
        (["empty"], "empty: no image in it"),
        (["images", "--annotations", "none.json"], "none.json: no such annotation file"),
        (["images", "--annotations", "broken.json"], "broken.json: not readable as JSON"),
        (["images", "--annotations", "list.json"], "list.json: not a COCO annotation file"),
        (["images", "--annotations", "nameless.json"], "nameless.json: images holds {'id': 1}"),
        (["images", "--threshold", "1.5"], "--threshold 1.5"),
        (["images", "--threshold", "nan"], "--threshold nan"),
        (["images", "--batch", "0"], "--batch 0"),
        (["images", "--output", "empty"], "empty: is a folder; --output is the file to write"),
        (["images", "--output", "broken.json/boxes.json"], "broken.json: cannot be made"),
        (["images", "--device", "gpu"], "device 'gpu' cannot be used"),
    ],
)
def test_a_mistake_is_answered_with_a_message(
    folder: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").symlink_to(folder)
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    (tmp_path / "nameless.json").write_text('{"images": [{"id": 1}]}', encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    assert cli.main(["detect", "--output", "boxes.json", "--weights", str(weights), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    assert words in message
    assert sorted(tmp_path.iterdir()) == before
