"""Files that a command writes for a person: whole or not at all, and refused before the long part where they can be."""

import os
from contextlib import suppress
from pathlib import Path

from fpd_accel.errors import DataError


def prepare_file(path: Path, *, option: str = "--output") -> None:
    """Make the folder of a file that a long computation will write, and that ``option`` of its command names.

    Raises:
        DataError: ``path`` is a folder, or its own folder cannot be made.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; {option} is the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be made: {error.strerror}") from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, under a temporary name that becomes its own; make its folder.

    Raises:
        DataError: the file cannot be written; nothing of it is left behind.
    """
    try:
        _replace(path, path.with_name(f".{path.name}.{os.getpid()}"), content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}; choose another file") from None


def replace_file(path: Path, content: str | bytes) -> None:
    """The same in a run directory, where one process writes: what it leaves when it is killed, the next one overwrites.

    Raises:
        OSError: the file cannot be written; nothing of it is left behind.
    """
    _replace(path, path.with_name(f".{path.name}.writing"), content)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def amount(count: int) -> str:
    """Bytes in words."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def _replace(path: Path, staged: Path, content: str | bytes) -> None:
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        if path.exists() and not path.is_file():  # a device such as /dev/null, or a pipe: nothing to take the place of
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(data)
        flush(staged)
        staged.replace(path)
    except OSError:
        with suppress(OSError):
            staged.unlink()
        raise
