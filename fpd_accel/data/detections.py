"""A detector's boxes, in COCO's result format, in place of the annotated people of prepared shards.

The file is a list of ``{"image_id": 785, "category_id": 1, "bbox": [x, y, width, height], "score": 0.97}``, pixels, as
``fpd-accel detect`` and most detectors write it. What cannot be right is refused; what such files contain beside usable
boxes is skipped and counted (see ``SKIPPED``), the way the published loader passes over it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

from fpd_accel.data.numbers import is_usable
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.geometry import Side

PERSON = 1  # COCO's number of the category
SKIPPED = {
    "other_category": f"boxes of another category than {PERSON} (person)",
    "no_area": "boxes without width or height",
    "low_score": "boxes whose score is below the threshold",
    "unknown_image": "boxes of images that are not in the shards",
}


def read_detections(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a detection file, each checked: ``image_id``, ``category_id``, ``bbox``, ``score``, all finite.

    Raises:
        DataError: there is no such file, it is not a JSON list of detections, or it is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of boxes; `fpd-accel detect` writes one")
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(entries, list):
        raise DataError(
            f"{path}: not a list of boxes in COCO's result format, "
            '[{"image_id": 785, "category_id": 1, "bbox": [x, y, width, height], "score": 0.97}, ...]'
        )
    if not entries:
        raise DataError(f"{path}: an empty list: there is no box in it")
    for number, entry in enumerate(entries):
        problem = _problem(entry)
        if problem:
            raise DataError(f"{path}: box {number} of {len(entries)}: {problem}")
    return entries


def _problem(entry: Any) -> str | None:
    """What is wrong with one entry of a detection file."""
    if not isinstance(entry, dict):
        return f"{entry!r} is no object with image_id, category_id, bbox and score"
    missing = [name for name in ("image_id", "category_id", "bbox", "score") if name not in entry]
    if missing:
        return f"{', '.join(missing)} missing"
    for name in ("image_id", "category_id"):
        if not isinstance(entry[name], int) or isinstance(entry[name], bool):
            return f"{name} is {entry[name]!r}, not an integer"
    if not isinstance(entry["bbox"], list) or len(entry["bbox"]) != 4 or not all(map(is_usable, entry["bbox"])):
        return f"bbox is {entry['bbox']!r}, not four finite numbers of at most 1e30 (x, y, width, height)"
    if not is_usable(entry["score"]):
        return f"score is {entry['score']!r}, not a finite number"
    if not isinstance(entry.get("file_name", ""), str):
        return f"file_name is {entry['file_name']!r}, not a name"
    return None


class People:
    """The columns of ``people/`` that a detector knows, in memory, read by rows as those of an Arrow dataset are.

    Nobody's keypoints are labelled; the area is that of the box.
    """

    def __init__(
        self,
        *,
        image_id: Int64[np.ndarray, " person"],
        image_row: Int64[np.ndarray, " person"],
        box: Float[np.ndarray, "person 4"],
        score: Float64[np.ndarray, " person"],
        num_keypoints: int,
    ) -> None:
        self.columns = {
            "id": np.arange(len(box)),
            "image_id": image_id,
            "image_row": image_row,
            "box": box.astype(np.float32),
            "area": box[:, 2:].prod(axis=1),
            "score": score,
        }
        self.num_keypoints = num_keypoints

    def __len__(self) -> int:
        return len(self.columns["id"])

    def __getitem__(self, rows: Any) -> dict[str, np.ndarray]:
        people = {name: column[rows] for name, column in self.columns.items()}
        # Made when asked for: a hundred thousand boxes would carry them about for nothing.
        people["keypoints"] = np.zeros((*people["id"].shape, 3 * self.num_keypoints), dtype=np.float32)
        return people


class Detections(Shards):
    """Shards whose images are cropped around a detector's boxes; the annotated people stay the ground truth.

    ``people`` are the boxes of ``file`` that can be used, in its order: of category 1, with an area, with a score of at
    least ``threshold``, of an image in the shards. As in the published loader they are not cut to the image.

    Raises:
        DataError: the file cannot be read, no box of it can be used, or it names other images by the same ids.
    """

    def __init__(self, shards: Shards, file: str | os.PathLike[str], *, threshold: float = 0.0) -> None:
        super().__init__(shards.path)
        self._annotated, self.file, self.threshold = shards.annotated, Path(file), threshold
        entries = read_detections(self.file)
        skipped: Counter[str] = Counter()
        chosen = self._choose(entries, skipped)
        self.skipped = {key: skipped[key] for key in SKIPPED if skipped[key]}  # reason -> boxes
        if not chosen:
            reasons = ", ".join(f"{count} {SKIPPED[key]}" for key, count in self.skipped.items())
            raise DataError(
                f"{self.file}: none of its {len(entries)} boxes can be used with {self.path}: {reasons}; "
                "are these the boxes of other images?"
            )
        self._people = People(
            image_id=np.array([entry["image_id"] for _, entry in chosen]),
            image_row=np.array([row for row, _ in chosen]),
            box=np.array([entry["bbox"] for _, entry in chosen], dtype=np.float64),
            score=np.array([entry["score"] for _, entry in chosen], dtype=np.float64),
            num_keypoints=self.skeleton.num_keypoints,
        )

    def _choose(self, entries: list[dict[str, Any]], skipped: Counter[str]) -> list[tuple[int, dict[str, Any]]]:
        """Image row and entry of each box to use."""
        listed = self.images.with_format("numpy").select_columns(["id", "file_name"])[:]
        rows = {int(image): row for row, image in enumerate(listed["id"])}
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
                self._check_name(number, entry, str(listed["file_name"][row]))
                chosen.append((row, entry))
        return chosen

    def _check_name(self, number: int, entry: dict[str, Any], file_name: str) -> None:
        """Numbers made up from the order of files would silently put boxes on other images."""
        if Path(entry.get("file_name", file_name)).name != Path(file_name).name:
            raise DataError(
                f"{self.file}: box {number} is of {entry['file_name']}, but image {entry['image_id']} of {self.path} "
                f"is {file_name}; give `fpd-accel detect` the annotation file, --annotations, for the image ids"
            )

    def open(self) -> None:
        """Map the files of the images; the boxes are in memory."""
        _ = self.images, self._stored

    @property
    def annotated(self) -> Shards:
        """The shards as they were prepared: their people are the ground truth."""
        return self._annotated

    @cached_property
    def people(self) -> Any:
        return self._people

    def columns(self, names: Iterable[str], rows: Sequence[int] | np.ndarray | None = None) -> dict[str, np.ndarray]:
        found = self._people[slice(None) if rows is None else list(rows)]
        return {name: found[name] for name in names}

    @cached_property
    def usable(self) -> np.ndarray:
        return np.arange(len(self._people))

    @cached_property
    def image_rows(self) -> np.ndarray:
        return self._people.columns["image_row"]

    @cached_property
    def num_images(self) -> int:
        """Images with a box."""
        return len(np.unique(self._people.columns["image_row"]))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of images and boxes."""
        content = f"{super().fingerprint} {self.threshold} {hashlib.sha256(self.file.read_bytes()).hexdigest()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def box_to_crop(self, box: np.ndarray, *, width: Side, height: Side) -> np.ndarray:  # noqa: ARG002
        """The box as the detector gave it."""
        return box
