"""The teacher, asked once about every view of every person, before a student is trained on what it said.

For a teacher much larger than its student. All ranks build parts side by side; a part is written whole or not at all,
so that a build which was stopped or killed goes on with those that are missing, on any number of ranks.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fpd_accel.cache_key import cache_key
from fpd_accel.config import Recipe, TeacherCache
from fpd_accel.data.batch import Batch
from fpd_accel.data.lessons import DESCRIPTION, Layout, Lessons, differing, nearest_cache, pack, read_description
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import close_loader, make_loader
from fpd_accel.data.views import EveryView
from fpd_accel.errors import DataError, Preempted, TrainingError
from fpd_accel.files import amount, replace_file
from fpd_accel.guard import Guard
from fpd_accel.log import say, track, warn
from fpd_accel.model_folder import ModelConfig
from fpd_accel.models import PoseModel
from fpd_accel.outputs import STRIDE
from fpd_accel.processes import on_every_rank, on_first_rank
from fpd_accel.report import describe_teacher_share
from fpd_accel.shared_folder import SharedFolder
from fpd_accel.teacher import Teacher

PART_BYTES = 64 * 2**20  # about: what is lost of a build that is killed, on each rank
LINE_SECONDS = 60.0  # between lines of progress


@dataclass(frozen=True)
class CacheBuilder:
    """Opens the cache that a recipe asks for, and builds what is missing of it."""

    recipe: Recipe
    accelerator: Accelerator
    options: TeacherCache
    teacher: Teacher
    config: ModelConfig  # of the teacher
    digest: str  # of all that decides what the teacher says
    train: Mixture
    unlabelled: Shards | None
    batch_size: int  # people per forward of the teacher
    guard: Guard

    def open(self, *, student: ModelConfig, samples: int) -> Lessons:
        """The whole cache, for a run that will still train on so many samples.

        Raises:
            DataError: it does not fit on the disk, another machine does not see it, or it is damaged.
            Preempted: the run was asked to stop; the parts that are finished are kept.
        """
        lessons, missing = on_first_rank(self.accelerator, self._find)
        if missing:
            with self._shared.one_job(meanwhile=self._heed_stop):
                lessons, missing = on_first_rank(self.accelerator, partial(self._begin, student, samples))
                if missing:
                    self._shared.require_shared()  # before the teacher is asked
                    self._build(lessons, missing)
        opened = on_every_rank(
            self.accelerator, partial(self._open_whole, lessons.layout), same=lambda found: found.layout
        )
        say(f"teacher cache: {opened.folder}: {amount(opened.layout.records * opened.layout.record_bytes)}, complete")
        return opened

    @property
    def sources(self) -> tuple[Shards, ...]:
        return self.train.datasets if self.unlabelled is None else (*self.train.datasets, self.unlabelled)

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that decides what is in the cache."""
        return cache_key(self.recipe, self.options, self.digest, self.sources, unlabelled=self.unlabelled is not None)

    @property
    def folder(self) -> Path:
        """Of the cache: a name of its own for each key."""
        root = Path(self.options.folder or Path(self.recipe.run.root) / "teacher_cache")
        return root / hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def _shared(self) -> SharedFolder:
        return SharedFolder(self.folder, "teacher.cache.folder", self.accelerator, self.guard.watchdog.alive)

    def _find(self) -> tuple[Lessons, list[int]]:
        """The cache as far as it exists, and the parts that are missing."""
        found = read_description(self.folder)
        if found is None:
            lessons = Lessons(self.folder, self._new_layout())
            return lessons, list(range(lessons.layout.parts))
        key, layout = found
        if key != self.key:
            raise DataError(
                f"{self.folder / DESCRIPTION}: not what this folder is named after; other there: "
                f"{', '.join(differing(key, self.key))}; remove the folder, to build it again"
            )
        lessons = Lessons(self.folder, layout)
        return lessons, lessons.missing()

    def _new_layout(self) -> Layout:
        model, views = self.teacher.model, self.recipe.data.augment.views
        assert isinstance(model, PoseModel)
        assert views is not None  # checked with the recipe
        height, width = (side // STRIDE for side in self.config.input_size)
        layout = Layout(
            people=tuple(map(len, self.sources)),
            views=views,
            shape=(
                model.num_stages if self.recipe.distill.teacher_stage == "each" else 1,
                self.config.skeleton.num_keypoints, height, width,
            ),
            dtype=self.options.dtype,
            part_people=1,
        )  # fmt: skip
        unit = math.lcm(self.batch_size, views) // views  # people whose views fill whole batches
        units = max(1, round(PART_BYTES / (unit * views * layout.record_bytes)))
        return layout.model_copy(update={"part_people": unit * units})

    def _begin(self, student: ModelConfig, samples: int) -> tuple[Lessons, list[int]]:
        """What is still missing, now that nobody else builds; say what it costs and gains, and that there is room."""
        lessons, missing = self._find()
        if not missing:
            return lessons, missing
        layout, folder = lessons.layout, lessons.folder
        stages, joints, height, width = layout.shape
        whole = layout.records * layout.record_bytes
        needed = sum(len(layout.records_of(part)) for part in missing) * layout.record_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lessons.remove_abandoned()
            free = shutil.disk_usage(folder).free
            what = (
                f"{layout.views} views x {sum(layout.people)} people x {stages * joints} heatmaps of {height} x {width}"
            )
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
            self._say_gain(student, layout.views, samples / sum(layout.people))
            if not (folder / DESCRIPTION).exists() and (nearest := nearest_cache(folder.parent, self.key)) is not None:
                say(f"teacher cache: a new one; {nearest[0]} was built with other {', '.join(nearest[1])}")
            replace_file(
                folder / DESCRIPTION, json.dumps({"key": self.key, "layout": layout.model_dump(mode="json")}, indent=2)
            )
        except OSError as error:
            raise DataError(f"teacher.cache.folder: {folder}: cannot be written: {error.strerror}") from None
        return lessons, missing

    def _say_gain(self, student: ModelConfig, views: int, epochs: float) -> None:
        say(
            f"teacher cache: {describe_teacher_share(self.config, student)}; building asks the teacher {views} times "
            f"about everybody, what is left of this run without a cache {epochs:.1f} times: it pays for itself after "
            f"{views} epochs"
        )
        if epochs <= views:
            warn("teacher.cache: this run is too short to pay for it; leave it out, unless other runs will read it")

    def _build(self, lessons: Lessons, missing: list[int]) -> None:
        """Ranks take turns; the last turn repeats parts where there are not enough, as all have to ask together."""
        recipe, layout = self.recipe, lessons.layout
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        turns = list(range(rank, -(-len(missing) // ranks) * ranks, ranks))
        parts = [missing[turn % len(missing)] for turn in turns]
        stream = EveryView(
            self.train, layout, parts,
            input_size=recipe.data.input_size,
            batch_size=self.batch_size,
            augment=recipe.data.augment,
            padding=recipe.data.box_padding,
            seed=recipe.run.seed,
            unbiased=recipe.codec.name == "udp",
            unlabelled=self.unlabelled,
        )  # fmt: skip
        batches = iter(make_loader(stream, recipe.data.workers, self.accelerator.device))
        began = told = time.monotonic()
        try:
            for done, (turn, part) in enumerate(track(zip(turns, parts, strict=True), "teacher", len(turns)), 1):
                write = partial(
                    self._write, lessons, part, batches, samples=stream.part_samples, keep=turn < len(missing)
                )
                if recipe.teacher.shard:  # ranks that gather weights do not listen to one that has an error
                    write()
                else:
                    on_every_rank(self.accelerator, write, same=lambda _: None)
                self._heed_stop()
                now = time.monotonic()
                if now - told > LINE_SECONDS:
                    told, left = now, (now - began) / done * (len(turns) - done) / 60
                    say(f"teacher cache: {done} of {len(turns)} turns, {left:.0f} minutes left")
        finally:
            close_loader(batches)

    def _write(self, lessons: Lessons, part: int, batches: Iterator[Batch], *, samples: int, keep: bool) -> int:
        """Ask the teacher about one part, and with ``keep`` write it; how many records it has."""
        layout = lessons.layout
        records = len(layout.records_of(part))
        tensors = layout.empty(records)
        for start in range(0, samples, self.batch_size):
            self.guard.watchdog.alive(f"part {part} of the teacher cache")
            self.guard.look_at(*self.sources)
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
            lessons.write(part, tensors)
        return records

    def _open_whole(self, layout: Layout) -> Lessons:
        """On each rank: the parts that other machines wrote have to be there too."""
        lessons = Lessons(self.folder, layout)

        def lacking() -> str:
            missing = len(lessons.missing())
            return f"{missing} of {layout.parts} parts are not here" if missing else ""

        self._shared.wait_for(lacking)
        return lessons

    def _heed_stop(self) -> None:
        """On all ranks: end, if one of them was asked to.

        Raises:
            Preempted: one was.
        """
        asked = torch.tensor(float(self.guard.stop.name is not None), device=self.accelerator.device)
        if self.accelerator.reduce(asked, reduction="sum") > 0:
            raise Preempted(
                f"{self.folder}: asked to stop ({self.guard.stop.name or 'on another rank'}) while the teacher's cache "
                "was built; what is finished of it is kept; the same command goes on from there"
            )


def _smaller(layout: Layout) -> str:
    ways = [f"data.augment.views below {layout.views}"] if layout.views > 1 else []
    ways += ["teacher.cache.dtype to uint8"] if layout.dtype != "uint8" else []
    return f", or set {' or '.join(ways)}" if ways else ""
