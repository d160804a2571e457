"""Several datasets trained on as one: which of them a labelled sample is from, as a pure function of its number."""

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.skeleton import Skeleton


@dataclass(frozen=True)
class Mixture:
    """Datasets of the same keypoints, in an order that counts, each with its part of the labelled samples.

    ``weights`` are relative; None: the people of each, so that everybody comes once in ``len(self)`` samples. What else
    a skeleton says than keypoints and flip pairs is taken from the first.

    Raises:
        DataError: the keypoints, their order or their flip pairs differ.
    """

    datasets: tuple[Shards, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for shards in self.datasets[1:]:
            difference = _difference(self.skeleton, shards.skeleton)
            if difference is not None:
                raise DataError(
                    f"{shards.path}: cannot be mixed with {self.datasets[0].path}: {difference}; prepare both with the "
                    "same skeleton"
                )

    def __len__(self) -> int:
        """Labelled people, and so the labelled samples of an epoch."""
        return sum(map(len, self.datasets))

    @property
    def skeleton(self) -> Skeleton:
        return self.datasets[0].skeleton

    @property
    def path(self) -> str:
        """Where all of them are, for messages."""
        return " + ".join(str(shards.path) for shards in self.datasets)

    def open(self) -> None:
        """Map the files of all of them."""
        for shards in self.datasets:
            shards.open()

    def changed(self) -> str | None:
        """The first file that is no longer the one that was opened, if any."""
        return next(filter(None, (shards.changed() for shards in self.datasets)), None)

    @property
    def has_head_sizes(self) -> bool:
        return all(shards.has_head_sizes for shards in self.datasets)

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """The weights as the smallest integers: of the first ``sum(parts)`` samples each dataset has so many."""
        weights = self.weights if self.weights is not None else tuple(map(len, self.datasets))
        exact = [Fraction(str(weight)) for weight in weights]  # as it is written: 0.1 is a tenth, which no float is
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        return tuple(weight // math.gcd(*whole) for weight in whole)

    def locate(self, sample: int) -> tuple[int, int]:
        """The dataset that labelled sample ``sample`` is from, and its number among the samples of that dataset.

        Dataset after dataset is split off from those that follow it: it has sample k of what is left if floor(share *
        k) rises from k to k + 1. Integers, so that ``sum(parts)`` samples have exactly their parts; in any stretch a
        dataset has its share to within as many samples as there are datasets.
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
        """What has to stay for samples to be the same: of each dataset content and part; the path is for messages."""
        return [
            {"path": str(shards.path), "sha256": shards.fingerprint, "part": part}
            for shards, part in zip(self.datasets, self.parts, strict=True)
        ]

    @property
    def fingerprint(self) -> str:
        """SHA-256 that two mixtures share if they give the same samples; of one dataset its own."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint
        content = " ".join(f"{identity['sha256']} x {identity['part']}" for identity in self.identities)
        return hashlib.sha256(content.encode()).hexdigest()

    def __str__(self) -> str:
        """How many people there are, and of several datasets where they are from and what part they have."""
        if len(self.datasets) == 1:
            return str(len(self))
        parts = zip(self.datasets, self.parts, strict=True)
        listed = (f"{len(shards)} from {shards.path} ({part / sum(self.parts):.1%})" for shards, part in parts)
        return f"{len(self)}: {', '.join(listed)}"


def as_mixture(people: Shards | Mixture) -> Mixture:
    """One dataset is a mixture too."""
    return people if isinstance(people, Mixture) else Mixture((people,))


def _difference(first: Skeleton, other: Skeleton) -> str | None:
    """What keeps people of two skeletons from being labelled alike, in words."""
    if first.num_keypoints != other.num_keypoints:
        return f"it has {other.num_keypoints} keypoints, not {first.num_keypoints}"
    for number, (wanted, found) in enumerate(zip(first.keypoints, other.keypoints, strict=True), start=1):
        if wanted != found:
            return f"keypoint {number} of {first.num_keypoints} is {found!r}, not {wanted!r}"
    for name, ours, theirs in zip(first.keypoints, first.flip_index, other.flip_index, strict=True):
        if ours != theirs:
            return f"mirroring turns {name!r} into {first.keypoints[theirs]!r}, not {first.keypoints[ours]!r}"
    return None
