"""MPII Human Pose and a folder of its images -> shards (Andriluka et al., CVPR 2014).

Crops are those of the published implementation: the position moves down by 15 pixels per unit of scale, the box is a
square of 200 pixels per unit of scale about it, not cut to the image, and ``data.box_padding`` (1.25) does the rest.
The files count pixels from 1, the shards from 0. Without silhouettes the area of a person is that of the box, so that
AP does not compare with COCO's.

As in ``coco.py``, what cannot be right is *refused*, with nothing written: a file in neither of the two forms, another
number of joints, numbers that are not finite, a ground truth of other people, an image folder in which nothing is
found. What the dataset is known to contain is *skipped and counted* (see ``SKIPPED``).
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from fpd_accel.data.coco import SKIPPED as SKIPPED_OF_COCO
from fpd_accel.data.images import read_image
from fpd_accel.data.mpii_annotations import (
    Person,
    check_same_people,
    read_ground_truth,
    read_hrnet_json,
    read_release,
)
from fpd_accel.data.shards import Shards, ShardWriter
from fpd_accel.errors import DataError
from fpd_accel.log import track
from fpd_accel.skeleton import MPII

SKIPPED = {
    **{key: SKIPPED_OF_COCO[key] for key in ("image_missing", "image_corrupt")},
    "image_of_test_set": "images of the test set, whose labels are not published",
    "image_empty": "images without an annotated person",
    "person_of_skipped_image": "people in the images left out above",
    "person_unlabelled": "people without a labelled joint",
    "person_contradictory": "people with a joint that is unknown, repeated or nowhere",
    "person_without_position": "people without position or scale",
    "duplicate_person": "people listed before with the same image, position and joints",
}


def prepare_mpii(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    ground_truth: str | os.PathLike[str] | None = None,
) -> Shards:
    """Write shards of the people of MPII, and open them.

    Args:
        images: folder of MPII's images.
        annotations: a JSON list of ``image, center, scale, joints, joints_vis``, such as HRNet's ``train.json`` and
            ``valid.json``; or ``mpii_human_pose_v1_u12_1.mat``, of which the training images are taken, all of them:
            whom the literature holds out of those, ``valid.json`` says and the .mat does not.
        output: folder to write.
        ground_truth: HRNet's ``gt_valid.mat``, which goes with its ``valid.json``: the sizes of heads, without which
            there is no PCKh, and the labels that PCKh is measured by. The .mat form has head sizes itself. With it
            people who are listed twice stay twice: the published evaluation scores every row of the file.

    Every image is decoded once to prove that it can be. Ids of people are their places in the file, from 1.

    Raises:
        DataError: the module's docstring says for what; or ``output`` exists.
    """
    images, annotations = Path(images), Path(annotations)
    if not images.is_dir():
        raise DataError(f"{images}: no such image folder")
    skipped: Counter[str] = Counter()
    if annotations.suffix.lower() == ".mat":
        if ground_truth is not None:
            raise DataError(
                f"{ground_truth}: {annotations} has head sizes itself; the ground truth goes with HRNet's JSON"
            )
        people = read_release(annotations, skipped)
    else:
        people = read_hrnet_json(annotations)
    source = {"annotations": annotations.name, "sha256": _sha256(annotations)}
    if ground_truth is not None:
        people = _with_ground_truth(people, annotations, Path(ground_truth))
        source |= {"ground_truth": Path(ground_truth).name, "ground_truth_sha256": _sha256(Path(ground_truth))}
    by_image = _by_image(people, skipped, keep_repeated=ground_truth is not None)
    with ShardWriter(Path(output), MPII, clip_boxes=False, head_sizes=True) as writer:
        writer.write_images(_images(images, annotations, by_image, skipped))
        writer.write_people(_rows(writer.image_rows, list(by_image.values())))
        if not writer.image_rows:
            raise DataError(
                f"{images}: no image of {annotations} can be used; "
                + (f"looked first for {images / next(iter(by_image))}" if by_image else f"left out: {dict(skipped)}")
            )
        writer.finish(source=source, skipped={key: skipped[key] for key in SKIPPED if skipped[key]})
    return Shards(output)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _with_ground_truth(people: list[Person], annotations: Path, path: Path) -> list[Person]:
    truth = read_ground_truth(path)
    check_same_people(path, truth, annotations, people)
    return [
        replace(person, keypoints=keypoints, head_size=float(size))
        for person, keypoints, size in zip(people, truth.keypoints, truth.head_sizes, strict=True)
    ]


def _by_image(people: list[Person], skipped: Counter[str], *, keep_repeated: bool) -> dict[str, list[Person]]:
    """File name -> its people that have a place, in the order of the file; each once, unless the repeated are kept."""
    found: dict[str, list[Person]] = {}
    seen = set()
    for person in people:
        key = (person.image, person.position, person.scale, person.keypoints.tobytes())
        if person.position is None:
            skipped["person_without_position"] += 1
        elif key in seen and not keep_repeated:
            skipped["duplicate_person"] += 1
        else:
            seen.add(key)
            found.setdefault(person.image, []).append(person)
    return found


def _images(
    folder: Path, annotations: Path, by_image: dict[str, list[Person]], skipped: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Images with people, read and proven to decode; the id of an image is its place among them, from 1."""
    named = track(list(by_image.items()), f"reading images of {annotations.name}")
    for number, (name, people) in enumerate(named, start=1):
        problem, data, (height, width) = read_image(folder / name)
        if problem is not None:
            skipped[problem] += 1
            skipped["person_of_skipped_image"] += len(people)
            continue
        yield {"id": number, "file_name": name, "width": width, "height": height, "bytes": data}


def _rows(image_rows: dict[int, tuple[int, int, int]], people: list[list[Person]]) -> Iterator[dict[str, Any]]:
    """One flat row per person of the images written."""
    for image_id, (row, _, _) in image_rows.items():
        for person in people[image_id - 1]:
            box = person_box(person)
            labelled = person.keypoints[:, 2] > 0
            keypoints = person.keypoints.copy()
            keypoints[labelled, :2] -= 1  # from MATLAB's pixels to ours
            yield {
                "id": person.number,
                "image_id": image_id,
                "image_row": row,
                "box": box,
                "keypoints": keypoints.reshape(-1),
                "area": float(box[2] * box[3]),
                "crowd": False,
                "score": 1.0,
                "unused": "" if labelled.any() else "no_keypoints",
                "head_size": person.head_size,
            }


def person_box(person: Person) -> Float32[np.ndarray, "4"]:
    """The box (x, y, width, height) about which the published implementation crops a person, pixels from 0."""
    assert person.position is not None
    x, y = person.position
    side = 200 * person.scale
    return np.array([x - 1 - side / 2, y + 15 * person.scale - 1 - side / 2, side, side], dtype=np.float32)
