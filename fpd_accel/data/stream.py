"""Samples in an exact order: sample k is the same on any number of ranks and workers, and after any restart.

Training reads one endless sequence: epoch after epoch, each a permutation keyed by (seed, epoch). Micro-batch m of
rank r starts at sample `start + (m * ranks + r) * batch_size`; worker w of n reads the micro-batches with m % n == w.
So the only state is the number of samples consumed. If unlabelled people have a share of the samples, sample k is
unlabelled if floor(share * k) rises from k to k + 1, which spreads them as evenly as possible for any batch size.
Several labelled datasets divide the remaining samples in the same way (see `mixture.py`), each with epochs of its own.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fpd_accel.config.schema import Augment
from fpd_accel.data.augment import Geometry, draw_geometry, sample_generator, view_in_epoch
from fpd_accel.data.batch import Batch
from fpd_accel.data.images import StoredImage, decode_image
from fpd_accel.data.mixture import Mixture, as_mixture
from fpd_accel.data.shards import LABELS, Shards
from fpd_accel.data.teacher_targets import TeacherTargets
from fpd_accel.distributed.preemption import ignore_stop_signals, terminate
from fpd_accel.geometry import Matrix, box_to_region, crop_matrix, lowest_row, mirror_matrix, transform_points

WARP_MARGIN = 3  # rows below the lowest point of a crop that its interpolation may read
READ_AHEAD = 4  # batches that each loader process prepares in advance


@dataclass(frozen=True)
class Place:
    """The origin of a sample: a person in a dataset, in one pass over that dataset."""

    source: int  # number of the dataset: the labelled ones from 0 on, then the unlabelled one
    epoch: int  # pass over that dataset
    row: int  # of the person in the dataset's `people`


@dataclass
class Source:
    """One dataset of a stream, and its order in the epoch that was read last."""

    shards: Shards
    number: int
    labelled: bool = True
    group_by_image: bool = False
    order: tuple[int, np.ndarray] = field(default=(-1, np.empty(0, dtype=np.int64)))  # epoch, permutation

    def place(self, sample: int, *, seed: int | None) -> Place:
        """Return the place of a sample, counted within this dataset; without a seed the order is the stored one."""
        epoch, position = divmod(sample, len(self.shards))
        if seed is not None:
            if self.order[0] != epoch:
                order = self.shards.order(seed, epoch, source=self.number)
                self.order = epoch, by_image(order, self.shards.image_rows) if self.group_by_image else order
            position = int(self.order[1][position])
        return Place(self.number, epoch, int(self.shards.usable[position]))


@dataclass(frozen=True)
class Sample:
    """A person and the image that it is in."""

    place: Place
    box: np.ndarray  # to crop around: x, y, width, height, image pixels
    keypoints: np.ndarray  # (joint, 3): x, y, v; all zero without labels
    image_row: int
    image: StoredImage


class PoseStream(IterableDataset[Batch]):
    """The micro-batches of one rank, from global sample `start` up to `stop`.

    If `stop - start` is not a multiple of `ranks * batch_size`, the last batches run on into the next epoch, so that
    all batches are full and all ranks have the same number of batches. Evaluation drops the repeated `Batch.rows`.

    Args:
        shards: A dataset with labels, or a mixture of several.
        input_size: (height, width) of the crops in pixels.
        augment: Shuffle the order and draw a random geometry for each sample. None: stored order, without augmentation.
        padding: Factor on the person's box.
        seed: Seed of order and geometry.
        start: First global sample.
        stop: End of the global samples. None: one epoch.
        unbiased: Crop as UDP does.
        unlabelled: A dataset of any skeleton whose samples have no visible keypoints.
        share: Share of the unlabelled samples.
        group_by_image: Shuffle images instead of people: the people of an image follow each other, and it is decoded
            once per micro-batch.
        teacher_targets: Cached teacher outputs for all views of all these people, added to the batches.
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
        teacher_targets: TeacherTargets | None = None,
    ) -> None:
        self.labelled, self.skeleton = as_mixture(shards), shards.skeleton
        self.flip_index = np.array(self.skeleton.flip_index)
        self.input_size, self.batch_size, self.padding = input_size, batch_size, padding
        self.augment, self.seed, self.rank, self.ranks = augment, seed, rank, ranks
        self.start, self.stop = start, len(self.labelled) if stop is None else stop
        self.unbiased, self.teacher_targets = unbiased, teacher_targets
        self.share = share if unlabelled is not None else 0.0
        self.sources = [
            Source(dataset, number, labelled=number < len(self.labelled.datasets), group_by_image=group_by_image)
            for number, dataset in enumerate((*self.labelled.datasets, unlabelled))
            if dataset is not None
        ]

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank."""
        return -(-max(self.stop - self.start, 0) // (self.ranks * self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for micro_batch in range(first, len(self), stride):
            sample = self.start + (micro_batch * self.ranks + self.rank) * self.batch_size
            yield self.batch(range(sample, sample + self.batch_size))

    def batch(self, samples: range) -> Batch:
        """Return the batch of a range of samples of the endless sequence."""
        people = self._read([self.place(sample) for sample in samples])
        regions = box_to_region(np.stack([person.box for person in people]), self.input_size, padding=self.padding)
        geometries = [self._geometry(*one) for one in zip(people, *regions, strict=True)]
        crops = np.empty((len(people), *self.input_size, 3), dtype=np.uint8)
        keypoints = np.empty((len(people), self.skeleton.num_keypoints, 2), dtype=np.float32)
        visible = np.empty(keypoints.shape[:2], dtype=np.float32)
        matrices = [self._matrix(*one) for one in zip(people, geometries, strict=True)]
        for same_image in _group_by_image(people):  # decode once, then warp while the pixels are in the CPU's cache
            lowest = max(lowest_row(matrices[i], self.input_size) for i in same_image)
            person = people[same_image[0]]
            pixels = decode_image(person.image.data, rows=max(0, math.ceil(lowest)) + WARP_MARGIN)
            if pixels is None:
                raise self.sources[person.place.source].shards.damaged_image(person.image_row)
            for i in same_image:
                cv2.warpAffine(pixels, matrices[i], self.input_size[::-1], dst=crops[i], flags=cv2.INTER_LINEAR)
        for i, geometry in enumerate(geometries):
            keypoints[i], visible[i] = self._keypoints(people[i], geometry, matrices[i])
        labelled = [float(self.sources[person.place.source].labelled) for person in people]
        cache = self.teacher_targets
        targets, scales = cache.read([self._record(cache, one.place) for one in people]) if cache else (None, None)
        return Batch(
            crops=torch.from_numpy(crops),
            keypoints=torch.from_numpy(keypoints),
            visible=torch.from_numpy(visible),
            centers=torch.from_numpy(np.stack([g.center for g in geometries]).astype(np.float32)),
            sizes=torch.from_numpy(np.stack([g.size for g in geometries]).astype(np.float32)),
            rows=torch.tensor([person.place.row for person in people], dtype=torch.int64),
            labelled=None if self.sources[-1].labelled else torch.tensor(labelled),
            teacher_targets=targets,
            scales=scales,
        )

    def place(self, sample: int) -> Place:
        """Return the place of a sample of the endless sequence."""
        seed = self.seed if self.augment is not None else None
        before, after = math.floor(self.share * sample), math.floor(self.share * (sample + 1))
        if after > before:
            return self.sources[-1].place(before, seed=seed)
        number, sample_in_source = self.labelled.locate(sample - before)
        return self.sources[number].place(sample_in_source, seed=seed)

    def _read(self, places: Sequence[Place]) -> list[Sample]:
        """Return the people at the given places, in that order; each dataset is read once."""
        found: dict[Place, Sample] = {}
        for source in self.sources:
            chosen = [place for place in places if place.source == source.number]
            if chosen:
                found |= zip(chosen, self._people(source, chosen), strict=True)
        return [found[place] for place in places]

    def _people(self, source: Source, places: Sequence[Place]) -> Iterator[Sample]:
        people = source.shards.columns(LABELS, [place.row for place in places])
        rows = people["image_row"].tolist()
        images = source.shards.read_images(rows)
        widths, heights = np.array([(image.width, image.height) for image in images]).T
        boxes = source.shards.box_to_crop(people["box"], width=widths, height=heights)
        unlabelled = np.zeros((self.skeleton.num_keypoints, 3), dtype=np.float32)
        for i, place in enumerate(places):
            keypoints = people["keypoints"][i].reshape(-1, 3) if source.labelled else unlabelled
            yield Sample(place, boxes[i], keypoints, rows[i], images[i])

    def _geometry(self, person: Sample, center: np.ndarray, size: np.ndarray) -> Geometry:
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
        """Return the view that the geometry is drawn for: the number of the epoch, or of one of a few fixed views."""
        if self.augment is None or self.augment.views is None:
            return place.epoch
        return view_in_epoch(self.seed, place.epoch, place.row, source=place.source, views=self.augment.views)

    def _record(self, cache: TeacherTargets, place: Place) -> int:
        """Return the record of this view of this person in the teacher cache."""
        position = int(np.searchsorted(self.sources[place.source].shards.usable, place.row))
        return cache.layout.record(place.source, position, self._view(place))

    def _matrix(self, person: Sample, geometry: Geometry) -> Matrix:
        """Return the affine map from a person's image to the crop, mirroring included."""
        center, width = geometry.center, person.image.width
        if geometry.flip:
            center = np.array([width - 1 - center[0], center[1]])
        matrix = crop_matrix(
            center, float(geometry.size[0]), self.input_size, rotation=geometry.rotation, unbiased=self.unbiased
        )
        return mirror_matrix(matrix, width) if geometry.flip else matrix

    def _keypoints(self, person: Sample, geometry: Geometry, matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
        """Return a person's keypoints in the crop, left and right swapped if it is mirrored, and which are visible."""
        points, visible = person.keypoints[:, :2], person.keypoints[:, 2] > 0
        if geometry.flip:
            points, visible = points[self.flip_index], visible[self.flip_index]
        return transform_points(matrix, points), visible


def _group_by_image(people: Sequence[Sample]) -> Iterable[list[int]]:
    """Return the indices of the people in each image."""
    numbers: dict[tuple[int, int], list[int]] = {}
    for number, person in enumerate(people):
        numbers.setdefault((person.place.source, person.image_row), []).append(number)
    return numbers.values()


def make_loader(stream: PoseStream, workers: int, device: torch.device) -> DataLoader[Batch]:
    """Return a loader of a stream's batches, read ahead by `workers` processes (0: read in this process)."""
    for source in stream.sources:
        source.shards.open()
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=READ_AHEAD if workers else None,
        worker_init_fn=start_worker,
    )


def close_loader(batches: Iterator[Batch]) -> None:
    """End a loader's processes now, not at the end of the interpreter."""
    shut_down = getattr(batches, "_shutdown_workers", None)  # PyTorch's iterator has it if there are workers
    if shut_down is not None:
        shut_down()
        for process in batches._workers:  # type: ignore[attr-defined]
            terminate(process)


def start_worker(_: int) -> None:
    """Run OpenCV in one thread, as the other workers use the other cores, and leave stop signals to the trainer."""
    cv2.setNumThreads(0)
    ignore_stop_signals()


def by_image(order: Int[np.ndarray, " person"], images: Int[np.ndarray, " person"]) -> Int[np.ndarray, " person"]:
    """Return a permutation of people with the people of each image in a row, in their order in the permutation `order`.

    An image takes the position in `order` of its first person as stored. The position of its first person in `order`
    would bring images with many people early in every epoch.
    """
    position = np.empty_like(order)
    position[order] = np.arange(len(order), dtype=order.dtype)
    _, first, image = np.unique(images, return_index=True, return_inverse=True)
    return order[np.argsort(position[first][image][order], kind="stable")]
