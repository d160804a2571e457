"""Numbers that users give: boxes and keypoints are kept, and computed with, in single precision."""

from typing import Any

LARGEST = 1e30  # from which on a sum or product of theirs may be infinite in single precision


def is_finite(value: Any) -> bool:
    """Whether a value of a JSON file is a number that can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
