"""The dataset on disk: images and people as memory-mapped Arrow, and a JSON that says what they are.

``images/`` has one row per image with its original bytes, never re-encoded; ``people/`` one flat row per person;
``dataset.json`` the skeleton, the counts and where it came from. Opening costs milliseconds, whatever the size. What
``fpd-accel publish`` wrote is opened by path or URL, and cached in this form (see ``remote.py``).
"""

import hashlib
import itertools
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value

from fpd_accel.config import is_url
from fpd_accel.data.columns import BytesColumn, Column
from fpd_accel.data.images import KeptPixels, StoredImage
from fpd_accel.data.remote import PARTS, Layout, Part, Published, open_arrow, quiet_datasets, read_description
from fpd_accel.errors import DataError
from fpd_accel.geometry import Side, clip_box
from fpd_accel.skeleton import Skeleton

FORMAT = 2  # since 2 people may have head sizes, and boxes that are not cut to the image
OLDEST_FORMAT = 1
LABELS = ("image_row", "box", "keypoints")  # columns of people that a batch is made from
USABLE = "usable.npy"  # int32 rows of the people that can be cropped; datasets written before it do without
IMAGE_FEATURES = Features(
    {"id": Value("int64"), "file_name": Value("string"), "width": Value("int32"), "height": Value("int32")}
    | {"bytes": Value("binary")}
)


def people_features(num_keypoints: int, *, head_sizes: bool = False) -> Features:
    """Columns of ``people/``; keypoints are flat (x, y, v) triples, v as in COCO (0 unlabelled, 1 hidden, 2 seen)."""
    head = {"head_size": Value("float32")} if head_sizes else {}  # pixels, what PCKh divides by; not-a-number: unknown
    return Features(
        {
            "id": Value("int64"),
            "image_id": Value("int64"),
            "image_row": Value("int64"),
            "box": List(Value("float32"), length=4),
            "keypoints": List(Value("float32"), length=3 * num_keypoints),
            "area": Value("float32"),
            "crowd": Value("bool"),
            "score": Value("float32"),
            "unused": Value("string"),  # why the person is never cropped; empty for those that are
        }
        | head
    )


