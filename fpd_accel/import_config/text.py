"""Write a converted recipe: a header that lists the differences, then each value with the key that it comes from."""

import os
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fpd_accel.errors import ConfigError
from fpd_accel.files import replace_file
from fpd_accel.import_config.notes import differences, prepare_commands, unused
from fpd_accel.import_config.yacs import Experiment, one_line, plain

WIDTH = 120


@dataclass(frozen=True)
class Line:
    """One value of a recipe, and its origin."""

    path: str  # dotted path in the recipe, such as "optim.lr"
    value: Any
    experiment: Experiment
    key: str  # key of the experiment, such as "TRAIN.LR"; empty if there is none
    note: str = ""

    @property
    def comment(self) -> str:
        """The key and its value, whether that is the default, and the note."""
        if not self.key:
            return one_line(self.note)
        default = "" if self.key in self.experiment.sources else " (default)"
        origin = f"{self.key} {plain(self.experiment[self.key])}{default}"
        return one_line("; ".join(filter(None, (origin, self.note))))


def write_text(
    lines: Sequence[Line],
    experiment: Experiment,
    teacher_experiment: Experiment | None,
    *,
    files: tuple[str, str | None],
    overrides: Sequence[str],
) -> str:
    """Return the recipe as YAML with comments; no text in a comment can change the values."""
    made_from = [f"--cfg {shlex.quote(one_line(files[0]))}"]
    made_from += [f"--tcfg {shlex.quote(one_line(files[1]))}"] if files[1] else []
    made_from += [" ".join(shlex.quote(one_line(word)) for word in overrides)] if overrides else []
    header = [
        *_comment(
            "Converted by `fpd-accel import-config` from experiment files of the original implementation (yacs):"
        ),
        *(text for words in made_from for text in _comment(words, indent="#   ")),
        *_comment(
            "Behind each value: the key that it comes from. Settings that the files do not have take the original's "
            "defaults."
        ),
        "#",
        *_comment("Data, from the original's folders:"),
        *(f"#   {command}" for command in prepare_commands(experiment)),
        "#",
    ]
    values = {line.path: line.value for line in lines}
    distils = values["distill.mode"] == "fpd"
    if distils:
        again = "a second training of a finished student" if values["student.weights"] else "other random numbers"
        header += [
            *_comment(f"The control, the same without the teacher, as a gain may also come from {again}:"),
            "#   accelerate launch recipes/distill.py --config THIS_FILE \\",
            f"#       distill.mode=normal run.name={values['run.name']}_control",
            "#",
        ]
    header += ["# Differences from the original:", *_items(differences(experiment))]
    left_out = _items(unused(experiment, teacher_experiment, distils=distils))
    header += ["# Left out, as without effect on the result in the original or here:", *left_out] if left_out else []
    return "\n".join([*header, *_body(lines)]) + "\n"


def write_recipe(text: str, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a recipe, whole or not at all.

    Raises:
        ConfigError: The file exists and `force` is not set, or it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path}: a folder; give the name of a file, such as {path / 'recipe.yaml'}")
    if path.exists() and not force:
        raise ConfigError(f"{path}: exists already; give another name, or --force to replace it")
    try:
        replace_file(path, text, own=str(os.getpid()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _body(lines: Sequence[Line]) -> Iterator[str]:
    """Yield the YAML, sections in the order of the lines; comments too long to follow their values precede them."""
    opened: list[str] = []
    for line in lines:
        *sections, name = line.path.split(".")
        for depth, section in enumerate(sections):
            if opened[: depth + 1] != sections[: depth + 1]:
                yield f"{'  ' * depth}{section}:"
        opened, indent = sections, "  " * len(sections)
        # PyYAML writes some line breaks of Unicode as they are, which its reader takes for ends of lines.
        printable = isinstance(line.value, str) and line.value.isprintable()
        value = yaml.safe_dump(line.value, default_flow_style=True, width=10**9, allow_unicode=printable)
        entry = f"{indent}{name}: {value.removesuffix('...' + chr(10)).strip()}"
        behind = f"{entry} # {line.comment}"
        if line.comment and len(behind) > WIDTH:
            yield from _comment(line.comment, indent=f"{indent}# ")
        yield entry if not line.comment or len(behind) > WIDTH else behind


def _items(texts: Iterator[str]) -> list[str]:
    return [line for text in texts for line in _comment(one_line(text), indent="# - ", further="#   ")]


def _comment(text: str, *, indent: str = "# ", further: str | None = None) -> list[str]:
    """Return a text as lines of comment."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=further or indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
