"""Everything annotated in a set of shards as NumPy arrays, read column by column; no image is touched."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.skeleton import Skeleton

Severity = Literal["error", "warning", "information"]


@dataclass(frozen=True)
class Finding:
    """Something that a person should know of before training, and whom it concerns."""

    severity: Severity
    check: str  # which check found it: a name that stays the same
    message: str  # what is wrong, how often, and what to do
    count: int = 0  # of people, images or joints, whatever the message counts
    people: tuple[int, ...] = ()  # ids of the annotations concerned


@dataclass(frozen=True, eq=False)
class Labels:
    """The N annotations of a dataset; arrays share their first axis, coordinates are image pixels."""

    skeleton: Skeleton
    ids: Int[np.ndarray, " person"]
    image_ids: Int[np.ndarray, " person"]
    image_rows: Int[np.ndarray, " person"]
    boxes: Float[np.ndarray, "person 4"]  # x, y, width, height
    keypoints: Float[np.ndarray, "person joint 2"]
    visibility: Float[np.ndarray, "person joint"]  # 0 unlabelled, 1 hidden, 2 seen, and whatever else is there
    areas: Float[np.ndarray, " person"]
    crowd: Bool[np.ndarray, " person"]
    unused: Shaped[np.ndarray, " person"]  # why a person is never cropped; empty for the usable
    widths: Int[np.ndarray, " person"]  # of the person's image
    heights: Int[np.ndarray, " person"]
    listed_images: Int[np.ndarray, " image"]  # id of each row of the images

    @cached_property
    def usable(self) -> Bool[np.ndarray, " person"]:
        return self.unused == ""

    @cached_property
    def labelled(self) -> Bool[np.ndarray, "person joint"]:
        """Keypoints that training and evaluation look at: those of usable people, seen or hidden."""
        return (self.visibility > 0) & self.usable[:, None]

    @cached_property
    def longer_side(self) -> Float[np.ndarray, " person"]:
        """Of the box, at least one pixel: what lengths are compared with."""
        return np.maximum(self.boxes[:, 2:].max(axis=1), 1.0)

    def finding(
        self,
        severity: Severity,
        check: str,
        chosen: Bool[np.ndarray, " person"],
        message: Callable[[str], str],
        *,
        among: Bool[np.ndarray, " person"] | None = None,
    ) -> list[Finding]:
        """A finding about the people chosen, none if there is nobody; ``message`` is given "3 of 98 people".

        ``among`` are those who could have been chosen, by default the usable.
        """
        count = int(chosen.sum())
        if not count:
            return []
        share = f"{count} of {_people(int((self.usable if among is None else among).sum()))}"
        return [Finding(severity, check, message(share), count, tuple(self.ids[chosen].tolist()))]


def _people(count: int) -> str:
    return "1 person" if count == 1 else f"{count} people"


def read_labels(shards: Shards) -> Labels:
    """The columns of the people and the sizes of their images.

    Raises:
        DataError: nobody is annotated, or a column does not have the shape that the skeleton and the format ask for.
    """
    if not len(shards.people):
        raise DataError(f"{shards.path}: images alone: nobody is annotated, so there are no labels to check")
    people, images = shards.people.data, shards.images.data
    joints = shards.skeleton.num_keypoints
    triples = _rows(shards, people.column("keypoints").chunks, 3 * joints, name="keypoints").reshape(-1, joints, 3)
    image_rows = _column(people, "image_row")
    outside = (image_rows < 0) | (image_rows >= len(shards.images))
    if outside.any():
        raise DataError(
            f"{shards.path}: {int(outside.sum())} people point to images that are not there; prepare the dataset again"
        )
    return Labels(
        skeleton=shards.skeleton,
        ids=_column(people, "id"),
        image_ids=_column(people, "image_id"),
        image_rows=image_rows,
        boxes=_rows(shards, people.column("box").chunks, 4, name="box").astype(np.float64),
        keypoints=triples[..., :2].astype(np.float64),
        visibility=triples[..., 2],
        areas=_column(people, "area").astype(np.float64),
        crowd=_column(people, "crowd"),
        unused=_column(people, "unused").astype(str),
        widths=_column(images, "width")[image_rows],
        heights=_column(images, "height")[image_rows],
        listed_images=_column(images, "id"),
    )


def _column(table: Any, name: str) -> np.ndarray:
    return np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in table.column(name).chunks])


def _rows(shards: Shards, chunks: Iterable[Any], length: int, *, name: str) -> np.ndarray:
    """A column of lists of one length, as an array (row, length)."""
    chunks = list(chunks)
    flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks])
    if len(flat) != length * sum(map(len, chunks)):
        raise DataError(f"{shards.path}: column {name!r} does not hold {length} numbers a person; prepare it again")
    return flat.reshape(-1, length)
