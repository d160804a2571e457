"""Files that a command writes: whole or not at all."""

import os
import threading
from pathlib import Path

import pytest

from fpd_accel.errors import DataError
from fpd_accel.files import write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "people.json"
    for content in ("first", "second"):
        write_whole(path, content)
        assert path.read_text() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["people.json"]


def test_pipes_and_devices_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, "through")
    reader.join(10)
    assert read == [b"through"]
    assert pipe.is_fifo()


def test_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        write_whole(tmp_path, "text")
