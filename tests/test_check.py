"""`fpd-accel check`: every kind of mistake in labels is found and counted, and nothing else is reported."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from fpd_accel import cli
from fpd_accel.check.contact_sheet import CAPTION, CELL, COLUMNS, choose_people, contact_sheet
from fpd_accel.check.label_rules import repeated_images
from fpd_accel.check.labels import read_labels
from fpd_accel.check.oracle import score_labels, similar_people
from fpd_accel.check.report import Report, check_shards
from fpd_accel.check.skeleton_rules import check_skeleton
from fpd_accel.config.schema import Evaluate
from fpd_accel.data import coco, mpii
from fpd_accel.data.coco import prepare_coco
from fpd_accel.data.shard_writer import ShardWriter
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.evaluation.coco_results import coco_results, ground_truth, ground_truth_predictions
from fpd_accel.evaluation.folder import evaluate_folder
from fpd_accel.geometry import box_to_region, clip_box
from fpd_accel.metrics import average_precision
from fpd_accel.models.create import create_model
from fpd_accel.skeleton import COCO, Skeleton, load_skeleton
from fpd_accel.visualize import encode_picture, keypoint_colors
from fpd_accel.weights.model_folder import ModelConfig, read_model_config, save_model

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]
PEOPLE = 40


class Dataset:
    """Images and people of synthetic shards as plain records, to corrupt, write again and check."""

    def __init__(self, source: Path, folder: Path) -> None:
        shards = Shards(source)
        people = shards.people[:]
        self.folder, self.skeleton, self.skipped = folder, shards.skeleton, dict(shards.description["skipped"])
        self.clip_boxes = True
        self.images: list[Record] = [dict(image) for image in shards.images]
        self.people: list[Record] = [{name: column[i] for name, column in people.items()} for i in range(PEOPLE)]
        for person in self.people:
            person["keypoints"] = person["keypoints"].reshape(-1, 3).copy()
            person["box"] = person["box"].copy()

    def joint(self, person: int, name: str) -> np.ndarray:
        """Return x, y and visibility of a joint, to be changed in place."""
        return self.people[person]["keypoints"][self.skeleton.index(name)]

    def exchange(self, person: int, *parts: str) -> None:
        """Exchange left and right of some joints."""
        for part in parts:
            rows = [self.skeleton.index(f"{side}_{part}") for side in ("left", "right")]
            self.people[person]["keypoints"][rows] = self.people[person]["keypoints"][rows[::-1]]

    def add(self, person: Record, **changes: Any) -> int:
        self.people.append({**copy.deepcopy(person), "id": 1000 + len(self.people), **changes})
        return int(self.people[-1]["id"])

    def write(self) -> Shards:
        with ShardWriter(self.folder / "shards", self.skeleton, clip_boxes=self.clip_boxes) as writer:
            writer.write_images(iter(self.images))
            writer.write_people(
                {**person, "keypoints": np.asarray(person["keypoints"], np.float32).reshape(-1)}
                for person in self.people
            )
            writer.finish(source={}, skipped=self.skipped)
        return Shards(self.folder / "shards")

    def check(self) -> Report:
        return check_shards(self.write())


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return shards of 24 synthetic images with more than 40 people."""
    from fpd_accel.synthetic.dataset import draw_dataset

    folder = tmp_path_factory.mktemp("check")
    draw_dataset(folder / "coco", images=24, seed=3)
    prepare_coco(folder / "coco" / "images", folder / "coco" / "person_keypoints.json", folder / "shards")
    return folder / "shards"


@pytest.fixture
def dataset(drawn: Path, tmp_path: Path) -> Dataset:
    return Dataset(drawn, tmp_path)


def found(report: Report) -> dict[str, tuple[str, int]]:
    """Return severity and count of each finding, by the name of its check."""
    assert len({finding.check for finding in report.findings}) == len(report.findings)
    return {finding.check: (finding.severity, finding.count) for finding in report.findings}


