"""MPII: its two annotation forms, the geometry of the published loader, and PCKh as its evaluation computes it."""

import contextlib
import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from scipy.io import savemat

from fpd_accel import cli
from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Augment
from fpd_accel.data.mpii import MPII_SKIPPED, prepare_mpii
from fpd_accel.data.shards import FORMAT, Shards
from fpd_accel.data.stream import PoseStream
from fpd_accel.errors import DataError
from fpd_accel.evaluation.coco_results import (
    Predictions,
    ground_truth_predictions,
    head_accuracy,
    regions,
    selection_metric,
)
from fpd_accel.metrics import mpii_scores
from fpd_accel.skeleton import MPII
from fpd_accel.training.run import run

WIDTH, HEIGHT = 90, 70
SHORT_NAMES = ["rank", "rkne", "rhip", "lhip", "lkne", "lank", "pelv", "thor", "neck", "head"]
SHORT_NAMES += ["rwri", "relb", "rsho", "lsho", "lelb", "lwri"]
GROUPS = {"Head": [9], "Shoulder": [12, 13], "Elbow": [11, 14], "Wrist": [10, 15], "Hip": [2, 3], "Knee": [1, 4]}
GROUPS["Ankle"] = [0, 5]


# --- the files --------------------------------------------------------------------------------------------------


def hrnet_person(image: str, seed: int, *, missing: tuple[int, ...] = (), **changes: Any) -> dict[str, Any]:
    """An entry of HRNet's JSON; pixels count from 1."""
    joints = np.random.default_rng(seed).uniform((10, 10), (WIDTH - 10, HEIGHT - 10), (16, 2)).round(4)
    joints[list(missing)] = -1
    visible = [int(joint not in missing) for joint in range(16)]
    person = {"image": image, "center": [40.0 + seed, 30.0], "scale": 0.25, "joints": joints.tolist()}
    return {**person, "joints_vis": visible, **changes}


def write_ground_truth(path: Path, people: list[dict[str, Any]], heads: np.ndarray, **changes: Any) -> Path:
    """HRNet's gt_valid.mat of the people of a JSON; ``heads``: their (x1, y1, x2, y2)."""
    content = {
        "dataset_joints": np.array([SHORT_NAMES], dtype=object),
        "jnt_missing": 1.0 - np.array([person["joints_vis"] for person in people]).T,
        "pos_gt_src": np.array([person["joints"] for person in people]).transpose(1, 2, 0),
        "headboxes_src": heads.reshape(-1, 2, 2).transpose(1, 2, 0),
    }
    savemat(path, {name: value for name, value in {**content, **changes}.items() if value is not None})
    return path


def struct_array(*structs: dict[str, Any]) -> np.ndarray:
    """A 1 x N MATLAB struct array; a field that one struct lacks is an empty matrix there."""
    fields = list(dict.fromkeys(field for struct in structs for field in struct))
    array = np.empty((1, len(structs)), dtype=[(field, object) for field in fields])
    for place, struct in enumerate(structs):
        for field in fields:
            array[0, place][field] = struct.get(field, np.zeros((0, 0)))
    return array


def release_person(entry: dict[str, Any], head: tuple[int, int, int, int], **changes: Any) -> dict[str, Any]:
    """A struct of ``annorect`` with the types that MPII's file mixes: bytes, doubles, and visibility as text."""
    points = []
    for joint, ((x, y), labelled) in enumerate(zip(entry["joints"], entry["joints_vis"], strict=True)):
        seen = {} if joint in (8, 9) else {"is_visible": "0" if joint % 2 else np.uint8(1)}
        if labelled:
            points.append({"x": x, "y": y, "id": np.uint8(joint), **seen})
    rectangle = dict(zip(("x1", "y1", "x2", "y2"), map(np.uint8, head), strict=True))
    place = {"x": np.uint8(entry["center"][0]), "y": np.uint8(entry["center"][1])}
    person = {"annopoints": struct_array({"point": struct_array(*points)}), "objpos": struct_array(place)}
    return {**rectangle, **person, "scale": entry["scale"], **changes}


def release_image(name: str, *people: dict[str, Any]) -> dict[str, Any]:
    rectangles = struct_array(*people) if people else np.zeros((0, 0))
    empty = np.zeros((0, 0))
    return {"image": struct_array({"name": name}), "annorect": rectangles, "frame_sec": empty, "vididx": empty}


def write_release(path: Path, images: list[dict[str, Any]], is_train: list[int], **changes: Any) -> Path:
    single = np.empty((len(images), 1), dtype=object)
    single[:] = [[np.array([[1]], dtype=np.uint8)]] * len(images)
    release = {
        "annolist": struct_array(*images),
        "img_train": np.array([is_train], dtype=np.uint8),
        "version": "12",
        "single_person": single,
        "act": struct_array(*[{"cat_name": "sports", "act_id": np.int16(1)}] * len(images)),
        "video_list": np.array([["abc", "def"]], dtype=object),
    }
    savemat(path, {"RELEASE": {key: value for key, value in {**release, **changes}.items() if value is not None}})
    return path


