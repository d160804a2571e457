"""Start jobs as forks of one process that has imported everything: an interpreter takes seconds to import torch.

    python tests/forks.py FOLDER

Reads one JSON object per line: `command`, a script and its arguments; `environment`, all variables; `log`, a file.
Answers with the process id of a fork in a session of its own, which runs the script as `__main__`. Its exit code is
written to FOLDER/ID.code. The other side is `jobs.py`.
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

from starts import IMPORTS, fork_off

ENDS = {signal.SIGCHLD}


def main() -> None:
    folder = Path(sys.argv[1])
    for name in IMPORTS:
        import_module(name)
    running: set[int] = set()
    signal.signal(signal.SIGCHLD, lambda *_: write_exit_codes(running, folder))
    for line in sys.stdin:  # until the other side has ended, perhaps killed
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # a job may end before it is in `running`
        process = fork_off(partial(run, request), Path(request["log"]))
        running.add(process)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        print(process, flush=True)
    for process in tuple(running):
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def write_exit_codes(running: set[int], folder: Path) -> None:
    """Write the exit code of each job that has ended; if a signal ended it, the signal's number as a negative one."""
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            return
        running.discard(process)
        staged = folder / f"{process}.staged"
        staged.write_text(str(os.waitstatus_to_exitcode(status)))
        staged.rename(folder / f"{process}.code")


def run(request: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    os.environ.clear()
    os.environ.update(request["environment"])
    if "HF_DATASETS_CACHE" in os.environ:  # read when `datasets` was imported
        sys.modules["datasets.config"].HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])
    sys.argv = request["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