def test_a_clean_dataset_has_no_findings_and_its_numbers_add_up(dataset: Dataset) -> None:
    report = dataset.check()
    assert found(report) == {}
    people = len(dataset.people)
    assert people == PEOPLE
    assert report.counts == {"images": 24, "people": people, "usable": people, "unusable": {}, "skipped": {}}
    assert sum(report.sizes.values()) == people
    assert sum(report.images_by_people.values()) == 24
    assert report.oracle.holds
    assert report.oracle.evaluated == report.oracle.people == people
    for row, joint in enumerate(report.joints):
        states = [person["keypoints"][row, 2] for person in dataset.people]
        assert [joint[name] for name in ("unlabelled", "hidden", "seen")] == [states.count(v) for v in (0, 1, 2)]
    widths = [float(person["box"][2]) for person in dataset.people]
    assert report.quantiles["box width"] == pytest.approx(np.quantile(widths, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]))


# Name -> a change of the dataset, and the findings that it causes.
Spoil = Callable[[Dataset], Any]
SPOILED: dict[str, tuple[Spoil, dict[str, tuple[str, int]]]] = {}


def spoiled(**expected: tuple[str, int]) -> Callable[[Spoil], Spoil]:
    def register(spoil: Spoil) -> Spoil:
        SPOILED[spoil.__name__.replace("_", " ")] = (spoil, expected)
        return spoil

    return register


@spoiled(box_partly_outside_image=("warning", 2))
def two_boxes_reach_outside(data: Dataset) -> None:
    for person in (1, 4):
        data.people[person]["box"][2] += 320


@spoiled(box_outside_image=("warning", 1), ground_truth_below_one=("error", 1))
def a_box_lies_outside(data: Dataset) -> None:
    data.people[2] |= {"box": np.array([400, 10, 20, 20], np.float32), "exclude_reason": "no_area"}


@spoiled(box_outside_image=("error", 5), ground_truth_below_one=("error", 5))
def many_boxes_lie_outside(data: Dataset) -> None:
    for person in data.people[:5]:
        person |= {"box": np.array([400, 10, 20, 20], np.float32), "exclude_reason": "no_area"}


@spoiled(box_without_size=("warning", 1), ground_truth_below_one=("error", 1))
def a_box_has_no_width(data: Dataset) -> None:
    data.people[2] |= {"box": np.array([40, 10, 0, 20], np.float32), "exclude_reason": "no_area"}


@spoiled(area_not_positive=("error", 1))
def an_area_is_negative(data: Dataset) -> None:
    data.people[3]["area"] = -4.0


@spoiled(area_above_box=("error", 40))
def areas_are_in_other_units(data: Dataset) -> None:
    for person in data.people:
        person["area"] *= 50


@spoiled(area_of_box=("information", 40))
def areas_are_a_share_of_the_box(data: Dataset) -> None:
    for person in data.people:
        person["area"] = 0.6 * float(person["box"][2] * person["box"][3])


@spoiled(visibility_unknown=("error", 2))
def two_people_have_another_visibility(data: Dataset) -> None:
    data.joint(0, "nose")[2] = data.joint(0, "left_hip")[2] = data.joint(3, "nose")[2] = 3


@spoiled(keypoint_at_origin=("warning", 1))
def an_absent_keypoint_is_called_seen(data: Dataset) -> None:
    data.joint(5, "left_wrist")[:] = (0, 0, 2)


@spoiled(keypoint_outside_image=("warning", 1))
def a_keypoint_is_outside(data: Dataset) -> None:
    data.joint(5, "left_wrist")[:] = (330, 20, 1)


@spoiled(keypoint_outside_image=("error", 6))
def many_keypoints_are_outside(data: Dataset) -> None:
    for person in range(6):
        data.joint(person, "left_wrist")[:] = (20, -30, 2)


@spoiled(keypoint_far_from_box=("warning", 1))
def a_keypoint_is_somebody_elses(data: Dataset) -> None:
    x, _, width, _ = data.people[7]["box"]
    data.joint(7, "right_wrist")[:] = (5 if x > 160 - width / 2 else 315, 5, 2)


@spoiled(unlabelled_with_place=("warning", 3))
def places_are_kept_of_what_is_not_labelled(data: Dataset) -> None:
    for person in (0, 1, 2):
        data.joint(person, "nose")[2] = 0


