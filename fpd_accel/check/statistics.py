"""Statistics of a dataset: numbers of images and people, their sizes, and the visibility of keypoints."""

from typing import Any

import numpy as np

from fpd_accel.check.labels import Labels
from fpd_accel.check.skeleton_rules import sigma_source
from fpd_accel.data.shards import Shards

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LEVEL_NAMES = ("min", "5 %", "25 %", "median", "75 %", "95 %", "max")
SIZES = {"small": 32.0**2, "medium": 96.0**2}  # largest areas of COCO's size classes, square pixels
GROUPS = (0, 1, 2, 3, 6, 11)  # smallest number of people per image of each group of images


def count_all(shards: Shards, labels: Labels) -> dict[str, Any]:
    """Return the numbers of images, people and usable people, of unusable people by reason, and of what was skipped."""
    reasons, numbers = np.unique(labels.exclude_reason[~labels.usable], return_counts=True)
    return {
        "images": len(labels.listed_images),
        "people": len(labels.ids),
        "usable": int(labels.usable.sum()),
        "unusable": dict(zip(reasons.tolist(), numbers.tolist(), strict=True)),
        "skipped": dict(shards.description.get("skipped", {})),
    }


def people_per_image(labels: Labels) -> np.ndarray:
    """Return the number of usable people of each image."""
    return np.bincount(labels.image_rows[labels.usable], minlength=len(labels.listed_images))


def images_by_people(labels: Labels) -> dict[str, int]:
    """Return the numbers of images by their number of usable people: `{"0": 3, "1": 17, …, "11+": 2}`."""
    counts = people_per_image(labels)
    groups = {}
    for first, after in zip(GROUPS, (*GROUPS[1:], None), strict=True):
        name = f"{first}+" if after is None else str(first) if after == first + 1 else f"{first}-{after - 1}"
        groups[name] = int(((counts >= first) & (True if after is None else counts < after)).sum())
    return groups


def sizes(labels: Labels) -> dict[str, int]:
    """Return the numbers of usable people by COCO's size class, which the annotated area decides."""
    areas = labels.areas[labels.usable]
    small, medium = (int((areas <= limit).sum()) for limit in SIZES.values())
    return {"small": small, "medium": medium - small, "large": len(areas) - medium}


def quantiles(labels: Labels) -> dict[str, list[float]]:
    """Return the quantiles at `LEVELS` of each size of usable people, in pixels and square pixels."""
    usable = labels.usable
    width, height = labels.boxes[usable, 2], labels.boxes[usable, 3]
    area = labels.areas[usable]
    rows = np.unique(labels.image_rows, return_index=True)[1]  # one person of each image
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
    """Return for each joint how many usable people have it seen, hidden or unlabelled, and its sigma."""
    states = labels.visibility[labels.usable]
    skeleton = labels.skeleton
    return [
        {
            "name": name,
            "seen": int((states[:, k] == 2).sum()),
            "hidden": int((states[:, k] == 1).sum()),
            "unlabelled": int((states[:, k] == 0).sum()),
            "flips_with": skeleton.flip_partner.get(name),
            "sigma": skeleton.sigmas[k],
            "sigma_source": sigma_source(skeleton, name),
        }
        for k, name in enumerate(skeleton.keypoints)
    ]
