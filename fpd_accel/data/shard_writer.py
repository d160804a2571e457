"""Writing of prepared datasets; `shards.py` has their format."""

import hashlib
import itertools
import json
import shutil
import uuid
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features

from fpd_accel.data.published.download import quiet_datasets
from fpd_accel.data.shards import FORMAT, IMAGE_FEATURES, USABLE, people_features
from fpd_accel.errors import DataError
from fpd_accel.files import staged_folder
from fpd_accel.skeleton import Skeleton


class ShardWriter:
    """A dataset under construction in a temporary folder, which is renamed to `output` at the end of the block.

    Write the images, then the people, then call `finish`. If the block raises, nothing is left behind.

    Args:
        clip_boxes: Boxes are clipped to the image before cropping (COCO's protocol), or used as they are (MPII's).
        head_sizes: People have a `head_size`.
        allow_no_people: Accept images without a single usable person.

    Raises:
        DataError: `output` exists or cannot be made, or no usable person was written although there must be one.
    """

    def __init__(
        self,
        output: Path,
        skeleton: Skeleton,
        *,
        clip_boxes: bool = True,
        head_sizes: bool = False,
        allow_no_people: bool = False,
    ) -> None:
        if output.exists():
            raise DataError(f"{output}: exists; remove it or choose another output")
        self.output, self.skeleton, self.clip_boxes, self.head_sizes = output, skeleton, clip_boxes, head_sizes
        self.allow_no_people = allow_no_people
        self._staged = staged_folder(output, own=uuid.uuid4().hex[:8])
        self.image_rows: dict[int, tuple[int, int, int]] = {}  # image id -> row, width, height
        # The note on the source of the sigmas changes neither people nor images, so it is left out.
        self.digest = hashlib.sha256(skeleton.model_dump_json(exclude={"sigmas_estimated"}).encode())
        self.counts = {"images": 0, "people": 0, "usable": 0} | ({"head_sizes": 0} if head_sizes else {})
        if not clip_boxes:
            self.digest.update(b"boxes as they are")
        self.excluded: Counter[str] = Counter()  # exclude_reason -> people
        self.usable_rows = array("i")

    def __enter__(self) -> "ShardWriter":
        with self._translate_errors():
            self.staging = self._staged.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._translate_errors():
            self._staged.__exit__(*error)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.output}: cannot be made: {error.strerror}; choose another output") from None

    def write_images(self, records: Iterator[dict[str, Any]]) -> None:
        """Write the images, records with the columns of `IMAGE_FEATURES`."""

        def numbered() -> Iterator[dict[str, Any]]:
            for row, record in enumerate(records):
                self.image_rows[record["id"]] = (row, record["width"], record["height"])
                self.digest.update(hashlib.sha256(record["bytes"]).digest())
                yield record

        self._save("images", numbered(), IMAGE_FEATURES)
        self.counts["images"] = len(self.image_rows)

    def write_people(self, records: Iterator[dict[str, Any]]) -> None:
        """Write the people of these images, records with the columns of `people_features`."""

        def counted() -> Iterator[dict[str, Any]]:
            for record in records:
                reason = record["exclude_reason"]
                if reason:
                    self.excluded[reason] += 1
                else:
                    self.usable_rows.append(self.counts["people"])
                    self.counts["usable"] += 1
                self.counts["people"] += 1
                self.digest.update(repr((record["id"], record["box"].tolist(), record["keypoints"].tolist())).encode())
                self.digest.update(repr((reason, *(record[name] for name in ("crowd", "area", "score")))).encode())
                if self.head_sizes:
                    self.digest.update(repr(record["head_size"]).encode())
                    self.counts["head_sizes"] += not reason and record["head_size"] > 0
                yield record

        if self.image_rows:
            self._save("people", counted(), people_features(self.skeleton.num_keypoints, head_sizes=self.head_sizes))

    def finish(self, *, source: dict[str, str], skipped: dict[str, int]) -> None:
        """Write `dataset.json`, with the names and SHA-256 of the annotation files, and what was left out by reason."""
        if not self.counts["usable"] and not (self.allow_no_people and self.counts["images"]):
            raise DataError(
                f"{self.output}: nothing to write: no person that can be used; left out: {skipped | self.excluded}"
            )
        description = {
            "format": FORMAT,
            "clip_boxes": self.clip_boxes,
            "counts": self.counts,
            "skipped": skipped,
            "exclude_reason": self.excluded,
            "source": source,
            "sha256": self.digest.hexdigest(),
            "skeleton": self.skeleton.model_dump(mode="json"),
        }
        if self.counts["people"]:
            np.save(self.staging / USABLE, np.asarray(self.usable_rows, dtype=np.int32), allow_pickle=False)
        (self.staging / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def _save(self, name: str, records: Iterator[dict[str, Any]], features: Features) -> None:
        """Write a table; none if there are no records, which `datasets` would refuse."""
        first = next(records, None)
        if first is None:
            return
        cache = self.staging / "cache"
        with quiet_datasets():
            dataset = Dataset.from_generator(
                lambda: itertools.chain([first], records),
                features=features,
                cache_dir=str(cache),
                fingerprint=uuid.uuid4().hex,
                writer_batch_size=64,
            )
            dataset.save_to_disk(str(self.staging / name))
        shutil.rmtree(cache)