@spoiled(joint_never_labelled=("warning", 1))
def nobody_has_a_nose(data: Dataset) -> None:
    for person in range(len(data.people)):
        data.joint(person, "nose")[:] = 0


@spoiled(id_repeated=("error", 2))
def three_annotations_share_an_id(data: Dataset) -> None:
    data.people[6]["id"] = data.people[4]["id"] = data.people[0]["id"]


@spoiled(image_mixed_up=("error", 1))
def a_person_points_to_another_image(data: Dataset) -> None:
    data.people[0]["image_row"] = (data.people[0]["image_row"] + 1) % 24


@spoiled(image_repeated=("warning", 2))
def an_image_is_there_three_times(data: Dataset) -> None:
    data.images[3]["bytes"] = data.images[9]["bytes"] = data.images[0]["bytes"]


@spoiled(person_repeated_in_other_image=("warning", 1))
def a_person_is_in_two_images(data: Dataset) -> None:
    other = next(p for p in data.people if p["image_id"] != data.people[0]["image_id"])
    data.add(data.people[0], image_id=other["image_id"], image_row=other["image_row"])


@spoiled(person_repeated=("warning", 1), ground_truth_below_one=("error", 1))
def a_person_is_annotated_twice(data: Dataset) -> None:
    data.add(data.people[0])


@spoiled(sides_exchanged_along_limb=("error", 40))
def the_columns_of_the_ankles_are_exchanged(data: Dataset) -> None:
    complete = [p for p in data.people if (p["keypoints"][:, 2] > 0).all()]
    data.people = (complete * 2)[:40]
    shift_apart(data)
    for person in range(40):
        data.exchange(person, "ankle")


def shift_apart(data: Dataset) -> None:
    """Give people used more than once their own ids, images and slightly different places."""
    for number, original in enumerate(list(data.people)):
        person = copy.deepcopy(original)
        person |= {"id": number, "image_row": number % 20, "image_id": data.images[number % 20]["id"]}
        person["keypoints"][:, :2] += number * 0.01
        person["box"][:2] = np.maximum(person["box"][:2] - number * 0.01, 0)
        data.people[number] = person


@spoiled(faces_mirrored=("error", 40))
def eyes_are_named_as_the_viewer_sees_them(data: Dataset) -> None:
    frontal = [p for p in data.people if (p["keypoints"][:3, 2] == 2).all() and p["keypoints"][:, 2].all()]
    data.people = (frontal * 3)[:40]
    shift_apart(data)
    for person in range(40):
        data.exchange(person, "eye", "ear")


@spoiled(torso_twisted=("warning", 1))
def the_shoulders_of_one_are_exchanged(data: Dataset) -> None:
    joints = [data.skeleton.index(f"{side}_{part}") for side in ("left", "right") for part in ("shoulder", "hip")]

    def clearly_frontal(person: Record) -> bool:
        points = person["keypoints"][joints]
        return bool((points[:, 2] > 0).all() and points[0, 0] - points[2, 0] > 20 and points[1, 0] - points[3, 0] > 15)

    data.exchange(next(i for i, p in enumerate(data.people) if clearly_frontal(p)), "shoulder", "elbow", "wrist")


@spoiled(limb_without_length=("error", 40))
def wrists_are_copies_of_elbows(data: Dataset) -> None:
    data.people = ([p for p in data.people if (p["keypoints"][:, 2] > 0).all()] * 2)[:40]
    shift_apart(data)
    for person in range(40):
        data.joint(person, "left_wrist")[:] = data.joint(person, "left_elbow")


@spoiled(skipped_image_missing=("warning", 4), skipped_duplicate_id=("warning", 1))
def prepare_left_something_out(data: Dataset) -> None:
    data.skipped = {"image_missing": 4, "duplicate_id": 1, "image_empty": 7}


def test_reasons_of_either_form_of_annotations_are_said_in_words(dataset: Dataset) -> None:
    dataset.skipped = {"duplicate_id": 1, "duplicate_person": 2}
    words = [finding.message for finding in dataset.check().findings]
    assert words == [f"prepare left out {count} {(coco.COCO_SKIPPED | mpii.MPII_SKIPPED)[reason]}"
                     for reason, count in dataset.skipped.items()]  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_wrong_is_found_and_counted(dataset: Dataset, name: str) -> None:
    spoil, expected = SPOILED[name]
    spoil(dataset)
    assert found(dataset.check()) == expected