class Source:
    """Two images and three people on disk in HRNet's form, to be spoiled and prepared."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images, self.output = folder, folder / "images", folder / "shards"
        self.annotations = folder / "valid.json"
        self.images.mkdir()
        for seed, name in enumerate(("a.jpg", "b.jpg")):
            noise = np.random.default_rng(seed).uniform(0, 255, (HEIGHT, WIDTH, 3)).astype(np.float32)
            cv2.imwrite(str(self.images / name), cv2.GaussianBlur(noise, (0, 0), 4))
        self.people: Any = [
            hrnet_person("b.jpg", 0),
            hrnet_person("a.jpg", 1, missing=(0, 5, 9)),
            hrnet_person("b.jpg", 2),
        ]
        self.heads = np.array([[10, 10, 40, 50], [20, 5, 26, 13], [5, 5, 17, 21]])  # diagonals of 50, 10 and 20

    def prepare(self, **options: Any) -> Shards:
        self.annotations.write_text(json.dumps(self.people), encoding="utf-8")
        return prepare_mpii(self.images, self.annotations, self.output, **options)

    def prepare_with_heads(self, **changes: Any) -> Shards:
        return self.prepare(ground_truth=self.ground_truth(**changes))

    def ground_truth(self, **changes: Any) -> Path:
        return write_ground_truth(self.folder / "gt_valid.mat", self.people, self.heads, **changes)

    def refusal(self, prepare: Callable[[], Shards]) -> str:
        with pytest.raises(DataError) as caught:
            prepare()
        assert not self.output.exists()
        assert not [path for path in self.folder.iterdir() if path.name.startswith(".")]
        return str(caught.value)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


@pytest.fixture(scope="module")
def sample(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, list[dict[str, Any]]]:
    """The five people of the sample, prepared, and their annotations; heads drawn about neck and head top."""
    folder, work = shared / "data" / "mpii_sample", tmp_path_factory.mktemp("mpii")
    people = json.loads((folder / "annotations.json").read_bytes())
    joints = np.array([person["joints"] for person in people])
    heads = np.concatenate([joints[:, 9] - 20, joints[:, 8] + 20], axis=1)
    truth = write_ground_truth(work / "gt_valid.mat", people, heads)
    return prepare_mpii(folder / "images", folder / "annotations.json", work / "shards", ground_truth=truth), people


# --- the people -------------------------------------------------------------------------------------------------


def test_shards_hold_the_people_of_the_json_with_pixels_counted_from_zero(source: Source) -> None:
    shards = source.prepare()
    people = shards.people[:]
    assert shards.skeleton == MPII
    assert shards.description["counts"] == {"images": 2, "people": 3, "usable": 3, "head_sizes": 0}
    assert shards.description["skipped"] == shards.description["exclude_reason"] == {}
    assert [row["file_name"] for row in shards.images] == ["b.jpg", "a.jpg"]  # as the file meets them
    assert shards.images[0]["bytes"] == (source.images / "b.jpg").read_bytes()
    assert people["id"].tolist() == [1, 3, 2]  # their places in the file
    assert people["image_row"].tolist() == [0, 0, 1]
    triples = people["keypoints"].reshape(3, 16, 3)
    np.testing.assert_allclose(triples[1, :, :2], np.array(source.people[2]["joints"]) - 1, rtol=1e-6)
    assert (triples[1, :, 2] == 2).all()
    missing = [0, 5, 9]
    assert (triples[2, missing] == 0).all()
    assert (np.delete(triples[2], missing, axis=0)[:, 2] == 2).all()


def test_the_labels_of_the_ground_truth_are_those_that_count(source: Source) -> None:
    missing = 1.0 - np.array([person["joints_vis"] for person in source.people]).T
    missing[7, 0] = 1
    moved = np.array([person["joints"] for person in source.people]).transpose(1, 2, 0) + 0.5
    shards = source.prepare_with_heads(jnt_missing=missing, pos_gt_src=moved)
    assert shards.description["counts"] == {"images": 2, "people": 3, "usable": 3, "head_sizes": 3}
    assert shards.description["source"].keys() == {"annotations", "sha256", "ground_truth", "ground_truth_sha256"}
    people = shards.people[:]
    np.testing.assert_allclose(people["head_size"], [0.6 * 50, 0.6 * 20, 0.6 * 10], rtol=1e-6)
    triples = people["keypoints"].reshape(3, 16, 3)
    np.testing.assert_allclose(triples[1, :, :2], np.array(source.people[2]["joints"]) - 0.5, rtol=1e-6)
    assert (triples[0, 7] == 0).all()
    assert (triples[2, :, 2] > 0).sum() == 13


def test_the_matlab_file_gives_the_people_of_the_json(source: Source) -> None:
    first, second, third = source.people
    heads = [tuple(head) for head in source.heads.tolist()]
    untouched = {"x1": 1.0, "y1": 1.0, "x2": 5.0, "y2": 5.0}  # in MPII's file some people have a head alone
    path = write_release(
        source.folder / "release.mat",
        [
            release_image("b.jpg", release_person(first, heads[0]), untouched, release_person(third, heads[2])),
            release_image("test.jpg", {"scale": 1.0, "objpos": struct_array({"x": 1.0, "y": 1.0})}),
            release_image("nobody.jpg"),
            release_image("a.jpg", release_person(second, heads[1])),
        ],
        [1, 0, 1, 1],
    )
    shards = prepare_mpii(source.images, path, source.folder / "matlab")
    assert shards.description["counts"] == {"images": 2, "people": 3, "usable": 3, "head_sizes": 3}
    assert shards.description["skipped"] == {"image_of_test_set": 1, "image_empty": 1, "person_unlabelled": 1}
    expected, found = source.prepare_with_heads().people[:], shards.people[:]
    for column in ("image_id", "image_row", "box", "area", "head_size", "score"):
        np.testing.assert_array_equal(found[column], expected[column], err_msg=column)
    assert found["id"].tolist() == [1, 3, 4]  # rectangles of training images, in order
    triples, labels = (people["keypoints"].reshape(3, 16, 3) for people in (found, expected))
    np.testing.assert_array_equal(triples[..., :2], labels[..., :2])
    hidden = np.isin(np.arange(16), [1, 3, 5, 7, 11, 13, 15])  # 9, the head, comes without a flag
    np.testing.assert_array_equal(triples[..., 2], np.where((labels[..., 2] > 0) & hidden, 1, labels[..., 2]))


def test_one_image_and_one_person_are_a_matlab_file_too(source: Source) -> None:
    person = release_person(source.people[0], (1, 1, 4, 5))
    path = write_release(source.folder / "release.mat", [release_image("b.jpg", person)], [1])
    people = prepare_mpii(source.images, path, source.output).people[:]
    assert people["head_size"].tolist() == pytest.approx([3.0])
    assert (people["keypoints"].reshape(16, 3)[:, 2] > 0).all()


RELEASE_SKIPS: dict[str, tuple[dict[str, Any], str]] = {
    "no position": ({"objpos": np.zeros((0, 0))}, "person_without_position"),
    "no scale": ({"scale": np.zeros((0, 0))}, "person_without_position"),
    "an unknown joint": (
        {"annopoints": struct_array({"point": struct_array({"x": 1.0, "y": 1.0, "id": 16})})},
        "person_contradictory",
    ),
    "a joint twice": (
        {"annopoints": struct_array({"point": struct_array(*[{"x": 1.0, "y": 1.0, "id": 3}] * 2)})},
        "person_contradictory",
    ),
    "a joint without a place": (
        {"annopoints": struct_array({"point": struct_array({"x": np.nan, "y": 1.0, "id": 3})})},
        "person_contradictory",
    ),
    "no joints": ({"annopoints": np.zeros((0, 0))}, "person_unlabelled"),
}


@pytest.mark.parametrize("spoiled", RELEASE_SKIPS)
def test_people_that_the_matlab_file_leaves_incomplete_are_skipped_and_counted(source: Source, spoiled: str) -> None:
    changes, reason = RELEASE_SKIPS[spoiled]
    people = [
        release_person(source.people[0], (1, 1, 4, 5), **changes),
        release_person(source.people[2], (1, 1, 1, 1)),  # a head without size
    ]
    path = write_release(source.folder / "release.mat", [release_image("b.jpg", *people)], [1])
    shards = prepare_mpii(source.images, path, source.output)
    assert shards.description["skipped"] == {reason: 1}
    assert shards.description["counts"] == {"images": 1, "people": 1, "usable": 1, "head_sizes": 0}
    assert not shards.has_head_sizes


# --- what is skipped, what is refused ---------------------------------------------------------------------------

Spoil = Callable[[Source], Any]
SPOILED: dict[str, tuple[Spoil, dict[str, int], dict[str, int]]] = {
    # name: what is done to the source, then images, people and usable, and what is skipped
    "an image that is missing": (
        lambda s: (s.images / "b.jpg").unlink(), {"images": 1, "people": 1, "usable": 1},
        {"image_missing": 1, "person_of_skipped_image": 2},
    ),
    "an image cut off on the way": (
        lambda s: (s.images / "a.jpg").write_bytes((s.images / "a.jpg").read_bytes()[:400]),
        {"images": 1, "people": 2, "usable": 2}, {"image_corrupt": 1, "person_of_skipped_image": 1},
    ),
    "a person listed twice": (
        lambda s: s.people.append(dict(s.people[0])), {"images": 2, "people": 3, "usable": 3}, {"duplicate_person": 1},
    ),
    "a person without position": (
        lambda s: s.people[2].update(center=[-1, -1]), {"images": 2, "people": 2, "usable": 2},
        {"person_without_position": 1},
    ),
    "a person without scale": (
        lambda s: s.people[2].update(scale=0), {"images": 2, "people": 2, "usable": 2}, {"person_without_position": 1},
    ),
    "a person without a label": (
        lambda s: s.people[2].update(joints_vis=[0] * 16), {"images": 2, "people": 3, "usable": 2}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_cannot_be_used_is_skipped_and_counted(source: Source, spoiled: str) -> None:
    spoil, counts, skipped = SPOILED[spoiled]
    spoil(source)
    shards = source.prepare()
    assert shards.description["counts"] == {**counts, "head_sizes": 0}
    assert shards.description["skipped"] == skipped
    assert shards.description["skipped"].keys() <= MPII_SKIPPED.keys()
    assert sum(shards.description["exclude_reason"].values()) == counts["people"] - counts["usable"]
    assert len(PoseStream(shards, input_size=(32, 32), batch_size=1).batch(range(len(shards)))) == counts["usable"]


REFUSED: dict[str, tuple[Spoil, str]] = {
    "a file in COCO's form": (lambda s: setattr(s, "people", {"images": []}), "--format coco --skeleton mpii"),
    "a person that is no object": (lambda s: s.people.append("joe"), "person 4: is 'joe'"),
    "no image": (lambda s: s.people[1].pop("image"), "person 2: 'image' is None"),
    "the test set": (lambda s: s.people[0].pop("joints"), "labels of MPII's test images are not published"),
    "15 joints": (lambda s: s.people[0]["joints"].pop(), "person 1: 'joints' should hold 16 x 2 numbers"),
    "joints of three numbers": (lambda s: s.people[0].update(joints=[[1, 2, 3]] * 16), "should hold 16 x 2 numbers"),
    "a joint short of a number": (lambda s: s.people[0]["joints"][3].pop(), "'joints' should hold 16 x 2 numbers"),
    "joints in words": (lambda s: s.people[0].update(joints=[["a", "b"]] * 16), "should hold 16 x 2 numbers"),
    "a number too long": (lambda s: s.people[0].update(scale=10**400), "not a finite number"),
    "a joint that is nowhere": (lambda s: s.people[0]["joints"][3].__setitem__(0, math.nan), "not a finite number"),
    "17 visibilities": (lambda s: s.people[2]["joints_vis"].append(1), "person 3: 'joints_vis' should hold 16 numbers"),
    "another visibility": (lambda s: s.people[2]["joints_vis"].__setitem__(0, 3), "neither 0 nor 1"),
    "no centre": (lambda s: s.people[0].pop("center"), "'center' should hold 2 numbers, not None"),
    "scale as a pair": (lambda s: s.people[0].update(scale=[1, 1]), "'scale' should hold one number"),
    "an infinite scale": (lambda s: s.people[0].update(scale=math.inf), "not a finite number"),
    "a scale beyond single precision": (lambda s: s.people[0].update(scale=1e39), "not a finite number"),
    "nobody": (lambda s: s.people.clear(), "no image of"),
    "images that are elsewhere": (lambda s: [path.unlink() for path in s.images.iterdir()], "looked first for"),
    "nobody labelled": (
        lambda s: [person.update(joints_vis=[0] * 16) for person in s.people],
        "no person that can be used",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_right_is_refused_and_nothing_is_written(source: Source, mistake: str) -> None:
    spoil, words = REFUSED[mistake]
    spoil(source)
    message = source.refusal(source.prepare)
    assert words in message
    assert str(source.folder) in message
    assert "\n" not in message


WRONG_TRUTH: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"headboxes_src": None}, "has no 'headboxes_src'"),
    "15 joints": ({"jnt_missing": np.zeros((15, 3))}, "'jnt_missing' is float64 (15, 3), not numbers (16, people)"),
    "nobody": ({"pos_gt_src": np.zeros((16, 2, 0))}, "not numbers (16, 2, people)"),
    "heads as words": ({"headboxes_src": np.array([["ab", "cd"]], dtype=object)}, "'headboxes_src' is object"),
    "two heads for three people": ({"headboxes_src": np.ones((2, 2, 2))}, "3, 3 and 2 people"),
    "a label that is nowhere": ({"pos_gt_src": np.full((16, 2, 3), np.nan)}, "not finite"),
    "other people": ({"pos_gt_src": np.full((16, 2, 3), 900.0)}, "person 1 is not the one in"),
}


@pytest.mark.parametrize("mistake", WRONG_TRUTH)
def test_a_ground_truth_that_does_not_fit_is_refused(source: Source, mistake: str) -> None:
    changes, words = WRONG_TRUTH[mistake]
    message = source.refusal(lambda: source.prepare_with_heads(**changes))
    assert words in message
    assert message.startswith(str(source.folder / "gt_valid.mat"))


def test_a_ground_truth_of_another_split_is_refused(source: Source) -> None:
    path = source.ground_truth()
    source.people.pop()
    assert "3 people, but" in source.refusal(lambda: source.prepare(ground_truth=path))
    source.people.append(hrnet_person("b.jpg", 2))
    source.people.reverse()
    assert "person 1 is not the one in" in source.refusal(lambda: source.prepare(ground_truth=path))


def test_a_matlab_file_has_its_own_head_sizes(source: Source) -> None:
    path = write_release(source.folder / "release.mat", [release_image("b.jpg")], [1])
    truth = source.ground_truth()
    message = source.refusal(lambda: prepare_mpii(source.images, path, source.output, ground_truth=truth))
    assert "has head sizes itself" in message
    message = source.refusal(lambda: prepare_mpii(source.images, path, source.output))
    assert "no image of" in message
    assert "image_empty" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"img_train": None}, "has no struct RELEASE with annolist and img_train"),
        ({"annolist": np.ones((1, 3))}, "img_train do not match"),
        ({"img_train": np.ones((1, 4))}, "img_train do not match"),
        ({"annolist": struct_array({"image": struct_array({"name": "b.jpg"}), "annorect": 3.0})}, "no struct annorect"),
        ({"annolist": struct_array({"annorect": np.zeros((0, 0))})}, "annolist(1) has no image.name"),
    ],
)
def test_a_matlab_file_of_another_layout_is_refused(source: Source, changes: dict[str, Any], words: str) -> None:
    path = write_release(source.folder / "release.mat", [release_image("b.jpg")], [1], **changes)
    assert words in source.refusal(lambda: prepare_mpii(source.images, path, source.output))


def test_the_ground_truth_given_as_annotations_is_refused_with_advice(source: Source) -> None:
    path = source.ground_truth()
    assert "gt_valid.mat as ground truth" in source.refusal(lambda: prepare_mpii(source.images, path, source.output))


class Bomb:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["empty", "text", "cut off", "MATLAB 7.3", "pickle"])
def test_a_file_that_is_no_matlab_file_is_refused_and_nothing_in_it_runs(source: Source, content: str) -> None:
    path = source.ground_truth()
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    contents = {
        "empty": b"", "text": b"MATLAB" * 100, "cut off": path.read_bytes()[:700],
        "MATLAB 7.3": header + bytes(600), "pickle": pickle.dumps(Bomb(source.folder / "ran")),
    }  # fmt: skip
    path.write_bytes(contents[content])
    for prepare in (
        lambda: source.prepare(ground_truth=path),
        lambda: prepare_mpii(source.images, path, source.output),
    ):
        message = source.refusal(prepare)
        assert message.startswith(f"{path}: ")
        assert ("save -v7" in message) == (content == "MATLAB 7.3")
    assert not (source.folder / "ran").exists()


def test_files_that_do_not_exist_are_refused(source: Source) -> None:
    nothing = source.folder / "nothing"
    assert "no such image folder" in source.refusal(lambda: prepare_mpii(nothing, source.annotations, source.output))
    for path in (nothing, nothing.with_suffix(".mat")):
        message = source.refusal(lambda path=path: prepare_mpii(source.images, path, source.output))
        assert message == f"{path}: no such annotation file"
    message = source.refusal(lambda: source.prepare(ground_truth=nothing))
    assert message == f"{nothing}: no such annotation file"


# --- the geometry -----------------------------------------------------------------------------------------------


def test_the_region_of_a_person_is_the_one_computed_by_hand(sample: tuple[Shards, list[dict[str, Any]]]) -> None:
    shards, _ = sample
    batch = PoseStream(shards, input_size=(256, 256), batch_size=1).batch(range(1))
    # centre (966, 340), scale 4.718488: y + 15 * 4.718488 = 410.77732, both less 1; 4.718488 * 1.25 * 200 = 1179.622
    np.testing.assert_allclose(batch.centers.numpy(), [[965.0, 409.77732]], atol=1e-3)  # image pixels
    np.testing.assert_allclose(batch.sizes.numpy(), [[1179.622, 1179.622]], atol=1e-3)  # of a 1280 x 720 image


def published_matrix(person: dict[str, Any], input_size: tuple[int, int]) -> np.ndarray:
    """The affine map of the published loader from three points: centre, a point above it, and one to the side."""
    height, width = input_size
    scale = person["scale"] * 1.25
    x, y = person["center"][0] - 1, person["center"][1] + 15 * person["scale"] - 1
    half = 0.5 * scale * 200
    ours = [[x, y], [x, y - half], [x - half, y - half]]
    theirs = [[width / 2, height / 2], [width / 2, height / 2 - width / 2], [0, height / 2 - width / 2]]
    return cv2.getAffineTransform(np.float32(ours), np.float32(theirs))


@pytest.mark.parametrize("input_size", [(256, 256), (256, 192)])
def test_crops_and_joints_are_the_published_ones(
    sample: tuple[Shards, list[dict[str, Any]]], shared: Path, input_size: tuple[int, int]
) -> None:
    shards, people = sample
    batch = PoseStream(shards, input_size=input_size, batch_size=1).batch(range(5))
    for i, row in enumerate(batch.rows.tolist()):
        person = people[shards.people[row]["id"] - 1]
        matrix = published_matrix(person, input_size)
        labelled = np.array(person["joints_vis"]) > 0
        joints = (np.array(person["joints"]) - 1) @ matrix[:, :2].T + matrix[:, 2]
        np.testing.assert_array_equal(batch.visible[i].numpy() > 0, labelled)
        np.testing.assert_allclose(batch.keypoints[i].numpy()[labelled], joints[labelled], atol=1e-3)  # crop pixels
        image = cv2.imread(str(shared / "data" / "mpii_sample" / "images" / person["image"]))[..., ::-1]
        crop = cv2.warpAffine(np.ascontiguousarray(image), matrix, input_size[::-1], flags=cv2.INTER_LINEAR)
        assert np.abs(batch.crops[i].numpy().astype(int) - crop).mean() < 0.05  # grey level


def test_evaluation_has_the_regions_of_the_crops(sample: tuple[Shards, list[dict[str, Any]]]) -> None:
    shards, _ = sample
    batch = PoseStream(shards, input_size=(256, 256), batch_size=1).batch(range(5))
    centers, sizes = regions(shards, batch.rows.numpy(), (256, 256), 1.25)
    np.testing.assert_array_equal(centers, batch.centers.numpy())
    np.testing.assert_array_equal(sizes, batch.sizes.numpy())


def test_training_crops_are_drawn_about_the_same_regions(sample: tuple[Shards, list[dict[str, Any]]]) -> None:
    shards, _ = sample
    still = Augment(flip=0, scale=0, rotation_probability=0, half_body=0)
    drawn = PoseStream(shards, input_size=(256, 256), batch_size=1, augment=still).batch(range(5))
    centers, sizes = regions(shards, drawn.rows.numpy(), (256, 256), 1.25)
    np.testing.assert_array_equal(drawn.centers.numpy(), centers)
    np.testing.assert_array_equal(drawn.sizes.numpy(), sizes)


def test_shards_of_the_first_format_are_read_as_they_were(tiny_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_shards, tmp_path / "first")
    description = json.loads((tmp_path / "first" / "dataset.json").read_bytes())
    assert description.pop("format") == FORMAT == 3
    assert description.pop("clip_boxes") is True
    (tmp_path / "first" / "dataset.json").write_text(json.dumps({**description, "format": 1}), encoding="utf-8")
    first = Shards(tmp_path / "first")
    assert not first.has_head_sizes
    old, new = (
        PoseStream(shards, input_size=(64, 48), batch_size=1).batch(range(4)) for shards in (first, Shards(tiny_shards))
    )
    np.testing.assert_array_equal(old.crops, new.crops)
    np.testing.assert_array_equal(old.centers, new.centers)


def test_a_box_past_the_image_is_cut_for_coco_and_not_for_mpii(source: Source, tiny_shards: Path) -> None:
    box = np.array([-10.0, 5.0, 200.0, 30.0], dtype=np.float32)
    np.testing.assert_array_equal(source.prepare().box_to_crop(box, width=WIDTH, height=HEIGHT), box)
    cut = Shards(tiny_shards).box_to_crop(box, width=WIDTH, height=HEIGHT)
    np.testing.assert_array_equal(cut, [0, 5, WIDTH - 1, 29])


# --- PCKh -------------------------------------------------------------------------------------------------------


def slow_scores(predicted: np.ndarray, joints: np.ndarray, missing: np.ndarray, heads: np.ndarray) -> dict[str, float]:
    """The formula of MPII's evaluation, a joint at a time. Pixels count from 1 on both sides."""

    def share(joint: int, threshold: float) -> tuple[int, int]:
        right = counted = 0
        for n in range(len(predicted)):
            if not missing[n, joint]:
                size = 0.6 * math.dist(heads[n, :2], heads[n, 2:])
                counted += 1
                right += math.dist(predicted[n, joint], joints[n, joint]) / size <= threshold
        return right, counted

    def mean(threshold: float) -> float:
        shares = [share(joint, threshold) for joint in range(16) if joint not in (6, 7)]
        total = sum(counted for _, counted in shares)
        return sum(100.0 * right / counted * (counted / total) for right, counted in shares)

    per_joint = [100.0 * right / counted for right, counted in (share(joint, 0.5) for joint in range(16))]
    groups = {f"PCKh_{name}@0.5": sum(per_joint[j] for j in group) / len(group) for name, group in GROUPS.items()}
    return groups | {"PCKh@0.5": mean(0.5), "PCKh@0.1": mean(0.1), "Mean@0.1 (original, 0.11)": mean(0.11)}


