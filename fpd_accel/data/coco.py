"""Preparation of shards from COCO keypoint annotations and a folder of images.

Errors in the annotations are *refused*, with nothing written: a file in another format, keypoints that differ from the
skeleton's in number or name, an image id that appears twice, an annotation without a box, numbers that are not finite,
or an image folder without any of the images. Defects that real datasets contain are *skipped and counted* (see
`COCO_SKIPPED`), so that the shards hold only images that decode and people that can be cropped.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fpd_accel.console import track
from fpd_accel.data.images import read_listed_images
from fpd_accel.data.shard_writer import ShardWriter
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.files import sha256
from fpd_accel.geometry import clip_box
from fpd_accel.skeleton import COCO, Skeleton

Record = dict[str, Any]
MAX_VALUE = 1e30  # of annotated numbers; regions computed from them, with padding and scale, stay finite in float32
COCO_SKIPPED = {
    "image_missing": "images listed that are not in the folder",
    "image_corrupt": "images that do not decode",
    "image_size": "images whose size differs from the one listed",
    "image_empty": "images without an annotated person",
    "person_of_skipped_image": "people in the skipped images",
    "duplicate_id": "annotations with the id of an earlier one",
    "unknown_category": "annotations of a category that is not listed",
    "unknown_image": "annotations of an image that is not listed",
}


def prepare_coco(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    skeleton: Skeleton = COCO,
    category: str | None = None,
    keep_empty_images: bool = False,
) -> Shards:
    """Write shards of the people annotated in a COCO keypoint JSON, and open them.

    Crowd regions, people without keypoints and people without area stay in the shards with an `exclude_reason`: the
    evaluation protocol needs them, training and inference never see them. Every image is decoded once to verify it.

    Args:
        images: Folder of the image files.
        annotations: JSON file in COCO's keypoint format.
        output: Folder to write.
        skeleton: Skeleton of the annotations; keypoint names and order must match.
        category: Name of the category to use; needed only if several have keypoints.
        keep_empty_images: Keep images without an annotated person too, and accept a file without annotations. A
            detector's boxes need these images: in evaluation by COCO's protocol, where detections in them count as
            false positives, and in training on people without labels.

    Raises:
        DataError: The annotations are refused (see the module's docstring), or `output` exists.
    """
    images, annotations = Path(images), Path(annotations)
    if not images.is_dir():
        raise DataError(f"{images}: no such image folder")
    dataset = _read(annotations, allow_unannotated=keep_empty_images)
    category_id = _category(annotations, dataset, skeleton, category) if dataset["annotations"] else None
    skipped: Counter[str] = Counter()
    people = _people(annotations, dataset, category_id, skeleton, skipped)
    with ShardWriter(Path(output), skeleton, allow_no_people=keep_empty_images) as writer:
        listed = [image for image in dataset["images"] if keep_empty_images or people[image["id"]]]
        skipped["image_empty"] = len(dataset["images"]) - len(listed)
        reading = track(listed, f"reading images of {annotations.name}")
        writer.write_images(read_listed_images(images, reading, people, skipped))
        writer.write_people(_rows(writer.image_rows, people, skeleton))
        if not writer.image_rows:
            first = images / str(dataset["images"][0]["file_name"]) if dataset["images"] else images
            raise DataError(f"{images}: no image of {annotations} can be used; looked first for {first}")
        writer.finish(
            source={"annotations": annotations.name, "sha256": sha256(annotations)},
            skipped={key: skipped[key] for key in COCO_SKIPPED if skipped[key]},
        )
    return Shards(output)


def read_json(path: Path, *, missing: str = "no such annotation file") -> Any:
    """Return the content of a JSON file; raise a DataError, with the text `missing` if there is no such file."""
    if not path.is_file():
        raise DataError(f"{path}: {missing}")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None


def _read(path: Path, *, allow_unannotated: bool) -> Record:
    dataset = read_json(path)
    if allow_unannotated and isinstance(dataset, dict):  # such as COCO's image_info_unlabeled2017.json
        dataset = {"annotations": [], "categories": []} | dataset
    for key in ("images", "annotations", "categories"):
        if not isinstance(dataset, dict) or not isinstance(dataset.get(key), list):
            raise DataError(f"{path}: not a COCO annotation file: it has no list {key!r}")
        for entry in dataset[key]:
            if not isinstance(entry, dict):
                raise DataError(f"{path}: not a COCO annotation file: {key} holds {entry!r}, which is not an object")
    image_fields = {"id": int, "file_name": str, "width": int, "height": int}
    for key, fields in (("images", image_fields), ("categories", {"id": int})):
        for field, kind in fields.items():
            for entry in dataset[key]:
                if not isinstance(entry.get(field), kind):
                    raise DataError(f"{path}: {key} holds {entry}: {field!r} is missing or not {kind.__name__}")
    counts = Counter(image["id"] for image in dataset["images"])
    if twice := [key for key, count in counts.items() if count > 1]:
        raise DataError(f"{path}: {len(twice)} image ids appear twice, {twice[0]} among them; ids have to be unique")
    return dataset


def _category(path: Path, dataset: Record, skeleton: Skeleton, wanted: str | None) -> int:
    candidates = [c for c in dataset["categories"] if wanted in (None, c.get("name")) and (wanted or "keypoints" in c)]
    if not candidates and len(dataset["categories"]) == 1 and wanted is None:
        candidates = dataset["categories"]  # a lone category that does not name its keypoints
    if len(candidates) != 1:
        names = ", ".join(repr(c.get("name")) for c in dataset["categories"])
        problem = f"no category {wanted!r}" if wanted else f"{len(candidates)} categories with keypoints, not one"
        raise DataError(f"{path}: {problem}; categories here: {names}; name one with --category")
    names = candidates[0].get("keypoints", list(skeleton.keypoints))
    if not isinstance(names, list):
        raise DataError(f"{path}: category {candidates[0].get('name')!r}: 'keypoints' is not a list of names")
    if len(names) != skeleton.num_keypoints:
        raise DataError(
            f"{path}: {len(names)} keypoints, but skeleton {skeleton.name!r} has {skeleton.num_keypoints}; "
            f"give a matching skeleton YAML with --skeleton"
        )
    for expected, found in zip(skeleton.keypoints, names, strict=True):
        if expected != found:
            place = f"{path}: keypoint {found!r} stands where skeleton {skeleton.name!r} has {expected!r}"
            raise DataError(f"{place}; the names and their order have to be the same")
    return int(candidates[0]["id"])


def _people(
    path: Path, dataset: Record, category: int | None, skeleton: Skeleton, skipped: Counter[str]
) -> dict[int, list[Record]]:
    """Return the checked annotations of the category by image id."""
    listed = {c.get("id") for c in dataset["categories"]}
    people: dict[int, list[Record]] = {image["id"]: [] for image in dataset["images"]}
    seen: set[int] = set()
    for annotation in dataset["annotations"]:
        if annotation.get("category_id") not in listed:
            skipped["unknown_category"] += 1
        elif annotation["category_id"] != category:
            continue
        elif annotation.get("image_id") not in people:
            skipped["unknown_image"] += 1
        elif annotation.get("id") in seen:
            skipped["duplicate_id"] += 1
        else:
            _check_annotation(path, annotation, skeleton)
            seen.add(annotation["id"])
            people[annotation["image_id"]].append(annotation)
    return people


def _check_annotation(path: Path, annotation: Record, skeleton: Skeleton) -> None:
    name = f"{path}: annotation {annotation.get('id')}"
    for field, length in (("bbox", 4), ("keypoints", 3 * skeleton.num_keypoints)):
        values = annotation.get(field)
        if values is None:
            raise DataError(f"{name}: has no {field!r}; a keypoint file is needed (person_keypoints_*.json)")
        if not isinstance(values, list) or len(values) != length:
            found = len(values) if isinstance(values, list) else values
            raise DataError(
                f"{name}: {field!r} holds {found} numbers, not {length}; skeleton {skeleton.name!r} has "
                f"{skeleton.num_keypoints} keypoints of 3"
            )
        if not all(map(is_usable, values)):
            raise DataError(f"{name}: {field!r} has a value that is not a finite number of at most 1e30")
    for field in ("area", "score"):
        if not is_usable(value := annotation.get(field, 0)):
            raise DataError(f"{name}: {field!r} is {value!r}, not a finite number of at most 1e30")
    if not isinstance(annotation.get("id"), int):
        raise DataError(f"{name}: has no integer 'id'")


def _rows(
    image_rows: dict[int, tuple[int, int, int]], people: dict[int, list[Record]], skeleton: Skeleton
) -> Iterator[Record]:
    """Yield one flat row for each person in the written images."""
    for image_id, (row, width, height) in image_rows.items():
        for annotation in people[image_id]:
            keypoints = np.asarray(annotation["keypoints"], dtype=np.float32).reshape(skeleton.num_keypoints, 3)
            box = np.asarray(annotation["bbox"], dtype=np.float32)
            crowd = bool(annotation.get("iscrowd", 0))
            reasons = {
                "crowd": crowd,
                "no_keypoints": not keypoints[:, 2].any(),
                "no_area": clip_box(box, width, height)[2:].min() <= 0,
            }
            yield {
                "id": annotation["id"],
                "image_id": image_id,
                "image_row": row,
                "box": box,
                "keypoints": keypoints.reshape(-1),
                "area": float(annotation.get("area", box[2] * box[3])),
                "crowd": crowd,
                "score": float(annotation.get("score", 1.0)),
                "exclude_reason": next((reason for reason, applies in reasons.items() if applies), ""),
            }


def is_usable(value: Any) -> bool:
    """Return whether a value of a JSON file is a finite number of at most `MAX_VALUE`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_VALUE
