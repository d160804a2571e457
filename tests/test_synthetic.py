"""Drawn people: the same bytes every time, annotations that agree with the picture, a folder whole or absent."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from fpd_accel.errors import DataError
from fpd_accel.skeleton import COCO as SKELETON
from fpd_accel.synthetic.body import articulate, random_body, random_pose
from fpd_accel.synthetic.dataset import SyntheticPerson, draw_dataset, draw_image

IMAGES = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("synthetic") / "drawn", images=IMAGES, seed=5)


@pytest.fixture(scope="module")
def people() -> list[SyntheticPerson]:
    return [person for index in range(60) for person in draw_image(11, index)[1]]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_image_depends_on_seed_and_index_alone():
    last, truth = draw_image(3, 7)
    draw_image(3, 0)
    again, truth_again = draw_image(3, 7)
    assert last.dtype == np.uint8
    assert last.shape == (240, 320, 3)
    np.testing.assert_array_equal(last, again)
    for person, same in zip(truth, truth_again, strict=True):
        np.testing.assert_array_equal(person.keypoints, same.keypoints)
        assert person[1:] == same[1:]
    # Unrelated pictures differ in nearly every pixel; a shared background would not.
    for other in (draw_image(4, 7)[0], draw_image(3, 8)[0]):
        assert (last != other).any(axis=2).mean() > 0.9


def test_other_processes_write_the_same_bytes(dataset, tmp_path):
    alone, several = (
        draw_dataset(tmp_path / f"with {workers}", images=6, seed=5, workers=workers) for workers in (0, 2)
    )
    assert _files(alone) == _files(several)
    first = "images/000000000001.jpg"
    assert _files(alone)[first] == _files(dataset)[first]


def test_cocos_own_loader_reads_the_annotations(dataset):
    coco = COCO(str(dataset / "person_keypoints.json"))
    assert coco.getImgIds() == list(range(1, IMAGES + 1))
    assert sorted(coco.getAnnIds()) == list(range(1, len(coco.anns) + 1))
    (person,) = coco.loadCats(coco.getCatIds())
    assert (person["id"], person["name"]) == (1, "person")
    assert person["keypoints"] == list(SKELETON.keypoints)
    assert min(map(min, person["skeleton"])) == 1
    assert max(map(max, person["skeleton"])) == 17
    for image in coco.dataset["images"]:
        assert image["file_name"] == f"{image['id']:012d}.jpg"
        assert cv2.imread(str(dataset / "images" / image["file_name"])).shape == (image["height"], image["width"], 3)
        assert 1 <= len(coco.getAnnIds(imgIds=image["id"])) <= 3


def test_the_jpeg_shows_the_image(dataset):
    written = cv2.imread(str(dataset / "images" / "000000000003.jpg"))[..., ::-1]
    # Mean grey levels: what compression of a noisy picture costs; swapped colours or another picture cost over 20.
    assert np.abs(written.astype(int) - draw_image(5, 2)[0]).mean() < 8


def test_numbers_of_an_annotation_agree(dataset):
    annotations = json.loads((dataset / "person_keypoints.json").read_text())["annotations"]
    for annotation in annotations:
        keypoints = np.array(annotation["keypoints"]).reshape(17, 3)
        assert set(keypoints[:, 2]) <= {0, 1, 2}
        assert annotation["num_keypoints"] == (keypoints[:, 2] > 0).sum() >= 5
        assert (keypoints[keypoints[:, 2] == 0] == 0).all()
        assert annotation["iscrowd"] == 0
        x, y, width, height = annotation["bbox"]
        assert 0 <= x < x + width <= 320
        assert 0 <= y < y + height <= 240
        assert 0 < annotation["area"] <= width * height


def test_visible_joints_lie_within_the_box(people):
    for person in people:
        x, y, width, height = person.box
        seen = person.keypoints[person.keypoints[:, 2] == 2, :2]
        # Half a pixel: a joint is seen where the pixel nearest to it shows its limb.
        assert (seen >= np.array((x, y)) - 0.5).all()
        assert (seen <= np.array((x + width - 1, y + height - 1)) + 0.5).all()


def test_joints_are_seen_hidden_and_cut_off(people):
    visible = np.concatenate([person.keypoints[:, 2] for person in people])
    shares = [(visible == value).mean() for value in (0, 1, 2)]
    assert 0 < shares[0] < 0.1
    assert 0.1 < shares[1] < 0.4
    assert shares[2] > 0.6


def test_left_is_on_the_right_of_who_faces_the_viewer(people):
    """A face shows its left eye to the right, and shoulders and hips below it agree unless the body is twisted."""
    names = SKELETON.keypoints
    left, right = ([names.index(f"{side}_{part}") for part in ("eye", "shoulder", "hip")] for side in ("left", "right"))
    nose = names.index("nose")
    agree = []
    for person in people:
        x, visible = person.keypoints[:, 0], person.keypoints[:, 2]
        y = person.keypoints[:, 1]
        upright = y[[11, 12]].min() > y[[5, 6]].max()
        if upright and (visible[[nose, *left, *right]] == 2).all():
            assert x[left[0]] > x[right[0]]
            agree.append((x[left] > x[right]).all())
    assert len(agree) > 20
    assert np.mean(agree) > 0.9


def test_a_mirrored_figure_has_left_and_right_exchanged():
    rng = np.random.default_rng(0)
    for _ in range(20):
        body, pose = random_body(rng), random_pose(rng)
        (yaw, height, roll), (lean, aside, twist), (turn, nod, tilt) = pose.view, pose.trunk, pose.head
        mirrored = articulate(
            body,
            pose._replace(
                view=(-yaw, height, -roll),
                trunk=(lean, -aside, -twist),
                head=(-turn, nod, -tilt),
                arms=pose.arms[::-1],
                legs=pose.legs[::-1],
            ),
        )
        figure = articulate(body, pose)
        for name, other in zip(
            SKELETON.keypoints, np.array(SKELETON.keypoints)[list(SKELETON.flip_index)], strict=True
        ):
            expected = figure.points[name] * (-1, 1, 1)
            np.testing.assert_allclose(mirrored.points[str(other)], expected, atol=1e-12)  # statures
        np.testing.assert_array_equal(mirrored.turned_away[list(SKELETON.flip_index)], figure.turned_away)


def test_bones_keep_their_length_in_every_pose():
    rng = np.random.default_rng(1)
    for _ in range(20):
        body = random_body(rng)
        points = articulate(body, random_pose(rng)).points
        for side in ("left", "right"):
            for a, b, length in (
                ("shoulder", "elbow", body.upper_arm),
                ("elbow", "wrist", body.forearm),
                ("hip", "knee", body.thigh),
                ("knee", "ankle", body.shin),
            ):
                measured = np.linalg.norm(points[f"{side}_{a}"] - points[f"{side}_{b}"])
                assert measured == pytest.approx(length, abs=1e-12)  # statures


def test_an_existing_output_is_refused_and_left_alone(dataset):
    before = _files(dataset)
    with pytest.raises(DataError, match=r"drawn: exists already; delete it or choose another"):
        draw_dataset(dataset, images=1, seed=0)
    assert _files(dataset) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_dataset_leaves_nothing_behind(tmp_path, workers, monkeypatch):
    written = []

    def write_and_interrupt(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content)
        written.append(path.name)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", write_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_dataset(tmp_path / "drawn", images=4, seed=0, workers=workers)
    assert written == ["000000000001.jpg", "000000000002.jpg"]
    assert list(tmp_path.iterdir()) == []


def test_size_and_crowd_are_what_was_asked_for():
    image, people = draw_image(0, 0, image_size=(120, 96), people=(2, 2))
    assert image.shape == (120, 96, 3)
    assert len(people) == 2


@pytest.mark.parametrize(
    "setting",
    [
        {"images": 0},
        {"quality": 101},
        {"workers": -1},
        {"seed": -1},
        {"image_size": (240, 63)},
        {"people": (0, 2)},
        {"people": (3, 2)},
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(tmp_path, setting):
    with pytest.raises(DataError):
        draw_dataset(tmp_path / "drawn", **{"images": 1, "seed": 0, **setting})
    assert list(tmp_path.iterdir()) == []
