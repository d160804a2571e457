"""A detector's boxes, in COCO's result format, in place of the annotated people of prepared shards.

The file is a list of `{"image_id": 785, "category_id": 1, "bbox": [x, y, width, height], "score": 0.97}`, in pixels, as
`fpd-accel detect` and most detectors write it. Errors are refused; boxes that cannot be used are skipped and counted
(see `BOX_SKIPPED`), as in the published loader.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from fpd_accel.config.schema import Evaluate
from fpd_accel.console import say, warn
from fpd_accel.data.arrow_columns import read_columns
from fpd_accel.data.coco import is_usable, read_json
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.files import sha256
from fpd_accel.geometry import Side

PERSON = 1  # COCO's id of the category
BOX_SKIPPED = {
    "other_category": f"boxes of another category than {PERSON} (person)",
    "no_area": "boxes without width or height",
    "low_score": "boxes whose score is below the threshold",
    "unknown_image": "boxes of images that are not in the shards",
}


def read_detections(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the checked entries of a detection file, each with `image_id`, `category_id`, `bbox` and `score`.

    Raises:
        DataError: The file does not exist, is not a JSON list of detections, or is empty.
    """
    path = Path(path)
    entries = read_json(path, missing="no such file of boxes; `fpd-accel detect` writes one")
    if not isinstance(entries, list):
        raise DataError(
            f"{path}: not a list of boxes in COCO's result format, "
            '[{"image_id": 785, "category_id": 1, "bbox": [x, y, width, height], "score": 0.97}, ...]'
        )
    if not entries:
        raise DataError(f"{path}: an empty list; it has no boxes")
    for number, entry in enumerate(entries):
        if problem := _problem(entry):
            raise DataError(f"{path}: box {number} of {len(entries)}: {problem}")
    return entries


def _problem(entry: Any) -> str | None:
    """Return the problem with an entry of a detection file, or None."""
    if not isinstance(entry, dict):
        return f"{entry!r} is not an object with image_id, category_id, bbox and score"
    if missing := [name for name in ("image_id", "category_id", "bbox", "score") if name not in entry]:
        return f"{', '.join(missing)} missing"
    for name in ("image_id", "category_id"):
        if not isinstance(entry[name], int) or isinstance(entry[name], bool):
            return f"{name} is {entry[name]!r}, not an integer"
    if not isinstance(entry["bbox"], list) or len(entry["bbox"]) != 4 or not all(map(is_usable, entry["bbox"])):
        return f"bbox is {entry['bbox']!r}, not four finite numbers of at most 1e30 (x, y, width, height)"
    if not is_usable(entry["score"]):
        return f"score is {entry['score']!r}, not a finite number"
    if not isinstance(entry.get("file_name", ""), str):
        return f"file_name is {entry['file_name']!r}, not a string"
    return None


