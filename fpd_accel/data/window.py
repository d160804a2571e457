"""Training people read as a stream: images are fetched where they were published, a window of row groups at a time.

The order of an epoch permutes the row groups, cuts them into windows, and permutes the people of each window: like that
of local shards a pure function of (seed, epoch), so that ranks, workers and restarts change nothing. All processes of a
node share a folder of Arrow files, one per row group, fetched by whoever needs it first, and memory-mapped. Workers
fetch the next window in the background. Three windows lie there, the one behind for who is slower; what is older goes.
"""

import hashlib
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

from fpd_accel.data.images import StoredImage
from fpd_accel.data.remote import Part, Published, written_to
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.log import say

WINDOWS_KEPT = 3  # on the local disk: behind, current, next
LOCKS = 64  # that the row groups of a folder share
ABANDONED = 3600.0  # seconds after which a half-written file is nobody's


def open_training(path: str, *, streaming: bool, window: int) -> Shards:
    """Shards to train on: local or cached, or a stream in windows of so many row groups.

    Raises:
        DataError: they cannot be opened, or not be streamed.
    """
    return StreamedShards(path, window=window) if streaming else Shards(path)


class StreamedShards(Shards):
    """Published shards whose people are cached, while their images come and go.

    The order of people hangs on row groups and window, so the fingerprint does too.
    """

    cached_parts: tuple[Part, ...] = ("people",)

    def __init__(self, path: str | os.PathLike[str], *, window: int) -> None:
        super().__init__(path)
        if self.published is None:
            raise DataError(
                f"{self.path}: not Parquet, so it cannot be streamed; write it with `fpd-accel publish`, or set "
                "data.streaming=false"
            )
        self.window = window
        groups, size = len(self.published.groups), self.published.layout.size("images")
        kept = min(1.0, WINDOWS_KEPT * window / groups)
        say(
            f"{self.path}: streaming {size / 1e6:.1f} MB of images in {groups} row groups; about "
            f"{kept * size / 1e6:.1f} MB of them at a time in {self.published.folder / 'stream'}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_members"}

    @cached_property
    def images(self) -> Any:
        assert self.published is not None
        return StreamedImages(self.published, window=self.window)

    def open(self) -> None:
        """Map the files of the people; images are fetched when they are read."""
        _ = self.images, self.people, self.usable, self._labels

    def read_images(self, rows: Sequence[int]) -> list[StoredImage]:
        images = self.images[rows]
        return [StoredImage(*image) for image in zip(images["bytes"], images["height"], images["width"], strict=True)]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of people, images, and what their order hangs on."""
        assert self.published is not None
        content = f"{super().fingerprint} {self.window} {self.published.starts.tolist()}"
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _members(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Row groups with usable people in them, and the numbers of these people."""
        assert self.published is not None
        rows = self.people["image_row"][:][self.usable]
        groups = np.searchsorted(self.published.starts, rows, side="right") - 1
        people = np.argsort(groups, kind="stable").astype(np.int32)
        present, first = np.unique(groups[people], return_index=True)
        return present, np.split(people, first[1:])

    def order(self, seed: int, epoch: int, *, source: int) -> np.ndarray:
        """The permutation of one epoch, window after window; images are prefetched along the last one asked for."""
        (windows, generator), (following, _) = (self._windows(seed, e, source=source) for e in (epoch, epoch + 1))
        present, members = self._members
        self.images.follow([present[window] for window in (*windows, following[0])])
        return np.concatenate(
            [generator.permutation(np.concatenate([members[group] for group in window])) for window in windows]
        )

    def _windows(self, seed: int, epoch: int, *, source: int) -> tuple[list[np.ndarray], np.random.Generator]:
        """The row groups of each window, as numbers into :attr:`_members`, and the generator of what is drawn next."""
        generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, source]))
        groups = generator.permutation(len(self._members[0]))
        return [groups[first : first + self.window] for first in range(0, len(groups), self.window)], generator


