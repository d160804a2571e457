"""Publication of prepared shards as Parquet, on the Hub or any other file system of fsspec.

`images/` holds the original bytes in row groups of a fixed number of images, which a stream fetches one by one;
`people/` holds the people in their order; `dataset.json` is that of the shards, with size, SHA-256 and row groups of
each file added. The published dataset has the fingerprint of the shards.
"""

import itertools
import json
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from fpd_accel.console import track
from fpd_accel.data.published.download import PublishedFile, PublishedLayout, Table, images_digest, join
from fpd_accel.data.shards import FORMAT, Shards
from fpd_accel.errors import DataError
from fpd_accel.files import sha256, staged_folder

PEOPLE_PER_GROUP = 10_000


def publish(
    shards: Shards, output: str, *, images_per_group: int = 128, file_size: int = 256_000_000
) -> PublishedLayout:
    """Write shards as Parquet into a new folder or below a URL.

    A local folder appears complete or not at all; at a URL `dataset.json` is written last, so that an incomplete copy
    is not a dataset. A stream fetches row groups of `images_per_group` at once; a file ends at `file_size` bytes.

    Raises:
        DataError: `output` has a dataset, or cannot be written.
    """
    with _open_target(output) as target:
        layout = PublishedLayout(
            images=_write(shards.images, "images", target, rows=images_per_group, file_size=file_size),
            people=_write(shards.people, "people", target, rows=PEOPLE_PER_GROUP, file_size=file_size),
        )
        description = shards.description | {"format": FORMAT, "parquet": layout.model_dump(mode="json")}
        (target.staging / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        target.upload("dataset.json")
    return layout


@dataclass
class _Target:
    """The destination of the files: they are written in `staging`, and uploaded one by one if it is a URL."""

    url: str
    system: AbstractFileSystem
    path: str  # of the dataset in `system`
    staging: Path

    def upload(self, name: str) -> None:
        """Move a complete file to a URL; files for a local folder stay."""
        if not isinstance(self.system, LocalFileSystem):
            with _translate_errors(join(self.url, name)):
                self.system.makedirs(join(self.path, name).rpartition("/")[0], exist_ok=True)
                self.system.put_file(str(self.staging / name), join(self.path, name))
            (self.staging / name).unlink()


@contextmanager
def _open_target(output: str) -> Iterator[_Target]:
    with _translate_errors(output):
        system, path = url_to_fs(output)
        is_local = isinstance(system, LocalFileSystem)
        exists = system.exists(path if is_local else join(path, "dataset.json"))
    if exists:
        raise DataError(f"{output}: exists; remove it or choose another output")
    if is_local:
        with _translate_errors(output, OSError), staged_folder(Path(path), own=uuid.uuid4().hex[:8]) as staging:
            yield _Target(output, system, path, staging)
    else:
        with tempfile.TemporaryDirectory(prefix="fpd_accel_") as folder:
            yield _Target(output, system, path, Path(folder))


@contextmanager
def _translate_errors(path: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Raise errors of a file system as DataError; remote file systems have kinds of their own."""
    try:
        yield
    except kind as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{path}: cannot be written ({reason}); choose another output") from None


def _write(dataset: Dataset, part: Table, target: _Target, *, rows: int, file_size: int) -> tuple[PublishedFile, ...]:
    """Write a table in row groups of `rows`, in as many files as needed."""
    table = dataset.with_format("arrow")
    starts = track(range(0, len(table), rows), f"writing {part}", total=-(-len(table) // rows))
    groups = (table[start : start + rows] for start in starts)
    files: list[PublishedFile] = []
    (target.staging / part).mkdir()
    for first in groups:
        files.append(_write_file(first, groups, f"{part}/{len(files):05}.parquet", target, file_size=file_size))
    return tuple(files)


def _write_file(
    first: pa.Table, others: Iterator[pa.Table], name: str, target: _Target, *, file_size: int
) -> PublishedFile:
    """Write one file of `first` and as many of the `others` as fit."""
    path, counts, digests = target.staging / name, list[int](), list[str]()
    is_images = name.startswith("images")
    options: dict[str, Any] = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    options["compression"] = "NONE" if is_images else "ZSTD"  # JPEG data do not compress further
    with _translate_errors(str(path)), pq.ParquetWriter(path, first.schema, **options) as writer:
        for table in itertools.chain([first], others):
            writer.write_table(table, row_group_size=len(table))
            counts.append(len(table))
            digests += [images_digest(table)] if is_images else []
            if path.stat().st_size >= file_size:
                break
    file = PublishedFile(
        path=name, size=path.stat().st_size, sha256=sha256(path), groups=tuple(counts), digests=tuple(digests)
    )
    target.upload(name)
    return file
