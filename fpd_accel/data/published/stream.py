"""Streaming of published datasets: images are fetched from their source, a window of row groups at a time.

The order of an epoch permutes the row groups, splits them into windows, and permutes the people within each window.
Like the order of local shards it is a pure function of (seed, epoch), the same for any ranks, workers and restarts. All
processes of a node share a folder of memory-mapped Arrow files, one per row group; the first process to need a row
group fetches it, and workers fetch the next window in the background. Three windows are kept: the previous one for
slower processes, the current and the next one. Older files are removed.
"""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock, Timeout
from torch.utils.data import get_worker_info

from fpd_accel.console import say
from fpd_accel.data.images import StoredImage
from fpd_accel.data.published.download import Published, Table, translate_disk_errors
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.files import sha256, staged

WINDOWS_KEPT = 3  # on the local disk: previous, current, next
LOCKS = 64  # lock files shared by the row groups of a folder
STALE_FILE = 3600.0  # seconds without a write after which a temporary file is taken for abandoned


def open_training(path: str, *, streaming: bool, window: int) -> Shards:
    """Return a training dataset: local or cached shards, or a stream with windows of `window` row groups."""
    return StreamedShards(path, window=window) if streaming else Shards(path)


class StreamedShards(Shards):
    """Published shards whose people are cached and whose images are fetched as needed.

    The order of people depends on the row groups and the window, the number of them that are read together, so the
    fingerprint includes both.

    Raises:
        DataError: The dataset cannot be opened, or is not in Parquet.
    """

    cached_parts: tuple[Table, ...] = ("people",)

    def __init__(self, path: str | os.PathLike[str], *, window: int) -> None:
        super().__init__(path)
        if self.published is None:
            raise DataError(
                f"{self.path}: not Parquet, so it cannot be streamed; write it with `fpd-accel publish`, or set "
                "data.streaming=false"
            )
        self.window, self.source = window, self.published
        groups, size = len(self.source.groups), self.source.layout.size("images")
        kept = min(1.0, WINDOWS_KEPT * window / groups)
        say(
            f"{self.path}: streaming {size / 1e6:.1f} MB of images in {groups} row groups; about "
            f"{kept * size / 1e6:.1f} MB of them at a time in {self.source.folder / 'stream'}"
        )

    @cached_property
    def images(self) -> Any:
        """The images, fetched when they are read."""
        return StreamedImages(self.source, window=self.window)

    def open(self) -> None:
        """Map the files of the people; images are fetched when they are read."""
        _ = self.images, self.people, self.usable, self._labels

    def read_images(self, rows: Sequence[int]) -> list[StoredImage]:
        """Return images by their rows; fetch those that are not on the local disk."""
        images = self.images[rows]
        return [StoredImage(*image) for image in zip(images["bytes"], images["height"], images["width"], strict=True)]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of people, images, row groups and window."""
        return sha256(f"{super().fingerprint} {self.window} {self.source.starts.tolist()}")

    @cached_property
    def _members(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Row groups with usable people, and the indices of these people among the usable ones."""
        groups = np.searchsorted(self.source.starts, self.image_rows, side="right") - 1
        people = np.argsort(groups, kind="stable").astype(np.int32)
        present, first = np.unique(groups[people], return_index=True)
        return present, np.split(people, first[1:])

    def order(self, seed: int, epoch: int, *, source: int) -> np.ndarray:
        """Return the permutation of an epoch, window after window, and prefetch images along it."""
        (windows, generator), (following, _) = (self._windows(seed, e, source=source) for e in (epoch, epoch + 1))
        present, members = self._members
        self.images.follow([present[window] for window in (*windows, following[0])])
        people = (np.concatenate([members[group] for group in window]) for window in windows)
        return np.concatenate([generator.permutation(own) for own in people])

    def _windows(self, seed: int, epoch: int, *, source: int) -> tuple[list[np.ndarray], np.random.Generator]:
        """Return the row groups of each window, as indices into `_members`, and the generator for the next draws."""
        generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, source]))
        groups = generator.permutation(len(self._members[0]))
        return [groups[first : first + self.window] for first in range(0, len(groups), self.window)], generator