class Shards:
    """A prepared dataset, opened memory-mapped. Picklable: a worker opens it again.

    ``path`` is a folder that `fpd-accel prepare` or `fpd-accel publish` wrote, or the URL of one of the latter.

    Raises:
        DataError: the folder is not a prepared dataset, or one of another format, or part of it is missing or cannot
            be downloaded.
    """

    cached_parts: tuple[Part, ...] = PARTS  # of a published dataset: what is downloaded before its use

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path | str = str(path) if is_url(path) else Path(path)
        self.published: Published | None = None
        self.decoded: KeptPixels | None = None  # of images whose pixels are on a disk: see decoded.py
        self._stamps: dict[Path, tuple[int, ...] | None] = {}
        name, content = f"{self.path}/dataset.json", read_description(self.path)
        try:
            self.description: dict[str, Any] = json.loads(content)
            found = self.description["format"]
            readable = OLDEST_FORMAT <= found <= FORMAT
            _ = self.description["sha256"], int(self.description["counts"]["people"])
            if readable:
                self.skeleton = Skeleton.model_validate(self.description["skeleton"])
            if readable and "parquet" in self.description:
                layout = Layout.model_validate(self.description["parquet"])
                self.published = Published.open(self.path, layout, fingerprint=self.description["sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{name}: damaged ({error}); write the dataset again with `fpd-accel prepare`") from None
        if not readable:
            raise DataError(
                f"{name}: format {found}, but this version reads {OLDEST_FORMAT} to {FORMAT}; prepare the dataset again"
            )
        if self.published is not None:
            self.folders = {part: self.published.cached(part) for part in self.cached_parts}
        elif isinstance(self.path, Path):
            self.folders = {part: self.path / part for part in PARTS}
        else:
            raise DataError(f"{self.path}: prepared for its own machine; write it there with `fpd-accel publish`")

    def __getstate__(self) -> dict[str, Any]:
        opened = ("images", "people", "usable", "image_rows", "_labels", "_stored")
        return {k: v for k, v in self.__dict__.items() if k not in opened}

    def open(self) -> None:
        """Map the files. Workers that are forked after that share what is known of them, and need not read it again.

        Not for ever: where a worker reads, Arrow counts references, and so copies what it knows of that record batch.
        That is 2.3 kB each (a thousand people, a hundred images), some 10 MB per worker once it has been all over a
        million people; with the order of an epoch the only memory that grows with the dataset.
        """
        _ = self.images, self.people, self.usable, self._labels, self._stored

    @cached_property
    def images(self) -> Dataset:
        return self._open("images")

    @cached_property
    def people(self) -> Dataset:
        if not self.description["counts"]["people"]:
            features = people_features(self.skeleton.num_keypoints)
            return Dataset.from_dict({name: [] for name in features}, features=features).with_format("numpy")
        return self._open("people").with_format("numpy")

    @cached_property
    def image_rows(self) -> np.ndarray:
        """The row of the image of each usable person."""
        return self.people.data.column("image_row").to_numpy()[self.usable]

    @cached_property
    def _labels(self) -> dict[str, Column]:
        return {name: Column(self.people.data.column(name)) for name in LABELS}

    @cached_property
    def _stored(self) -> tuple[BytesColumn, Column, Column]:
        table = self.images.data
        return BytesColumn(table.column("bytes")), Column(table.column("height")), Column(table.column("width"))

    def read_images(self, rows: Sequence[int]) -> list[StoredImage]:
        """Some images, whose bytes, or pixels, stay where they are."""
        encoded, heights, widths = self._stored
        sizes = zip(rows, heights[rows].tolist(), widths[rows].tolist(), strict=True)
        return [StoredImage(self._pixels(row, encoded), height, width) for row, height, width in sizes]

    def _pixels(self, row: int, encoded: BytesColumn) -> np.ndarray:
        """Of an image whose pixels are kept those, of others the bytes they are encoded in."""
        pixels = self.decoded.get(row) if self.decoded is not None else None
        return encoded[row] if pixels is None else pixels

    def image_sizes(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths of some images, pixels."""
        _, heights, widths = self._stored
        return heights[rows], widths[rows]

    def image_name(self, row: int) -> str:
        """The file that an image was prepared from."""
        return str(self.images[[row]]["file_name"][0])

    def _open(self, name: Part) -> Dataset:
        folder = self.folders[name]
        try:
            self._stamps |= {path: _stamp(path) for path in folder.rglob("*.arrow")}
            if self.published is None:
                return datasets.load_from_disk(str(folder))
            dataset = open_arrow(folder)
            if len(dataset) != self.published.layout.rows(name):
                raise ValueError(f"{len(dataset)} rows")
        except (OSError, ValueError, KeyError) as error:
            again = "prepare the dataset again" if self.published is None else "remove it, to download it again"
            raise DataError(f"{folder}: cannot be opened ({error}); {again}") from None
        return dataset

    def changed(self) -> str | None:
        """Which file is no longer the one that was opened, if any: those who open it next would read something else."""
        for path, stamp in self._stamps.items():
            now = _stamp(path)
            if now != stamp:
                return f"{path}: was {'removed' if now is None else 'changed'}"
        return None

    @property
    def fingerprint(self) -> str:
        """SHA-256 that two shards share if they hold the same people and images."""
        return str(self.description["sha256"])

    @cached_property
    def usable(self) -> np.ndarray:
        """Rows of ``people`` that can be cropped, in order; memory-mapped, so that processes share them."""
        file = self.folders["people"].with_name(USABLE)
        if self.published is None and file.is_file():  # else a column has to be read through
            try:
                rows = np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)
                if rows.shape != (self.description["counts"]["usable"],):
                    raise ValueError(f"{rows.shape} rows")
                if len(rows) and rows[-1] >= self.description["counts"]["people"]:
                    raise ValueError(f"row {rows[-1]} of {self.description['counts']['people']}")
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{file}: damaged ({error}); prepare the dataset again") from None
            return rows
        column = self.people.data.column("unused")
        chunks = [np.empty(0, dtype=bool), *(chunk.to_numpy(zero_copy_only=False) == "" for chunk in column.chunks)]
        return np.flatnonzero(np.concatenate(chunks))

    @property
    def has_head_sizes(self) -> bool:
        """Whether usable people have a ``head_size``, so that PCKh can be measured."""
        return self.description["counts"].get("head_sizes", 0) > 0

    def box_to_crop(self, box: np.ndarray, *, width: Side, height: Side) -> np.ndarray:
        """The box around which an image of this size is cropped: cut to the image, unless the dataset has it as is.

        Boxes of several images go with the width and height of each.
        """
        return clip_box(box, width, height) if self.description.get("clip_boxes", True) else box

    @property
    def annotated(self) -> "Shards":
        """The shards whose people are the ground truth: these."""
        return self

    def columns(self, names: Iterable[str], rows: Sequence[int] | np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Some columns of all people, or of some rows of them; far faster than through ``people``."""
        found = {}
        for name in names:  # those of each batch are kept at hand
            column = self._labels[name] if name in LABELS else Column(self.people.data.column(name))
            found[name] = column.all() if rows is None else column[rows]
        return found

    def __len__(self) -> int:
        return len(self.usable)

    def order(self, seed: int, epoch: int, *, source: int) -> np.ndarray:
        """The permutation of ``range(len(self))`` that is one epoch of dataset number ``source`` of a mixture."""
        order = np.arange(len(self), dtype=np.int32)  # each worker has one: 4 MB for a million people
        np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, source])).shuffle(order)
        return order


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What tells a file from one that has taken its place; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class ShardWriter:
    """Writes a dataset into a temporary sibling of ``output``; :meth:`finish` renames it, leaving the block removes it.

    ``clip_boxes``: crops show boxes cut to the image (COCO's protocol) or as they are (MPII's). ``head_sizes``: people
    have a ``head_size``. ``images_alone``: there may be nobody in them.

    Raises:
        DataError: ``output`` exists or cannot be made, or no usable person was written although there may not be
            images alone.
    """

    def __init__(
        self,
        output: Path,
        skeleton: Skeleton,
        *,
        clip_boxes: bool = True,
        head_sizes: bool = False,
        images_alone: bool = False,
    ) -> None:
        if output.exists():
            raise DataError(f"{output}: exists; remove it or choose another output")
        self.output, self.skeleton, self.clip_boxes, self.head_sizes = output, skeleton, clip_boxes, head_sizes
        self.images_alone = images_alone
        self.staging = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}")
        self.image_rows: dict[int, tuple[int, int, int]] = {}  # image id -> row, width, height
        # Without the note on where the sigmas are from: it changes neither people nor images.
        self.digest = hashlib.sha256(skeleton.model_dump_json(exclude={"sigmas_estimated"}).encode())
        self.counts = {"images": 0, "people": 0, "usable": 0} | ({"head_sizes": 0} if head_sizes else {})
        if not clip_boxes:
            self.digest.update(b"boxes as they are")
        self.unused: dict[str, int] = {}
        self.usable_rows = array("i")

    def __enter__(self) -> "ShardWriter":
        try:
            self.staging.mkdir(parents=True)
        except OSError as error:
            raise DataError(f"{self.output}: cannot be made: {error.strerror}; choose another output") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

    def write_images(self, records: Iterator[dict[str, Any]]) -> None:
        first = next(records, None)
        if first is None:  # the library refuses to write nothing
            return
        records = itertools.chain([first], records)

        def numbered() -> Iterator[dict[str, Any]]:
            for row, record in enumerate(records):
                self.image_rows[record["id"]] = (row, record["width"], record["height"])
                self.digest.update(hashlib.sha256(record["bytes"]).digest())
                yield record

        self._save("images", numbered(), IMAGE_FEATURES)
        self.counts["images"] = len(self.image_rows)

    def write_people(self, records: Iterator[dict[str, Any]]) -> None:
        def counted() -> Iterator[dict[str, Any]]:
            for record in records:
                reason = record["unused"]
                if not reason:
                    self.usable_rows.append(self.counts["people"])
                self.counts["people"] += 1
                self.counts["usable"] += not reason
                if reason:
                    self.unused[reason] = self.unused.get(reason, 0) + 1
                self.digest.update(repr((record["id"], record["box"].tolist(), record["keypoints"].tolist())).encode())
                self.digest.update(repr((reason, *(record[name] for name in ("crowd", "area", "score")))).encode())
                if self.head_sizes:
                    self.digest.update(repr(record["head_size"]).encode())
                    self.counts["head_sizes"] += not reason and record["head_size"] > 0
                yield record

        if not self.image_rows:
            return
        features = people_features(self.skeleton.num_keypoints, head_sizes=self.head_sizes)
        first = next(records, None)
        if first is None:  # as above; `Shards` knows that nobody is there
            return
        records = itertools.chain([first], records)
        self._save("people", counted(), features)

    def finish(self, *, source: dict[str, str], skipped: dict[str, int]) -> None:
        """Write ``dataset.json`` and give the dataset its name."""
        if not self.counts["usable"] and not (self.images_alone and self.counts["images"]):
            raise DataError(
                f"{self.output}: nothing to write: no person that can be used; left out: {skipped | self.unused}"
            )
        description = {
            "format": FORMAT,
            "clip_boxes": self.clip_boxes,
            "counts": self.counts,
            "skipped": skipped,
            "unused": self.unused,
            "source": source,
            "sha256": self.digest.hexdigest(),
            "skeleton": self.skeleton.model_dump(mode="json"),
        }
        if self.counts["people"]:
            np.save(self.staging / USABLE, np.asarray(self.usable_rows, dtype=np.int32), allow_pickle=False)
        (self.staging / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        try:
            self.staging.rename(self.output)
        except OSError as error:
            raise DataError(f"{self.output}: cannot be made: {error.strerror}; choose another output") from None

    def _save(self, name: str, records: Iterator[dict[str, Any]], features: Features) -> None:
        cache = self.staging / "cache"
        with quiet_datasets():
            dataset = Dataset.from_generator(
                lambda: records,
                features=features,
                cache_dir=str(cache),
                fingerprint=uuid.uuid4().hex,
                writer_batch_size=64,
            )
            dataset.save_to_disk(str(self.staging / name))
        shutil.rmtree(cache)
