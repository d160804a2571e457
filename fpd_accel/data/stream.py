"""People in an exact order: sample k is the same on any number of ranks and workers, and after any restart.

Training reads one endless sequence: epoch after epoch, each a permutation keyed by (seed, epoch). Micro-batch m of
rank r starts at sample ``start + (m * ranks + r) * batch_size``; worker w of n reads the micro-batches with m % n == w.
So the only state is the number of samples consumed.
"""

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fpd_accel.augment import Geometry, draw_geometry, sample_generator
from fpd_accel.config import Augment
from fpd_accel.data.batch import Batch
from fpd_accel.data.shards import Shards, decode_image
from fpd_accel.errors import DataError
from fpd_accel.geometry import box_to_region, crop_matrix, mirror_matrix, transform_points


def epoch_order(people: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of one epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(people)


class PoseStream(IterableDataset[Batch]):
    """Whole micro-batches of one rank, from global sample ``start`` up to ``stop``.

    With ``augment`` the order is shuffled and the geometry random; without it the people come as they are stored, as
    evaluation wants them. Where ``stop`` is not a multiple of ``ranks * batch_size`` the last batches run on into the
    next epoch, so that every batch has ``batch_size`` people and every rank has as many batches: who counts people
    drops the repeated :attr:`Batch.rows`.
    """

    def __init__(
        self,
        shards: Shards,
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
    ) -> None:
        self.shards, self.input_size, self.batch_size, self.padding = shards, input_size, batch_size, padding
        self.augment, self.seed, self.rank, self.ranks = augment, seed, rank, ranks
        self.start, self.stop = start, len(shards) if stop is None else stop
        self._order: tuple[int, np.ndarray] | None = None

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
        places = [self._place(sample) for sample in samples]
        rows = [row for _, row in places]
        people = self.shards.people[rows]
        pictures = self.shards.images[people["image_row"].tolist()]
        crops, keypoints, visible, geometries = [], [], [], []
        for i, (epoch, row) in enumerate(places):
            pixels = decode_image(pictures["bytes"][i])
            if pixels is None:
                raise DataError(
                    f"{self.shards.path}: image {pictures['file_name'][i]} no longer decodes; prepare it again"
                )
            triples = people["keypoints"][i].reshape(-1, 3)
            geometry = self._geometry(epoch, row, people["box"][i], triples, pixels.shape)
            crop, points, seen = self._crop(pixels, triples, geometry)
            crops.append(crop)
            keypoints.append(points)
            visible.append(seen)
            geometries.append(geometry)
        return Batch(
            crops=torch.from_numpy(np.stack(crops)),
            keypoints=torch.from_numpy(np.stack(keypoints).astype(np.float32)),
            visible=torch.from_numpy(np.stack(visible).astype(np.float32)),
            centers=torch.from_numpy(np.stack([g.center for g in geometries]).astype(np.float32)),
            sizes=torch.from_numpy(np.stack([g.size for g in geometries]).astype(np.float32)),
            rows=torch.tensor(rows, dtype=torch.int64),
        )

    def _place(self, sample: int) -> tuple[int, int]:
        """Epoch and row of a sample."""
        epoch, position = divmod(sample, len(self.shards))
        if self.augment is None:
            return epoch, int(self.shards.usable[position])
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.shards), self.seed, epoch)
        return epoch, int(self.shards.usable[self._order[1][position]])

    def _geometry(self, epoch: int, row: int, box: np.ndarray, triples: np.ndarray, shape: tuple[int, ...]) -> Geometry:
        box = self.shards.box_to_crop(box, width=shape[1], height=shape[0])
        center, size = box_to_region(box, self.input_size, padding=self.padding)
        if self.augment is None:
            return Geometry(center, size)
        return draw_geometry(
            sample_generator(self.seed, epoch, row),
            self.augment,
            skeleton=self.shards.skeleton,
            center=center,
            size=size,
            keypoints=triples[:, :2],
            visible=triples[:, 2] > 0,
        )

    def _crop(
        self, pixels: np.ndarray, triples: np.ndarray, geometry: Geometry
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One warp, mirroring folded in; the keypoints through the same matrix, left and right exchanged with it."""
        height, width = self.input_size
        points, visible = triples[:, :2], triples[:, 2] > 0
        if geometry.flip:
            center = np.array([pixels.shape[1] - 1 - geometry.center[0], geometry.center[1]])
            matrix = crop_matrix(center, float(geometry.size[0]), self.input_size, rotation=geometry.rotation)
            matrix = mirror_matrix(matrix, pixels.shape[1])
            exchange = list(self.shards.skeleton.flip_index)
            points, visible = points[exchange], visible[exchange]
        else:
            matrix = crop_matrix(geometry.center, float(geometry.size[0]), self.input_size, rotation=geometry.rotation)
        crop = cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_LINEAR)
        return crop, transform_points(matrix, points), visible


def make_loader(stream: PoseStream, workers: int, device: torch.device) -> DataLoader[Batch]:
    """Batches of a stream, read ahead by ``workers`` processes (0: in this one)."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    """One thread per worker: OpenCV's own threads would fight with the other workers'."""
    cv2.setNumThreads(0)
