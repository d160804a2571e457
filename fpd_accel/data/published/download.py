"""Published datasets: Parquet files in a folder or behind a URL, and their local cache.

`dataset.json` lists the files with size, SHA-256 and row groups, by which downloads are verified. The cache is beside
that of `datasets` (`HF_DATASETS_CACHE`), with one folder for each content and layout, so another dataset under the same
URL gets another folder. It holds `people/` and `images/` as Arrow, with a folder for each Parquet file. Each part is
downloaded by one process of the node and renamed when it is complete.
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

from fpd_accel.console import say, track, warn
from fpd_accel.errors import DataError
from fpd_accel.files import is_url, sha256, write_whole

Table = Literal["people", "images"]
PARTS: tuple[Table, ...] = ("people", "images")
RETRY_DELAYS = (1.0, 4.0, 10.0)  # seconds before each retry of a download
ADVICE = "publish the dataset again"
BLOCK_SIZE = 2**18  # bytes per request: holds the small columns of a row group, or its footer
# Errors that a retry does not fix.
PERMANENT_ERRORS = (ImportError, NotImplementedError, OfflineModeIsEnabled, PermissionError, ValueError)

Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Result = TypeVar("Result")


class UnreachableError(DataError):
    """A file that cannot be reached: not even its absence is known."""


def images_digest(table: pa.Table) -> str:
    """Return the SHA-256 of the ids and bytes of the images in a row group."""
    digest = hashlib.sha256(repr(table.column("id").to_pylist()).encode())
    for image in table.column("bytes"):
        digest.update(image.as_buffer())
    return digest.hexdigest()


class PublishedFile(BaseModel):
    """A Parquet file as `dataset.json` lists it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, Field(pattern=r"^(images|people)/\w+\.parquet$")]  # relative to the dataset's folder
    size: Count  # bytes
    sha256: Sha256
    groups: tuple[Count, ...]  # rows of each row group
    digests: tuple[Sha256, ...] = ()  # `images_digest` of each row group, as those are read one by one


class PublishedLayout(BaseModel):
    """The files of a published dataset: the entry `parquet` of `dataset.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: tuple[PublishedFile, ...]
    people: tuple[PublishedFile, ...]

    def files(self, part: Table) -> tuple[PublishedFile, ...]:
        """Return the files of a table."""
        return self.images if part == "images" else self.people

    def rows(self, part: Table) -> int:
        """Return the number of rows of a table."""
        return sum(sum(file.groups) for file in self.files(part))

    def size(self, part: Table) -> int:
        """Return the size of a table's files in bytes."""
        return sum(file.size for file in self.files(part))


def cache_root() -> Path:
    """Return the folder of downloads; `HF_DATASETS_CACHE` or `HF_HOME` move it."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "fpd_accel"


def read_description(path: Path | str) -> bytes:
    """Return the content of a dataset's `dataset.json`; for a URL that cannot be reached, the last one downloaded."""
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
    remembered = cache_root() / "descriptions" / f"{sha256(url)[:32]}.json"
    try:
        content = with_retries(url, lambda: _read(url))
    except UnreachableError as error:
        if not remembered.is_file():
            raise
        warn(f"{error}; using its dataset.json of the last download")
        return remembered.read_bytes()
    if not remembered.is_file() or remembered.read_bytes() != content:
        write_whole(remembered, content)
    return content


def join(folder: Path | str, name: str) -> str:
    """Return the path or URL of a file in a folder."""
    return f"{str(folder).rstrip('/')}/{name}"


def _read(url: str) -> bytes:
    system, path = url_to_fs(url)
    return system.cat_file(path)


def with_retries(url: str, read: Callable[[], Result]) -> Result:
    """Return the result of `read`, retried after each of `RETRY_DELAYS`; raise its last error as DataError."""
    for delay in (*RETRY_DELAYS, None):
        try:
            return read()
        except DataError:
            raise
        except Exception as raised:  # each file system has its own errors
            # fsspec's HTTP reports an unreachable server as a missing file, with the actual error as its cause.
            is_hidden = isinstance(raised, FileNotFoundError) and getattr(raised.__cause__, "status", None) != 404
            error = (raised.__cause__ or raised) if is_hidden else raised
            if isinstance(error, FileNotFoundError):
                raise DataError(f"{url}: no such file; `fpd-accel publish` writes datasets for URLs") from None
            reason = f"{url}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
            if isinstance(error, PERMANENT_ERRORS):
                raise UnreachableError(reason) from None
            if delay is None:
                raise UnreachableError(f"{reason}, tried {len(RETRY_DELAYS) + 1} times") from None
            time.sleep(delay)
    raise AssertionError("the last try returns or raises")


