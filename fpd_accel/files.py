"""Files and folders that are written whole or not at all, their SHA-256, and URLs."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fpd_accel.errors import DataError

URL = re.compile(r"(?:[A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]*://")


@contextmanager
def staged(path: Path, *, own: str = "writing") -> Iterator[Path]:
    """Give a temporary sibling of `path` to write to; on success flush it to the disk and rename it to `path`.

    Args:
        path: The file to write; its folder is made.
        own: Distinguishes temporary files of several writers. By default a temporary file that a killed process left
            behind is overwritten by the next one.

    Raises:
        OSError: The file cannot be written. Nothing of it is left behind, whatever the error is.
    """
    temporary = path.with_name(f".{path.name}.{own}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def staged_folder(path: Path, *, own: str = "writing") -> Iterator[Path]:
    """Give an empty temporary sibling of `path` to fill; on success flush it to the disk and rename it to `path`.

    `path` must not exist, or be an empty folder, when the block ends. A temporary folder that a killed process left
    behind is emptied first.

    Raises:
        OSError: The folder cannot be written. Nothing of it is left behind, whatever the error is.
    """
    temporary = path.with_name(f".{path.name}.{own}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            flush(written)
        temporary.rename(path)
        flush(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that a command's user asked for, text as UTF-8; make its folder.

    Raises:
        DataError: The file cannot be written; nothing of it is left behind.
    """
    try:
        replace_file(path, content, own=str(os.getpid()))
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}; choose another file") from None


def replace_file(path: Path, content: str | bytes, *, own: str = "writing") -> None:
    """Write a file in one piece, text as UTF-8; make its folder. See `staged` for `own`.

    Raises:
        OSError: The file cannot be written; nothing of it is left behind.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if path.exists() and not path.is_file() and not path.is_dir():  # a device such as /dev/null, or a pipe
        path.write_bytes(data)
        return
    with staged(path, own=own) as temporary:
        temporary.write_bytes(data)


def prepare_file(path: Path, *, option: str = "--output") -> None:
    """Make the folder of a file that a long computation will write, and that `option` of its command names.

    Raises:
        DataError: `path` is a folder, or its own folder cannot be made.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; {option} is the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be made: {error.strerror}") from None


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(source: Path | bytes | str) -> str:
    """Return the hexadecimal SHA-256 of a file's content, of bytes, or of a text as UTF-8.

    Raises:
        OSError: The file cannot be read.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(source.encode() if isinstance(source, str) else source).hexdigest()


def amount(count: int) -> str:
    """Return a number of bytes in words."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is one of fsspec's URLs, as `hf://datasets/user/name`, rather than a local one."""
    return URL.match(os.fspath(path)) is not None
