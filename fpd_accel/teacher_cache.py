"""The teacher, asked once about every view of every person, before a student is trained on what it said.

For a teacher much larger than its student. All ranks build parts side by side; a part is written whole or not at all,
so that a build which was stopped or killed goes on with those that are missing, on any number of ranks.
"""

import hashlib
import json
import math
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout

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
from fpd_accel.teacher import Teacher

FORMAT = 1
PART_BYTES = 64 * 2**20  # about: what is lost of a build that is killed, on each rank
PATIENCE = 10.0  # seconds that a lock is waited for, before all ranks meet again
LATENCY = 60.0  # seconds until a shared file system shows one machine what another one wrote
LINE_SECONDS = 60.0  # between lines of progress
CODE = (  # of this package, whose text decides on crops and outputs, as models/ does
    "augment.py", "data/batch.py", "data/images.py", "data/lessons.py", "data/shards.py", "data/stream.py",
    "data/views.py", "fold.py", "fp8.py", "geometry.py", "outputs.py", "skeleton.py", "teacher.py",
)  # fmt: skip
PACKAGES = (
    "torch",
    "numpy",
    "opencv-python-headless",
    "simplejpeg",
)  # that crops, draws and outputs hang on


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
            with self._locked():
                lessons, missing = on_first_rank(self.accelerator, partial(self._begin, student, samples))
                if missing:
                    self._require_shared_folder()
                    self._build(lessons, missing)
        opened = on_every_rank(
            self.accelerator, partial(self._open_whole, lessons.layout), same=lambda found: found.layout
        )
        say(f"teacher cache: {opened.folder}: {amount(opened.layout.records * opened.layout.record_bytes)}, complete")
        return opened

    @property
    def sources(self) -> tuple[Shards, ...]:
        return self.train.datasets if self.unlabelled is None else (*self.train.datasets, self.unlabelled)

    @property
    def key(self) -> dict[str, Any]:
        """Everything that decides what is in the cache."""
        recipe = self.recipe
        return {
            "format": FORMAT,
            "teacher_sha256": self.digest,
            "precision": recipe.train.precision,
            "fp8": recipe.teacher.fp8,
            "teacher_stage": recipe.distill.teacher_stage,
            "dtype": self.options.dtype,
            "people_sha256": [shards.fingerprint for shards in self.sources],
            "usable_sha256": [
                hashlib.sha256(shards.usable.astype(np.int64).tobytes()).hexdigest() for shards in self.sources
            ],
            "unlabelled": self.unlabelled is not None,  # the last of them
            "seed": recipe.run.seed,
            "augment": recipe.data.augment.model_dump(mode="json"),
            "box_padding": recipe.data.box_padding,
            "input_size": list(recipe.data.input_size),
            "unbiased": recipe.codec.name == "udp",
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "code_sha256": code_digest(),
        }

    @property
    def folder(self) -> Path:
        """Of the cache: a name of its own for each key."""
        root = Path(self.options.folder or Path(self.recipe.run.root) / "teacher_cache")
        return root / hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]

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

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One job builds, on all of its ranks; whoever comes later waits for it, and finds what it built."""
        path, waited = self.folder.with_suffix(".lock"), False
        lock = FileLock(path)

        def acquire() -> bool:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=PATIENCE if waited else 0)
            except Timeout:
                return False
            except OSError as error:
                raise DataError(f"teacher.cache.folder: {self.folder}: cannot be made: {error.strerror}") from None
            return True

        try:
            while not on_first_rank(self.accelerator, acquire):  # in short turns: collective operations have a limit
                if not waited:
                    say(f"teacher cache: another job is building {self.folder}; waiting for it")
                waited = True
                self.guard.watchdog.alive(f"waiting for another job that builds {self.folder}")
                self._heed_stop()
            yield
        finally:
            lock.release()

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
        lessons, deadline = Lessons(self.folder, layout), time.monotonic() + LATENCY
        while missing := lessons.missing():
            self.guard.watchdog.alive(f"waiting for {self.folder}")
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.folder}: {len(missing)} of {layout.parts} parts are not here; set teacher.cache.folder to "
                    "a disk that all machines share"
                )
            time.sleep(1.0)
        return lessons

    def _require_shared_folder(self) -> None:
        """Before the teacher is asked: all machines see what the first writes.

        Raises:
            DataError: one does not.
        """
        if self.accelerator.num_processes == 1:
            return

        def write() -> Path:
            path = self.folder / f".seen_by_all.{uuid.uuid4().hex[:8]}"
            replace_file(path, "")
            return path

        def wait() -> Path:
            deadline = time.monotonic() + LATENCY
            while not path.exists():
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{self.folder}: is not the same folder here as on the first machine; set teacher.cache.folder "
                        "to a disk that all machines share"
                    )
                self.guard.watchdog.alive(f"waiting for {path}")
                time.sleep(0.1)
            return path

        path = on_first_rank(self.accelerator, write)
        try:
            on_every_rank(self.accelerator, wait, same=str)
        finally:
            if self.accelerator.is_main_process:
                path.unlink(missing_ok=True)

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


@cache
def code_digest() -> str:
    """SHA-256 of what in this package decides on crops and outputs: whoever changes it asks the teacher anew."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (*(package / name for name in CODE), *sorted((package / "models").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _smaller(layout: Layout) -> str:
    ways = [f"data.augment.views below {layout.views}"] if layout.views > 1 else []
    ways += ["teacher.cache.dtype to uint8"] if layout.dtype != "uint8" else []
    return f", or set {' or '.join(ways)}" if ways else ""
