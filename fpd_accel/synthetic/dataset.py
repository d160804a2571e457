"""Synthetic datasets in COCO keypoint format, for first trials without a download and for tests.

Image `index` is a pure function of (seed, index): its generator is Philox keyed by both (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011), so that any number of processes draws the same bytes in any order. Left
and right can be told apart as with real people, by face, feet and bent joints; they are not marked.
"""

import json
import os
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Integer

from fpd_accel.errors import DataError
from fpd_accel.files import staged_folder
from fpd_accel.skeleton import COCO
from fpd_accel.synthetic.body import JOINTS
from fpd_accel.synthetic.clothing import REGIONS, REGIONS_AT, DrawnPerson
from fpd_accel.synthetic.rendering import Picture
from fpd_accel.synthetic.scene import inside_image, paint_scene, photograph, plan_scene

IMAGE_SIZE = (240, 320)  # (height, width), pixels
MIN_SIDE = 64  # pixels; joints in smaller images are indistinguishable


class SyntheticPerson(NamedTuple):
    """The ground truth of one person in an image."""

    keypoints: Float[np.ndarray, "17 3"]  # x, y in pixels; 0 outside the image (x = y = 0), 1 hidden, 2 visible
    box: tuple[int, int, int, int]  # x, y, width, height of the visible silhouette, pixels
    area: int  # pixels of that silhouette


def draw_image(
    seed: int, index: int, *, image_size: tuple[int, int] = IMAGE_SIZE, people: tuple[int, int] = (1, 3)
) -> tuple[Picture, list[SyntheticPerson]]:
    """Return image `index` of `seed` (RGB), and the people in it from far to near.

    `seed` and `index` are from 0 to 2^64 - 1, `image_size` is (height, width) in pixels, each at least 64, and `people`
    the lowest and highest number of people, at least 1.

    Raises:
        DataError: An argument is out of range.
    """
    _check_drawing(seed, index, image_size, people)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    placed = plan_scene(rng, image_size, people)
    canvas = paint_scene(rng, placed, image_size)
    people_drawn = ((place, thing.person) for place, thing in enumerate(placed) if thing.person is not None)
    truth = [_describe(person, canvas.owner - place * REGIONS) for place, person in people_drawn]
    return photograph(rng, canvas.planes), truth


def draw_dataset(
    output: Path,
    *,
    images: int,
    seed: int,
    image_size: tuple[int, int] = IMAGE_SIZE,
    people: tuple[int, int] = (1, 3),
    quality: int = 90,
    workers: int = 0,
) -> Path:
    """Write `output/images/000000000001.jpg` … and `output/person_keypoints.json` (COCO format); return `output`.

    The folder appears complete or not at all. `seed`, `image_size` and `people` are those of `draw_image`, `quality`
    is JPEG's, 1 to 100, and `workers` are additional processes that draw (0: draw in this process).

    Raises:
        DataError: `output` exists, or an argument is out of range.
    """
    output = Path(output)
    _check_drawing(seed, 0, image_size, people)
    if images < 1 or not 1 <= quality <= 100 or workers < 0:
        wanted = "give at least 1 image, quality 1 to 100, and 0 workers or more"
        raise DataError(f"{output}: images={images}, quality={quality}, workers={workers}: out of range; {wanted}")
    if output.exists():
        raise DataError(f"{output}: exists already; delete it or choose another output folder")
    draw = partial(_draw_file, seed, image_size=image_size, people=people, quality=quality)
    with staged_folder(output, own=str(os.getpid())) as temporary:
        (temporary / "images").mkdir()
        truth: list[list[SyntheticPerson]] = []
        # Closing the generator stops the other processes at once, also after an exception.
        with closing(_draw_all(draw, images, workers)) as drawn:
            for jpeg, people_drawn in drawn:
                truth.append(people_drawn)
                (temporary / "images" / f"{len(truth):012d}.jpg").write_bytes(jpeg)
        document = _coco_document(truth, seed, image_size)
        (temporary / "person_keypoints.json").write_text(json.dumps(document), encoding="utf-8")
    return output


