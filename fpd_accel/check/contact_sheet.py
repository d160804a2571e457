"""A picture of people with their labels, for the mistakes that no statistic shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from fpd_accel.check.labels import Finding, Labels
from fpd_accel.console import track
from fpd_accel.data.images import decode_image
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.geometry import box_to_region, crop_matrix, transform_points
from fpd_accel.skeleton import Skeleton
from fpd_accel.visualize import draw_skeleton, keypoint_colors

CELL = (288, 216)  # (height, width) of a person, pixels
CAPTION = 32  # height of the caption below a person, pixels
COLUMNS, ROWS = 6, 4
PADDING = 1.5  # factor on the box, to show its surroundings
MARGIN = 8  # pixels
FONT, TEXT, LINE = cv2.FONT_HERSHEY_SIMPLEX, 0.4, 18
OUTSIDE = (110, 110, 110)  # RGB colour outside the image
EXPLANATION = "warm colours: the person's left; cool: right; green: neither; black centre: hidden; white: the box"


def choose_people(labels: Labels, findings: Sequence[Finding], *, count: int = COLUMNS * ROWS) -> dict[int, str]:
    """Choose up to `count` usable people: a third from the findings in turn, the others evenly spaced.

    Returns:
        The check that found each person, or an empty text, by the person's row in the shards.
    """
    usable = np.flatnonzero(labels.usable)
    row_of = dict(zip(labels.ids[usable].tolist(), usable.tolist(), strict=True))
    queues = [[(row_of[i], f.check) for i in f.people if i in row_of][: count // 3] for f in findings]
    in_turns = [queue[turn] for turn in range(count // 3) for queue in queues if turn < len(queue)]
    chosen: dict[int, str] = {}
    for row, check in in_turns:
        if len(chosen) < count // 3:
            chosen.setdefault(row, check)
    others = usable[~np.isin(usable, list(chosen))]
    places = np.linspace(0, len(others) - 1, min(count - len(chosen), len(others))).round().astype(int)
    return chosen | dict.fromkeys(others[places].tolist(), "")


def contact_sheet(shards: Shards, labels: Labels, chosen: Mapping[int, str]) -> UInt8[np.ndarray, "height width 3"]:
    """Draw the chosen people with box, skeleton, annotation id and number of keypoints, below a legend of the joints.

    Raises:
        DataError: An image no longer decodes.
    """
    cells = [_cell(shards, labels, row, chosen[row]) for row in track(chosen, "drawing people", total=len(chosen))]
    blank = np.full((CELL[0] + CAPTION, CELL[1], 3), 255, np.uint8)
    cells += [blank] * (-len(cells) % COLUMNS)
    lines = [np.concatenate(cells[start : start + COLUMNS], axis=1) for start in range(0, len(cells), COLUMNS)]
    title = f"{Path(shards.path).name}: {len(chosen)} of {int(labels.usable.sum())} usable people. {EXPLANATION}"
    return np.concatenate([_legend(shards.skeleton, title, COLUMNS * CELL[1]), *lines], axis=0)


def _cell(shards: Shards, labels: Labels, row: int, check: str) -> UInt8[np.ndarray, "height width 3"]:
    picture = shards.images[int(labels.image_rows[row])]
    pixels = decode_image(picture["bytes"])
    if pixels is None:
        raise DataError(f"{shards.path}: image {picture['file_name']} no longer decodes; prepare the dataset again")
    box = shards.box_to_crop(labels.boxes[row], width=int(labels.widths[row]), height=int(labels.heights[row]))
    center, size = box_to_region(box, CELL, padding=PADDING)
    matrix = crop_matrix(center, float(size[0]), CELL)
    crop = cv2.warpAffine(pixels, matrix, CELL[::-1], flags=cv2.INTER_LINEAR, borderValue=OUTSIDE)
    x, y, width, height = labels.boxes[row]
    first, last = _whole(transform_points(matrix, np.array([[x, y], [x + width, y + height]])))
    cv2.rectangle(crop, first, last, (255, 255, 255), 1, cv2.LINE_AA)
    points, labelled = transform_points(matrix, labels.keypoints[row]), labels.labelled[row]
    crop = draw_skeleton(crop, points, labelled, shards.skeleton)
    for place in _whole(points[labelled & (labels.visibility[row] == 1)]):
        cv2.circle(crop, place, 1, (0, 0, 0), -1, cv2.LINE_AA)
    crop[:, -2:] = 255  # a gap between neighbours
    caption = np.full((CAPTION, CELL[1], 3), 255, np.uint8)
    _write(caption, f"{labels.ids[row]}: {labelled.sum()}/{len(labelled)} keypoints", (4, 13))
    _write(caption, check, (4, 27), color=(200, 0, 0))
    return np.concatenate([crop, caption], axis=0)


def _whole(points: np.ndarray) -> list[list[int]]:
    """Round points to whole pixels, within what OpenCV can draw."""
    return np.rint(np.clip(points, -1e4, 1e4)).astype(int).tolist()


def _legend(skeleton: Skeleton, title: str, width: int) -> UInt8[np.ndarray, "height width 3"]:
    widest = max(cv2.getTextSize(_ascii(name), FONT, TEXT, 1)[0][0] for name in skeleton.keypoints)
    column = widest + 3 * MARGIN + 10
    across = max(1, (width - MARGIN) // column)
    height = LINE * (1 + -(-skeleton.num_keypoints // across)) + 2 * MARGIN
    canvas = np.full((height, width, 3), 255, np.uint8)
    _write(canvas, title, (MARGIN, LINE))
    for number, (name, color) in enumerate(zip(skeleton.keypoints, keypoint_colors(skeleton), strict=True)):
        line, place = divmod(number, across)
        x, y = MARGIN + place * column, LINE * (line + 2)
        cv2.circle(canvas, (x + 5, y - 4), 5, color, -1, cv2.LINE_AA)
        _write(canvas, name, (x + 14, y))
    return canvas


def _write(canvas: np.ndarray, text: str, place: tuple[int, int], *, color: tuple[int, int, int] = (0, 0, 0)) -> None:
    cv2.putText(canvas, _ascii(text), place, FONT, TEXT, color, 1, cv2.LINE_AA)


def _ascii(text: str) -> str:
    """Replace characters that OpenCV's fonts lack."""
    return text.encode("ascii", "replace").decode()
