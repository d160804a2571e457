"""Where a measurement was made: numbers without it cannot be compared."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from fpd_accel.log import available_cores
from fpd_accel.run_directory import PACKAGES


def environment() -> dict[str, Any]:
    """Versions, processor, cores of this process and, in a checkout, the commit with a + if files differ from it.

    To be asked before measuring, which is a load itself.
    """
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in (*PACKAGES, "pyarrow")},
        "system": platform.platform(),
        "cpu": _processor(),
        "cores": available_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": round(psutil.getloadavg()[0], 2),  # of the last minute, by whomever: other work makes rates lower
    }


def describe(found: dict[str, Any]) -> str:
    """An environment in one line."""
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
    if not (root / ".git").exists():  # installed: what repository lies around it is not ours
        return None
    try:
        commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        commit, changed = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
