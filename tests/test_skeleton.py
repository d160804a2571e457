"""Skeletons: COCO's own against its publications, and YAML files of others."""

import json
from pathlib import Path

import pytest
import yaml
from pycocotools.cocoeval import Params

from fpd_accel.errors import ConfigError
from fpd_accel.skeleton import COCO, MPII, Skeleton, load_skeleton

ROOT = Path(__file__).parents[1]
SKELETONS = sorted((ROOT / "recipes" / "skeletons").glob("*.yaml"))

PAIRED = ["eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle"]
NAMES = ["nose", *(f"{side}_{part}" for part in PAIRED for side in ("left", "right"))]

STICK = {
    "name": "stick",
    "keypoints": ["head", "left_hand", "right_hand"],
    "flip_pairs": [["left_hand", "right_hand"]],
    "limbs": [["head", "left_hand"], ["head", "right_hand"]],
    "upper_body": ["head"],
    "torso": ["left_hand", "right_hand"],
    "sigmas": [0.05, 0.06, 0.06],
}


def write(path: Path, **changes: object) -> Path:
    values = {key: value for key, value in {**STICK, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def refusal(path: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_skeleton(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_coco_has_the_published_keypoints_in_order() -> None:
    assert list(COCO.keypoints) == NAMES
    assert COCO.num_keypoints == 17
    assert COCO.index("left_hip") == 11
    assert COCO.flip_index == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
    assert COCO.upper_body_indices == tuple(range(11))


def test_coco_has_the_sigmas_of_the_official_evaluation() -> None:
    official = Params(iouType="keypoints").kpt_oks_sigmas.tolist()
    assert COCO.sigmas == pytest.approx(official, rel=1e-12)  # theirs are tenths, divided by 10


def test_coco_has_the_keypoints_and_limbs_of_its_annotation_files(shared: Path) -> None:
    content = json.loads((shared / "data" / "coco_sample" / "person_keypoints.json").read_bytes())
    (person,) = (category for category in content["categories"] if "keypoints" in category)
    assert list(COCO.keypoints) == person["keypoints"]
    published = {frozenset((a - 1, b - 1)) for a, b in person["skeleton"]}  # counted from 1 there
    drawn = {frozenset(limb) for limb in COCO.limb_indices}
    assert len(drawn) == len(COCO.limbs)
    assert drawn <= published
    necks = {frozenset((COCO.index(f"{side}_ear"), COCO.index(f"{side}_shoulder"))) for side in ("left", "right")}
    assert published - drawn == necks  # lines over the face that hide it in pictures


def test_mpii_has_the_published_joints_pairs_and_halves() -> None:
    assert MPII.num_keypoints == 16
    assert MPII.keypoints[:3] == ("right_ankle", "right_knee", "right_hip")
    assert MPII.keypoints[6:10] == ("pelvis", "thorax", "upper_neck", "head_top")
    assert MPII.keypoints[-3:] == ("left_shoulder", "left_elbow", "left_wrist")
    pairs = {0: 5, 1: 4, 2: 3, 10: 15, 11: 14, 12: 13}
    partners = {**pairs, **{b: a for a, b in pairs.items()}}
    assert MPII.flip_index == tuple(partners.get(joint, joint) for joint in range(16))
    assert set(MPII.upper_body_indices) == set(range(7, 16))
    parents = [1, 2, 6, 6, 3, 4, 6, 6, 7, 8, 11, 12, 7, 7, 13, 14]  # of the published code; the pelvis is its own
    limbs = {frozenset(pair) for pair in enumerate(parents) if pair[0] != pair[1]}
    assert {frozenset(limb) for limb in MPII.limb_indices} == limbs
    assert len(MPII.limbs) == 15


def test_coco_and_mpii_are_built_in() -> None:
    assert load_skeleton("coco") is COCO
    assert load_skeleton("mpii") is MPII


def test_there_is_a_skeleton_file_to_start_from() -> None:
    assert "lsp.yaml" in {path.name for path in SKELETONS}


@pytest.mark.parametrize("skeleton", [COCO, MPII, *map(load_skeleton, SKELETONS)], ids=lambda skeleton: skeleton.name)
def test_mirroring_twice_changes_nothing_and_exchanges_left_and_right(skeleton: Skeleton) -> None:
    index = skeleton.flip_index
    assert [index[k] for k in index] == list(range(skeleton.num_keypoints))
    exchanged = {"left": "right", "right": "left"}
    for name, partner in zip(skeleton.keypoints, (skeleton.keypoints[k] for k in index), strict=True):
        side, _, part = name.partition("_")
        assert partner == (f"{exchanged[side]}_{part}" if side in exchanged else name)


def test_the_leeds_skeleton_has_fourteen_joints_in_the_order_of_the_dataset(shared: Path) -> None:
    skeleton = load_skeleton(ROOT / "recipes" / "skeletons" / "lsp.yaml")
    content = json.loads((shared / "data" / "lsp_extended" / "person_keypoints_val.json").read_bytes())
    assert list(skeleton.keypoints) == content["categories"][0]["keypoints"]
    assert skeleton.num_keypoints == 14
    assert skeleton.torso == ("left_shoulder", "right_hip")
    assert {skeleton.keypoints[k] for k in skeleton.upper_body_indices} == {
        name for name in skeleton.keypoints if not any(part in name for part in ("ankle", "knee", "hip"))
    }


def test_a_skeleton_file_gives_what_it_says(tmp_path: Path) -> None:
    skeleton = load_skeleton(write(tmp_path / "stick.yaml"))
    assert skeleton.keypoints == ("head", "left_hand", "right_hand")
    assert skeleton.flip_index == (0, 2, 1)
    assert skeleton.limb_indices == ((0, 1), (0, 2))
    assert skeleton.sigmas == (0.05, 0.06, 0.06)
    assert load_skeleton(str(tmp_path / "stick.yaml")) == skeleton


def test_a_skeleton_needs_only_a_name_keypoints_and_sigmas(tmp_path: Path) -> None:
    bare = load_skeleton(write(tmp_path / "bare.yaml", flip_pairs=None, limbs=None, upper_body=None, torso=None))
    assert bare.flip_index == (0, 1, 2)
    assert bare.torso is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keypoints": ["head", "left_hand", "left_hand"]}, "keypoints: a name appears twice"),
        ({"sigmas": [0.05]}, "sigmas: 1 values for 3 keypoints"),
        ({"sigmas": [0.05, 0.06, 0]}, "sigmas.2: "),
        ({"sigmas": None}, "sigmas: Field required"),
        ({"keypoints": [], "sigmas": []}, "keypoints: "),
        ({"flip_pairs": [["left_hand", "rihgt_hand"]]}, "flip_pairs: 'rihgt_hand' is not a keypoint"),
        ({"flip_pairs": [["left_hand", "right_hand"], ["left_hand", "head"]]}, "'left_hand' is in two pairs"),
        ({"flip_pairs": [["left_hand"]]}, "flip_pairs.0"),
        ({"limbs": [["head", "tail"]]}, "limbs: 'tail' is not a keypoint"),
        ({"upper_body": ["tail"]}, "upper_body: 'tail' is not a keypoint"),
        ({"torso": ["head", "tail"]}, "torso: 'tail' is not a keypoint"),
        ({"flip_piars": []}, "flip_piars: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_skeleton_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    assert words in refusal(write(tmp_path / "bad.yaml", **changes))


def test_contradictions_of_a_skeleton_are_listed_together(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "bad.yaml", sigmas=[0.05], upper_body=["tail"]))
    assert "sigmas: 1 values" in message
    assert "upper_body: 'tail'" in message


@pytest.mark.parametrize("content", [b"name: [", b"name: \xff\xfe", b"", b"- a\n", b"name: x\nkeypoints: 3\n"])
def test_a_file_that_is_no_skeleton_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    refusal(path)


def test_a_skeleton_that_does_not_exist_is_refused_with_advice(tmp_path: Path) -> None:
    assert "no such skeleton; give 'coco', 'mpii' or a YAML file" in refusal(tmp_path / "nothing.yaml")
    refusal(tmp_path)
    refusal("COCO")
