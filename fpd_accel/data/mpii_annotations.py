"""Readers of MPII's labels in their two forms: HRNet's JSON, and MPII's own MATLAB file.

Coordinates stay as they are in the files, where pixels count from 1. MATLAB files are read by SciPy, which creates
arrays and executes nothing.
"""

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from fpd_accel.data.coco import MAX_VALUE, is_usable, read_json
from fpd_accel.errors import DataError
from fpd_accel.skeleton import MPII

JOINTS = MPII.num_keypoints
HEAD_FACTOR = 0.6  # head size / diagonal of the head's rectangle; SC_BIAS of MPII's evaluation code
# Arrays of `gt_valid.mat` and their shapes; people are one more axis, the last.
GROUND_TRUTH = {"pos_gt_src": (JOINTS, 2), "jnt_missing": (JOINTS,), "headboxes_src": (2, 2)}
MAX_DISTANCE = 10.0  # pixels; if the joints of a person in two files are farther apart, they are two people


@dataclass(frozen=True, eq=False)
class MpiiPerson:
    """One labelled person of an annotation file."""

    number: int  # position in the file, from 1
    image: str  # file name
    position: tuple[float, float] | None  # near the middle of the body; None: not in the file
    scale: float  # height of the person in units of 200 pixels
    keypoints: Float32[np.ndarray, "joint 3"]  # x, y, v; v as in COCO: 0 unlabelled (x = y = 0), 1 hidden, 2 seen
    head_size: float = math.nan  # pixels; NaN: unknown


def read_hrnet_json(path: Path) -> list[MpiiPerson]:
    """Return the people of a JSON list of `image, center, scale, joints, joints_vis`; raise a DataError for another."""
    people = read_json(path)
    if not isinstance(people, list):
        raise DataError(
            f"{path}: not the JSON form of MPII, which is a list of people; a file in COCO's form goes with "
            "--format coco --skeleton mpii"
        )
    return [_hrnet_person(f"{path}: person {number}", number, entry) for number, entry in enumerate(people, start=1)]


def _hrnet_person(name: str, number: int, entry: Any) -> MpiiPerson:
    if not isinstance(entry, dict):
        raise DataError(f"{name}: is {entry!r}, not an object with image, center, scale, joints and joints_vis")
    image = entry.get("image")
    if not isinstance(image, str) or not image:
        raise DataError(f"{name}: 'image' is {image!r}, not a file name")
    if "joints" not in entry:
        raise DataError(
            f"{name}: has no 'joints'; the labels of MPII's test images are not published, use train or valid"
        )
    center, scale = _numbers(name, entry, "center", (2,)), float(_numbers(name, entry, "scale", ()))
    joints, labelled = _numbers(name, entry, "joints", (JOINTS, 2)), _numbers(name, entry, "joints_vis", (JOINTS,))
    if not np.isin(labelled, (0, 1)).all():
        raise DataError(f"{name}: 'joints_vis' has a value that is neither 0 nor 1: {entry['joints_vis']}")
    # The published loader marks people without a position by an x of -1.
    position = (float(center[0]), float(center[1])) if center[0] != -1 and scale > 0 else None
    return MpiiPerson(number, image, position, scale, _triples(joints, 2 * labelled))


