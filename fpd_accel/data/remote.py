"""Published datasets: Parquet files in a folder or behind a URL, and the local cache of what was read of them.

``dataset.json`` lists the files with size, SHA-256 and row groups, so that what arrives is known to be what was
published. The cache lies beside that of ``datasets`` (``HF_DATASETS_CACHE``), a folder for each content and layout:
``people/`` and ``images/`` as Arrow, a folder for each Parquet file, each part downloaded by one process of the node
and renamed once it is whole. Another dataset under the same URL gets another folder.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from filelock import FileLock
from fsspec.core import url_to_fs
from huggingface_hub.errors import OfflineModeIsEnabled
from pydantic import BaseModel, ConfigDict, Field

from fpd_accel.config import is_url
from fpd_accel.errors import DataError
from fpd_accel.files import write_whole
from fpd_accel.log import say, track, warn

Part = Literal["people", "images"]
PARTS: tuple[Part, ...] = ("people", "images")
WAITS = (1.0, 4.0, 10.0)  # seconds before each further try of a download
AGAIN = "publish the dataset again"
READ_AHEAD = 2**18  # bytes: the small columns of a row group in one request, its footer in another
PERMANENT = (ImportError, NotImplementedError, OfflineModeIsEnabled, PermissionError, ValueError)  # no try changes it

Count = Annotated[int, Field(ge=1)]
Result = TypeVar("Result")


class UnreachableError(DataError):
    """Nothing is known about the file, not even that it is missing."""


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def images_digest(table: pa.Table) -> str:
    """SHA-256 of ids and bytes of the images of a row group."""
    digest = hashlib.sha256(repr(table.column("id").to_pylist()).encode())
    for image in table.column("bytes"):
        digest.update(image.as_buffer())
    return digest.hexdigest()


class PublishedFile(BaseModel):
    """A Parquet file as ``dataset.json`` lists it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, Field(pattern=r"^(images|people)/\w+\.parquet$")]  # below the dataset's folder
    size: Count  # bytes
    sha256: Sha256
    groups: tuple[Count, ...]  # rows of each row group
    digests: tuple[Sha256, ...] = ()  # of the images of each row group, which are read one by one


class Layout(BaseModel):
    """``"parquet"`` in ``dataset.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: tuple[PublishedFile, ...]
    people: tuple[PublishedFile, ...]

    def files(self, part: Part) -> tuple[PublishedFile, ...]:
        return self.images if part == "images" else self.people

    def rows(self, part: Part) -> int:
        return sum(sum(file.groups) for file in self.files(part))

    def size(self, part: Part) -> int:
        return sum(file.size for file in self.files(part))


def cache_root() -> Path:
    """Where downloads are kept; ``HF_DATASETS_CACHE`` or ``HF_HOME`` move it."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "fpd_accel"


def read_description(path: Path | str) -> bytes:
    """The content of a dataset's ``dataset.json``; of a URL that cannot be reached, what it was the last time.

    Raises:
        DataError: there is none, or none can be had.
    """
    if not is_url(path):
        try:
            return (Path(path) / "dataset.json").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{path}: not a prepared dataset (no dataset.json); write one with `fpd-accel prepare`"
            ) from None
        except OSError as error:
            raise DataError(f"{path}/dataset.json: cannot be read: {error.strerror}") from None
    url = join(path, "dataset.json")
    remembered = cache_root() / "descriptions" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json"
    try:
        content = persistently(url, lambda: _read(url))
    except UnreachableError as error:
        if not remembered.is_file():
            raise
        warn(f"{error}; going on with the dataset as it was there the last time")
        return remembered.read_bytes()
    if not remembered.is_file() or remembered.read_bytes() != content:
        write_whole(remembered, content)
    return content


def join(folder: Path | str, name: str) -> str:
    return f"{str(folder).rstrip('/')}/{name}"


def _read(url: str) -> bytes:
    system, place = url_to_fs(url)
    return system.cat_file(place)


def persistently(url: str, read: Callable[[], Result]) -> Result:
    """What ``read`` gives, tried again after each of ``WAITS``.

    Raises:
        DataError: there is no such file, it cannot be used, or the last try failed too.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except DataError:
            raise
        except Exception as raised:  # every file system raises its own
            error = _meant(raised)
            if isinstance(error, FileNotFoundError):
                raise DataError(f"{url}: no such file; `fpd-accel publish` writes datasets for URLs") from None
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if isinstance(error, PERMANENT):
                raise UnreachableError(f"{url}: cannot be read ({reason})") from None
            if wait is None:
                raise UnreachableError(f"{url}: cannot be read ({reason}), tried {len(WAITS) + 1} times") from None
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _meant(error: Exception) -> BaseException:
    """The error itself, but for fsspec's HTTP, to which a server that does not answer is a missing file."""
    cause = error.__cause__
    hidden = isinstance(error, FileNotFoundError) and cause is not None and getattr(cause, "status", None) != 404
    return cause if hidden and cause is not None else error