class StreamedImages:
    """Images by their rows, read from Arrow files of row groups that the processes of a node share."""

    def __init__(self, published: Published, *, window: int) -> None:
        # One folder per machine and window: others would remove files that are mapped here.
        own = sha256(f"{published.path} {window}")[:8]
        self.published, self.window = published, window
        self.folder = published.folder / "stream" / f"{socket.gethostname()}_{own}"
        self._opened: dict[int, Dataset] = {}  # by row group, the oldest first
        self._plan: list[np.ndarray] = []  # row groups of each window of an epoch, then of the first window of the next
        self._window_of: dict[int, int] = {}
        self._current: frozenset[int] = frozenset()
        self._wanted: deque[int] = deque()  # row groups to fetch ahead
        self._fetcher: threading.Thread | None = None

    def __len__(self) -> int:
        return int(self.published.starts[-1])

    def __getitem__(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Return the columns of images; raise a DataError if a row group cannot be fetched."""
        groups = np.searchsorted(self.published.starts, rows, side="right") - 1
        numbers = rows - self.published.starts[groups]  # within their row groups
        images = [self._open(group)[number] for group, number in zip(groups.tolist(), numbers.tolist(), strict=True)]
        return {name: [image[name] for image in images] for name in images[0]}

    def follow(self, windows: list[np.ndarray]) -> None:
        """Prefetch along these windows of row groups; the last one is the first of the next epoch."""
        self._plan = windows
        self._window_of = {int(group): number for number, window in enumerate(windows[:-1]) for group in window}

    def _open(self, group: int) -> Dataset:
        if group not in self._current and group in self._window_of:
            number = self._window_of[group]
            self._current = frozenset(self._plan[number].tolist())
            self._fetch_ahead(self._plan[number + 1].tolist())
        while group not in self._opened:
            path = self._path(group)
            try:
                opened = Dataset.from_file(str(path))
                with suppress(PermissionError):  # the file of another user
                    os.utime(path)  # mark as used: the least recently used files are removed first
            except FileNotFoundError:  # or was removed meanwhile
                try:
                    self._fetch(group, wait=True)
                except DataError as error:
                    hint = "the last checkpoint is intact: the same command resumes from it"
                    raise DataError(f"{error}; {hint}") from None
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be opened ({error}); remove it, to fetch it again") from None
            else:
                self._opened[group] = opened
        while len(self._opened) > 2 * self.window:  # a batch may span two windows
            del self._opened[next(iter(self._opened))]
        return self._opened[group]

    def _path(self, group: int) -> Path:
        return self.folder / f"{group:06}.arrow"

    def _fetch(self, group: int, *, wait: bool) -> None:
        """Write a row group unless it exists; without `wait`, skip it while another process writes it."""
        path = self._path(group)
        with translate_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), FileLock(self.folder / f"{group % LOCKS:02}.lock").acquire(blocking=wait):
                if path.exists():
                    return
                table = self.published.read_group(group)
                with (
                    staged(path, own="part") as temporary,
                    pa.OSFile(str(temporary), "wb") as sink,
                    pa.ipc.new_stream(sink, table.schema) as writer,
                ):
                    writer.write_table(table)
                self._remove_old()

    def _remove_old(self) -> None:
        """Keep the most recently used files; a removed file stays readable where it is open."""
        used = {}
        for path in self.folder.glob("*.[ap]*"):  # .arrow and .part
            with suppress(FileNotFoundError):  # removed by another process
                used[path] = path.stat().st_mtime
        abandoned = [path for path in used if path.suffix == ".part" and time.time() - used[path] > STALE_FILE]
        complete = sorted((path for path in used if path.suffix == ".arrow"), key=used.__getitem__)
        for path in (*abandoned, *complete[: -WINDOWS_KEPT * self.window]):
            path.unlink(missing_ok=True)

    def _fetch_ahead(self, groups: list[int]) -> None:
        """Fetch row groups in the background of a loader worker; the training process fetches on demand only."""
        worker = get_worker_info()
        if worker is None:
            return
        start = worker.id * len(groups) // worker.num_workers  # each worker starts at another one
        self._wanted = deque(groups[start:] + groups[:start])
        if self._fetcher is None or not self._fetcher.is_alive():
            self._fetcher = threading.Thread(target=self._fetch_wanted, daemon=True)
            self._fetcher.start()

    def _fetch_wanted(self) -> None:
        while self._wanted:
            with suppress(IndexError, DataError):  # the reader of the group tries again and reports the error
                self._fetch(self._wanted.popleft(), wait=False)
