"""Batches of all views of some people, from which a teacher cache is built."""

from typing import Any

import numpy as np

from fpd_accel.data.mixture import Mixture
from fpd_accel.data.stream import Place, PoseStream
from fpd_accel.data.teacher_targets import CacheLayout


class AllViewsStream(PoseStream):
    """The records of some parts of a cache, one part after the other, in batches of one size.

    Each part takes as many samples as the largest part, so that all ranks run the teacher equally often; samples beyond
    a part's own records are discarded. `options` are further arguments of `PoseStream`.
    """

    def __init__(self, shards: Mixture, layout: CacheLayout, parts: list[int], **options: Any) -> None:
        self.layout, self.parts = layout, parts
        self.part_samples = -(-len(layout.records_of(0)) // options["batch_size"]) * options["batch_size"]
        super().__init__(shards, stop=len(parts) * self.part_samples, **options)

    def place(self, sample: int) -> Place:
        """Return the dataset, view and row of a sample."""
        turn, offset = divmod(sample, self.part_samples)
        record = (self.layout.records_of(self.parts[turn]).start + offset) % self.layout.records
        person, view = divmod(record, self.layout.views)
        source = int(np.searchsorted(self.layout.first_person, person, side="right")) - 1
        position = person - self.layout.first_person[source]
        return Place(source, view, int(self.sources[source].shards.usable[position]))

    def _view(self, place: Place) -> int:
        return place.epoch