def test_pckh_is_the_published_formula(source: Source) -> None:
    random = np.random.default_rng(5)
    people = [hrnet_person("a.jpg", n, missing=tuple(random.choice(16, 4, replace=False))) for n in range(40)]
    heads = np.concatenate([random.uniform(0, 30, (40, 2)), random.uniform(40, 80, (40, 2))], axis=1)
    source.people, source.heads = people, heads
    shards = source.prepare_with_heads()
    joints, missing = (np.array([person[key] for person in people]) for key in ("joints", "joints_vis"))
    predicted = joints + random.normal(scale=8, size=joints.shape)
    order = shards.people[shards.usable]["id"] - 1
    found = Predictions(shards.usable, (predicted[order] - 1), np.ones((40, 16)))
    scores = head_accuracy(shards, found)
    expected = slow_scores(predicted, joints, missing == 0, heads)
    assert scores == pytest.approx(expected, abs=1e-9)
    assert list(scores) == list(expected)
    assert 0 < scores["PCKh@0.1"] < scores["Mean@0.1 (original, 0.11)"] < scores["PCKh@0.5"] < 100


def test_somebody_listed_twice_counts_twice_where_the_published_evaluation_counts_them(source: Source) -> None:
    source.people.append(dict(source.people[0]))
    source.heads = np.concatenate([source.heads, source.heads[:1]])
    shards = source.prepare_with_heads()
    assert shards.description["counts"] == {"images": 2, "people": 4, "usable": 4, "head_sizes": 4}
    assert shards.description["skipped"] == {}
    order = shards.people[shards.usable]["id"] - 1
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    joints, labelled = (np.array([person[key] for person in source.people]) for key in ("joints", "joints_vis"))
    predicted = joints + np.where(np.arange(4) == 3, 1e4, 0)[:, None, None]  # the second time wrong
    found = Predictions(shards.usable, predicted[order] - 1, np.ones((4, 16)))
    expected = slow_scores(predicted, joints, labelled == 0, source.heads)
    assert head_accuracy(shards, found) == pytest.approx(expected, abs=1e-9)
    assert expected["PCKh@0.5"] < 80