class StreamedImages:
    """Rows of images by their numbers, from Arrow files of their row groups that this node shares."""

    def __init__(self, published: Published, *, window: int) -> None:
        # Not shared with other machines, which would remove what is mapped here, nor with streams of other windows.
        own = hashlib.sha256(f"{published.path} {window}".encode()).hexdigest()[:8]
        self.published, self.window = published, window
        self.folder = published.folder / "stream" / f"{socket.gethostname()}_{own}"
        self._opened: dict[int, Dataset] = {}  # row groups, the oldest first
        self._plan: list[np.ndarray] = []  # row groups of the windows of an epoch, and of the first of the next one
        self._window_of: dict[int, int] = {}
        self._current: frozenset[int] = frozenset()
        self._wanted: deque[int] = deque()  # row groups to fetch ahead
        self._fetcher: threading.Thread | None = None

    def __len__(self) -> int:
        return int(self.published.starts[-1])

    def __getitem__(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The columns of some images.

        Raises:
            DataError: their row groups cannot be fetched.
        """
        groups = np.searchsorted(self.published.starts, rows, side="right") - 1
        first = self.published.starts[groups]
        images = [
            self._open(int(group))[int(row - start)] for row, group, start in zip(rows, groups, first, strict=True)
        ]
        return {name: [image[name] for image in images] for name in images[0]}

    def follow(self, windows: list[np.ndarray]) -> None:
        """Fetch ahead along these windows of row groups; the last is that of the next epoch."""
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
                with suppress(PermissionError):  # somebody else's
                    os.utime(path)  # in use: what was not for longest is removed first
            except FileNotFoundError:  # or removed again in between
                self._fetch(group)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be opened ({error}); remove it, to fetch it again") from None
            else:
                self._opened[group] = opened
        while len(self._opened) > 2 * self.window:  # a batch may span two windows
            del self._opened[next(iter(self._opened))]
        return self._opened[group]

    def _path(self, group: int) -> Path:
        return self.folder / f"{group:06}.arrow"

    def _fetch(self, group: int) -> None:
        try:
            self._fetch_once(group, wait=True)
        except DataError as error:
            raise DataError(f"{error}; the last checkpoint is intact: the same command goes on from it") from None

    def _fetch_once(self, group: int, *, wait: bool) -> None:
        """Put a row group into the folder, if nobody else did; without ``wait`` not if somebody is about to."""
        path = self._path(group)
        with written_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), FileLock(self.folder / f"{group % LOCKS:02}.lock").acquire(blocking=wait):
                if path.exists():
                    return
                table, staged = self.published.read_group(group), path.with_suffix(".part")
                with pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                staged.replace(path)
                self._remove_old()

    def _remove_old(self) -> None:
        """Keep what was used last. Who has a file open that is removed reads on."""
        used = {}
        for path in self.folder.glob("*.[ap]*"):  # .arrow and .part
            with suppress(FileNotFoundError):  # another process was first
                used[path] = path.stat().st_mtime
        abandoned = [path for path in used if path.suffix == ".part" and time.time() - used[path] > ABANDONED]
        whole = sorted((path for path in used if path.suffix == ".arrow"), key=used.__getitem__)
        for path in (*abandoned, *whole[: -WINDOWS_KEPT * self.window]):
            path.unlink(missing_ok=True)

    def _fetch_ahead(self, groups: list[int]) -> None:
        """In the background of a worker; the process that trains never waits for more than it needs."""
        worker = get_worker_info()
        if worker is None:
            return
        start = worker.id * len(groups) // worker.num_workers  # each begins elsewhere
        self._wanted = deque(groups[start:] + groups[:start])
        if self._fetcher is None or not self._fetcher.is_alive():
            self._fetcher = threading.Thread(target=self._fetch_wanted, daemon=True)
            self._fetcher.start()

    def _fetch_wanted(self) -> None:
        while self._wanted:
            with suppress(IndexError, DataError):  # who needs the group tries again, and says what is wrong
                self._fetch_once(self._wanted.popleft(), wait=False)
