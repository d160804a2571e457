"""Skeletons: COCO and MPII against their publications, and skeletons from YAML files."""

import json
from pathlib import Path

import pytest
import yaml
from pycocotools.cocoeval import Params

from fpd_accel.errors import ConfigError
from fpd_accel.skeleton import COCO, MPII, NEUTRAL_SIGMA, Skeleton, estimated_sigma, load_skeleton, split_side

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
    assert COCO.sigmas == pytest.approx(official, rel=1e-12)  # theirs are multiples of 0.1, divided by 10


def test_coco_has_the_keypoints_and_limbs_of_its_annotation_files(shared: Path) -> None:
    content = json.loads((shared / "data" / "coco_sample" / "person_keypoints.json").read_bytes())
    (person,) = (category for category in content["categories"] if "keypoints" in category)
    assert list(COCO.keypoints) == person["keypoints"]
    published = {frozenset((a - 1, b - 1)) for a, b in person["skeleton"]}  # one-based
    drawn = {frozenset(limb) for limb in COCO.limb_indices}
    assert len(drawn) == len(COCO.limbs)
    assert drawn <= published
    necks = {frozenset((COCO.index(f"{side}_ear"), COCO.index(f"{side}_shoulder"))) for side in ("left", "right")}
    assert published - drawn == necks  # these lines would hide the face in pictures


def test_mpii_has_the_published_joints_pairs_and_halves() -> None:
    assert MPII.num_keypoints == 16
    assert MPII.keypoints[:3] == ("right_ankle", "right_knee", "right_hip")
    assert MPII.keypoints[6:10] == ("pelvis", "thorax", "upper_neck", "head_top")
    assert MPII.keypoints[-3:] == ("left_shoulder", "left_elbow", "left_wrist")
    pairs = {0: 5, 1: 4, 2: 3, 10: 15, 11: 14, 12: 13}
    partners = {**pairs, **{b: a for a, b in pairs.items()}}
    assert MPII.flip_index == tuple(partners.get(joint, joint) for joint in range(16))
    assert set(MPII.upper_body_indices) == set(range(7, 16))
    parents = [1, 2, 6, 6, 3, 4, 6, 6, 7, 8, 11, 12, 7, 7, 13, 14]  # published; the pelvis is its own parent
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


def test_a_skeleton_needs_only_a_name_and_keypoints(tmp_path: Path) -> None:
    only = dict.fromkeys(("flip_pairs", "limbs", "upper_body", "torso", "sigmas"))
    bare = load_skeleton(write(tmp_path / "bare.yaml", **only))
    assert bare.flip_index == (0, 1, 2)
    assert bare.torso is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keypoints": ["head", "left_hand", "left_hand"]}, "keypoints: a name appears twice"),
        ({"sigmas": [0.05]}, "sigmas: 1 values for 3 keypoints"),
        ({"sigmas": [0.05, 0.06, 0]}, "sigmas.2: "),
        ({"sigmas": [0.05, None]}, "sigmas.1: "),
        ({"sigmas_estimated": ["tail"]}, "sigmas_estimated: 'tail' is not a keypoint"),
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


# --- missing sigmas ---------------------------------------------------------------------------------------------


def test_missing_sigmas_are_those_published_for_the_name_or_neutral_and_the_skeleton_says_so(tmp_path: Path) -> None:
    names = ["nose", "LeftWrist", "r_hip", "neck", "left_heel", "tail"]
    skeleton = load_skeleton(
        write(tmp_path / "odd.yaml", keypoints=names, **dict.fromkeys(STICK.keys() - {"name", "keypoints"}))
    )
    assert skeleton.sigmas == (0.026, 0.062, 0.107, 0.079, 0.066, NEUTRAL_SIGMA)
    assert skeleton.sigmas_estimated == tuple(names)
    assert skeleton.sigma_note == ", OKS sigmas of all 6 keypoints estimated"
    assert [estimated_sigma(name)[1] for name in names] == [
        "COCO", "COCO", "COCO", "CrowdPose", "COCO-WholeBody", "neutral"
    ]  # fmt: skip


def test_the_neutral_sigma_is_the_median_of_coco_s() -> None:
    assert sorted(COCO.sigmas)[8] == NEUTRAL_SIGMA


def test_one_missing_sigma_is_estimated_and_the_others_stay(tmp_path: Path) -> None:
    skeleton = load_skeleton(write(tmp_path / "stick.yaml", sigmas=[0.05, None, 0.06]))
    assert skeleton.sigmas == (0.05, NEUTRAL_SIGMA, 0.06)
    assert skeleton.sigmas_estimated == ("left_hand",)
    assert skeleton.sigma_note == ", OKS sigmas of 1 of 3 keypoints estimated"


def test_a_skeleton_that_gives_its_sigmas_says_nothing_of_them() -> None:
    assert COCO.sigmas_estimated == ()
    assert COCO.sigma_note == ""


def test_the_leeds_skeleton_has_the_sigmas_of_coco_and_crowdpose_as_estimates() -> None:
    leeds = load_skeleton(ROOT / "recipes" / "skeletons" / "lsp.yaml")
    of_coco = {name: COCO.sigmas[COCO.index(name)] for name in leeds.keypoints if name in COCO.keypoints}
    assert dict(zip(leeds.keypoints, leeds.sigmas, strict=True)) == {**of_coco, "neck": 0.079, "head_top": 0.079}
    assert leeds.sigmas_estimated == leeds.keypoints


def test_estimates_survive_being_written_and_skeletons_written_before_still_load() -> None:
    leeds = load_skeleton(ROOT / "recipes" / "skeletons" / "lsp.yaml")
    assert Skeleton.model_validate_json(leeds.model_dump_json()) == leeds
    before = {key: value for key, value in leeds.model_dump(mode="json").items() if key != "sigmas_estimated"}
    assert Skeleton.model_validate(before) == leeds.model_copy(update={"sigmas_estimated": ()})


@pytest.mark.parametrize(
    ("name", "side", "part"),
    [
        ("left_hip", "left", "hip"), ("hip_left", "left", "hip"), ("LeftHip", "left", "hip"), ("LHip", "left", "hip"),
        ("l hip", "left", "hip"), ("hip.R", "right", "hip"), ("RIGHT-BIG-TOE", "right", "big_toe"),
        ("rear", "", "rear"), ("left", "", "left"), ("lefthip", "", "lefthip"),
        ("left_right_seam", "", "left_right_seam"), ("Nose", "", "nose"),
    ],
)  # fmt: skip
def test_sides_are_read_from_names(name: str, side: str, part: str) -> None:
    assert split_side(name) == (side, part)