def test_a_joint_at_the_threshold_is_right() -> None:
    truth, visible = np.zeros((1, 16, 2)), np.ones((1, 16))
    for threshold, name in ((0.5, "PCKh@0.5"), (0.1, "PCKh@0.1"), (0.11, "Mean@0.1 (original, 0.11)")):
        offset = np.array([100 * threshold, 0.0])
        at = mpii_scores(truth + offset, truth, np.array([100.0]), visible)
        past = mpii_scores(truth + offset + [1e-6, 0.0], truth, np.array([100.0]), visible)
        assert (at[name], past[name]) == (100.0, 0.0)


def test_joints_count_by_how_often_they_are_labelled_and_groups_by_their_sides() -> None:
    truth, visible = np.zeros((4, 16, 2)), np.ones((4, 16))
    predicted = truth.copy()
    predicted[:, 6:8] = 1e4  # pelvis and thorax: no part in anything
    visible[1:, 10] = 0  # a right wrist is labelled once, and wrong; the left ones are right
    predicted[0, 10] = 1e4
    scores = mpii_scores(predicted, truth, np.full(4, 10.0), visible)
    assert scores["PCKh_Wrist@0.5"] == 50.0
    assert scores["PCKh@0.5"] == pytest.approx(100 * (14 * 4 - 4) / (14 * 4 - 3))
    assert {name: score for name, score in scores.items() if score == 100.0}.keys() == {
        f"PCKh_{group}@0.5" for group in GROUPS if group != "Wrist"
    }


