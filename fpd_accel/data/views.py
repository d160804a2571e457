"""All views of some people, for a teacher to be asked about: what a cache of its answers is built from."""

from typing import Any

import numpy as np

from fpd_accel.data.lessons import Layout
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.stream import Place, PoseStream


class EveryView(PoseStream):
    """The records of some parts of a cache, one part after the other, in batches of one size.

    Each part takes as many samples as the largest, so that all ranks ask together; those beyond its own records are for
    nobody.
    """

    def __init__(self, shards: Mixture, layout: Layout, parts: list[int], **options: Any) -> None:
        """``options``: those of :class:`PoseStream`."""
        self.layout, self.parts = layout, parts
        self.part_samples = -(-len(layout.records_of(0)) // options["batch_size"]) * options["batch_size"]
        super().__init__(shards, stop=len(parts) * self.part_samples, **options)

    def place(self, sample: int) -> Place:
        turn, offset = divmod(sample, self.part_samples)
        record = (self.layout.records_of(self.parts[turn]).start + offset) % self.layout.records
        person, view = divmod(record, self.layout.views)
        source = int(np.searchsorted(self.layout.first_person, person, side="right")) - 1
        position = person - self.layout.first_person[source]
        return Place(source, view, int(self.sources[source].shards.usable[position]))

    def _view(self, place: Place) -> int:
        return place.epoch
