"""The dataset on disk: images and people as memory-mapped Arrow, and a JSON that says what they are.

``images/`` has one row per image with its original bytes, never re-encoded; ``people/`` one flat row per person;
``dataset.json`` the skeleton, the counts and where it came from. Opening costs milliseconds, whatever the size.
"""

import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import datasets
import numpy as np
from datasets import Dataset, Features, Value
from datasets import List as Sequence

from fpd_accel.errors import DataError
from fpd_accel.geometry import Side, clip_box
from fpd_accel.skeleton import Skeleton

FORMAT = 2  # since 2 people may have head sizes, and boxes that are not cut to the image
OLDEST_FORMAT = 1
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
            "box": Sequence(Value("float32"), length=4),
            "keypoints": Sequence(Value("float32"), length=3 * num_keypoints),
            "area": Value("float32"),
            "crowd": Value("bool"),
            "score": Value("float32"),
            "unused": Value("string"),  # why the person is never cropped; empty for those that are
        }
        | head
    )


def decode_image(data: bytes) -> np.ndarray | None:
    """RGB pixels (height, width, 3), the EXIF orientation ignored as COCO's annotations want; None if undecodable."""
    if not data:
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)


def read_image(path: Path) -> tuple[str | None, bytes, tuple[int, int]]:
    """The problem with an image file (a key of ``SKIPPED`` in ``coco.py``, or None), its bytes, its (height, width)."""
    try:
        data = path.read_bytes()
    except OSError:
        return "image_missing", b"", (0, 0)
    pixels = decode_image(data)
    return ("image_corrupt", b"", (0, 0)) if pixels is None else (None, data, pixels.shape[:2])


class Shards:
    """A prepared dataset, opened memory-mapped. Picklable: a worker opens it again.

    Raises:
        DataError: the folder is not a prepared dataset, or one of another format, or part of it is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._stamps: dict[Path, tuple[int, ...] | None] = {}
        description = self.path / "dataset.json"
        if not description.is_file():
            raise DataError(
                f"{self.path}: not a prepared dataset (no dataset.json); write one with `fpd-accel prepare`"
            )
        try:
            self.description: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
            found = self.description["format"]
            readable = OLDEST_FORMAT <= found <= FORMAT
            if readable:
                self.skeleton = Skeleton.model_validate(self.description["skeleton"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{description}: damaged ({error}); write the dataset again with `fpd-accel prepare`"
            ) from None
        if not readable:
            raise DataError(
                f"{description}: format {found}, but this version reads {OLDEST_FORMAT} to {FORMAT}; prepare the "
                "dataset again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("images", "people", "usable")}

    def open(self) -> None:
        """Map the files. Workers that are forked after that share what is known of them, and need not read it again."""
        _ = self.images, self.people, self.usable

    @cached_property
    def images(self) -> Dataset:
        return self._open("images")

    @cached_property
    def people(self) -> Dataset:
        if not self.description["counts"]["people"]:
            features = people_features(self.skeleton.num_keypoints)
            return Dataset.from_dict({name: [] for name in features}, features=features).with_format("numpy")
        return self._open("people").with_format("numpy")

    def _open(self, name: str) -> Dataset:
        try:
            self._stamps |= {path: _stamp(path) for path in (self.path / name).glob("*.arrow")}
            return datasets.load_from_disk(str(self.path / name))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{self.path / name}: cannot be opened ({error}); prepare the dataset again") from None

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
        """Rows of ``people`` that can be cropped, in order."""
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
                self.counts["people"] += 1
                self.counts["usable"] += not reason
                if reason:
                    self.unused[reason] = self.unused.get(reason, 0) + 1
                self.digest.update(repr((record["id"], record["box"].tolist(), record["keypoints"].tolist())).encode())
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
