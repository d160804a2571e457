"""What a teacher said of fixed views of each person, on disk: written in parts, read by record.

A cache is a folder. ``cache.json`` says what it was made of and how it is laid out. ``part_00000.safetensors`` and its
siblings hold ``lessons`` (record, stage, joint, height, width), and with uint8 ``scales`` (record, stage, joint, 2).
Record ``person * views + view``; the people of several datasets are counted on. Records are read, not mapped: opening
a file and reading 100 kB of it takes a fifth of what safetensors' own slices take, and a file that is cut short is an
error instead of a SIGBUS.
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
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Shaped
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fpd_accel.errors import DataError
from fpd_accel.files import flush

DESCRIPTION = "cache.json"
WRITING = ".writing"  # at the end of the name of a part that is not whole yet
ABANDONED = 3600.0  # seconds after which such a part is nobody's
LEVELS = 255  # steps of uint8 between the lowest and the highest value of a heatmap
SCALES = 2  # numbers that go with a heatmap in uint8: its lowest value, and the step

Kind = Literal["bf16", "uint8"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "uint8": torch.uint8}

Packed = Shaped[Tensor, "batch stage joint heatmap_height heatmap_width"]
Scales = Float32[Tensor, "batch stage joint 2"]
Heatmaps = Float[Tensor, "batch stage joint heatmap_height heatmap_width"]


def pack(heatmaps: Heatmaps, dtype: Kind) -> tuple[Packed, Scales | None]:
    """Heatmaps as they are stored, and what uint8 needs beside them.

    Error after :func:`unpack`: bf16 at most ``|value| / 2^8``, none where the heatmaps came from bf16; uint8 at most a
    510th of the heatmap's own range from lowest to highest value, 0.002 for a peak of height 1. Both without the last
    digit of float32.
    """
    if dtype == "bf16":
        return heatmaps.to(torch.bfloat16), None
    heatmaps = heatmaps.float()
    lowest, highest = (limit(heatmaps, dim=(-2, -1)) for limit in (torch.amin, torch.amax))
    step = (highest - lowest) / LEVELS
    levels = (heatmaps - lowest[..., None, None]) / step.clamp(min=torch.finfo(torch.float32).tiny)[..., None, None]
    return levels.round().clamp(0, LEVELS).to(torch.uint8), torch.stack([lowest, step], dim=-1)


def unpack(packed: Packed, scales: Scales | None) -> tuple[Float32[Tensor, "batch joint height width"], ...]:
    """The heatmaps of each stage, where the packed ones are."""
    heatmaps = packed.float()
    if scales is not None:
        lowest, step = scales[..., None, None, :].unbind(-1)
        heatmaps = lowest + step * heatmaps
    return heatmaps.unbind(1)


class Layout(BaseModel):
    """How many records there are, of what, and in which part each is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    people: tuple[int, ...]  # of each dataset
    views: int
    shape: tuple[int, int, int, int]  # stages, joints, height, width of the heatmaps
    dtype: Kind
    part_people: int  # in each part but the last

    @property
    def records(self) -> int:
        return sum(self.people) * self.views

    @property
    def record_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize + self._scales * torch.float32.itemsize

    @property
    def _scales(self) -> int:
        return prod(self.shape[:2]) * SCALES if self.dtype == "uint8" else 0

    @property
    def parts(self) -> int:
        return -(-sum(self.people) // self.part_people)

    def records_of(self, part: int) -> range:
        size = self.part_people * self.views
        return range(part * size, min((part + 1) * size, self.records))

    @cached_property
    def first_person(self) -> tuple[int, ...]:
        """Of each dataset, in the count of all people."""
        return (0, *accumulate(self.people))[:-1]

    def record(self, source: int, position: int, view: int) -> int:
        """The number of a record; ``position``: of the person among the usable ones of dataset ``source``."""
        return (self.first_person[source] + position) * self.views + view

    def empty(self, records: int) -> dict[str, Tensor]:
        """Room for so many records."""
        tensors = {"lessons": torch.empty((records, *self.shape), dtype=DTYPES[self.dtype])}
        if self._scales:
            tensors["scales"] = torch.empty((records, *self.shape[:2], SCALES))
        return tensors


class Lessons:
    """A cache to read from and write into. Picklable: a worker opens the files that it needs."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self._starts: dict[int, dict[str, int]] = {}  # of the parts read so far: where in the file each tensor begins

    def path(self, part: int) -> Path:
        return self.folder / f"part_{part:05}.safetensors"

    def missing(self) -> list[int]:
        """Parts that are not there, or are not what they should be."""
        return [part for part in range(self.layout.parts) if not self._is_whole(part)]

    def remove_abandoned(self) -> None:
        """What killed processes have left half-written."""
        for path in self.folder.glob(f".*{WRITING}"):
            with suppress(FileNotFoundError):  # just renamed
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def write(self, part: int, tensors: dict[str, Tensor]) -> None:
        """Put a part into the folder.

        Raises:
            DataError: the disk does not take it.
        """
        path = self.path(part)
        # A name of its own: where locks of the file system hold on one machine alone, another may write the same part.
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{WRITING}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, staged)
                flush(staged)
                staged.replace(path)
            finally:
                staged.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path}: cannot be written ({error}); make room, or set teacher.cache.folder to another disk; the "
                "parts before it are kept"
            ) from None

    def read(self, records: Sequence[int]) -> tuple[Packed, Scales | None]:
        """Some records, as they are stored.

        Raises:
            DataError: a part is gone or has been cut short.
        """
        tensors = self.layout.empty(len(records))
        rows = {name: tensor.view(torch.uint8).flatten(1).numpy() for name, tensor in tensors.items()}
        size = self.layout.part_people * self.layout.views
        for i, record in enumerate(records):
            part, place = divmod(record, size)
            try:
                starts = self._starts.get(part) or self._starts.setdefault(part, self._find_tensors(part))
                with self.path(part).open("rb", buffering=0) as file:
                    for name, row in rows.items():
                        file.seek(starts[name] + place * row.shape[1])
                        if file.readinto(row[i]) != row.shape[1]:
                            raise ValueError("cut short")
            except (OSError, ValueError, KeyError) as error:
                raise DataError(
                    f"{self.path(part)}: cannot be read ({error}); the same command builds this part again"
                ) from None
        return tensors["lessons"], tensors.get("scales")

    def _find_tensors(self, part: int) -> dict[str, int]:
        """Where in its file each tensor of a part begins.

        Raises:
            OSError, ValueError, KeyError: it is no safetensors file, or not one of this layout.
        """
        wanted = self.layout.empty(0)
        records = len(self.layout.records_of(part))
        with self.path(part).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            size = os.fstat(file.fileno()).st_size
            if not 0 < length < size:
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(file.read(length))
        starts = {}
        for name, tensor in wanted.items():
            if tuple(header[name]["shape"]) != (records, *tensor.shape[1:]):
                raise ValueError(f"{name} has the shape {header[name]['shape']}")
            starts[name] = 8 + length + header[name]["data_offsets"][0]
        if size != 8 + length + records * self.layout.record_bytes:
            raise ValueError(f"{size} bytes")
        return starts

    def _is_whole(self, part: int) -> bool:
        try:
            self._find_tensors(part)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True


def read_description(folder: Path) -> tuple[dict[str, Any], Layout] | None:
    """What a cache was made of and how it is laid out; None if there is no cache.

    Raises:
        DataError: it cannot be understood.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
        return dict(description["key"]), Layout.model_validate(description["layout"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{path}: damaged ({error}); remove {folder}, to build it again") from None


def differing(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """The names of what is not the same for two caches."""
    found = []
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}")
    return found


def nearest_cache(root: Path, key: dict[str, Any]) -> tuple[Path, list[str]] | None:
    """Among the caches in a folder the one of which least is different, and what that is; None if there are none."""
    others = []
    for path in root.glob(f"*/{DESCRIPTION}"):
        with suppress(DataError):  # damaged: none to compare with
            found = read_description(path.parent)
            others += [(path.parent, differing(found[0], key))] if found is not None else []
    return min(others, key=lambda other: (len(other[1]), other[0]), default=None)
