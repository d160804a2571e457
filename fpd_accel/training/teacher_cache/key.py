"""The key of a teacher cache: everything that decides on its content, except for rounding."""

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fpd_accel.config.schema import Data
from fpd_accel.data.shards import Shards
from fpd_accel.files import sha256

FORMAT = 1
CODE = (
    "data/augment.py", "data/batch.py", "data/images.py", "data/shards.py", "data/stream.py",
    "data/teacher_targets.py", "geometry.py", "outputs.py", "skeleton.py", "training/teacher.py",
    "training/teacher_cache/views.py",
)  # fmt: skip
"""Files of this package that decide on crops and outputs, beside all of `models/`."""
PACKAGES = ("torch", "numpy", "opencv-python-headless", "simplejpeg")
"""Libraries whose versions decide on crops, random draws and outputs."""


def cache_key(
    data: Data,
    sources: Sequence[Shards],
    *,
    teacher_digest: str,
    precision: str,
    fp8: bool,
    teacher_stage: str,
    dtype: str,
    seed: int,
    unbiased: bool,
    unlabelled: bool,
) -> dict[str, Any]:
    """Return the key of a cache, as a dictionary for JSON.

    Args:
        data: Crop size, padding and augmentation.
        sources: The datasets, in the order of their records.
        teacher_digest: SHA-256 of the teacher (see `resume.teacher_digest`).
        precision: Of the teacher's forward pass.
        fp8: Whether its linear layers are in float8.
        teacher_stage: `each` keeps all stages, `last` the last.
        dtype: In which the heatmaps are stored.
        seed: Of the augmentation.
        unbiased: Whether crops are aligned by pixel centres (UDP).
        unlabelled: Whether the last source has people without labels.
    """
    return {
        "format": FORMAT,
        "teacher_sha256": teacher_digest,
        "precision": precision,
        "fp8": fp8,
        "teacher_stage": teacher_stage,
        "dtype": dtype,
        "people_sha256": [shards.fingerprint for shards in sources],
        "usable_sha256": [sha256(shards.usable.astype(np.int64).tobytes()) for shards in sources],
        "unlabelled": unlabelled,
        "seed": seed,
        "augment": data.augment.model_dump(mode="json"),
        "box_padding": data.box_padding,
        "input_size": list(data.input_size),
        "unbiased": unbiased,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "code_sha256": code_digest(),
    }


@cache
def code_digest() -> str:
    """Return the SHA-256 of the code that decides on crops and outputs; any change of it makes another cache."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in (*(package / name for name in CODE), *sorted((package / "models").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()
