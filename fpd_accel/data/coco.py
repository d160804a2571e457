"""COCO keypoint annotations and a folder of images -> shards.

What cannot be right is *refused*, with nothing written: an annotation file that is not one, a keypoint count or names
that differ from the skeleton's, an image id that appears twice, an annotation without box, numbers that are not
finite, an image folder in which nothing is found. What datasets in the wild contain is *skipped and counted* (see
``SKIPPED``): the run that follows meets only images that decode and people that can be cropped.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fpd_accel.data.images import read_image
from fpd_accel.data.numbers import is_usable
from fpd_accel.data.shards import Shards, ShardWriter
from fpd_accel.errors import DataError
from fpd_accel.geometry import clip_box
from fpd_accel.log import track
from fpd_accel.skeleton import COCO, Skeleton

Record = dict[str, Any]

SKIPPED = {
    "image_missing": "images listed that are not in the folder",
    "image_corrupt": "images that do not decode",
    "image_size": "images whose size is not the one listed",
    "image_empty": "images without an annotated person",
    "person_of_skipped_image": "people in the images left out above",
    "duplicate_id": "annotations whose id came before",
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

    ``category`` names the category to use; it is needed only where several have keypoints. Crowd regions, people
    without keypoints and people without area stay in the shards, marked unusable: the evaluation protocol needs them,
    training and inference never see them. Every image is decoded once to prove that it can be.

    ``keep_empty_images`` keeps images without an annotated person too, and takes a file that has images alone. A
    detector's boxes need them: in evaluation, where what is detected there counts as false alarms in COCO's protocol,
    and as people to learn from without labels.

    Raises:
        DataError: the module's docstring says for what; or ``output`` exists.
    """
    images, annotations = Path(images), Path(annotations)
    if not images.is_dir():
        raise DataError(f"{images}: no such image folder")
    dataset = _read(annotations, images_alone=keep_empty_images)
    category_id = _category(annotations, dataset, skeleton, category) if dataset["annotations"] else None
    skipped: Counter[str] = Counter()
    people = _people(annotations, dataset, category_id, skeleton, skipped)
    with ShardWriter(Path(output), skeleton, images_alone=keep_empty_images) as writer:
        listed = [image for image in dataset["images"] if keep_empty_images or people[image["id"]]]
        skipped["image_empty"] = len(dataset["images"]) - len(listed)
        writer.write_images(_images(images, annotations, listed, people, skipped))
        writer.write_people(_rows(writer.image_rows, people, skeleton))
        if not writer.image_rows:
            first = images / str(dataset["images"][0]["file_name"]) if dataset["images"] else images
            raise DataError(f"{images}: no image of {annotations} can be used; looked first for {first}")
        writer.finish(
            source={"annotations": annotations.name, "sha256": hashlib.sha256(annotations.read_bytes()).hexdigest()},
            skipped={key: skipped[key] for key in SKIPPED if skipped[key]},
        )
    return Shards(output)


def read_annotations(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: there is no such file, or it is not JSON.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such annotation file")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None


def _read(path: Path, *, images_alone: bool) -> Record:
    dataset = read_annotations(path)
    if images_alone and isinstance(dataset, dict):  # as COCO's image_info_unlabeled2017.json
        dataset = {"annotations": [], "categories": []} | dataset
    for key in ("images", "annotations", "categories"):
        if not isinstance(dataset, dict) or not isinstance(dataset.get(key), list):
            raise DataError(f"{path}: not a COCO annotation file: it has no list {key!r}")
        for entry in dataset[key]:
            if not isinstance(entry, dict):
                raise DataError(f"{path}: not a COCO annotation file: {key} holds {entry!r}, which is no object")
    for key, field, kind in (
        ("images", "id", int),
        ("images", "file_name", str),
        ("images", "width", int),
        ("images", "height", int),
        ("categories", "id", int),
    ):
        for entry in dataset[key]:
            if not isinstance(entry.get(field), kind):
                raise DataError(f"{path}: {key} holds {entry}: {field!r} is missing or not {kind.__name__}")
    repeated = [key for key, count in Counter(image["id"] for image in dataset["images"]).items() if count > 1]
    if repeated:
        raise DataError(
            f"{path}: {len(repeated)} image ids appear twice, {repeated[0]} among them; ids have to be unique"
        )
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
        raise DataError(f"{path}: category {candidates[0].get('name')!r}: 'keypoints' is no list of names")
    if len(names) != skeleton.num_keypoints:
        raise DataError(
            f"{path}: {len(names)} keypoints, but skeleton {skeleton.name!r} has {skeleton.num_keypoints}; "
            f"give a matching skeleton YAML with --skeleton"
        )
    for mine, theirs in zip(skeleton.keypoints, names, strict=True):
        if mine != theirs:
            raise DataError(
                f"{path}: keypoint {theirs!r} stands where skeleton {skeleton.name!r} has {mine!r}; "
                f"the names and their order have to be the same"
            )
    return int(candidates[0]["id"])


def _people(
    path: Path, dataset: Record, category: int | None, skeleton: Skeleton, skipped: Counter[str]
) -> dict[int, list[Record]]:
    """Image id -> its annotations of the category, each checked."""
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
            raise DataError(f"{name}: {field!r} holds something that is not a finite number of at most 1e30")
    for field in ("area", "score"):
        value = annotation.get(field, 0)
        if not is_usable(value):
            raise DataError(f"{name}: {field!r} is {value!r}, not a finite number of at most 1e30")
    if not isinstance(annotation.get("id"), int):
        raise DataError(f"{name}: has no integer 'id'")


def _images(
    folder: Path, annotations: Path, listed: list[Record], people: dict[int, list[Record]], skipped: Counter[str]
) -> Iterator[Record]:
    """Images read and proven to decode, in the order of the file."""
    for image in track(listed, f"reading images of {annotations.name}"):
        problem, data = _load_image(folder / image["file_name"], image)
        if problem:
            skipped[problem] += 1
            skipped["person_of_skipped_image"] += len(people[image["id"]])
            continue
        yield {**{key: image[key] for key in ("id", "file_name", "width", "height")}, "bytes": data}


def _load_image(path: Path, image: Record) -> tuple[str | None, bytes]:
    problem, data, size = read_image(path)
    if problem is None and size != (image["height"], image["width"]):
        return "image_size", b""
    return problem, data


def _rows(
    image_rows: dict[int, tuple[int, int, int]],
    people: dict[int, list[Record]],
    skeleton: Skeleton,
) -> Iterator[Record]:
    """One flat row per person of the images written."""
    for image_id, (row, width, height) in image_rows.items():
        for annotation in people[image_id]:
            keypoints = np.asarray(annotation["keypoints"], dtype=np.float32).reshape(skeleton.num_keypoints, 3)
            box = np.asarray(annotation["bbox"], dtype=np.float32)
            crowd = bool(annotation.get("iscrowd", 0))
            clipped = clip_box(box, width, height)
            reason = ""
            if crowd:
                reason = "crowd"
            elif not keypoints[:, 2].any():
                reason = "no_keypoints"
            elif clipped[2] <= 0 or clipped[3] <= 0:
                reason = "no_area"
            yield {
                "id": annotation["id"],
                "image_id": image_id,
                "image_row": row,
                "box": box,
                "keypoints": keypoints.reshape(-1),
                "area": float(annotation.get("area", box[2] * box[3])),
                "crowd": crowd,
                "score": float(annotation.get("score", 1.0)),
                "unused": reason,
            }
