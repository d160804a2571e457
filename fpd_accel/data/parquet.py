"""Prepared shards as Parquet, for the Hub or any place that fsspec can write to.

``images/`` holds the original bytes in row groups of a stated number of images, which a stream fetches one by one;
``people/`` the people in their order; ``dataset.json`` what it said before, and size, SHA-256 and row groups of each
file. It is the same dataset, by its fingerprint too.
"""

import hashlib
import json
import shutil
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

from fpd_accel.data.remote import Layout, Part, PublishedFile, images_digest, join
from fpd_accel.data.shards import Shards
from fpd_accel.errors import DataError
from fpd_accel.log import track

PEOPLE_PER_GROUP = 10_000


def publish(shards: Shards, output: str, *, images_per_group: int = 128, file_size: int = 256_000_000) -> Layout:
    """Write shards as Parquet into a new folder or below a URL.

    A local folder appears whole or not at all; elsewhere ``dataset.json`` comes last, without which it is no dataset.

    Args:
        images_per_group: images of a row group, what a stream fetches at once.
        file_size: bytes from which on the next file is begun.

    Raises:
        DataError: ``output`` has a dataset, or cannot be written.
    """
    with _outlet(output) as outlet:
        layout = Layout(
            images=_write(shards.images, "images", outlet, rows=images_per_group, file_size=file_size),
            people=_write(shards.people, "people", outlet, rows=PEOPLE_PER_GROUP, file_size=file_size),
        )
        description = shards.description | {"parquet": layout.model_dump(mode="json")}
        (outlet.staging / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        outlet.put("dataset.json")
    return layout


@dataclass
class _Outlet:
    """Where files go: they are written below ``staging``, and those for a URL leave it one by one."""

    url: str
    system: AbstractFileSystem
    place: str
    staging: Path

    def put(self, name: str) -> None:
        """Hand on a file that is whole."""
        if not isinstance(self.system, LocalFileSystem):
            with _writing(join(self.url, name)):
                self.system.makedirs(join(self.place, name).rpartition("/")[0], exist_ok=True)
                self.system.put_file(str(self.staging / name), join(self.place, name))
            (self.staging / name).unlink()


@contextmanager
def _outlet(output: str) -> Iterator[_Outlet]:
    with _writing(output):
        system, place = url_to_fs(output)
        taken = system.exists(place if isinstance(system, LocalFileSystem) else join(place, "dataset.json"))
    if taken:
        raise DataError(f"{output}: exists; remove it or choose another output")
    if not isinstance(system, LocalFileSystem):
        with tempfile.TemporaryDirectory(prefix="fpd_accel_") as folder:
            yield _Outlet(output, system, place, Path(folder))
        return
    staging = Path(place).with_name(f".{Path(place).name}.{uuid.uuid4().hex[:8]}")
    try:
        with _writing(output):
            staging.mkdir(parents=True)
        yield _Outlet(output, system, place, staging)
        with _writing(output):
            staging.rename(place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _writing(place: str) -> Iterator[None]:
    """What a file system raises, as one message."""
    try:
        yield
    except Exception as error:  # every file system raises its own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{place}: cannot be written ({reason}); choose another output") from None


def _write(dataset: Dataset, part: Part, outlet: _Outlet, *, rows: int, file_size: int) -> tuple[PublishedFile, ...]:
    """A table in row groups of ``rows``, in as many files as it takes."""
    table = dataset.with_format("arrow")
    starts = track(range(0, len(table), rows), f"writing {part}", total=-(-len(table) // rows))
    groups = (table[start : start + rows] for start in starts)
    files: list[PublishedFile] = []
    (outlet.staging / part).mkdir()
    for first in groups:
        files.append(_write_file(first, groups, f"{part}/{len(files):05}.parquet", outlet, file_size=file_size))
    return tuple(files)


def _write_file(
    first: pa.Table, others: Iterator[pa.Table], name: str, outlet: _Outlet, *, file_size: int
) -> PublishedFile:
    """One file of ``first`` and as many of the ``others`` as fit."""
    path, counts, digests = outlet.staging / name, [len(first)], list[str]()
    is_images = name.startswith("images")
    options: dict[str, Any] = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    options["compression"] = "NONE" if is_images else "ZSTD"  # a JPEG has nothing left to compress
    with _writing(str(path)), pq.ParquetWriter(path, first.schema, **options) as writer:
        writer.write_table(first, row_group_size=len(first))
        digests += [images_digest(first)] if is_images else []
        while path.stat().st_size < file_size and (table := next(others, None)) is not None:
            writer.write_table(table, row_group_size=len(table))
            counts.append(len(table))
            digests += [images_digest(table)] if is_images else []
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    file = PublishedFile(
        path=name, size=path.stat().st_size, sha256=digest, groups=tuple(counts), digests=tuple(digests)
    )
    outlet.put(name)
    return file