def test_a_finding_names_the_annotations_concerned(dataset: Dataset) -> None:
    two_boxes_reach_outside(dataset)
    (finding,) = dataset.check().findings
    assert finding.people == (dataset.people[1]["id"], dataset.people[4]["id"])
    assert f"2 of {len(dataset.people)} people: the box reaches outside the image" in finding.message


def test_sides_named_by_the_viewer_are_noticed_without_a_face(dataset: Dataset) -> None:
    parts = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    facing = [
        p for p in dataset.people if p["keypoints"][5, 0] > p["keypoints"][6, 0] + 5 and p["keypoints"][5:, 2].all()
    ]
    dataset.people = facing
    for person in range(len(facing)):
        dataset.people[person]["keypoints"][:5] = 0
        dataset.exchange(person, *parts)
    severities = {check: severity for check, (severity, _) in found(dataset.check()).items()}
    assert severities == {"joint_never_labelled": "warning", "sides_as_seen_by_viewer": "warning"}


def test_an_image_id_that_appears_twice_is_an_error(drawn: Path) -> None:
    labels = read_labels(Shards(drawn))
    rows = [0, 0, *range(2, len(labels.listed_images))]
    labels = dataclasses.replace(labels, listed_images=labels.listed_images[rows])
    from fpd_accel.check.label_rules import check_repeated

    assert {"image_id_repeated", "image_mixed_up"} == {finding.check for finding in check_repeated(labels)}


# --- skeletons --------------------------------------------------------------------------------------------------

NAMES = ("nose", "left_hand", "right_hand", "left_foot", "right_foot")
PAIRS = (("left_hand", "right_hand"), ("left_foot", "right_foot"))


def figure(**changes: Any) -> Skeleton:
    values = {
        "name": "figure", "keypoints": NAMES, "flip_pairs": PAIRS, "limbs": (("nose", "left_hand"),),
        "upper_body": NAMES[:3], "torso": NAMES[:2], "sigmas": (0.03, 0.07, 0.07, 0.09, 0.09),
    }  # fmt: skip
    return Skeleton.model_validate({**values, **changes})


