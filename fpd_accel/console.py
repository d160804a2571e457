"""Messages, errors and progress bars, printed once per job: by rank 0."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track as rich_track

from fpd_accel.errors import UserError

Item = TypeVar("Item")
console = Console(stderr=True, highlight=False)
# For tables, which a user may redirect into a file; 140 columns there.
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def is_main_process() -> bool:
    """Return whether this is rank 0, or the only process; known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a line to stderr on rank 0."""
    if is_main_process():
        console.print(escape(message), soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning to stderr on rank 0."""
    if is_main_process():
        console.print(f"[yellow]warning:[/yellow] {escape(message)}", soft_wrap=True)


def fail(error: UserError) -> int:
    """Print an error without a traceback, and return the exit code for it, 2.

    Rank 0 prints it; another rank only if the error is marked `this_rank_only`.
    """
    if is_main_process() or error.this_rank_only:
        rank = "" if is_main_process() else f" (rank {os.environ['RANK']})"
        console.print(f"[red]error{rank}:[/red] {escape(str(error))}", soft_wrap=True)
    return 2


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over items with a progress bar, shown on rank 0 if stderr is a terminal."""
    shown = is_main_process() and console.is_terminal
    return iter(rich_track(items, description, total=total, console=console, disable=not shown, transient=True))
