"""The teacher cache on disk: a teacher's heatmaps for fixed views of each person, written in parts, read by record.

A cache is a folder. `cache.json` has its key and its layout; `part_00000.safetensors` and so on hold `heatmaps`
(record, stage, joint, height, width) and, with uint8, `scales` (record, stage, joint, 2). The number of a record is
`person * views + view`; people are numbered through all datasets. Records are read, not mapped: opening a file and
reading 100 kB of it takes a fifth of the time of safetensors' slices, and a truncated file is an error instead of a
SIGBUS.
"""

import json
import os
import struct
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Shaped
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fpd_accel.errors import DataError
from fpd_accel.files import staged

DESCRIPTION = "cache.json"
WRITING = ".writing"  # suffix of a part that is being written
STALE_PART = 3600.0  # seconds without a write after which such a part is taken for abandoned
LEVELS = 255  # steps of uint8 between the lowest and the highest value of a heatmap

Kind = Literal["bf16", "uint8"]
DTYPES = {"bf16": torch.bfloat16, "uint8": torch.uint8}

Packed = Shaped[Tensor, "batch stage joint heatmap_height heatmap_width"]
Scales = Float32[Tensor, "batch stage joint 2"]
Heatmaps = Float[Tensor, "batch stage joint heatmap_height heatmap_width"]


def pack(heatmaps: Heatmaps, dtype: Kind) -> tuple[Packed, Scales | None]:
    """Return heatmaps in their stored form and, for uint8, their scales: (lowest value, step) of each heatmap.

    The error after `unpack`, up to float32 rounding, is at most `|value| / 2^8` in bf16, and zero if the heatmaps were
    computed in bf16; in uint8 it is at most 1/510 of the heatmap's range, 0.002 for a peak of height 1.
    """
    if dtype == "bf16":
        return heatmaps.to(torch.bfloat16), None
    heatmaps = heatmaps.float()
    lowest, highest = (limit(heatmaps, dim=(-2, -1)) for limit in (torch.amin, torch.amax))
    step = (highest - lowest) / LEVELS
    levels = (heatmaps - lowest[..., None, None]) / step.clamp(min=torch.finfo(torch.float32).tiny)[..., None, None]
    return levels.round().clamp(0, LEVELS).to(torch.uint8), torch.stack([lowest, step], dim=-1)


def unpack(packed: Packed, scales: Scales | None) -> tuple[Float32[Tensor, "batch joint height width"], ...]:
    """Return the float32 heatmaps of each stage, on the device of the packed ones."""
    heatmaps = packed.float()
    if scales is not None:
        lowest, step = scales[..., None, None, :].unbind(-1)
        heatmaps = lowest + step * heatmaps
    return heatmaps.unbind(1)


class CacheLayout(BaseModel):
    """The shape of the records of a cache, and their distribution over its parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    people: tuple[int, ...]  # usable people of each dataset
    views: int  # of each person
    shape: tuple[int, int, int, int]  # stages, joints, height, width of the heatmaps
    dtype: Kind
    part_people: int  # people in each part but the last

    @property
    def records(self) -> int:
        """The number of records."""
        return sum(self.people) * self.views

    @property
    def record_bytes(self) -> int:
        """The size of a record with its scales."""
        return sum(tensor.nbytes for tensor in self.empty(1).values())

    @property
    def parts(self) -> int:
        """The number of parts."""
        return -(-sum(self.people) // self.part_people)

    def records_of(self, part: int) -> range:
        """Return the numbers of the records of a part."""
        size = self.part_people * self.views
        return range(part * size, min((part + 1) * size, self.records))

    @cached_property
    def first_person(self) -> tuple[int, ...]:
        """The number of each dataset's first person among all people."""
        return (0, *accumulate(self.people))[:-1]

    def record(self, source: int, position: int, view: int) -> int:
        """Return the number of a record; `position` is the person's among the usable people of dataset `source`."""
        return (self.first_person[source] + position) * self.views + view

    def empty(self, records: int) -> dict[str, Tensor]:
        """Return uninitialised tensors for a number of records."""
        tensors = {"heatmaps": torch.empty((records, *self.shape), dtype=DTYPES[self.dtype])}
        if self.dtype == "uint8":  # the lowest value of each heatmap and the step
            tensors["scales"] = torch.empty((records, *self.shape[:2], 2))
        return tensors


