"""Numbers that users give: boxes and keypoints are kept, and computed with, in single precision."""

from typing import Any

LARGEST = 1e30  # far below the largest of them: regions with their padding and scale stay finite


def is_usable(value: Any) -> bool:
    """Whether a value of a JSON file is a number, finite and not larger than can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
