"""Runs that are killed again and again end as an undisturbed run does; see `kills.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


def kills(folder: Path, *arguments: str) -> dict:
    figures = folder / "figures.json"
    command = [sys.executable, str(SCRIPT), "--work", str(folder / "work"), "--json", str(figures), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(figures.read_text())


@pytest.mark.faults
def test_run_killed_three_times_comes_to_the_same_end(tmp_path: Path) -> None:
    assert kills(tmp_path, "--kills", "3")["kills"] == 3  # in any phase; the slow tests count those inside saves


def test_comparison_finds_a_single_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(SCRIPT.parent)
    from disk import Fault, difference

    weights = {"a.weight": torch.ones(3), "a.running_mean": torch.ones(3)}
    save_file(weights, tmp_path / "one")
    save_file(weights | {"a.running_mean": weights["a.running_mean"] + 1e-6}, tmp_path / "statistics")
    weights["a.weight"].view(torch.int32)[1] ^= 1
    save_file(weights, tmp_path / "flipped")
    assert difference(tmp_path / "one", tmp_path / "one") == 0
    assert 0 < difference(tmp_path / "one", tmp_path / "statistics") < 2e-6
    with pytest.raises(Fault, match=r"1 tensors differ, a\.weight"):
        difference(tmp_path / "one", tmp_path / "flipped")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_run_killed_two_hundred_times_comes_to_the_same_end(tmp_path: Path) -> None:
    figures = kills(tmp_path, "--kills", "200")
    assert figures["kills"] == 200
    assert figures["inside a save"] >= 100
    assert all(figures["phases"].values()), figures["phases"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_ranks_killed_twenty_times_come_to_the_same_end(tmp_path: Path) -> None:
    assert kills(tmp_path, "--kills", "20", "--ranks", "2")["kills"] == 20