def test_coco_s_skeleton_has_no_findings() -> None:
    assert check_skeleton(COCO) == check_skeleton(figure()) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"flip_pairs": PAIRS[:1]}, [("error", "flip_pair_missing", "'left_foot' and 'right_foot' are in no pair")]),
        (
            {"flip_pairs": (("left_hand", "right_foot"), ("left_foot", "right_hand"))},
            [("error", "flip_pair_mismatch", "'left_hand' and 'right_foot'"),
             ("error", "flip_pair_mismatch", "'left_foot' and 'right_hand'"),
             ("warning", "upper_body_one_sided", ""), ("warning", "upper_body_one_sided", ""),
             ("warning", "sigma_one_sided", "left_hand 0.07, right_foot 0.09; left_foot 0.09, right_hand 0.07")],
        ),
        ({"flip_pairs": (PAIRS[0], PAIRS[1][::-1])}, [("warning", "flip_pair_order", "the left joint comes first")]),
        (
            {"keypoints": (*NAMES[:4], "tail"), "flip_pairs": PAIRS[:1]},
            [("warning", "side_without_partner", "'left_foot'")],
        ),
        (
            {"keypoints": (*NAMES[:4], "tail"), "flip_pairs": (PAIRS[0], ("left_foot", "tail"))},
            [("warning", "flip_pair_mismatch", "only one of the names has a side"),
             ("warning", "side_without_partner", "")],
        ),
        ({"upper_body": NAMES[:2]}, [("warning", "upper_body_one_sided", "has 'left_hand' but not 'right_hand'")]),
        ({"sigmas": None}, [("warning", "sigmas_estimated", "estimated for 5 of 5 keypoints")]),
        ({"sigmas": (0.3, 0.07, 0.07, 0.09, 0.09)}, [("warning", "sigma_unlike_published", "nose 0.3 (COCO 0.026)")]),
        ({"sigmas": (0.03, 0.07, 0.08, 0.09, 0.09)}, [("warning", "sigma_one_sided", "left_hand 0.07, right_hand")]),
        ({"limbs": (), "torso": None}, [("information", "no_limbs", "dots"), ("information", "no_torso", "PCK")]),
    ],
)  # fmt: skip
def test_what_a_skeleton_contradicts_is_found(changes: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    findings = check_skeleton(figure(**changes))
    assert [(finding.severity, finding.check) for finding in findings] == [entry[:2] for entry in expected]
    for finding, (_, _, words) in zip(findings, expected, strict=True):
        assert words in finding.message


# --- labels as predictions --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shards]:
    data, output = shared / "data", tmp_path_factory.mktemp("samples")
    lsp, leeds = data / "lsp_extended", load_skeleton(ROOT / "recipes" / "skeletons" / "lsp.yaml")
    coco = data / "coco_sample"
    return {
        "coco": prepare_coco(coco / "images", coco / "person_keypoints.json", output / "coco"),
        "lsp": prepare_coco(lsp / "images", lsp / "person_keypoints_val.json", output / "lsp", skeleton=leeds),
    }


def test_the_samples_of_real_images_score_one_and_have_no_errors(samples: dict[str, Shards]) -> None:
    coco, lsp = check_shards(samples["coco"]), check_shards(samples["lsp"])
    for report in (coco, lsp):
        assert (report.oracle.average_precision, report.oracle.average_recall) == (1.0, 1.0)
        assert report.of("error") == []
    assert found(coco) == {}
    assert coco.counts["unusable"] == {"crowd": 5, "no_keypoints": 83}
    assert set(found(lsp)) == {"sigmas_estimated", "torso_twisted", "area_of_box"}
    assert lsp.quantiles["people per image"] == [1.0] * 7


def test_two_labels_of_one_person_are_named_with_the_reason(dataset: Dataset) -> None:
    twin = dataset.add(dataset.people[0])
    dataset.people[-1]["keypoints"] = dataset.people[-1]["keypoints"] + np.float32([0.2, 0, 0])
    shards = dataset.write()
    oracle = score_labels(shards, read_labels(shards), sample=0)
    assert oracle.average_recall < 1
    assert not oracle.holds
    (lost,) = oracle.lost
    assert (lost.person, lost.image) == (twin, dataset.people[0]["image_id"])
    assert lost.reason == f"dropped as a near-duplicate: of annotation {dataset.people[0]['id']}"


def test_more_people_in_an_image_than_coco_counts_are_named(dataset: Dataset) -> None:
    image = dataset.people[0]["image_id"]
    dataset.people = [dataset.people[0]]
    for number in range(23):
        twin = dataset.people[0]
        dataset.add(twin, keypoints=twin["keypoints"] + np.float32([12 * (number % 8 + 1), 10 * (number // 8), 0]))
    shards = dataset.write()
    oracle = score_labels(shards, read_labels(shards))
    assert oracle.average_recall == pytest.approx(20 / 24)
    assert {lost.image for lost in oracle.lost} == {image}
    assert len([lost for lost in oracle.lost if "COCO counts 20" in lost.reason]) == 4


@pytest.mark.parametrize("seed", range(6))
def test_looking_at_people_at_risk_alone_decides_as_evaluating_everybody_does(dataset: Dataset, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for person in list(dataset.people[:12]):
        keypoints = person["keypoints"] + np.float32([*rng.normal(0, 4 * seed, 2), 0])
        keypoints[rng.random(17) < 0.8] = 0
        keypoints[0] = person["keypoints"][0]
        dataset.add(person, keypoints=keypoints, box=person["box"] + np.float32([*rng.normal(0, 4 * seed, 2), 0, 0]))
    shards = dataset.write()
    people = coco_results(shards, ground_truth_predictions(shards), options=Evaluate(), input_size=(256, 192))
    truth = average_precision(ground_truth(shards), people, shards.skeleton.sigmas)
    labels = read_labels(shards)
    quick, whole = score_labels(shards, labels, sample=0), score_labels(shards, labels)
    assert whole.evaluated == len(shards) > quick.evaluated
    assert (whole.average_precision, whole.average_recall) == (truth["AP"], truth["AR"])
    assert quick.holds == whole.holds == (truth["AP"] == truth["AR"] == 1.0)
    assert quick.lost == whole.lost
    assert all(lost.explained for lost in whole.lost)


def test_images_are_compared_by_every_byte(dataset: Dataset) -> None:
    rng = np.random.default_rng(0)
    contents = [rng.bytes(5000) for _ in range(4)]
    contents += [
        contents[0][:-1] + b"x",
        contents[1],
        contents[2][:-1],
        contents[1],
        contents[3],
        b"x" + contents[3][1:],
    ]
    for image, content in zip(dataset.images, contents, strict=False):
        image["bytes"] = content
    digests = [hashlib.sha256(image["bytes"]).hexdigest() for image in dataset.images]
    expected = {
        tuple(i for i, d in enumerate(digests) if d == digest) for digest in digests if digests.count(digest) > 1
    }
    assert set(repeated_images(dataset.write())) == expected == {(1, 5, 7), (3, 8)}


# --- contact sheet ----------------------------------------------------------------------------------------------


def test_the_sheet_shows_people_with_their_sides_in_colour(drawn: Path) -> None:
    shards = Shards(drawn)
    labels = read_labels(shards)
    chosen = choose_people(labels, (), count=9)
    sheet = contact_sheet(shards, labels, chosen)
    legend = sheet.shape[0] - 2 * (CELL[0] + CAPTION)
    assert sheet.shape[1:] == (COLUMNS * CELL[1], 3)
    assert 30 < legend < 150
    np.testing.assert_array_equal(sheet, contact_sheet(shards, labels, choose_people(labels, (), count=9)))
    cell = sheet[legend : legend + CELL[0], : CELL[1]]
    assert len(np.unique(cell.reshape(-1, 3), axis=0)) > 1000  # a photograph
    colors = keypoint_colors(COCO)
    row = next(iter(chosen))
    for joint in np.flatnonzero(labels.visibility[row] == 2):
        assert (cell == colors[joint]).all(axis=-1).any(), COCO.keypoints[joint]
        assert (sheet[:legend] == colors[joint]).all(axis=-1).any()
    assert (sheet[-CELL[0] - CAPTION :, -CELL[1] :] == 255).all()  # the last cells are empty


@pytest.mark.parametrize("clip_boxes", [True, False])
def test_people_are_shown_and_measured_as_they_are_cropped(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, clip_boxes: bool
) -> None:
    dataset.clip_boxes = clip_boxes
    image = dataset.images[dataset.people[0]["image_row"]]
    box = np.array([-300, -200, image["width"] + 600, image["height"] + 500], np.float32)
    dataset.people[0]["box"] = box
    shards, shown, measured = dataset.write(), [], []
    labels = read_labels(shards)
    expected = clip_box(box, image["width"], image["height"]) if clip_boxes else box

    def spy(boxes: list[Any]) -> Callable[..., Any]:
        return lambda box, *size, **padding: (boxes.append(box), box_to_region(box, *size, **padding))[1]

    monkeypatch.setattr("fpd_accel.check.contact_sheet.box_to_region", spy(shown))
    monkeypatch.setattr("fpd_accel.check.oracle.box_to_region", spy(measured))
    contact_sheet(shards, labels, {0: ""})
    similar_people(shards, labels)
    np.testing.assert_allclose(shown[0], expected)
    first = np.argsort(labels.image_ids, kind="stable").tolist().index(0)
    np.testing.assert_allclose(measured[0][first], expected)


def test_people_are_spread_over_the_dataset_and_those_with_findings_come_first(dataset: Dataset) -> None:
    two_boxes_reach_outside(dataset)
    a_keypoint_is_outside(dataset)
    report = dataset.check()
    labels = read_labels(Shards(report.path))
    chosen = choose_people(labels, report.findings, count=12)
    assert list(chosen.items())[:3] == [
        (1, "box_partly_outside_image"), (5, "keypoint_outside_image"), (4, "box_partly_outside_image")
    ]  # fmt: skip
    rest = list(chosen)[3:]
    assert len(chosen) == 12
    assert rest == sorted(rest)
    assert rest[0] == 0
    assert rest[-1] == len(dataset.people) - 1


# --- command line -----------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return cli.main(["check", *map(str, arguments)])


def test_the_command_reports_a_clean_dataset_and_leaves_with_zero(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(drawn, "--output", tmp_path / "new" / "sheet.png", "--json", tmp_path / "other" / "report.json") == 0
    printed = capsys.readouterr()
    for words in ("skeleton coco", "AP 1.0000", "left_wrist", "given, as COCO", "0 errors, 0 warnings, 0 notes"):
        assert words in printed.out
    assert "\x1b" not in printed.out  # no colour codes in a pipe
    assert max(map(len, printed.out.splitlines())) < 200
    sheet = cv2.imread(str(tmp_path / "new" / "sheet.png"))
    assert sheet.shape[1] == COLUMNS * CELL[1]
    report = json.loads((tmp_path / "other" / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["findings"] == []
    assert report["ground_truth_as_prediction"]["holds"]
    assert len(report["joints"]) == 17
    assert {path.name for path in tmp_path.rglob("*.*")} == {"report.json", "sheet.png"}


def test_errors_are_listed_once_and_leave_with_two(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    many_keypoints_are_outside(dataset)
    dataset.people[9]["id"] = dataset.people[8]["id"]
    two_boxes_reach_outside(dataset)
    path = dataset.write().path
    assert run(path, "--json", dataset.folder / "report.json") == 2
    printed = capsys.readouterr()
    assert printed.err.count("error:") == 1
    assert "2 errors to correct" in printed.err
    assert "labelled outside the image" in printed.err
    assert "is that of an earlier person" in printed.err
    assert "reaches outside" not in printed.err  # a warning, on stdout alone
    assert "reaches outside" in printed.out
    written = json.loads((dataset.folder / "report.json").read_text())
    assert [finding["severity"] for finding in written["findings"]] == ["error", "error", "warning"]


def test_estimated_sigmas_are_said_in_the_report(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    values = COCO.model_dump()
    values["sigmas"] = [None, None, *values["sigmas"][2:]]
    dataset.skeleton = Skeleton.model_validate(values)
    path = dataset.write().path
    assert json.loads((path / "dataset.json").read_text())["skeleton"]["sigmas_estimated"] == ["nose", "left_eye"]
    assert run(path) == 0
    printed = capsys.readouterr().out
    assert "OKS sigmas of 2 of 17 keypoints estimated" in printed
    assert "estimated: COCO" in printed


def test_a_table_of_scores_and_a_model_folder_say_that_sigmas_are_estimated(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.skeleton = Skeleton.model_validate({**COCO.model_dump(), "sigmas": None})
    del dataset.people[2:]
    shards, folder = dataset.write(), dataset.folder / "model"
    config = ModelConfig(arch="tiny_w8", skeleton=shards.skeleton, input_size=(64, 64))
    save_model(folder, create_model("tiny_w8", 17).state_dict(), config)
    assert read_model_config(folder).skeleton.sigmas_estimated == COCO.keypoints
    evaluate_folder(str(folder), str(shards.path))
    printed = " ".join(capsys.readouterr().out.split())
    assert "OKS sigmas of all 17 keypoints estimated" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "not a prepared dataset"),
        (["{data}", "--output", "{tmp}/sheet.txt"], "a contact sheet is a .png or .jpg file"),
        (["{data}", "--output", "{tmp}/file/sheet.png"], "cannot be written"),
        (["{data}", "--json", "{tmp}"], "cannot be written"),
    ],
)
def test_what_cannot_be_read_or_written_is_refused(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run(*(argument.format(data=drawn, tmp=tmp_path) for argument in arguments)) == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("suffix", ["", ".txt", "png"])
def test_a_picture_of_another_format_is_refused(suffix: str) -> None:
    with pytest.raises(DataError, match=r"choose \.png, \.jpg or \.jpeg"):
        encode_picture(np.zeros((2, 3, 3), np.uint8), suffix)
