"""Shards of any number of people, written in the ordinary way from a few small pictures: to measure, not to learn."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fpd_accel.data.shards import Shards, ShardWriter
from fpd_accel.errors import DataError
from fpd_accel.log import say, track
from fpd_accel.skeleton import COCO

HEIGHT, WIDTH = 120, 160  # pixels of a picture
PICTURES = 64  # different ones; each image has its own row and its own bytes in it all the same
PEOPLE_PER_IMAGE = 2.5  # as in COCO's training images
BYTES_PER_PERSON = 2500  # on the disk while shards are written, twice what they take in the end


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
    images = int(-(-people // PEOPLE_PER_IMAGE))
    with ShardWriter(output, COCO) as writer:
        writer.write_images(track(_images(images), f"{images} images", total=images))
        writer.write_people(track(_people(people), f"{people} people", total=people))
        writer.finish(source={"drawn by": "fpd-accel bench"}, skipped={})
    for file in output.rglob("*.arrow"):  # until then its pages would be counted as memory of whoever reads them
        with file.open("rb") as written:
            os.fsync(written.fileno())
    return Shards(output)


def _images(number: int) -> Iterator[dict[str, Any]]:
    noise = np.random.default_rng(0).integers(0, 256, (PICTURES, 12, 16, 3), dtype=np.uint8)
    pictures = [cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) for small in noise]
    encoded = [cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures]
    for row in range(number):
        name = f"{row:012d}.jpg"
        yield {"id": row, "file_name": name, "width": WIDTH, "height": HEIGHT, "bytes": encoded[row % PICTURES]}


def _people(number: int) -> Iterator[dict[str, Any]]:
    generator = np.random.default_rng(1)
    places = generator.uniform(0, 1, (PICTURES, 2)).astype(np.float32) * np.array([WIDTH - 60, HEIGHT - 90], np.float32)
    boxes = np.concatenate([places, np.full((PICTURES, 2), (50, 80), np.float32)], axis=1)
    inside = generator.uniform(0, 1, (PICTURES, COCO.num_keypoints, 2)).astype(np.float32)
    points = boxes[:, None, :2] + inside * boxes[:, None, 2:]
    keypoints = np.concatenate([points, np.full((*points.shape[:2], 1), 2, np.float32)], axis=2).reshape(PICTURES, -1)
    for row in range(number):
        image, which = int(row // PEOPLE_PER_IMAGE), row % PICTURES
        yield {
            "id": row, "image_id": image, "image_row": image, "box": boxes[which], "keypoints": keypoints[which],
            "area": 2000.0, "crowd": False, "score": 1.0, "unused": "",
        }  # fmt: skip
