"""Preparation of shards from MPII Human Pose (Andriluka et al., CVPR 2014) and a folder of its images.

Crops are those of the published implementation: the position moves down by 15 pixels per unit of scale, and the box is
a square of 200 pixels per unit of scale around it, not clipped to the image; `data.box_padding` (1.25) is applied when
cropping. The files count pixels from 1, the shards from 0. MPII has no silhouettes, so the area of a person is that of
the box, and AP is not comparable with COCO's.

As in `coco.py`, errors are *refused*, with nothing written: a file in neither of the two forms, another number of
joints, numbers that are not finite, ground truth of other people, or an image folder without any of the images. Known
defects of the dataset are *skipped and counted* (see `MPII_SKIPPED`).
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fpd_accel.console import track
from fpd_accel.data.coco import COCO_SKIPPED
from fpd_accel.data.images import read_listed_images
from fpd_accel.data.mpii_annotations import MpiiPerson, read_hrnet_json, read_release, with_ground_truth
from fpd_accel.data.shard_writer import ShardWriter
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.files import sha256
from fpd_accel.skeleton import MPII

MPII_SKIPPED = {
    **{key: COCO_SKIPPED[key] for key in ("image_missing", "image_corrupt")},
    "image_of_test_set": "images of the test set, whose labels are not published",
    "image_empty": "images without an annotated person",
    "person_of_skipped_image": "people in the skipped images",
    "person_unlabelled": "people without a labelled joint",
    "person_contradictory": "people with a joint that is unknown, repeated or without coordinates",
    "person_without_position": "people without position or scale",
    "duplicate_person": "people with the same image, position and joints as an earlier one",
}


def prepare_mpii(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    ground_truth: str | os.PathLike[str] | None = None,
) -> Shards:
    """Write shards of the people annotated in MPII, and open them.

    Every image is decoded once to verify it. The id of a person is its position in the file, from 1.

    Args:
        images: Folder of MPII's images.
        annotations: JSON list of `image, center, scale, joints, joints_vis`, such as HRNet's `train.json` and
            `valid.json`; or `mpii_human_pose_v1_u12_1.mat`, of which all training images are taken. The usual
            validation split is listed in `valid.json` only, not in the .mat.
        output: Folder to write.
        ground_truth: HRNet's `gt_valid.mat`, which belongs to its `valid.json`: head sizes, which PCKh needs, and the
            labels that PCKh is measured against. The .mat form has head sizes itself. With ground truth, people who
            are listed twice are kept twice, because the published evaluation scores every row of the file.

    Raises:
        DataError: The annotations are refused (see the module's docstring), or `output` exists.
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
    source = {"annotations": annotations.name, "sha256": sha256(annotations)}
    if ground_truth is not None:
        people = with_ground_truth(people, annotations, Path(ground_truth))
        source |= {"ground_truth": Path(ground_truth).name, "ground_truth_sha256": sha256(Path(ground_truth))}
    by_image = _by_image(people, skipped, keep_duplicates=ground_truth is not None)
    people_of = dict(enumerate(by_image.values(), start=1))  # by image id: the image's position among these, from 1
    listed = [{"id": image_id, "file_name": name} for image_id, name in enumerate(by_image, start=1)]
    with ShardWriter(Path(output), MPII, clip_boxes=False, head_sizes=True) as writer:
        reading = track(listed, f"reading images of {annotations.name}")
        writer.write_images(read_listed_images(images, reading, people_of, skipped))
        writer.write_people(_rows(writer.image_rows, people_of))
        if not writer.image_rows:
            raise DataError(
                f"{images}: no image of {annotations} can be used; "
                + (f"looked first for {images / next(iter(by_image))}" if by_image else f"left out: {dict(skipped)}")
            )
        writer.finish(source=source, skipped={key: skipped[key] for key in MPII_SKIPPED if skipped[key]})
    return Shards(output)


def _by_image(people: list[MpiiPerson], skipped: Counter[str], *, keep_duplicates: bool) -> dict[str, list[MpiiPerson]]:
    """Return the people with a position by image file name, in the order of the file."""
    found: dict[str, list[MpiiPerson]] = {}
    seen = set()
    for person in people:
        key = (person.image, person.position, person.scale, person.keypoints.tobytes())
        if person.position is None:
            skipped["person_without_position"] += 1
        elif key in seen and not keep_duplicates:
            skipped["duplicate_person"] += 1
        else:
            seen.add(key)
            found.setdefault(person.image, []).append(person)
    return found


def _rows(image_rows: dict[int, tuple[int, int, int]], people: dict[int, list[MpiiPerson]]) -> Iterator[dict[str, Any]]:
    """Yield one flat row for each person in the written images."""
    for image_id, (row, _, _) in image_rows.items():
        for person in people[image_id]:
            assert person.position is not None  # the others were left out
            (x, y), side = person.position, 200 * person.scale
            box = np.array([x - 1 - side / 2, y + 15 * person.scale - 1 - side / 2, side, side], dtype=np.float32)
            keypoints, labelled = person.keypoints.copy(), person.keypoints[:, 2] > 0
            keypoints[labelled, :2] -= 1  # MATLAB counts pixels from 1
            yield {
                "id": person.number,
                "image_id": image_id,
                "image_row": row,
                "box": box,
                "keypoints": keypoints.reshape(-1),
                "area": float(box[2] * box[3]),
                "crowd": False,
                "score": 1.0,
                "exclude_reason": "" if labelled.any() else "no_keypoints",
                "head_size": person.head_size,
            }
