"""The command line: help for every option, the version, and answers to options that were removed."""

import argparse
from collections.abc import Iterator
from importlib import metadata

import pytest

from fpd_accel.cli import create_parser, main


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Yield every option and argument of a parser and of its commands, with the command's name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in set(action.choices.values()):
                yield from actions(command)
        else:
            yield parser.prog, action


def test_every_option_has_a_help_text() -> None:
    found = list(actions(create_parser()))
    assert len(found) > 60
    assert not [(prog, action.dest) for prog, action in found if not action.help]


def test_a_bare_command_prints_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("prepare", "check", "detect", "predict", "import-weights", "bench"))


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"fpd-accel {metadata.version('fpd-accel')}\n"


def test_a_removed_option_names_its_replacement(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-weights", "a.pth", "--output", "out", "--verify", "fixtures"]) == 2
    assert "--verify: removed in 0.2;" in capsys.readouterr().err