def _check_drawing(seed: int, index: int, image_size: tuple[int, int], people: tuple[int, int]) -> None:
    if not 0 <= seed < 2**64 or not 0 <= index < 2**64:
        raise DataError(f"seed {seed}, index {index}: must be whole numbers from 0 to 2^64 - 1; choose others")
    if min(image_size) < MIN_SIDE:
        raise DataError(f"image size {image_size}: too small to draw people; give at least {MIN_SIDE} pixels per side")
    if not 1 <= people[0] <= people[1]:
        raise DataError(f"people {people}: must be (fewest, most) with 1 <= fewest <= most")


def _describe(person: DrawnPerson, regions: Integer[np.ndarray, "height width"]) -> SyntheticPerson:
    """Return the ground truth of a person; `regions` has its region (1 to REGIONS - 1) at each pixel that shows it."""
    height, width = regions.shape
    keypoints = np.zeros((len(JOINTS), 3))
    for joint in np.flatnonzero(inside_image(person.keypoints, (height, width))):
        column, row = np.rint(person.keypoints[joint]).astype(int)
        seen = not person.turned_away[joint] and regions[row, column] in REGIONS_AT[JOINTS[joint]]
        keypoints[joint] = (*person.keypoints[joint], 2 if seen else 1)
    visible = ((regions > 0) & (regions < REGIONS)).astype(np.uint8)
    x, y, width, height = cv2.boundingRect(visible)
    return SyntheticPerson(keypoints, (x, y, width, height), int(visible.sum()))


def _draw_file(
    seed: int, index: int, *, image_size: tuple[int, int], people: tuple[int, int], quality: int
) -> tuple[bytes, list[SyntheticPerson]]:
    """Return an image as the bytes of a JPEG file, and the people in it."""
    image, truth = draw_image(seed, index, image_size=image_size, people=people)
    encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return encoded.tobytes(), truth


def _draw_all(
    draw: Callable[[int], tuple[bytes, list[SyntheticPerson]]], images: int, workers: int
) -> Generator[tuple[bytes, list[SyntheticPerson]], None, None]:
    """Yield all images in order, drawn by this or by other processes."""
    if workers == 0:
        yield from map(draw, range(images))
        return
    # No fork of this process, which would copy locks held by threads of PyTorch, OpenCV or a progress bar. A fork
    # server imports the package once for all workers; without one each worker imports it.
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    context.set_forkserver_preload(["__main__", __name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(0,))
    try:
        yield from pool.map(draw, range(images), chunksize=min(32, -(-images // workers)))
    finally:
        pool.shutdown(cancel_futures=True)


def _coco_document(truth: list[list[SyntheticPerson]], seed: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the content of the annotation file in COCO's format; ids count from 1."""
    height, width = image_size
    category = {"id": 1, "name": "person", "supercategory": "person", "keypoints": list(JOINTS)}
    annotations: list[dict[str, Any]] = []
    for image_id, people in enumerate(truth, start=1):
        for person in people:
            triples = [(round(x, 2), round(y, 2), int(seen)) for x, y, seen in person.keypoints.tolist()]
            entry = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": list(person.box),
                "area": person.area,
                "num_keypoints": int((person.keypoints[:, 2] > 0).sum()),
                "keypoints": list(sum(triples, ())),
            }
            annotations.append(entry)
    return {
        "info": {"description": "Synthetic people", "version": "1", "seed": seed, "contributor": "fpd_accel"},
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": [
            {"id": image_id, "file_name": f"{image_id:012d}.jpg", "width": width, "height": height, "license": 1}
            for image_id in range(1, len(truth) + 1)
        ],
        "annotations": annotations,
        "categories": [category | {"skeleton": [[a + 1, b + 1] for a, b in COCO.limb_indices]}],
    }