class TeacherTargets:
    """A teacher cache to read and write. Picklable: a worker opens the files that it needs."""

    def __init__(self, folder: Path, layout: CacheLayout) -> None:
        self.folder, self.layout = folder, layout
        self._starts: dict[int, dict[str, int]] = {}  # part -> offsets of its tensors in the file

    def path(self, part: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"part_{part:05}.safetensors"

    def missing(self) -> list[int]:
        """Return the parts that do not exist or are damaged."""
        missing = []
        for part in range(self.layout.parts):
            try:
                self._find_tensors(part)
            except (OSError, ValueError, KeyError, TypeError):
                missing.append(part)
        return missing

    def remove_abandoned(self) -> None:
        """Remove the temporary files of killed processes."""
        for path in self.folder.glob(f".*{WRITING}"):
            with suppress(FileNotFoundError):  # just renamed
                if time.time() - path.stat().st_mtime > STALE_PART:
                    path.unlink()

    def write(self, part: int, tensors: dict[str, Tensor]) -> None:
        """Write a part into the folder; raise a DataError if that is not possible."""
        path = self.path(part)
        # A unique temporary name: if file locks hold on one machine only, another machine may write the same part.
        try:
            with staged(path, own=f"{uuid.uuid4().hex[:8]}{WRITING}") as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path}: cannot be written ({error}); make room, or set teacher.cache.folder to another disk; the "
                "parts before it are kept"
            ) from None

    def read(self, records: Sequence[int]) -> tuple[Packed, Scales | None]:
        """Return records in their stored form; raise a DataError if a part is missing or truncated."""
        tensors = self.layout.empty(len(records))
        rows = {name: tensor.view(torch.uint8).flatten(1).numpy() for name, tensor in tensors.items()}
        size = self.layout.part_people * self.layout.views
        for i, record in enumerate(records):
            part, position = divmod(record, size)
            try:
                starts = self._starts.get(part) or self._starts.setdefault(part, self._find_tensors(part))
                with self.path(part).open("rb", buffering=0) as file:
                    for name, row in rows.items():
                        file.seek(starts[name] + position * row.shape[1])
                        if file.readinto(row[i]) != row.shape[1]:
                            raise ValueError("cut short")
            except (OSError, ValueError, KeyError) as error:
                raise DataError(
                    f"{self.path(part)}: cannot be read ({error}); the same command builds this part again"
                ) from None
        return tensors["heatmaps"], tensors.get("scales")

    def _find_tensors(self, part: int) -> dict[str, int]:
        """Return the offsets of a part's tensors; raise OSError, ValueError or KeyError if the file is damaged."""
        records = len(self.layout.records_of(part))
        with self.path(part).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            size = os.fstat(file.fileno()).st_size
            if not 0 < length < size:
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(file.read(length))
        starts = {}
        for name, tensor in self.layout.empty(0).items():
            if tuple(header[name]["shape"]) != (records, *tensor.shape[1:]):
                raise ValueError(f"{name} has the shape {header[name]['shape']}")
            starts[name] = 8 + length + header[name]["data_offsets"][0]
        if size != 8 + length + records * self.layout.record_bytes:
            raise ValueError(f"{size} bytes")
        return starts


def read_description(folder: Path) -> tuple[dict[str, Any], CacheLayout] | None:
    """Return the key and the layout of a cache, or None if there is no cache in the folder."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
        return dict(description["key"]), CacheLayout.model_validate(description["layout"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); remove {folder}, to build it again") from None


def differing(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of the entries in which two cache keys differ."""
    found = []
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}")
    return found


def nearest_cache(root: Path, key: dict[str, Any]) -> tuple[Path, list[str]] | None:
    """Return the cache in a folder whose key differs least, and the names that differ; None if there are no caches."""
    others = []
    for path in root.glob(f"*/{DESCRIPTION}"):
        with suppress(DataError):  # a damaged cache is not compared
            if found := read_description(path.parent):
                others.append((path.parent, differing(found[0], key)))
    return min(others, key=lambda other: (len(other[1]), other[0]), default=None)
