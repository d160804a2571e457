"""Prepared datasets on disk ("shards"): images and people as memory-mapped Arrow, described by a JSON file.

`images/` has one row per image with its original bytes, never re-encoded; `people/` has one flat row per person;
`dataset.json` has the skeleton, the counts and the sources. Opening takes milliseconds, whatever the size. A dataset
that `fpd-accel publish` wrote is opened by path or URL and cached in this form (see `published/download.py`).
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value

from fpd_accel.data.arrow_columns import BytesColumn, Column
from fpd_accel.data.images import StoredImage
from fpd_accel.data.published.download import PARTS, Published, PublishedLayout, Table, open_arrow, read_description
from fpd_accel.errors import DataError
from fpd_accel.files import is_url
from fpd_accel.geometry import Side, clip_box
from fpd_accel.skeleton import Skeleton

FORMAT = 3  # 2 added head sizes and boxes that are not clipped; 3 renamed `unused` to `exclude_reason`
OLDEST_FORMAT = 1
LABELS = ("image_row", "box", "keypoints")  # columns of people that a batch is made from
USABLE = "usable.npy"  # int32 rows of the usable people; older datasets lack it
IMAGE_FEATURES = Features(
    {"id": Value("int64"), "file_name": Value("string"), "width": Value("int32"), "height": Value("int32")}
    | {"bytes": Value("binary")}
)


def people_features(num_keypoints: int, *, head_sizes: bool = False) -> Features:
    """Return the columns of `people/`; keypoints are flat (x, y, v), v as in COCO: 0 unlabelled, 1 hidden, 2 seen."""
    head = {"head_size": Value("float32")} if head_sizes else {}  # pixels, the unit of PCKh; NaN: unknown
    columns = {
        **{name: Value("int64") for name in ("id", "image_id", "image_row")},
        "box": List(Value("float32"), length=4),
        "keypoints": List(Value("float32"), length=3 * num_keypoints),
        "area": Value("float32"),
        "crowd": Value("bool"),
        "score": Value("float32"),
        "exclude_reason": Value("string"),  # why the person is never cropped; empty for usable people
    }
    return Features(columns | head)


class Shards:
    """A prepared dataset, opened memory-mapped. Picklable: a worker opens it again.

    Args:
        path: A folder that `fpd-accel prepare` or `fpd-accel publish` wrote, or the URL of a published dataset.

    Raises:
        DataError: The folder is not a prepared dataset or has another format, or a part is missing or cannot be
            downloaded.
    """

    cached_parts: tuple[Table, ...] = PARTS  # of a published dataset, downloaded before use

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path | str = str(path) if is_url(path) else Path(path)
        self.published: Published | None = None
        # Pixels by the row of the image, or None if they are not kept on a local disk (see pixel_cache.py).
        self.decoded: Callable[[int], np.ndarray | None] | None = None
        self._stamps: dict[Path, tuple[int, ...] | None] = {}
        name, content = f"{self.path}/dataset.json", read_description(self.path)
        try:
            self.description: dict[str, Any] = json.loads(content)
            found = self.description["format"]
            readable = OLDEST_FORMAT <= found <= FORMAT
            _ = self.description["sha256"], int(self.description["counts"]["people"])
            if readable:
                self.skeleton = Skeleton.model_validate(self.description["skeleton"])
                if "unused" in self.description:  # up to format 2
                    self.description["exclude_reason"] = self.description.pop("unused")
            if readable and "parquet" in self.description:
                layout = PublishedLayout.model_validate(self.description["parquet"])
                self.published = Published(self.path, layout, self.description["sha256"])
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
            raise DataError(f"{self.path}: prepared for local use; publish it with `fpd-accel publish`")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not isinstance(getattr(type(self), k, None), cached_property)}

    def open(self) -> None:
        """Map the files, so that forked workers share the metadata instead of reading it again.

        Arrow counts references, so a worker copies the metadata of each record batch it reads: 2.3 kB per batch (1000
        people, 100 images), about 10 MB per worker after a pass over a million people. Beside the order of an epoch
        this is the only memory that grows with the dataset.
        """
        _ = self.images, self.people, self.usable, self._labels, self._stored

    @cached_property
    def images(self) -> Dataset:
        """The table of images."""
        return self._open("images")

    @cached_property
    def people(self) -> Dataset:
        """The table of people, in NumPy format."""
        if not self.description["counts"]["people"]:
            features = people_features(self.skeleton.num_keypoints)
            return Dataset.from_dict({name: [] for name in features}, features=features).with_format("numpy")
        people = self._open("people").with_format("numpy")
        # Datasets up to format 2 have the column under its old name.
        return people.rename_column("unused", "exclude_reason") if "unused" in people.column_names else people

    @cached_property
    def image_rows(self) -> np.ndarray:
        """The row of each usable person's image."""
        return self.people.data.column("image_row").to_numpy()[self.usable]

    @cached_property
    def _labels(self) -> dict[str, Column]:
        return {name: Column(self.people.data.column(name)) for name in LABELS}

    @cached_property
    def _stored(self) -> tuple[BytesColumn, Column, Column]:
        table = self.images.data
        return BytesColumn(table.column("bytes")), Column(table.column("height")), Column(table.column("width"))

    def read_images(self, rows: Sequence[int]) -> list[StoredImage]:
        """Return images by their rows; their bytes or pixels are views of the mapped files."""
        encoded, heights, widths = self._stored
        images = []
        for row, height, width in zip(rows, heights[rows].tolist(), widths[rows].tolist(), strict=True):
            pixels = self.decoded(row) if self.decoded is not None else None
            images.append(StoredImage(encoded[row] if pixels is None else pixels, height, width))
        return images

    def image_sizes(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the heights and widths of images in pixels."""
        _, heights, widths = self._stored
        return heights[rows], widths[rows]

    def damaged_image(self, row: int) -> DataError:
        """Return the error for an image that decoded when the shards were prepared; it names the image's file."""
        return DataError(f"{self.path}: image {self.images[[row]]['file_name'][0]} no longer decodes; prepare it again")

    def _open(self, name: Table) -> Dataset:
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
        """Return a message if a file was replaced or removed since it was opened, else None.

        Processes that open the dataset later would read other data.
        """
        for path, stamp in self._stamps.items():
            if (now := _stamp(path)) != stamp:
                return f"{path}: was {'removed' if now is None else 'changed'}"
        return None

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of people and images: equal for shards with the same content."""
        return str(self.description["sha256"])

    @cached_property
    def usable(self) -> np.ndarray:
        """Rows of the people that can be cropped, ascending; memory-mapped, so that processes share them."""
        file = self.folders["people"].with_name(USABLE)
        if self.published is None and file.is_file():  # otherwise the whole column has to be read
            try:
                rows = np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)
                if rows.shape != (self.description["counts"]["usable"],):
                    raise ValueError(f"{rows.shape} rows")
                if len(rows) and rows[-1] >= self.description["counts"]["people"]:
                    raise ValueError(f"row {rows[-1]} of {self.description['counts']['people']}")
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{file}: damaged ({error}); prepare the dataset again") from None
            return rows
        return np.flatnonzero(self.columns(["exclude_reason"])["exclude_reason"] == "")

    @property
    def has_head_sizes(self) -> bool:
        """Whether usable people have a `head_size`, which PCKh needs."""
        return self.description["counts"].get("head_sizes", 0) > 0

    def box_to_crop(self, box: np.ndarray, *, width: Side, height: Side) -> np.ndarray:
        """Return the box to crop around: clipped to the image, unless the dataset keeps its boxes as they are.

        `box` is one box or several, (..., 4): x, y, width, height in pixels of an image of `width` x `height`.
        """
        return clip_box(box, width, height) if self.description.get("clip_boxes", True) else box

    @property
    def annotated(self) -> "Shards":
        """The shards with the ground truth: these, or the ones that a detector's boxes belong to."""
        return self

    def columns(self, names: Iterable[str], rows: Sequence[int] | np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return columns of all people or of the given rows; far faster than indexing `people`."""
        found = {}
        for name in names:  # the columns that every batch reads are cached
            column = self._labels[name] if name in LABELS else Column(self.people.data.column(name))
            found[name] = column.all() if rows is None else column[rows]
        return found

    def __len__(self) -> int:
        return len(self.usable)

    def order(self, seed: int, epoch: int, *, source: int) -> np.ndarray:
        """Return the permutation of `range(len(self))` of an epoch; `source` is the dataset's number in its mixture."""
        order = np.arange(len(self), dtype=np.int32)  # one per worker: 4 MB for a million people
        np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, source])).shuffle(order)
        return order


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return a value that differs for a file that replaces this one, or None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
