"""Build a teacher cache: the teacher's outputs for every view of every person, computed once before training.

It pays off for a teacher much larger than its student. All ranks build parts side by side; a part is written whole or
not at all, so that a build that was stopped or killed continues with the missing parts, on any number of ranks.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from fpd_accel.config.schema import Data, TeacherCache
from fpd_accel.console import say, track, warn
from fpd_accel.data.batch import Batch
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import close_loader, make_loader
from fpd_accel.data.teacher_targets import (
    DESCRIPTION,
    CacheLayout,
    TeacherTargets,
    differing,
    nearest_cache,
    pack,
    read_description,
)
from fpd_accel.distributed.accelerator import run_on_all, run_on_main
from fpd_accel.distributed.shared_folder import SharedFolder
from fpd_accel.errors import DataError, Preempted, TrainingError
from fpd_accel.files import amount, replace_file, sha256
from fpd_accel.models.create import probe_model
from fpd_accel.outputs import STRIDE
from fpd_accel.training.supervisor import RunSupervisor
from fpd_accel.training.teacher import Teacher
from fpd_accel.training.teacher_cache.views import AllViewsStream
from fpd_accel.weights.model_cost import describe_teacher_share
from fpd_accel.weights.model_folder import ModelConfig

FORMAT = 1
PACKAGES = ("torch", "numpy", "opencv-python-headless", "simplejpeg")
"""Libraries whose versions decide on crops, random draws and outputs."""
CODE = (
    "data/augment.py", "data/batch.py", "data/images.py", "data/shards.py", "data/stream.py",
    "data/teacher_targets.py", "geometry.py", "outputs.py", "skeleton.py", "training/teacher.py",
    "training/teacher_cache/views.py",
)  # fmt: skip
"""Files of this package that decide on crops and outputs, beside all of `models/`."""
PART_BYTES = 64 * 2**20  # approximate size of a part: the work that a killed build loses on each rank
LINE_SECONDS = 60.0  # between lines of progress


@dataclass(frozen=True)
class CacheBuilder:
    """Opens the teacher cache of a run, and builds what is missing of it."""

    accelerator: Accelerator
    supervisor: RunSupervisor
    teacher: Teacher
    config: ModelConfig  # of the teacher
    options: TeacherCache
    root: Path  # folder of all caches
    train: Mixture
    unlabelled: Shards | None
    data: Data
    seed: int  # of the augmentation
    unbiased: bool  # crops aligned by pixel centres (UDP)
    precision: str
    teacher_stage: str  # `each` or `last`
    digest: str  # SHA-256 of the teacher
    batch_size: int  # samples per forward of the teacher on one rank

    def open(self, *, student: ModelConfig, samples: int) -> TeacherTargets:
        """Return the whole cache; estimate what it saves this `student`, which trains on so many more samples.

        Raises:
            DataError: It does not fit on the disk, another machine does not see it, or it is damaged.
            Preempted: The run was asked to stop; finished parts are kept.
        """
        targets, missing = run_on_main(self.accelerator, self._find)
        if missing:
            with self._shared.one_job(meanwhile=self._stop_if_asked):
                targets, missing = run_on_main(self.accelerator, partial(self._begin, student, samples))
                if missing:
                    self._shared.require_shared()  # before the teacher runs
                    self._build(targets, missing)
        opened = run_on_all(
            self.accelerator, partial(self._open_whole, targets.layout), same=lambda found: found.layout
        )
        say(f"teacher cache: {opened.folder}: {amount(opened.layout.records * opened.layout.record_bytes)}, complete")
        return opened

    @property
    def sources(self) -> tuple[Shards, ...]:
        """The datasets in the order of their records."""
        return self.train.datasets if self.unlabelled is None else (*self.train.datasets, self.unlabelled)

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that decides on the content of the cache, except for rounding."""
        return {
            "format": FORMAT,
            "teacher_sha256": self.digest,
            "precision": self.precision,
            "fp8": self.teacher.fp8,
            "teacher_stage": self.teacher_stage,
            "dtype": self.options.dtype,
            "people_sha256": [shards.fingerprint for shards in self.sources],
            "usable_sha256": [sha256(shards.usable.astype(np.int64).tobytes()) for shards in self.sources],
            "unlabelled": self.unlabelled is not None,
            "seed": self.seed,
            "augment": self.data.augment.model_dump(mode="json"),
            "box_padding": self.data.box_padding,
            "input_size": list(self.data.input_size),
            "unbiased": self.unbiased,
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "code_sha256": code_digest(),
        }

    @property
    def folder(self) -> Path:
        """The folder of the cache, with a name of its own for each key."""
        return self.root / sha256(json.dumps(self.key, sort_keys=True))[:16]

    @property
    def _shared(self) -> SharedFolder:
        return SharedFolder(self.folder, "teacher.cache.folder", self.accelerator, self.supervisor.watchdog.alive)

    def _find(self) -> tuple[TeacherTargets, list[int]]:
        """Return the cache as far as it exists, and its missing parts."""
        found = read_description(self.folder)
        key, layout = found or (self.key, self._new_layout())
        if key != self.key:
            raise DataError(
                f"{self.folder / DESCRIPTION}: does not have the key that this folder is named after; it differs in "
                f"{', '.join(differing(key, self.key))}; remove the folder to build it again"
            )
        targets = TeacherTargets(self.folder, layout)
        return targets, targets.missing() if found is not None else list(range(layout.parts))

    def _new_layout(self) -> CacheLayout:
        views = self.data.augment.views
        assert views is not None  # checked with the recipe
        stages, joints, input_size = 1, self.config.skeleton.num_keypoints, self.config.input_size
        if self.teacher_stage == "each":
            stages = len(probe_model(self.config.arch, joints, input_size, self.config.arguments).outputs)
        height, width = (side // STRIDE for side in input_size)
        people, shape = tuple(map(len, self.sources)), (stages, joints, height, width)
        layout = CacheLayout(people=people, views=views, shape=shape, dtype=self.options.dtype, part_people=1)
        unit = math.lcm(self.batch_size, views) // views  # people whose views fill whole batches
        units = max(1, round(PART_BYTES / (unit * views * layout.record_bytes)))
        return layout.model_copy(update={"part_people": unit * units})

    def _begin(self, student: ModelConfig, samples: int) -> tuple[TeacherTargets, list[int]]:
        """Return what is missing while no other job builds; print cost and gain, and check the free space."""
        targets, missing = self._find()
        if not missing:
            return targets, missing
        layout, folder = targets.layout, targets.folder
        stages, joints, height, width = layout.shape
        whole = layout.records * layout.record_bytes
        needed = sum(len(layout.records_of(part)) for part in missing) * layout.record_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            targets.remove_abandoned()
            free = shutil.disk_usage(folder).free
            people = sum(layout.people)
            what = f"{layout.views} views x {people} people x {stages * joints} heatmaps of {height} x {width}"
            there = f", of which {amount(whole - needed)} are there" if needed < whole else ""
            say(
                f"teacher cache: {what}, {layout.dtype}: {amount(whole)}{there}; {amount(free)} are free in {folder}; "
                f"training reads {amount(layout.record_bytes)} per sample"
            )
            if needed > free:
                raise DataError(
                    f"teacher.cache: {amount(needed)} more are needed in {folder}, where {amount(free)} are free; make "
                    f"room, set teacher.cache.folder to another disk{_smaller(layout)}"
                )
            self._say_gain(student, layout.views, samples / people)
            if not (folder / DESCRIPTION).exists() and (nearest := nearest_cache(folder.parent, self.key)) is not None:
                say(f"teacher cache: a new one; {nearest[0]} was built with other {', '.join(nearest[1])}")
            replace_file(
                folder / DESCRIPTION, json.dumps({"key": self.key, "layout": layout.model_dump(mode="json")}, indent=2)
            )
        except OSError as error:
            raise DataError(f"teacher.cache.folder: {folder}: cannot be written: {error.strerror}") from None
        return targets, missing

    def _say_gain(self, student: ModelConfig, views: int, epochs: float) -> None:
        say(
            f"teacher cache: {describe_teacher_share(self.config, student)}; building runs the teacher {views} "
            f"times per person, the rest of this run without a cache {epochs:.1f} times: it pays for itself after "
            f"{views} epochs"
        )
        if epochs <= views:
            warn("teacher.cache: this run is too short to pay for it; leave it out, unless other runs will read it")

    def _build(self, targets: TeacherTargets, missing: list[int]) -> None:
        """Build the missing parts in turns of one part per rank.

        A last turn with fewer parts than ranks repeats some, because all ranks have to run a sharded teacher together.
        """
        layout = targets.layout
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        turns = list(range(rank, -(-len(missing) // ranks) * ranks, ranks))
        parts = [missing[turn % len(missing)] for turn in turns]
        stream = AllViewsStream(
            self.train, layout, parts,
            input_size=self.data.input_size,
            batch_size=self.batch_size,
            augment=self.data.augment,
            padding=self.data.box_padding,
            seed=self.seed,
            unbiased=self.unbiased,
            unlabelled=self.unlabelled,
        )  # fmt: skip
        batches = iter(make_loader(stream, self.data.workers, self.accelerator.device))
        began = last_line = time.monotonic()
        try:
            for done, (turn, part) in enumerate(track(zip(turns, parts, strict=True), "teacher", len(turns)), 1):
                write = partial(self._write, targets, part, batches, stream.part_samples, keep=turn < len(missing))
                if self.teacher.sharded:  # ranks that gather weights cannot exchange errors meanwhile
                    write()
                else:
                    run_on_all(self.accelerator, write, same=lambda _: None)
                self._stop_if_asked()
                now = time.monotonic()
                if now - last_line > LINE_SECONDS:
                    last_line, left = now, (now - began) / done * (len(turns) - done) / 60
                    say(f"teacher cache: {done} of {len(turns)} turns, {left:.0f} minutes left")
        finally:
            close_loader(batches)

    def _write(self, targets: TeacherTargets, part: int, batches: Iterator[Batch], samples: int, *, keep: bool) -> int:
        """Run the teacher on one part and, with `keep`, write it; return its number of records."""
        layout = targets.layout
        records = len(layout.records_of(part))
        tensors = layout.empty(records)
        for start in range(0, samples, self.batch_size):
            self.supervisor.watchdog.alive(f"part {part} of the teacher cache")
            self.supervisor.check_data_files(*self.sources)
            crops = next(batches).to(self.accelerator.device).crops
            stages = self.teacher(crops)[-layout.shape[0] :]
            heatmaps = torch.stack([stage for stage in stages if isinstance(stage, torch.Tensor)], dim=1)
            if not bool(heatmaps.isfinite().all()):
                raise TrainingError(
                    f"{self.config.arch}: the teacher's heatmaps are not finite; are its weights damaged?"
                )
            packed = pack(heatmaps, layout.dtype)
            for tensor, values in zip(tensors.values(), packed, strict=False):  # without scales where there are none
                assert values is not None
                tensor[start : start + self.batch_size] = values[: max(0, records - start)].cpu()
        if keep:
            targets.write(part, tensors)
        return records

    def _open_whole(self, layout: CacheLayout) -> TeacherTargets:
        """Open the cache on each rank, where the parts that other machines wrote have to be visible too."""
        targets = TeacherTargets(self.folder, layout)

        def problem() -> str:
            missing = len(targets.missing())
            return f"{missing} of {layout.parts} parts are not here" if missing else ""

        self._shared.wait_for(problem)
        return targets

    def _stop_if_asked(self) -> None:
        """Raise Preempted on all ranks if one of them was asked to stop."""
        stops = torch.tensor(float(self.supervisor.stop.name is not None), device=self.accelerator.device)
        if self.accelerator.reduce(stops, reduction="sum") > 0:
            asked_by = self.supervisor.stop.name or "on another rank"
            raise Preempted(
                f"{self.folder}: asked to stop ({asked_by}) while the teacher's cache "
                "was built; what is finished of it is kept; the same command goes on from there"
            )


@cache
def code_digest() -> str:
    """Return the SHA-256 of the code that decides on crops and outputs; any change of it makes another cache."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in (*(package / name for name in CODE), *sorted((package / "models").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _smaller(layout: CacheLayout) -> str:
    ways = [f"data.augment.views below {layout.views}"] if layout.views > 1 else []
    ways += ["teacher.cache.dtype to uint8"] if layout.dtype != "uint8" else []
    return f", or set {' or '.join(ways)}" if ways else ""
