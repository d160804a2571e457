"""Shards of any number of people, from a few small pictures: to measure, not to learn.

Laid out as ``fpd-accel prepare`` does it, but written table by table: a million people in seconds, not a minute.
"""

import math
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter

from fpd_accel.data.shards import IMAGE_FEATURES, Shards, ShardWriter, people_features, quiet_datasets
from fpd_accel.errors import DataError
from fpd_accel.log import say, track
from fpd_accel.skeleton import COCO

HEIGHT, WIDTH = 120, 160  # pixels of a picture
PICTURES = 64  # different ones; each image has its own row and its own bytes in it all the same
PEOPLE_PER_IMAGE = 2.5  # as in COCO's training images
ROWS = 10_000  # written at a time
BYTES_PER_PERSON = 5000  # on the disk while shards are written, twice what they take in the end


def draw_crowd(folder: Path, people: int) -> Shards:
    """Shards of ``people`` usable people in ``folder``, as they were left there or written now.

    Raises:
        DataError: the folder cannot be made, or there is no room in it.
    """
    output = folder / f"people_{people}"
    if (output / "dataset.json").is_file():
        return Shards(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}; choose another --cache") from None
    if free < people * BYTES_PER_PERSON:
        raise DataError(
            f"{folder}: {people} people need {people * BYTES_PER_PERSON / 1e9:.1f} GB, but {free / 1e9:.1f} are free; "
            "choose another --cache, or a lower --people"
        )
    say(f"writing shards of {people} people into {output}")
    images = math.ceil(people / PEOPLE_PER_IMAGE)
    with ShardWriter(output, COCO) as writer:
        _write(writer.staging / "images", _images, images, IMAGE_FEATURES)
        _write(writer.staging / "people", _people, people, people_features(COCO.num_keypoints))
        writer.digest.update(f"a crowd of {people}".encode())
        writer.counts = {"images": images, "people": people, "usable": people}
        writer.finish(source={"drawn by": "fpd-accel bench"}, skipped={})
    return Shards(output)


def _write(folder: Path, table: Callable[[np.ndarray], pa.Table], rows: int, features: Features) -> None:
    """Tables of rows, and of them what the library would save of rows that came one by one."""
    cache = folder.with_name("cache.arrow")
    with ArrowWriter(path=str(cache), features=features) as writer:
        for first in track(range(0, rows, ROWS), f"{rows} {folder.name}"):
            own = table(np.arange(first, min(first + ROWS, rows)))
            writer.write_table(own.select(list(features)).cast(features.arrow_schema))
        writer.finalize()
    with quiet_datasets():
        Dataset.from_file(str(cache)).save_to_disk(str(folder))
    cache.unlink()
    for file in folder.glob("*.arrow"):  # until then its pages would be counted as memory of whoever reads them
        with file.open("rb") as written:
            os.fsync(written.fileno())


def _images(rows: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "id": rows,
            "file_name": [f"{row:012d}.jpg" for row in rows],
            "width": np.full(len(rows), WIDTH),
            "height": np.full(len(rows), HEIGHT),
            "bytes": [_pictures()[row % PICTURES] for row in rows],
        }
    )


@cache
def _pictures() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (PICTURES, 6, 8, 3), dtype=np.uint8)
    pictures = [cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) for small in noise]
    return [cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures]


def _people(rows: np.ndarray) -> pa.Table:
    """Everybody's keypoints are visible and in the box, which is in the picture."""
    generator = np.random.default_rng(rows[0])
    number, joints = len(rows), COCO.num_keypoints
    width, height = 50, 80  # pixels
    corners = generator.uniform(0, (WIDTH - width, HEIGHT - height), (number, 2))
    points = corners[:, None] + generator.uniform(0, (width, height), (number, joints, 2))
    boxes = np.concatenate([corners, np.full((number, 2), (width, height))], axis=1)
    keypoints = np.concatenate([points, np.full((number, joints, 1), 2)], axis=2)
    images = np.floor(rows / PEOPLE_PER_IMAGE).astype(np.int64)
    return pa.table(
        {
            "id": rows,
            "image_id": images,
            "image_row": images,
            "box": pa.FixedSizeListArray.from_arrays(boxes.astype(np.float32).ravel(), 4),
            "keypoints": pa.FixedSizeListArray.from_arrays(keypoints.astype(np.float32).ravel(), 3 * joints),
            "area": np.full(number, 2000.0),
            "crowd": np.zeros(number, dtype=bool),
            "score": np.ones(number),
            "unused": [""] * number,
        }
    )