class Detections(Shards):
    """Shards whose images are cropped around a detector's boxes; the annotated people stay the ground truth.

    `people` are the usable boxes of `file` in its order: those of category 1, with an area, with a score of at least
    `threshold`, and of an image in the shards. As in the published loader, they are not clipped to the image.

    Raises:
        DataError: The file cannot be read, has no usable box, or uses the same ids for other images.
    """

    def __init__(self, shards: Shards, file: str | os.PathLike[str], *, threshold: float = 0.0) -> None:
        super().__init__(shards.path)
        self._annotated, self.file, self.threshold = shards.annotated, Path(file), threshold
        entries = read_detections(self.file)
        skipped: Counter[str] = Counter()
        chosen = self._choose(entries, skipped)
        self.skipped = {key: skipped[key] for key in BOX_SKIPPED if skipped[key]}  # reason -> boxes
        if not chosen:
            reasons = ", ".join(f"{count} {BOX_SKIPPED[key]}" for key, count in self.skipped.items())
            raise DataError(
                f"{self.file}: none of its {len(entries)} boxes can be used with {self.path}: {reasons}; "
                "are they boxes of other images?"
            )
        box = np.array([entry["bbox"] for _, entry in chosen], dtype=np.float64)
        self._boxes = {
            "id": np.arange(len(box)),
            "image_id": np.array([entry["image_id"] for _, entry in chosen]),
            "image_row": np.array([row for row, _ in chosen]),
            "box": box.astype(np.float32),
            "area": box[:, 2:].prod(axis=1),
            "score": np.array([entry["score"] for _, entry in chosen], dtype=np.float64),
        }

    def _choose(self, entries: list[dict[str, Any]], skipped: Counter[str]) -> list[tuple[int, dict[str, Any]]]:
        """Return (image row, entry) of each usable box; count the others in `skipped`."""
        listed = read_columns(self.images, ("id", "file_name"))
        rows = {image: row for row, image in enumerate(listed["id"].tolist())}
        chosen = []
        for number, entry in enumerate(entries):
            row = rows.get(entry["image_id"])
            if entry["category_id"] != PERSON:
                skipped["other_category"] += 1
            elif min(entry["bbox"][2:]) <= 0:
                skipped["no_area"] += 1
            elif entry["score"] < self.threshold:
                skipped["low_score"] += 1
            elif row is None:
                skipped["unknown_image"] += 1
            else:
                name = listed["file_name"][row]
                if Path(entry.get("file_name", name)).name != Path(name).name:  # ids numbered by the order of files
                    raise DataError(
                        f"{self.file}: box {number} is of {entry['file_name']}, but image {entry['image_id']} of "
                        f"{self.path} is {name}; pass the annotation file to `fpd-accel detect --annotations` for its "
                        "image ids"
                    )
                chosen.append((row, entry))
        return chosen

    def open(self) -> None:
        """Map the files of the images; the boxes are in memory."""
        _ = self.images, self._stored

    @property
    def annotated(self) -> Shards:
        """The shards as they were prepared: their people are the ground truth."""
        return self._annotated

    @cached_property
    def people(self) -> Dataset:
        """The boxes as a table, in NumPy format."""
        return Dataset.from_dict(self.columns((*self._boxes, "keypoints"))).with_format("numpy")

    def columns(self, names: Iterable[str], rows: Sequence[int] | np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return columns of all boxes or of the given rows; all keypoints are unlabelled."""
        rows = self.usable if rows is None else np.asarray(rows, dtype=np.int64)
        # Created on access: stored for 100,000 boxes they would only take memory.
        keypoints = np.zeros((len(rows), 3 * self.skeleton.num_keypoints), dtype=np.float32)
        return {name: keypoints if name == "keypoints" else self._boxes[name][rows] for name in names}

    @cached_property
    def usable(self) -> np.ndarray:
        """The rows of `people`: all boxes are usable."""
        return self._boxes["id"]

    @cached_property
    def image_rows(self) -> np.ndarray:
        """The row of each box's image."""
        return self._boxes["image_row"]

    @cached_property
    def num_images(self) -> int:
        """The number of images with a box."""
        return len(np.unique(self.image_rows))

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of images and boxes."""
        return sha256(f"{super().fingerprint} {self.threshold} {sha256(self.file)}")

    def box_to_crop(self, box: np.ndarray, *, width: Side, height: Side) -> np.ndarray:  # noqa: ARG002
        """Return the detector's box unchanged."""
        return box


def open_detections(shards: Shards, file: str, *, threshold: float) -> Detections:
    """Return the shards with a detector's boxes; print how many were used and skipped."""
    detections = Detections(shards, file, threshold=threshold)
    say(
        f"{file}: {len(detections)} boxes with a score of at least {threshold:g}, in "
        f"{detections.num_images} of the {len(detections.images)} images of {shards.path}"
    )
    for reason, count in detections.skipped.items():
        say(f"  skipped {count} {BOX_SKIPPED[reason]}")
    return detections


def with_boxes(shards: Shards, options: Evaluate) -> Shards:
    """Return the shards with the detector's boxes of `options.boxes`, and print how many were used and skipped.

    Shards are returned unchanged if `options.boxes` is None or they already have a detector's boxes.
    """
    if options.boxes is None or isinstance(shards, Detections):
        return shards
    detections = open_detections(shards, options.boxes, threshold=options.box_threshold)
    if unknown := detections.skipped.get("unknown_image"):
        dropped = shards.description["skipped"].get("image_empty", 0)
        warn(
            f"{unknown} boxes are of images that are not in {shards.path}"
            + (f" ({dropped} images without an annotated person were skipped when it was prepared)" if dropped else "")
            + "; COCO's protocol counts detections there as false positives, so AP is too high: for the exact "
            "protocol prepare the images with --keep-empty-images"
        )
    return detections
