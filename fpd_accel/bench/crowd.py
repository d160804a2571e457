"""Generated shards of any number of people, made from a few small pictures: to measure with, not to learn from.

The layout is that of `fpd-accel prepare`, but written table by table: a million people take seconds, not a minute.
"""

import math
import shutil
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter

from fpd_accel.console import say, track
from fpd_accel.data.published.download import quiet_datasets
from fpd_accel.data.shard_writer import ShardWriter
from fpd_accel.data.shards import IMAGE_FEATURES, Shards, people_features
from fpd_accel.errors import DataError
from fpd_accel.files import flush
from fpd_accel.skeleton import COCO

PICTURES = 64  # distinct ones; each image still has its own row and its own copy of the bytes
PEOPLE_PER_IMAGE = 2.5  # as in COCO's training images
ROWS = 10_000  # written at a time


@dataclass(frozen=True)
class Pictures:
    """The images of a generated dataset."""

    name: str
    height: int  # pixels
    width: int
    grain: float  # grey levels, standard deviation of each pixel's noise, which gives a JPEG a photograph's size
    bytes_per_person: int  # upper limit on the disk, twice the final size, since shards are written twice


# For measurements that depend on the number of people.
SMALL = Pictures("people", 120, 160, grain=0, bytes_per_person=5000)
# As large as COCO's, 160 kB each. Loaders are compared on them; their decoded pixels need room beside the shards.
PHOTOGRAPHS = Pictures("photographs", 480, 640, grain=9, bytes_per_person=440_000)
PHOTOGRAPHED = 640  # people in these photographs


def draw_crowd(folder: Path, people: int, *, pictures: Pictures = SMALL) -> Shards:
    """Return shards of `people` usable people in `folder`, written now unless an earlier call left them there.

    Raise a DataError if the folder cannot be made, or the disk is too full.
    """
    output = folder / f"{pictures.name}_{people}"
    if (output / "dataset.json").is_file():
        return Shards(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}; choose another --cache") from None
    if free < (needed := people * pictures.bytes_per_person):
        raise DataError(
            f"{folder}: {people} people need {needed / 1e9:.1f} GB, but {free / 1e9:.1f} are free; "
            "choose another --cache, or a lower --people"
        )
    say(f"writing shards of {people} people into {output}")
    images = math.ceil(people / PEOPLE_PER_IMAGE)
    with ShardWriter(output, COCO) as writer:
        _write(writer.staging / "images", partial(_images, pictures), images, IMAGE_FEATURES)
        _write(writer.staging / "people", partial(_people, pictures), people, people_features(COCO.num_keypoints))
        writer.digest.update(f"a crowd of {people} {pictures}".encode())
        writer.counts = {"images": images, "people": people, "usable": people}
        writer.usable_rows = array("i", range(people))
        writer.finish(source={"drawn by": "fpd-accel bench"}, skipped={})
    return Shards(output)


def _write(folder: Path, table: Callable[[np.ndarray], pa.Table], rows: int, features: Features) -> None:
    """Save the tables of all rows as `datasets` would have saved rows that came one by one."""
    cache = folder.with_name("cache.arrow")
    with ArrowWriter(path=str(cache), features=features) as writer:
        for first in track(range(0, rows, ROWS), f"{rows} {folder.name}"):
            own = table(np.arange(first, min(first + ROWS, rows)))
            writer.write_table(own.select(list(features)).cast(features.arrow_schema))
        writer.finalize()
    with quiet_datasets():
        Dataset.from_file(str(cache)).save_to_disk(str(folder))
    cache.unlink()
    for file in folder.glob("*.arrow"):  # unflushed pages would count as memory of the process that reads them
        flush(file)


def _images(pictures: Pictures, rows: np.ndarray) -> pa.Table:
    encoded = _encoded(pictures, PICTURES)
    columns = {
        "id": rows,
        "file_name": [f"{row:012d}.jpg" for row in rows],
        "width": np.full(len(rows), pictures.width),
        "height": np.full(len(rows), pictures.height),
        "bytes": [encoded[row % len(encoded)] for row in rows],
    }
    return pa.table(columns)


@cache
def _encoded(pictures: Pictures, number: int) -> list[bytes]:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (number, 6, 8, 3), dtype=np.uint8)
    size = pictures.width, pictures.height
    drawn = [cv2.resize(small, size, interpolation=cv2.INTER_CUBIC) for small in noise]
    if pictures.grain:  # of brightness alone, like most of the sensor noise in photographs
        shape = (pictures.height, pictures.width, 1)
        drawn = [np.clip(one + generator.normal(0, pictures.grain, shape), 0, 255).astype(np.uint8) for one in drawn]
    return [cv2.imencode(".jpg", picture)[1].tobytes() for picture in drawn]


def _people(pictures: Pictures, rows: np.ndarray) -> pa.Table:
    """Return people whose keypoints are all visible and inside their box, and whose box is inside the image."""
    generator, number, joints = np.random.default_rng(rows[0]), len(rows), COCO.num_keypoints
    width, height = pictures.width * 5 // 16, pictures.height * 2 // 3
    corners = generator.uniform(0, (pictures.width - width, pictures.height - height), (number, 2))
    points = corners[:, None] + generator.uniform(0, (width, height), (number, joints, 2))
    boxes = np.concatenate([corners, np.full((number, 2), (width, height))], axis=1)
    keypoints = np.concatenate([points, np.full((number, joints, 1), 2)], axis=2)
    images = np.floor(rows / PEOPLE_PER_IMAGE).astype(np.int64)
    columns = {
        "id": rows,
        "image_id": images,
        "image_row": images,
        "box": pa.FixedSizeListArray.from_arrays(boxes.astype(np.float32).ravel(), 4),
        "keypoints": pa.FixedSizeListArray.from_arrays(keypoints.astype(np.float32).ravel(), 3 * joints),
        "area": np.full(number, width * height / 2),
        "crowd": np.zeros(number, dtype=bool),
        "score": np.ones(number),
        "exclude_reason": [""] * number,
    }
    return pa.table(columns)
