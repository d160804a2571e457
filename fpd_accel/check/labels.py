"""The annotations of a set of shards as NumPy arrays, read column by column; no image is decoded."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, Shaped

from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.skeleton import Skeleton

Severity = Literal["error", "warning", "information"]
People = Bool[np.ndarray, " person"]
SYSTEMATIC = 0.05  # share of people above which a mistake is taken for one of the conversion, and so for an error


@dataclass(frozen=True)
class Finding:
    """A problem or peculiarity of a dataset that a user should know before training."""

    severity: Severity
    check: str  # stable name of the check
    message: str  # what is wrong, how often, and what to do
    count: int = 0  # number of people, images or joints, whichever the message counts
    people: tuple[int, ...] = ()  # annotation ids of the people concerned


@dataclass(frozen=True, eq=False)
class Labels:
    """The N annotations of a dataset; arrays share their first axis, coordinates are image pixels."""

    skeleton: Skeleton
    ids: Int[np.ndarray, " person"]
    image_ids: Int[np.ndarray, " person"]
    image_rows: Int[np.ndarray, " person"]
    boxes: Float[np.ndarray, "person 4"]  # x, y, width, height
    keypoints: Float[np.ndarray, "person joint 2"]  # x, y
    visibility: Float[np.ndarray, "person joint"]  # 0 unlabelled, 1 hidden, 2 seen; unchecked, so other values occur
    areas: Float[np.ndarray, " person"]  # square pixels
    crowd: People
    exclude_reason: Shaped[np.ndarray, " person"]  # why a person is never cropped; empty for usable people
    widths: Int[np.ndarray, " person"]  # of the person's image
    heights: Int[np.ndarray, " person"]  # of the person's image
    listed_images: Int[np.ndarray, " image"]  # image id of each row of the images

    @cached_property
    def usable(self) -> People:
        """People who are cropped in training and evaluation."""
        return self.exclude_reason == ""

    @cached_property
    def labelled(self) -> Bool[np.ndarray, "person joint"]:
        """Keypoints that training and evaluation use: those of usable people, seen or hidden."""
        return (self.visibility > 0) & self.usable[:, None]

    @cached_property
    def longer_side(self) -> Float[np.ndarray, " person"]:
        """Longer side of each box, at least one pixel: the unit of lengths."""
        return np.maximum(self.boxes[:, 2:].max(axis=1), 1.0)

    def finding(
        self, severity: Severity | None, check: str, chosen: People, message: str, *, among: People | None = None
    ) -> list[Finding]:
        """Return a finding about the chosen people, as a list: empty if none is chosen.

        Without a `severity` it is a warning for a few people, whom annotators got wrong, and an error if the share is
        above `SYSTEMATIC`, which points to the conversion. `{share}` in the message stands for words such as "3 of 98
        people": 98 is the number of people `among` whom they are chosen, by default the usable people.
        """
        count, total = int(chosen.sum()), int((self.usable if among is None else among).sum())
        if not count:
            return []
        severity = severity or ("error" if count > SYSTEMATIC * max(total, 1) else "warning")
        text = message.replace("{share}", f"{count} of {total} {'person' if total == 1 else 'people'}")
        return [Finding(severity, check, text, count, tuple(self.ids[chosen].tolist()))]


def read_labels(shards: Shards) -> Labels:
    """Read the annotations of all people and the sizes of their images.

    Raises:
        DataError: There are no annotations, or a column does not have the shape that skeleton and format require.
    """
    if not len(shards.people):
        raise DataError(f"{shards.path}: images without annotated people: there are no labels to check")
    people, images = shards.people.data, shards.images.data
    joints = shards.skeleton.num_keypoints
    triples = _rows(shards, "keypoints", 3 * joints).reshape(-1, joints, 3)
    image_rows = people.column("image_row").to_numpy()
    if outside := int(((image_rows < 0) | (image_rows >= len(shards.images))).sum()):
        text = f"{outside} people refer to images that do not exist; prepare the dataset again"
        raise DataError(f"{shards.path}: {text}")
    return Labels(
        skeleton=shards.skeleton,
        ids=people.column("id").to_numpy(),
        image_ids=people.column("image_id").to_numpy(),
        image_rows=image_rows,
        boxes=_rows(shards, "box", 4).astype(np.float64),
        keypoints=triples[..., :2].astype(np.float64),
        visibility=triples[..., 2],
        areas=people.column("area").to_numpy().astype(np.float64),
        crowd=people.column("crowd").to_numpy(),
        exclude_reason=people.column("exclude_reason").to_numpy().astype(str),
        widths=images.column("width").to_numpy()[image_rows],
        heights=images.column("height").to_numpy()[image_rows],
        listed_images=images.column("id").to_numpy(),
    )


def _rows(shards: Shards, name: str, length: int) -> np.ndarray:
    """Return a column of lists of equal length as an array (person, length)."""
    column = shards.people.data.column(name)
    flat: np.ndarray = pc.list_flatten(column).to_numpy()
    if len(flat) != length * len(column):
        text = f"column {name!r} does not hold {length} numbers per person; prepare the dataset again"
        raise DataError(f"{shards.path}: {text}")
    return flat.reshape(-1, length)
