"""Loader processes ignore stop signals to the whole job, and end with the trainer."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A trainer, and a loader process that is blocked in a read. The pipe `life` is open as long as either runs.
SCRIPT = """
import multiprocessing, os, signal, sys, time
from fpd_accel.distributed.preemption import ignore_stop_signals, terminate

def serve(pipe):
    ignore_stop_signals()
    pipe.send(os.getpid())
    while pipe.recv():
        while signal.SIGTERM in signal.sigpending():  # two at once would count as one
            time.sleep(0.001)
        pipe.send(signal.alarm(0))  # seconds until an end that was set meanwhile

here, there = multiprocessing.Pipe()
worker = multiprocessing.get_context("fork").Process(target=serve, args=(there,), daemon=True)
worker.start()
print(here.recv(), flush=True)
for line in sys.stdin:
    if line == "ask\\n":
        here.send(True)
        print(here.recv(), flush=True)
    else:
        terminate(worker)
        print("ended", worker.exitcode, flush=True)
"""


def start() -> tuple[subprocess.Popen[str], int, int]:
    """Return the trainer, the process id of its loader process, and the read end of `life`."""
    read, life = os.pipe()
    trainer = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        pass_fds=(life,),
    )  # fmt: skip
    os.close(life)
    assert trainer.stdout is not None
    return trainer, int(trainer.stdout.readline()), read


def ask(trainer: subprocess.Popen[str], what: str) -> str:
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    trainer.stdin.write(f"{what}\n")
    trainer.stdin.flush()
    return trainer.stdout.readline().strip()


def test_loader_process_is_ended_by_its_trainer_alone() -> None:
    trainer, worker, read = start()
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker, number)
            assert ask(trainer, "ask") == "0"
        assert ask(trainer, "end") == "ended 143"
    finally:
        trainer.kill()
        trainer.communicate()
        os.close(read)


def test_loader_process_ends_with_its_trainer_although_it_is_blocked() -> None:
    trainer, worker, read = start()
    os.kill(worker, signal.SIGTERM)
    assert ask(trainer, "ask") == "0"
    trainer.kill()
    trainer.communicate()
    assert os.read(read, 1) == b""  # returns when no process has the write end
    os.close(read)
