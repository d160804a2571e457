"""What a cache of a teacher's outputs is named after: everything that decides what is in it, but for rounding."""

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fpd_accel.config import Recipe, TeacherCache
from fpd_accel.data.shards import Shards

FORMAT = 1
CODE = (  # of this package, whose text decides on crops and outputs, as models/ does
    "augment.py", "data/batch.py", "data/images.py", "data/lessons.py", "data/shards.py", "data/stream.py",
    "data/views.py", "fold.py", "fp8.py", "geometry.py", "outputs.py", "skeleton.py", "teacher.py",
)  # fmt: skip
# Libraries whose versions decide on crops, draws and outputs.
PACKAGES = ("torch", "numpy", "opencv-python-headless", "simplejpeg")


def cache_key(
    recipe: Recipe, options: TeacherCache, teacher_digest: str, sources: Sequence[Shards], *, unlabelled: bool
) -> dict[str, Any]:
    """For JSON. ``unlabelled``: the last of the sources has people without labels."""
    return {
        "format": FORMAT,
        "teacher_sha256": teacher_digest,
        "precision": recipe.train.precision,
        "fp8": recipe.teacher.fp8,
        "teacher_stage": recipe.distill.teacher_stage,
        "dtype": options.dtype,
        "people_sha256": [shards.fingerprint for shards in sources],
        "usable_sha256": [hashlib.sha256(shards.usable.astype(np.int64).tobytes()).hexdigest() for shards in sources],
        "unlabelled": unlabelled,
        "seed": recipe.run.seed,
        "augment": recipe.data.augment.model_dump(mode="json"),
        "box_padding": recipe.data.box_padding,
        "input_size": list(recipe.data.input_size),
        "unbiased": recipe.codec.name == "udp",
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "code_sha256": code_digest(),
    }


@cache
def code_digest() -> str:
    """SHA-256 of what in this package decides on crops and outputs: whoever changes it asks the teacher anew."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (*(package / name for name in CODE), *sorted((package / "models").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()
