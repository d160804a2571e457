"""Folders that jobs and machines share: one job writes at a time, and a rank that does not see the files says so."""

from pathlib import Path

import pytest
from filelock import FileLock

from fpd_accel.distributed import shared_folder
from fpd_accel.distributed.accelerator import create_accelerator
from fpd_accel.distributed.shared_folder import SharedFolder
from fpd_accel.errors import DataError


@pytest.fixture
def waited_for() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path: Path, waited_for: list[str], monkeypatch: pytest.MonkeyPatch) -> SharedFolder:
    monkeypatch.setattr(shared_folder, "LOCK_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(shared_folder, "POLL_SECONDS", 0.0)
    return SharedFolder(tmp_path / "folder", "some.setting", create_accelerator("fp32"), waited_for.append)


def test_a_second_job_waits_for_the_first(
    folder: SharedFolder, waited_for: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, turns = FileLock(folder.path.with_suffix(".lock")), []
    first.acquire()

    def meanwhile() -> None:
        turns.append(first.is_locked)
        if len(turns) == 3:
            first.release()

    with folder.one_job(meanwhile=meanwhile):
        assert turns == [True] * 3
        with pytest.raises(TimeoutError):
            first.acquire(timeout=0)
    first.acquire(timeout=0)
    first.release()
    assert len(waited_for) == 3
    assert capsys.readouterr().err.count("some.setting: another job is writing") == 1


def test_a_rank_that_does_not_see_the_written_files_is_an_error(
    folder: SharedFolder, waited_for: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["2 of 3 parts are not here", "1 of 3 parts are not here", ""])
    folder.wait_for(lambda: next(answers))
    assert len(waited_for) == 2
    monkeypatch.setattr(shared_folder, "VISIBLE_SECONDS", -1.0)
    with pytest.raises(DataError, match=r"folder: 2 of 3 parts are not here; set some\.setting to a folder on a disk"):
        folder.wait_for(lambda: "2 of 3 parts are not here")