def test_people_without_a_head_size_are_left_out(source: Source) -> None:
    source.heads[1] = 7  # a rectangle without extent
    shards = source.prepare_with_heads()
    assert shards.description["counts"]["head_sizes"] == 2
    labels = ground_truth_predictions(shards)
    wrong = shards.people[labels.rows]["id"] == 2
    moved = replace(labels, keypoints=labels.keypoints + 1e4 * wrong[:, None, None])
    assert head_accuracy(shards, moved)["PCKh@0.5"] == 100.0


def test_ground_truth_as_prediction_scores_a_hundred(sample: tuple[Shards, list[dict[str, Any]]]) -> None:
    shards, _ = sample
    labels = ground_truth_predictions(shards)
    scores = head_accuracy(shards, labels)
    assert len(scores) == 10
    assert set(scores.values()) == {100.0}
    away = replace(labels, keypoints=labels.keypoints + 200)
    assert set(head_accuracy(shards, away).values()) == {0.0}


def test_the_best_is_chosen_by_pckh_where_it_can_be_measured(source: Source, tiny_valid: Path) -> None:
    shards = source.prepare()
    assert (selection_metric(shards), selection_metric(Shards(tiny_valid))) == ("AP", "AP")
    assert head_accuracy(shards, ground_truth_predictions(shards)) == {}
    source.output.rename(source.folder / "elsewhere")
    assert selection_metric(source.prepare_with_heads()) == "PCKh@0.5"


