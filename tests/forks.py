"""Starts jobs as forks of one process that has imported everything: an interpreter takes seconds to import torch.

    python tests/forks.py FOLDER

Reads one JSON object per line: ``command``, a script and its arguments; ``environment``, all of it; ``log``, a file.
Answers with the id of a process in a session of its own, which runs the script as ``__main__``; its exit code goes to
FOLDER/ID.code. ``jobs.py`` is the other side.
"""

import json
import os
import runpy
import signal
import sys
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "faults"))

from starts import fork_off

IMPORTS = (
    "fpd_accel.run", "fpd_accel.data.synthetic", "torch.utils.tensorboard", "torch.distributed.checkpoint",
    "pycocotools.cocoeval", "safetensors.torch", "datasets.config",
)  # fmt: skip
ENDS = {signal.SIGCHLD}


def main() -> None:
    folder = Path(sys.argv[1])
    for name in IMPORTS:
        import_module(name)
    running: set[int] = set()
    signal.signal(signal.SIGCHLD, lambda *_: note_ends(running, folder))
    for line in sys.stdin:  # until whoever asks has gone, perhaps killed
        asked = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # a job may be over before it is noted
        process = fork_off(partial(run, asked), Path(asked["log"]))
        running.add(process)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        print(process, flush=True)
    for process in tuple(running):
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def note_ends(running: set[int], folder: Path) -> None:
    """Write the exit codes of all that have ended; of a signal the negative, as subprocess has it."""
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            return
        running.discard(process)
        staged = folder / f"{process}.staged"
        staged.write_text(str(os.waitstatus_to_exitcode(status)))
        staged.rename(folder / f"{process}.code")


def run(asked: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    os.environ.clear()
    os.environ.update(asked["environment"])
    if "HF_DATASETS_CACHE" in os.environ:  # read when it was imported
        sys.modules["datasets.config"].HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])
    sys.argv = asked["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