def _numbers(name: str, entry: dict[str, Any], field: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        values = np.asarray(entry.get(field), dtype=np.float64)
    except (TypeError, ValueError, OverflowError):  # strings, lists of different lengths, or an integer of 400 digits
        values = np.full((), np.nan)
    if values.shape != shape:
        wanted = " x ".join(map(str, shape)) or "one"
        raise DataError(f"{name}: {field!r} should hold {wanted} numbers, not {entry.get(field)!r:.200}")
    if not (np.abs(values) <= MAX_VALUE).all():
        raise DataError(
            f"{name}: {field!r} has a value that is not a finite number of at most 1e30: {entry.get(field)!r:.200}"
        )
    return values


def _triples(joints: Float[np.ndarray, "joint 2"], visibility: np.ndarray) -> np.ndarray:
    joints = np.where(visibility[:, None] > 0, joints, 0.0)
    return np.concatenate([joints, visibility[:, None]], axis=1).astype(np.float32)


def with_ground_truth(people: list[MpiiPerson], annotations: Path, path: Path) -> list[MpiiPerson]:
    """Return the people of HRNet's JSON with the keypoints and head sizes of its `gt_valid.mat`.

    The two files are matched by order alone, so ground truth of other people is refused with a DataError.
    """
    keypoints, head_sizes = _read_ground_truth(path)
    advice = "use the ground truth of the same split as the JSON (gt_valid.mat with valid.json)"
    if len(keypoints) != len(people):
        raise DataError(f"{path}: {len(keypoints)} people, but {annotations} has {len(people)}; {advice}")
    for person, truth in zip(people, keypoints, strict=True):
        both = (person.keypoints[:, 2] > 0) & (truth[:, 2] > 0)
        distances = np.linalg.norm(person.keypoints[both, :2] - truth[both, :2], axis=1)
        if both.any() and np.median(distances) > MAX_DISTANCE:
            raise DataError(
                f"{path}: person {person.number} is not the one in {annotations}: their joints are "
                f"{np.median(distances):.0f} pixels apart; {advice}"
            )
    return [
        replace(person, keypoints=truth, head_size=size)
        for person, truth, size in zip(people, keypoints, head_sizes.tolist(), strict=True)
    ]


def _read_ground_truth(path: Path) -> tuple[list[np.ndarray], Float[np.ndarray, " person"]]:
    """Return what HRNet's evaluation compares predictions with: (x, y, v) of each person's joints, and head sizes."""
    content = _load_matlab(path, *GROUND_TRUTH)
    arrays = {}
    for name, shape in GROUND_TRUTH.items():
        array = content.get(name)
        if array is None:
            raise DataError(f"{path}: has no {name!r}: not the ground truth of HRNet's MPII evaluation (gt_valid.mat)")
        # MATLAB drops a last axis of length 1: one person.
        fits = array.shape[: len(shape)] == shape and array.ndim <= len(shape) + 1 and array.size > 0
        if not fits or array.dtype.kind not in "biuf":
            raise DataError(
                f"{path}: {name!r} is {array.dtype} {array.shape}, not numbers ({', '.join(map(str, shape))}, people)"
            )
        arrays[name] = np.moveaxis(array.reshape(*shape, -1).astype(np.float64), -1, 0)
    joints, missing, heads = arrays.values()
    if not len(joints) == len(missing) == len(heads):
        raise DataError(f"{path}: {len(joints)}, {len(missing)} and {len(heads)} people in {', '.join(GROUND_TRUTH)}")
    labelled = missing == 0
    if not (np.abs(joints[labelled]) <= MAX_VALUE).all():
        raise DataError(f"{path}: 'pos_gt_src' holds labelled joints whose coordinates are not finite numbers")
    sizes = HEAD_FACTOR * np.linalg.norm(heads[:, 1] - heads[:, 0], axis=1)
    triples = [_triples(points, 2 * seen) for points, seen in zip(joints, labelled, strict=True)]
    return triples, np.where(sizes > 0, sizes, np.nan)


def read_release(path: Path, skipped: Counter[str]) -> list[MpiiPerson]:
    """Return the labelled people in the training images of `mpii_human_pose_v1_u12_1.mat`; count the rest in `skipped`.

    All people with joints are taken, as in HRNet's JSON; `single_person`, the list of isolated people, is ignored.

    Raises:
        DataError: The file is not MPII's annotation file.
    """
    release = _load_matlab(path, "RELEASE", simplify_cells=True).get("RELEASE")
    if not isinstance(release, dict) or not {"annolist", "img_train"} <= release.keys():
        raise DataError(
            f"{path}: has no struct RELEASE with annolist and img_train: not MPII's own annotation file "
            "(mpii_human_pose_v1_u12_1.mat); pass HRNet's gt_valid.mat as ground truth together with its JSON"
        )
    images, is_train = _structs(release["annolist"]), np.atleast_1d(release["img_train"])
    if images is None or len(images) != len(is_train):
        raise DataError(f"{path}: RELEASE.annolist and RELEASE.img_train do not match")
    people: list[MpiiPerson] = []
    numbers = itertools.count(1)
    for index, (image, train) in enumerate(zip(images, is_train, strict=True), start=1):
        name = image["image"].get("name") if isinstance(image.get("image"), dict) else None
        rectangles = _structs(image.get("annorect"))
        if not isinstance(name, str) or not name or rectangles is None:
            raise DataError(f"{path}: RELEASE.annolist({index}) has no image.name, or no struct annorect")
        if not train:
            skipped["image_of_test_set"] += 1
        elif not rectangles:
            skipped["image_empty"] += 1
        else:
            for rectangle in rectangles:
                people += _release_person(next(numbers), name, rectangle, skipped)
    return people


def _release_person(number: int, image: str, rectangle: dict[str, Any], skipped: Counter[str]) -> Iterator[MpiiPerson]:
    """Yield the person of an `annorect`, or count in `skipped` why there is none."""
    annopoints = rectangle.get("annopoints")
    points = _structs(annopoints.get("point")) if isinstance(annopoints, dict) else []
    if not points:
        skipped["person_unlabelled"] += 1
        return
    keypoints = _release_joints(points)
    if keypoints is None:
        skipped["person_contradictory"] += 1
        return
    position, scale = _numbers_of(rectangle.get("objpos"), "x", "y"), _numbers_of(rectangle, "scale")
    head, size = _numbers_of(rectangle, "x1", "y1", "x2", "y2"), math.nan
    if head is not None:
        size = HEAD_FACTOR * math.hypot(head[2] - head[0], head[3] - head[1]) or math.nan
    if position is None or scale is None or scale[0] <= 0:
        yield MpiiPerson(number, image, None, 0.0, keypoints, size)
    else:
        yield MpiiPerson(number, image, (position[0], position[1]), scale[0], keypoints, size)


def _release_joints(points: list[dict[str, Any]]) -> np.ndarray | None:
    """Return the (x, y, v) of a person's `point` structs, or None if they are contradictory."""
    joints, visibility = np.zeros((JOINTS, 2)), np.zeros(JOINTS)
    for point in points:
        numbers, seen = _numbers_of(point, "id", "x", "y"), _numbers_of(point, "is_visible")
        if numbers is None or numbers[0] not in range(JOINTS) or visibility[int(numbers[0])]:
            return None
        joints[int(numbers[0])] = numbers[1:]
        visibility[int(numbers[0])] = 1 if seen is not None and seen[0] <= 0 else 2  # head joints have no is_visible
    return _triples(joints, visibility)


def _structs(value: Any) -> list[dict[str, Any]] | None:
    """Return a MATLAB struct array as a list: one struct comes as a dict, an absent one as an empty matrix."""
    if isinstance(value, dict):
        return [value]
    if value is None or (isinstance(value, np.ndarray) and not value.size):
        return []
    return value if isinstance(value, list) and all(isinstance(struct, dict) for struct in value) else None


def _numbers_of(struct: Any, *fields: str) -> list[float] | None:
    """Return fields of a struct as finite numbers, which MATLAB may hold as text; None if one is not a number."""
    try:
        numbers = [float(struct[field]) for field in fields]
    except (LookupError, TypeError, ValueError):  # such as an empty matrix in place of a struct or of a number
        return None
    return numbers if all(map(is_usable, numbers)) else None


def _load_matlab(path: Path, *names: str, simplify_cells: bool = False) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such annotation file")
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise DataError(f"{path}: MATLAB files need SciPy; install it with `pip install 'fpd-accel[mpii]'`") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about variables of unknown classes, which are not used here
            return loadmat(path, appendmat=False, variable_names=names, simplify_cells=simplify_cells)
    except NotImplementedError:
        raise DataError(f"{path}: MATLAB 7.3 format, which is HDF5; save it again with `save -v7`") from None
    except Exception as error:  # damaged bytes can raise anything
        raise DataError(f"{path}: not readable as a MATLAB file: {error}") from None
