"""The machine and software of a measurement, without which its numbers cannot be compared."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from fpd_accel.distributed.accelerator import available_cores
from fpd_accel.training.resume import PACKAGES


def environment() -> dict[str, Any]:
    """Return versions, processor, cores of this process and, in a checkout, the commit (with + if files differ).

    Call it before measuring, which is a load itself.
    """
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in (*PACKAGES, "pyarrow")},
        "system": platform.platform(),
        "cpu": _processor(),
        "cores": available_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": round(psutil.getloadavg()[0], 2),  # of the last minute, by all processes: other work lowers rates
    }


def describe(found: dict[str, Any]) -> str:
    """Return an environment as one line."""
    versions = found["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "datasets", "numpy"))
    libraries += f", OpenCV {versions['opencv-python-headless']}, simplejpeg {versions['simplejpeg']}"
    commit = f"commit {found['commit'][:9] + '+' * found['commit'].endswith('+')}" if found["commit"] else "no commit"
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_gb']:.0f} GB, load {found['load']:.2f}; "
        f"Python {found['python']}, {libraries}; fpd-accel {versions['fpd-accel']}, {commit}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed: a repository around it is another project's
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