# --- the commands -----------------------------------------------------------------------------------------------


def prepare_by_command(source: Source, *more: object) -> int:
    source.annotations.write_text(json.dumps(source.people), encoding="utf-8")
    files = ["--images", source.images, "--annotations", source.annotations, "--output", source.output]
    return cli.main(["prepare", *map(str, files), *map(str, more)])


def test_one_command_prepares_mpii(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    source.people.append(source.people[0])
    source.heads = np.concatenate([source.heads, source.heads[:1]])
    source.heads[1] = 7
    assert prepare_by_command(source, "--format", "mpii", "--ground-truth", source.ground_truth()) == 0
    said = capsys.readouterr().err
    assert "2 images, 4 annotations, 4 usable" in said
    assert "without the size of the head, so not in PCKh: 1" in said
    shutil.rmtree(source.output)
    assert prepare_by_command(source, "--format", "mpii") == 0
    said = capsys.readouterr().err
    assert "2 images, 3 annotations, 3 usable" in said
    assert "skipped 1 people with the same image" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "mpii", "--skeleton", "mpii"], "--skeleton does not go with --format mpii"),
        (["--format", "mpii", "--category", "person"], "--category does not go with --format mpii"),
        (["--ground-truth", "gt_valid.mat"], "--ground-truth does not go with --format coco"),
        ([], "valid.json: not a COCO annotation file"),
        (["--format", "mpii", "--ground-truth", "nothing.mat"], "nothing.mat: no such annotation file"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    source: Source, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert prepare_by_command(source, *options) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not source.output.exists()


def test_a_student_is_trained_chosen_and_reported_by_pckh(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = source.prepare_with_heads()
    recipe = {
        "run": {"name": "mpii", "root": str(tmp_path / "runs")},
        "data": {"train": str(shards.path), "valid": str(shards.path), "input_size": [64, 64], "workers": 0},
        "student": {"arch": "tiny_w8"},
        "distill": {"mode": "normal"},
        "train": {"steps": 2, "global_batch": 3},
        "optim": {"schedule": "constant"},
        "evaluate": {"every_epochs": 1},
        "log": {"every_steps": 1, "pictures_every_steps": None, "trackers": []},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (score,) = run(load_recipe(tmp_path / "recipe.yaml"))
    printed = capsys.readouterr().out
    for heading in ("PCKh@0.5", "PCKh@0.1", "Mean@0.1", "Head", "Sho.", "Elbow", "Wrist", "Hip", "Knee", "Ankle"):
        assert heading in printed
    assert f"{score.metrics['PCKh@0.5']:.2f}" in printed
    assert "AP50" not in printed
    records = []
    for line in (tmp_path / "runs" / "mpii" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(KeyError):
            records.append(json.loads(line)["valid_PCKh@0.5"])
    assert len(records) == 2
    assert score.metrics["PCKh@0.5"] == max(records)
    described = json.loads((tmp_path / "runs" / "mpii" / "best" / "config.json").read_bytes())
    assert described["skeleton"]["name"] == "mpii"
    assert described["source"]["valid"]["PCKh@0.5"] == max(records)


def test_matlab_files_without_scipy_are_refused_with_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    (tmp_path / "release.mat").write_bytes(b"any")
    with pytest.raises(DataError, match=r"release\.mat: MATLAB files need SciPy; .*fpd-accel\[mpii\]"):
        prepare_mpii(images=tmp_path, annotations=tmp_path / "release.mat", output=tmp_path / "out")