@dataclass(frozen=True)
class Published:
    """The files of a published dataset, and their cache. Picklable."""

    path: Path | str
    layout: PublishedLayout
    fingerprint: str

    @cached_property
    def folder(self) -> Path:
        """The cache folder of this content and layout."""
        return cache_root() / sha256(f"{self.fingerprint} {self.layout.model_dump_json()}")[:32]

    def cached(self, part: Table) -> Path:
        """Return the folder of a part as Arrow; download it first if it is not cached."""
        folder = self.folder / part
        if folder.is_dir():
            return folder
        say(f"{self.path}: downloading {part}, {self.layout.size(part) / 1e6:.1f} MB, into {folder}")
        with translate_disk_errors(folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{part}.lock"):
                if not folder.is_dir():  # another process may have downloaded it meanwhile
                    self._download(part, folder)
        return folder

    def _download(self, part: Table, folder: Path) -> None:
        """Convert the files of a part one by one in a temporary folder, where an interrupted download goes on."""
        files = self.layout.files(part)
        staging = self.folder / f".{part}"
        (staging / "arrow").mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(track(files, f"downloading {part}", total=len(files))):
            arrow = staging / "arrow" / f"{number:05}"
            if not arrow.is_dir():
                self._convert(file, staging / "work").rename(arrow)
        shutil.rmtree(staging / "work", ignore_errors=True)
        (staging / "arrow").rename(folder)
        staging.rmdir()

    def _convert(self, file: PublishedFile, work: Path) -> Path:
        """Return a folder with one Parquet file, downloaded and verified, as Arrow."""
        shutil.rmtree(work, ignore_errors=True)
        (work / "arrow").mkdir(parents=True)
        url, options = join(self.path, file.path), datasets.DownloadConfig(cache_dir=str(work / "parquet"))
        with quiet_datasets():
            manager = datasets.DownloadManager(download_config=options)
            downloaded = Path(with_retries(url, lambda: manager.download(url)))
            _check_size(url, downloaded.stat().st_size, file)
            if sha256(downloaded) != file.sha256:
                raise DataError(f"{url}: not the file that dataset.json describes (SHA-256); {ADVICE}")
            try:
                rows = Dataset.from_parquet(str(downloaded), cache_dir=str(work / "cache"))
            except datasets.exceptions.DatasetGenerationError as error:
                if isinstance(error.__cause__, OSError):  # most likely a full disk
                    raise error.__cause__ from None
                raise DataError(f"{url}: cannot be read as Parquet ({error}); {ADVICE}") from None
        for written in rows.cache_files:
            path = Path(written["filename"])
            path.rename(work / "arrow" / path.name)
        return work / "arrow"

    @cached_property
    def groups(self) -> list[tuple[PublishedFile, int]]:
        """(file, number within the file) of each row group of the images."""
        return [(file, number) for file in self.layout.images for number in range(len(file.groups))]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each row group of the images, followed by the number of images."""
        return np.cumsum([0, *(rows for file in self.layout.images for rows in file.groups)])

    def read_group(self, group: int) -> pa.Table:
        """Return one row group of the images, read at its source and verified."""
        file, number = self.groups[group]
        url = join(self.path, file.path)

        def read() -> pa.Table:
            system, path = url_to_fs(url)
            with system.open(path, "rb", block_size=BLOCK_SIZE, cache_type="readahead") as content:
                _check_size(url, content.seek(0, os.SEEK_END), file)
                try:
                    parquet = pq.ParquetFile(content, page_checksum_verification=True)
                    # Without threads, so that no read outlives this call.
                    table = parquet.read_row_group(number, use_threads=False)
                except (pa.ArrowInvalid, IndexError) as error:
                    raise DataError(f"{url}: row group {number} is damaged ({error}); {ADVICE}") from None
            if len(table) != file.groups[number]:
                raise DataError(f"{url}: row group {number} has {len(table)} images; {ADVICE}")
            if images_digest(table) != file.digests[number]:
                raise DataError(f"{url}: row group {number} is not that of dataset.json (SHA-256); {ADVICE}")
            return table

        return with_retries(url, read)


def _check_size(url: str, size: int, file: PublishedFile) -> None:
    if size != file.size:
        raise DataError(f"{url}: {size} bytes, but dataset.json says {file.size}: truncated or replaced; {ADVICE}")


def open_arrow(folder: Path) -> Dataset:
    """Return the Arrow files of a cached part as one memory-mapped dataset."""
    return datasets.concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(folder.glob("*/*.arrow"))])


@contextmanager
def translate_disk_errors(folder: Path) -> Iterator[None]:
    """Raise errors of the local disk as DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: the cache cannot be written: {error.strerror or error}; HF_DATASETS_CACHE names another folder"
        ) from None


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide the progress bars of `datasets`, which count Arrow files: they mean nothing to the user."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
