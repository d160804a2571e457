"""Several datasets trained on as one: the dataset of each labelled sample is a pure function of its number."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.files import sha256
from fpd_accel.skeleton import Skeleton


@dataclass(frozen=True)
class Mixture:
    """An ordered mixture of datasets with the same keypoints, each with a share of the labelled samples.

    All else of the skeleton, such as limbs and sigmas, is that of the first dataset.

    Raises:
        DataError: The keypoints, their order or their flip pairs differ.
    """

    datasets: tuple[Shards, ...]
    # Relative shares of the samples. None: the numbers of people, so that each comes once in `len(self)` samples.
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for shards in self.datasets[1:]:
            if difference := _skeleton_difference(self.skeleton, shards.skeleton):
                raise DataError(
                    f"{shards.path}: cannot be mixed with {self.datasets[0].path}: {difference}; prepare both with the "
                    "same skeleton"
                )

    def __len__(self) -> int:
        """Return the number of labelled people, which is the number of labelled samples in an epoch."""
        return sum(map(len, self.datasets))

    @property
    def skeleton(self) -> Skeleton:
        """The skeleton of the first dataset."""
        return self.datasets[0].skeleton

    @property
    def path(self) -> str:
        """The paths of all datasets, for messages."""
        return " + ".join(str(shards.path) for shards in self.datasets)

    def open(self) -> None:
        """Map the files of all datasets."""
        for shards in self.datasets:
            shards.open()

    def changed(self) -> str | None:
        """Return a message if a file was replaced or removed since it was opened, else None."""
        return next(filter(None, (shards.changed() for shards in self.datasets)), None)

    @property
    def has_head_sizes(self) -> bool:
        """Whether all datasets have head sizes, which PCKh needs."""
        return all(shards.has_head_sizes for shards in self.datasets)

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """The weights as coprime integers: the samples of each dataset among the first `sum(parts)`."""
        weights = self.weights if self.weights is not None else tuple(map(len, self.datasets))
        exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.1 is exactly a tenth, unlike the float
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        return tuple(weight // math.gcd(*whole) for weight in whole)

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the dataset of a labelled sample, and the sample's number within that dataset.

        The datasets are split off one after the other: of the remaining samples, a dataset gets sample k if floor(share
        * k) rises from k to k + 1. Integer arithmetic makes the parts exact in every `sum(parts)` samples; in any range
        of samples a dataset's share is exact to within as many samples as there are datasets.
        """
        left = sum(self.parts)
        for number, part in enumerate(self.parts[:-1]):
            before, after = sample * part // left, (sample + 1) * part // left
            if after > before:
                return number, before
            sample, left = sample - before, left - part
        return len(self.parts) - 1, sample

    @property
    def identities(self) -> list[dict[str, Any]]:
        """The content and the part of each dataset, on which the samples depend, and its path for messages."""
        return [
            {"path": str(shards.path), "sha256": shards.fingerprint, "part": part}
            for shards, part in zip(self.datasets, self.parts, strict=True)
        ]

    @property
    def fingerprint(self) -> str:
        """A SHA-256 that is equal for mixtures with the same samples; a single dataset's own fingerprint."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint
        return sha256(" ".join(f"{identity['sha256']} x {identity['part']}" for identity in self.identities))

    def __str__(self) -> str:
        """Return the number of people and, for several datasets, the number and share of each."""
        if len(self.datasets) == 1:
            return str(len(self))
        parts = zip(self.datasets, self.parts, strict=True)
        listed = (f"{len(shards)} from {shards.path} ({part / sum(self.parts):.1%})" for shards, part in parts)
        return f"{len(self)}: {', '.join(listed)}"


def as_mixture(people: Shards | Mixture) -> Mixture:
    """Return the mixture itself, or a mixture of the one dataset."""
    return people if isinstance(people, Mixture) else Mixture((people,))


def _skeleton_difference(first: Skeleton, other: Skeleton) -> str | None:
    """Return how the keypoints of two skeletons differ, or None if they are interchangeable."""
    if first.num_keypoints != other.num_keypoints:
        return f"it has {other.num_keypoints} keypoints, not {first.num_keypoints}"
    for number, (expected, found) in enumerate(zip(first.keypoints, other.keypoints, strict=True), start=1):
        if expected != found:
            return f"keypoint {number} of {first.num_keypoints} is {found!r}, not {expected!r}"
    for name, ours, theirs in zip(first.keypoints, first.flip_index, other.flip_index, strict=True):
        if ours != theirs:
            return f"mirroring turns {name!r} into {first.keypoints[theirs]!r}, not {first.keypoints[ours]!r}"
    return None
