"""People in an exact order: sample k is the same on any number of ranks and workers, and after any restart.

Training reads one endless sequence: epoch after epoch, each a permutation keyed by (seed, epoch). Micro-batch m of
rank r starts at sample ``start + (m * ranks + r) * batch_size``; worker w of n reads the micro-batches with m % n == w.
So the only state is the number of samples consumed. Where people without labels have a share of the samples, sample k
is one of them if floor(share * k) rises from k to k + 1: they come as evenly as can be, whatever the batch. Several
datasets with labels divide what is left in the same way (see ``mixture.py``), each with epochs of its own.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fpd_accel.augment import Geometry, draw_geometry, sample_generator, view_in_epoch
from fpd_accel.config import Augment
from fpd_accel.data.batch import Batch
from fpd_accel.data.images import StoredImage, decode_image
from fpd_accel.data.lessons import Lessons
from fpd_accel.data.mixture import Mixture, as_mixture
from fpd_accel.data.order import by_image
from fpd_accel.data.shards import LABELS, Shards
from fpd_accel.errors import DataError
from fpd_accel.geometry import Matrix, box_to_region, crop_matrix, lowest_row, mirror_matrix, transform_points
from fpd_accel.stop import end_process, outlive_stop

WARP_BELOW = 3  # rows below the lowest point of a crop that its interpolation may look at
READ_AHEAD = 4  # batches per loader process that are made or being made before they are asked for


@dataclass(frozen=True)
class Place:
    """Where a sample comes from: which dataset, which pass over it, which row of its people."""

    source: int  # the labelled datasets from 0 on, then the one without labels
    epoch: int
    row: int


@dataclass
class Source:
    """One dataset of the mixture, and the order of the epoch that was asked for last."""

    shards: Shards
    number: int
    labelled: bool = True
    group_by_image: bool = False
    order: tuple[int, np.ndarray] = field(default=(-1, np.empty(0, dtype=np.int64)))

    def place(self, sample: int, *, seed: int | None) -> Place:
        """The place of sample number ``sample`` of this dataset alone; without a seed they come as they are stored."""
        epoch, position = divmod(sample, len(self.shards))
        if seed is not None:
            if self.order[0] != epoch:
                order = self.shards.order(seed, epoch, source=self.number)
                self.order = epoch, by_image(order, self.shards.image_rows) if self.group_by_image else order
            position = int(self.order[1][position])
        return Place(self.number, epoch, int(self.shards.usable[position]))


@dataclass(frozen=True)
class Person:
    """One row of the people, and its image."""

    place: Place
    box: np.ndarray
    keypoints: np.ndarray  # (joint, 3); all zero for someone without labels
    image_row: int
    image: StoredImage


class PoseStream(IterableDataset[Batch]):
    """Whole micro-batches of one rank, from global sample ``start`` up to ``stop``.

    With ``augment`` the order is shuffled and the geometry random; without it the people come as they are stored, as
    evaluation wants them. Where ``stop`` is not a multiple of ``ranks * batch_size`` the last batches run on into the
    next epoch, so that every batch has ``batch_size`` people and every rank has as many batches: who counts people
    drops the repeated :attr:`Batch.rows`.

    ``shards`` may be a mixture of several. ``unlabelled`` people, of whatever skeleton, come with no keypoint visible
    and have ``share`` of the samples. ``unbiased`` crops as UDP does. ``group_by_image`` shuffles images, not people:
    those of one image follow each other, so that it is decoded once for all of them that are in one micro-batch.
    ``lessons``: what a teacher said of all views of all these people, handed out with them.
    """

    def __init__(
        self,
        shards: Shards | Mixture,
        *,
        input_size: tuple[int, int],
        batch_size: int,
        augment: Augment | None = None,
        padding: float = 1.25,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        start: int = 0,
        stop: int | None = None,
        unbiased: bool = False,
        unlabelled: Shards | None = None,
        share: float = 0.0,
        group_by_image: bool = False,
        lessons: Lessons | None = None,
    ) -> None:
        self.people, self.skeleton = as_mixture(shards), shards.skeleton
        self.exchange = np.array(self.skeleton.flip_index)  # of keypoints, where the image is mirrored
        self.input_size, self.batch_size, self.padding = input_size, batch_size, padding
        self.augment, self.seed, self.rank, self.ranks = augment, seed, rank, ranks
        self.start, self.stop = start, len(self.people) if stop is None else stop
        self.unbiased, self.share, self.lessons = unbiased, share if unlabelled is not None else 0.0, lessons
        self.sources = [Source(labelled, number) for number, labelled in enumerate(self.people.datasets)]
        if unlabelled is not None:
            self.sources.append(Source(unlabelled, len(self.sources), labelled=False))
        for source in self.sources:
            source.group_by_image = group_by_image

    def __len__(self) -> int:
        """Micro-batches of this rank."""
        return -(-max(self.stop - self.start, 0) // (self.ranks * self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for micro_batch in range(first, len(self), stride):
            sample = self.start + (micro_batch * self.ranks + self.rank) * self.batch_size
            yield self.batch(range(sample, sample + self.batch_size))

    def batch(self, samples: range) -> Batch:
        """The batch of some samples of the endless sequence."""
        people = self._read([self.place(sample) for sample in samples])
        geometries = self._geometries(people)
        crops = np.empty((len(people), *self.input_size, 3), dtype=np.uint8)
        keypoints = np.empty((len(people), self.skeleton.num_keypoints, 2), dtype=np.float32)
        visible = np.empty(keypoints.shape[:2], dtype=np.float32)
        matrices = [self._matrix(*one) for one in zip(people, geometries, strict=True)]
        for same_image in _by_image(people):  # each is decoded once, and warped while the processor has it at hand
            lowest = max(lowest_row(matrices[i], self.input_size) for i in same_image)
            pixels = self._decode(people[same_image[0]], rows=max(0, math.ceil(lowest)) + WARP_BELOW)
            for i in same_image:
                cv2.warpAffine(pixels, matrices[i], self.input_size[::-1], dst=crops[i], flags=cv2.INTER_LINEAR)
        for i, geometry in enumerate(geometries):
            keypoints[i], visible[i] = self._keypoints(people[i], geometry, matrices[i])
        labelled = [float(self.sources[person.place.source].labelled) for person in people]
        lessons, scales = self.lessons.read([self._record(p.place) for p in people]) if self.lessons else (None, None)
        return Batch(
            crops=torch.from_numpy(crops),
            keypoints=torch.from_numpy(keypoints),
            visible=torch.from_numpy(visible),
            centers=torch.from_numpy(np.stack([g.center for g in geometries]).astype(np.float32)),
            sizes=torch.from_numpy(np.stack([g.size for g in geometries]).astype(np.float32)),
            rows=torch.tensor([person.place.row for person in people], dtype=torch.int64),
            labelled=None if self.sources[-1].labelled else torch.tensor(labelled),
            lessons=lessons,
            scales=scales,
        )

    def place(self, sample: int) -> Place:
        seed = self.seed if self.augment is not None else None
        before, after = math.floor(self.share * sample), math.floor(self.share * (sample + 1))
        if after > before:
            return self.sources[-1].place(before, seed=seed)
        number, own = self.people.locate(sample - before)
        return self.sources[number].place(own, seed=seed)

    def _read(self, places: Sequence[Place]) -> list[Person]:
        """The people at some places, in their order; each dataset is read once."""
        found: dict[Place, Person] = {}
        for source in self.sources:
            chosen = [place for place in places if place.source == source.number]
            if chosen:
                found |= zip(chosen, self._people(source, chosen), strict=True)
        return [found[place] for place in places]

    def _people(self, source: Source, places: Sequence[Place]) -> Iterator[Person]:
        people = source.shards.columns(LABELS, [place.row for place in places])
        rows = people["image_row"].tolist()
        images = source.shards.read_images(rows)
        nothing = np.zeros((self.skeleton.num_keypoints, 3), dtype=np.float32)
        for i, place in enumerate(places):
            keypoints = people["keypoints"][i].reshape(-1, 3) if source.labelled else nothing
            yield Person(place, people["box"][i], keypoints, rows[i], images[i])

    def _decode(self, person: Person, *, rows: int) -> np.ndarray:
        """The pixels of a person's image, of at least so many rows."""
        pixels = decode_image(person.image.data, rows=rows)
        if pixels is None:
            shards = self.sources[person.place.source].shards
            raise DataError(
                f"{shards.path}: image {shards.image_name(person.image_row)} no longer decodes; prepare it again"
            )
        return pixels

    def _geometries(self, people: Sequence[Person]) -> list[Geometry]:
        """What each crop shows; the regions around all boxes of a dataset are found at once."""
        boxes = np.empty((len(people), 4), dtype=np.float32)
        for source in self.sources:
            own = [i for i, person in enumerate(people) if person.place.source == source.number]
            if own:
                boxes[own] = source.shards.box_to_crop(
                    np.stack([people[i].box for i in own]),
                    width=np.array([people[i].image.width for i in own]),
                    height=np.array([people[i].image.height for i in own]),
                )
        regions = box_to_region(boxes, self.input_size, padding=self.padding)
        return [self._geometry(*one) for one in zip(people, *regions, strict=True)]

    def _geometry(self, person: Person, center: np.ndarray, size: np.ndarray) -> Geometry:
        if self.augment is None:
            return Geometry(center, size)
        place = person.place
        return draw_geometry(
            sample_generator(self.seed, self._view(place), place.row, source=place.source),
            self.augment,
            skeleton=self.skeleton,
            center=center,
            size=size,
            keypoints=person.keypoints[:, :2],
            visible=person.keypoints[:, 2] > 0,
        )

    def _view(self, place: Place) -> int:
        """The number by which the geometry is drawn: of the epoch, or of one of a few views."""
        views = self.augment.views if self.augment is not None else None
        if views is None:
            return place.epoch
        return view_in_epoch(self.seed, place.epoch, place.row, source=place.source, views=views)

    def _record(self, place: Place) -> int:
        """Where in the teacher's cache this view of this person is."""
        assert self.lessons is not None
        position = int(np.searchsorted(self.sources[place.source].shards.usable, place.row))
        return self.lessons.layout.record(place.source, position, self._view(place))

    def _matrix(self, person: Person, geometry: Geometry) -> Matrix:
        """The one map from a person's image to the crop, mirroring folded in."""
        center, width = geometry.center, person.image.width
        if geometry.flip:
            center = np.array([width - 1 - center[0], center[1]])
        matrix = crop_matrix(
            center, float(geometry.size[0]), self.input_size, rotation=geometry.rotation, unbiased=self.unbiased
        )
        return mirror_matrix(matrix, width) if geometry.flip else matrix

    def _keypoints(self, person: Person, geometry: Geometry, matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
        """A person's keypoints in the crop, left and right exchanged where it is mirrored, and which are visible."""
        points, visible = person.keypoints[:, :2], person.keypoints[:, 2] > 0
        if geometry.flip:
            points, visible = points[self.exchange], visible[self.exchange]
        return transform_points(matrix, points), visible


def _by_image(people: Sequence[Person]) -> Iterable[list[int]]:
    """Numbers of people who are in one image, image by image as they come."""
    numbers: dict[tuple[int, int], list[int]] = {}
    for number, person in enumerate(people):
        numbers.setdefault((person.place.source, person.image_row), []).append(number)
    return numbers.values()


def make_loader(stream: PoseStream, workers: int, device: torch.device) -> DataLoader[Batch]:
    """Batches of a stream, read ahead by ``workers`` processes (0: in this one)."""
    for source in stream.sources:
        source.shards.open()
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=READ_AHEAD if workers else None,
        worker_init_fn=_start_worker,
    )


def close_loader(batches: Iterator[Batch]) -> None:
    """End a loader's processes now, not at the end of the interpreter."""
    end = getattr(batches, "_shutdown_workers", None)  # of PyTorch's iterator over several processes
    if end is not None:
        end()
        for process in batches._workers:  # type: ignore[attr-defined]
            end_process(process)


def _start_worker(_: int) -> None:
    """One thread per worker: OpenCV's own threads would fight with the other workers'. It stops after its trainer."""
    cv2.setNumThreads(0)
    outlive_stop()
