"""Numbers about a dataset that are neither right nor wrong: how many, how large, how visible."""

from typing import Any

import numpy as np

from fpd_accel.check.anatomy import sigma_source
from fpd_accel.check.labels import Labels
from fpd_accel.data.shards import Shards

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LEVEL_NAMES = ("min", "5 %", "25 %", "median", "75 %", "95 %", "max")
SIZES = {"small": 32.0**2, "medium": 96.0**2}  # areas up to which a person is that for COCO, square pixels
CROWDED = (0, 1, 2, 3, 6, 11)  # people per image from which a group of images is counted


def count_all(shards: Shards, labels: Labels) -> dict[str, Any]:
    """Images, people, who of them is usable and why not, and what was skipped before."""
    reasons, numbers = np.unique(labels.unused[~labels.usable], return_counts=True)
    return {
        "images": len(labels.listed_images),
        "people": len(labels.ids),
        "usable": int(labels.usable.sum()),
        "unusable": dict(zip(reasons.tolist(), numbers.tolist(), strict=True)),
        "skipped": dict(shards.description.get("skipped", {})),
    }


def people_per_image(labels: Labels) -> np.ndarray:
    """Usable people of each image."""
    return np.bincount(labels.image_rows[labels.usable], minlength=len(labels.listed_images))


def crowding(labels: Labels) -> dict[str, int]:
    """Images by their number of usable people: ``{"0": 3, "1": 17, …, "11+": 2}``."""
    counts = people_per_image(labels)
    named = {}
    for first, after in zip(CROWDED, (*CROWDED[1:], None), strict=True):
        name = f"{first}+" if after is None else str(first) if after == first + 1 else f"{first}-{after - 1}"
        named[name] = int(((counts >= first) & (True if after is None else counts < after)).sum())
    return named


def sizes(labels: Labels) -> dict[str, int]:
    """Usable people by the sizes of COCO's evaluation, which takes the annotated area."""
    areas = labels.areas[labels.usable]
    small, medium = (int((areas <= limit).sum()) for limit in SIZES.values())
    return {"small": small, "medium": medium - small, "large": len(areas) - medium}


def quantiles(labels: Labels) -> dict[str, list[float]]:
    """The levels of :data:`LEVELS` of what has a size; pixels and square pixels, usable people alone."""
    usable = labels.usable
    width, height = labels.boxes[usable, 2], labels.boxes[usable, 3]
    area = labels.areas[usable]
    rows = np.unique(labels.image_rows, return_index=True)[1]  # a person of each image
    measured = {
        "people per image": people_per_image(labels),
        "labelled keypoints per person": labels.labelled[usable].sum(axis=1),
        "box width": width,
        "box height": height,
        "box area": width * height,
        "person area": area,
        "person area / box area": area / np.maximum(width * height, 1),
        "image width": labels.widths[rows],
        "image height": labels.heights[rows],
    }
    return {name: np.quantile(values, LEVELS).tolist() for name, values in measured.items() if len(values)}


def visibility(labels: Labels) -> list[dict[str, Any]]:
    """For each joint how many usable people show, hide or lack it, and its sigma."""
    states = labels.visibility[labels.usable]
    skeleton = labels.skeleton
    partner = {a: b for pair in skeleton.flip_pairs for a, b in (pair, pair[::-1])}
    return [
        {
            "name": name,
            "seen": int((states[:, k] == 2).sum()),
            "hidden": int((states[:, k] == 1).sum()),
            "unlabelled": int((states[:, k] == 0).sum()),
            "flips_with": partner.get(name),
            "sigma": skeleton.sigmas[k],
            "sigma_source": sigma_source(skeleton, name),
        }
        for k, name in enumerate(skeleton.keypoints)
    ]