@dataclass(frozen=True)
class Published:
    """The files of a published dataset, and where they are cached. Picklable."""

    path: Path | str
    layout: Layout
    folder: Path  # of the cache

    @classmethod
    def open(cls, path: Path | str, layout: Layout, *, fingerprint: str) -> "Published":
        key = hashlib.sha256(f"{fingerprint} {layout.model_dump_json()}".encode()).hexdigest()[:32]
        return cls(path, layout, cache_root() / key)

    def cached(self, part: Part) -> Path:
        """The folder of a part as Arrow, downloaded first where it is not there yet.

        Raises:
            DataError: a file cannot be had, or is not the one that was published.
        """
        folder = self.folder / part
        if folder.is_dir():
            return folder
        files = self.layout.files(part)
        say(f"{self.path}: downloading {part}, {self.layout.size(part) / 1e6:.1f} MB, into {folder}")
        with written_to(folder), locked(self.folder / f"{part}.lock"):
            if folder.is_dir():  # another process was first
                return folder
            staging = self.folder / f".{part}"
            (staging / "arrow").mkdir(parents=True, exist_ok=True)
            for number, file in enumerate(track(files, f"downloading {part}", total=len(files))):
                arrow = staging / "arrow" / f"{number:05}"
                if not arrow.is_dir():  # else it is there since a start that was interrupted
                    self._convert(file, staging / "work").rename(arrow)
            shutil.rmtree(staging / "work", ignore_errors=True)
            (staging / "arrow").rename(folder)
            staging.rmdir()
        return folder

    def _convert(self, file: PublishedFile, work: Path) -> Path:
        """A folder of one Parquet file as Arrow, downloaded and verified."""
        shutil.rmtree(work, ignore_errors=True)
        (work / "arrow").mkdir(parents=True)
        url, options = join(self.path, file.path), datasets.DownloadConfig(cache_dir=str(work / "parquet"))
        with quiet_datasets():
            manager = datasets.DownloadManager(download_config=options)
            downloaded = Path(persistently(url, lambda: manager.download(url)))
            check_size(url, downloaded.stat().st_size, file)
            with downloaded.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                    raise DataError(f"{url}: not the file that dataset.json describes (SHA-256); {AGAIN}")
            try:
                rows = Dataset.from_parquet(str(downloaded), cache_dir=str(work / "cache"))
            except datasets.exceptions.DatasetGenerationError as error:
                if isinstance(error.__cause__, OSError):  # the disk is full, most likely
                    raise error.__cause__ from None
                raise DataError(f"{url}: cannot be read as Parquet ({error}); {AGAIN}") from None
        for written in rows.cache_files:
            path = Path(written["filename"])
            path.rename(work / "arrow" / path.name)
        return work / "arrow"

    @cached_property
    def groups(self) -> list[tuple[PublishedFile, int]]:
        """File, and number in it, of each row group of the images."""
        return [(file, number) for file in self.layout.images for number in range(len(file.groups))]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each row group of the images, and behind the last one their number."""
        return np.cumsum([0, *(rows for file in self.layout.images for rows in file.groups)])

    def read_group(self, group: int) -> pa.Table:
        """One row group of the images, read where it is.

        Raises:
            DataError: it cannot be had, or its file is not the one that was published.
        """
        file, number = self.groups[group]
        url = join(self.path, file.path)

        def read() -> pa.Table:
            system, place = url_to_fs(url)
            with system.open(place, "rb", block_size=READ_AHEAD, cache_type="readahead") as content:
                check_size(url, content.seek(0, os.SEEK_END), file)
                try:
                    # One thread: reading happens in this one, so that nothing outlives it.
                    table = pq.ParquetFile(content, page_checksum_verification=True).read_row_group(
                        number, use_threads=False
                    )
                except (pa.ArrowInvalid, IndexError) as error:
                    raise DataError(f"{url}: row group {number} is damaged ({error}); {AGAIN}") from None
            if len(table) != file.groups[number]:
                raise DataError(f"{url}: row group {number} has {len(table)} images; {AGAIN}")
            if images_digest(table) != file.digests[number]:
                raise DataError(f"{url}: row group {number} is not what dataset.json describes (SHA-256); {AGAIN}")
            return table

        return persistently(url, read)


def check_size(url: str, size: int, file: PublishedFile) -> None:
    if size != file.size:
        raise DataError(f"{url}: {size} bytes, but dataset.json says {file.size}: cut off or replaced; {AGAIN}")


def open_arrow(folder: Path) -> Dataset:
    """The Arrow files of a cached part as one dataset, memory-mapped."""
    return datasets.concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(folder.glob("*/*.arrow"))])


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """What goes wrong with the local disk, as one message."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: the cache cannot be written: {error.strerror or error}; HF_DATASETS_CACHE names another place"
        ) from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While no other process of the node, and no other thread, is inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """The library's own bars count Arrow shards, which mean nothing to the person waiting."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
