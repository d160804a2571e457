"""What ``fpd-accel bench scale`` measures, for the command line too: nothing heavy is imported here."""

from collections.abc import Sequence
from dataclasses import dataclass

PROCESS_ROUNDS = 3  # of processes, at most: each start of them is ten seconds


@dataclass(frozen=True)
class Scale:
    """What to measure, and how large."""

    processes: Sequence[int] = (1, 2)
    joints: Sequence[int] = (17, 133)  # COCO's body, COCO-WholeBody
    inputs: Sequence[tuple[int, int]] = ((256, 192), (384, 288))  # (height, width)
    people: Sequence[int] = (10_000, 1_000_000)  # to open and to order
    scored: Sequence[int] = (10_000, 100_000)  # to evaluate
    batch: int = 8
    steps: int = 10  # of training, with each number of processes
    rounds: int = 5  # of processes at most PROCESS_ROUNDS, of evaluation one
