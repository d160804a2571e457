"""Kill a training run again and again, and compare its results with those of an undisturbed run.

    python tests/faults/kills.py --kills 200
    python tests/faults/kills.py --kills 20 --ranks 2

A tiny distillation (EMA, AdamW, cosine, evaluations, trained batch normalisation, a loader process, checkpoints written
in the background every three steps) is trained once by `python recipes/distill.py --config RECIPE`, undisturbed. Then
the same recipe under another `run.name` is started, killed by SIGKILL and started again by the same command, until the
number of kills is reached; the last start runs to the end. On one rank at least half of the kills, if they are many,
fall inside a save. The phase is read from the disk after the process has ended: a staged checkpoint that was not there
before, a new one that `latest` does not name yet, or old ones not yet pruned.

After every kill each `step_N` verifies and, on one rank, has the bytes of the undisturbed run's; the newest is no older
than before; `latest` names it or the one before it. At the end weights, EMA, optimizer, `best/`, `final/`, scores and
every value of the curve are those of the undisturbed run.

An interpreter takes seconds to import torch. So on one rank each start of the killed run is a fork of this process,
which has imported everything, started no thread and used no tensor; the fork runs `recipes/distill.py` as `__main__`.
With `--exec` every start is the command itself. Several ranks are always started by torchrun.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from disk import PHASES, SAVES, Disk, Fault, compare, inspect, listing, look, manifests, phase, records
from material import EVERY, prepare
from starts import ENVIRONMENT, IMPORTS, ROOT, Start, fork_off, living

STATISTICS = 1e-6  # tolerance of running statistics on several ranks, absolute
MANY = 20  # from this number of kills on, half have to fall inside saves; the phases of a few are chance
PATIENCE = 600.0  # seconds for a start to reach its kill


@dataclass
class Tally:
    """Counts of what was done to the run."""

    phases: Counter[str] = field(default_factory=Counter)
    victims: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    repeated: int = 0  # steps that were lost and taken again
    verified: int = 0  # checkpoints
    slowest_end: float = 0.0  # seconds from a kill until the launcher had ended

    @property
    def kills(self) -> int:
        return self.phases.total()

    @property
    def inside(self) -> int:
        return sum(self.phases[name] for name in SAVES)


class Experiment:
    """The undisturbed run, the killed one, and their comparison."""

    def __init__(self, work: Path, *, kills: int, seed: int, ranks: int, fork: bool) -> None:
        self.work, self.wanted, self.seed, self.ranks = work, kills, seed, ranks
        self.fork = fork and ranks == 1
        self.random = random.Random(seed)
        self.steps = EVERY * (kills + 12) * (1 if ranks == 1 else 3)  # several ranks get further before a kill
        self.tally, self.sessions, self.deviation = Tally(), set[int](), 0.0
        # Seconds, estimated from the starts so far: to the first save, from one save to the next, of one save.
        self.startup, self.cycle, self.saving = (5.0, 1.0, 0.1) if ranks == 1 else (10.0, 1.0, 0.1)

    def run(self) -> None:
        """Run the experiment.

        Raises:
            Fault: A guarantee is violated.
        """
        for name in IMPORTS:
            import_module(name)
        self._in_a_fork(lambda: prepare(self.work, steps=self.steps))
        whole, killed = self.work / "whole", self.work / "killed"
        self._to_the_end(Start(self.work / "whole.yaml", self.work / "whole.log", ranks=self.ranks))
        self.expected = manifests(whole)
        self.evaluations = {record["step"] for record in records(whole) if record["kind"] == "valid"}
        disk = look(killed)
        while self.tally.kills < self.wanted:
            disk = self._kill_once(killed, disk)
        self._to_the_end(self._start())
        self.deviation = compare(whole, killed, tolerance=STATISTICS if self.ranks > 1 else 0.0)
        if self.ranks == 1 and 2 * self.tally.inside < self.tally.kills >= MANY:
            raise Fault(f"{self.tally.inside} of {self.tally.kills} kills fell inside a save: fewer than half")
        self._wait_for_loaders()

    def _in_a_fork(self, function: Any) -> None:
        log = self.work / "prepare.log"
        _, status = os.waitpid(fork_off(function, log), 0)
        if status:
            raise Fault(log.read_text())

    def _to_the_end(self, start: Start) -> None:
        if start.wait(PATIENCE + 5.0 * self.steps):
            raise Fault(f"ended with code {start.code}:\n{start.output()}")

    def _start(self) -> Start:
        start = Start(self.work / "killed.yaml", self.work / "killed.log", ranks=self.ranks, fork=self.fork)
        self.sessions.add(start.pid)
        return start

    def _kill_once(self, run: Path, before: Disk) -> Disk:
        """Start the run, kill it at a random moment, check the run directory, and return its state."""
        # A start that finishes no save brings the run no nearer to its end, so that the run does not end too early.
        ahead = before.newest / self.steps > self.tally.kills / self.wanted
        missing = self.wanted / 2 + 1 - self.tally.inside
        aimed = self.random.random() < 1.2 * missing / (self.wanted - self.tally.kills)
        start, stale = self._start(), set(before.hidden)
        try:
            if aimed:
                self._until_save(start, run, stale, 1 if ahead else self.random.randint(1, 3))
            else:
                self._until(start, run, stale, self.random.uniform(0, self.startup + self.cycle * (0 if ahead else 2)))
            began = time.monotonic()
            self._kill(start)
            after = look(run)
            died = phase(before, after, stale=stale & after.hidden, evaluations=self.evaluations)
            start.wait(120)
        finally:
            if start.running():
                start.kill_all()
        if self.ranks > 1:
            after = look(run)  # a surviving rank has finished its save
        self.tally.slowest_end = max(self.tally.slowest_end, time.monotonic() - began)
        self.tally.phases[died] += 1
        self.tally.resumes += bool(before.whole)
        self.tally.verified += len(after.whole)
        if after.metrics != before.metrics:
            self.tally.repeated += max(0, after.step - after.newest)
        inspect(run, before, after, expected=self.expected if self.ranks == 1 else None)
        place = f"at step {after.step}, newest checkpoint {after.newest} of {self.steps}"
        print(f"kill {self.tally.kills}: {died}; {place}", file=sys.stderr, flush=True)
        return after

    def _kill(self, start: Start) -> None:
        if self.ranks > 1:
            rank = self.random.randint(-1, self.ranks - 1)
            victim = f"rank {rank}" if rank >= 0 else "all"
            start.kill_rank(rank) if rank >= 0 else start.kill_all()
        else:
            victim = self.random.choice(("trainer alone", *3 * ["process group"]))
            start.kill_trainer() if victim == "trainer alone" else start.kill_group()
            start.wait(120)
        self.tally.victims[victim] += 1

    def _until(self, start: Start, run: Path, stale: set[str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for _ in self._hidden(start, run, stale, pause=0.002):
            if time.monotonic() > deadline:
                return

    def _until_save(self, start: Start, run: Path, stale: set[str], number: int) -> None:
        """Wait until a random moment inside the save of this number, counted from the start."""
        # Renaming and pruning are short: the poll has to be fast.
        moment = self.random.choices(("writing", "renamed", "pruning"), (0.6, 0.2, 0.2))[0]
        fraction = self.random.uniform(0, 1.1)
        before, began, saves = set[str](), time.monotonic(), 0
        for hidden in self._hidden(start, run, stale, pause=0.0002 if moment == "pruning" else 0.0005):
            now = {name for name in hidden if name.endswith(".writing")}
            seconds = time.monotonic() - began
            if now and now != before:
                self.startup += 0.4 * (seconds - self.startup) if not saves else 0.0
                self.cycle += 0.4 * (seconds - self.cycle) if saves else 0.0
                saves, began = saves + 1, time.monotonic()
            elif before and not now:
                self.saving += 0.2 * (seconds - self.saving)
                if saves >= number + (moment == "pruning"):  # pruning may be over before it is seen: wait once more
                    return
            if saves >= number and moment == "pruning" and hidden - now:
                return
            if saves >= number and moment == "writing" and now and time.monotonic() - began >= fraction * self.saving:
                return
            before = now

    def _hidden(self, start: Start, run: Path, stale: set[str], *, pause: float) -> Iterator[set[str]]:
        """Yield again and again the names that are being staged and removed; drop those that vanish from `stale`."""
        deadline = time.monotonic() + PATIENCE
        while start.running():
            names = listing(run / "checkpoints")
            stale &= names
            yield {name for name in names - stale if name.endswith((".writing", ".removing"))}
            if time.monotonic() > deadline:
                raise Fault(f"nothing to kill within {PATIENCE:.0f} s:\n{start.output()}")
            time.sleep(pause)
        raise Fault(f"ended by itself with code {start.code}:\n{start.output()}")

    def _wait_for_loaders(self) -> None:
        """Check that the loader processes of killed trainers end by themselves."""
        deadline = time.monotonic() + 30
        while left := living(self.sessions):
            if time.monotonic() > deadline:
                raise Fault(f"processes of killed starts live on: {left}")
            time.sleep(0.2)

    def figures(self) -> dict[str, Any]:
        best = [record["valid_AP"] for record in records(self.work / "killed") if record["kind"] == "valid"]
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")
        return {
            "kills": self.tally.kills,
            "inside a save": self.tally.inside,
            "phases": {name: self.tally.phases[name] for name in PHASES},
            "killed": dict(sorted(self.tally.victims.items())),
            "resumed from a checkpoint": self.tally.resumes,
            "steps of the run": self.steps,
            "steps taken again": self.tally.repeated,
            "checkpoints verified": self.tally.verified,
            "evaluations": len(best),
            "times that best/ was chosen": sum(ap > max(best[:i], default=-1) for i, ap in enumerate(best)),
            "longest end after a kill (s)": round(self.tally.slowest_end, 1),
            "largest difference of statistics": self.deviation,
            "ranks": self.ranks,
            "seed": self.seed,
            "machine": f"{os.cpu_count()} x {cpu.split(':')[1].strip()}",
            "versions": {"python": sys.version.split()[0]}
            | {name: metadata.version(name) for name in ("torch", "accelerate", "safetensors", "datasets")},
            "commit": git.stdout.strip() or "none",
        }


def show(values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title="Killed and undisturbed run came to the same end")
    for name, value in values.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, shown)
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--ranks", type=int, default=1, help="more than one: under torchrun, over gloo")
    parser.add_argument("--exec", action="store_true", help="start the command itself each time, without a fork")
    parser.add_argument("--work", type=Path, help="an empty folder, which is kept; default: a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):  # read at import: start again
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    began = time.monotonic()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="kills_"))
    work.mkdir(parents=True, exist_ok=True)
    if listing(work):
        parser.error(f"--work: {work} is not empty")
    experiment = Experiment(
        work.resolve(), kills=arguments.kills, seed=arguments.seed, ranks=arguments.ranks, fork=not arguments.exec
    )
    try:
        experiment.run()
    except Fault as fault:
        print(f"FAULT after {experiment.tally.kills} kills: {fault}\nAll files are in {work}.", file=sys.stderr)
        return 1
    values = experiment.figures() | {"wall time (s)": round(time.monotonic() - began)}
    show(values)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if arguments.work is None:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
