"""Read a recipe, apply overrides, and report every mistake at once."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fpd_accel.config.rules import SECTION_RULES, contradictions, missing_files, teacher_contradictions
from fpd_accel.config.schema import DATASETS, PATH, Recipe
from fpd_accel.errors import ConfigError

SectionType = TypeVar("SectionType", bound=BaseModel)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Read a recipe from YAML, apply overrides such as `"train.steps=10"`, and check all of it.

    Without `check_files` the files that the recipe names need not exist.

    Raises:
        ConfigError: Lists every mistake at once, each with its dotted path.
    """
    return check_recipe(_read_yaml(Path(path)), overrides, source=str(path), check_files=check_files)


def check_recipe(
    values: dict[str, Any], overrides: Sequence[str] = (), *, source: str, check_files: bool = True
) -> Recipe:
    """Check sections as `load_recipe` checks those of a file; `source` stands in messages.

    Contradictions between sections are looked for once every section is valid.

    Raises:
        ConfigError: Lists every mistake at once, each with its dotted path.
    """
    mistakes: list[str] = []
    for override in overrides:
        mistakes += _apply_override(values, override)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        mistakes += [_explain(detail) for detail in error.errors()]
    for name in SECTION_RULES:
        mistakes += _broken_rules(name, values.get(name, {}))
    if recipe is not None and not mistakes:
        mistakes += contradictions(recipe)
        if check_files:
            mistakes += [*missing_files(recipe), *_teacher_mistakes(recipe)]
    if recipe is None or mistakes:
        raise ConfigError("\n  ".join([f"{source}: this recipe cannot be used", *mistakes]))
    return recipe


def load_section(
    section: type[SectionType], overrides: Sequence[str], *, source: str, values: Mapping[str, Any]
) -> SectionType:
    """Build one section of a recipe, such as `Evaluate`, and check it as `load_recipe` does.

    Overrides such as `"nms=soft"`, with or without the section's name before the key, are applied to `values`;
    `source` stands in messages.

    Raises:
        ConfigError: Lists every mistake at once, each with its dotted path.
    """
    name = next(name for name, field in Recipe.model_fields.items() if field.annotation is section)
    tree: dict[str, Any] = {name: dict(values)}
    mistakes: list[str] = []
    for override in overrides:
        mistakes += _apply_override(tree, override if override.startswith(f"{name}.") else f"{name}.{override}")
    try:
        checked = section.model_validate(tree[name])
        mistakes += _broken_rules(name, checked)
        if not mistakes:
            return checked
    except ValidationError as error:
        mistakes += [_explain(detail, name) for detail in error.errors()]
    raise ConfigError("\n  ".join([f"{source}: these options cannot be used", *mistakes]))


def _broken_rules(name: str, values: Any) -> list[str]:
    """Return the mistakes that the rules of a section find in it; none if its fields are wrong by themselves."""
    kind: Any = Recipe.model_fields[name].annotation
    try:
        section = TypeAdapter(kind).validate_python(values)
    except ValidationError:
        return []
    return list(SECTION_RULES[name](section))


def _teacher_mistakes(recipe: Recipe) -> list[str]:
    """Return the mistakes of the teacher's own recipe, and the contradictions between both recipes."""
    if recipe.distill.mode != "fpd" or recipe.teacher.recipe is None:
        return []
    try:
        return [*teacher_contradictions(recipe, teacher_recipe(recipe))]
    except ConfigError as error:
        return [f"teacher.recipe: {line.strip()}" for line in str(error).splitlines()]


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, defaults included. Reading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def teacher_recipe(recipe: Recipe, *, check_files: bool = True) -> Recipe:
    """Return the recipe that trains the teacher: `teacher.recipe` with its overrides and `distill.mode=normal`.

    Raises:
        ConfigError: There is no such recipe, or it cannot be used.
    """
    if recipe.teacher.recipe is None:
        raise ConfigError("teacher.recipe: not set, so there is no way to train the teacher")
    overrides = [*recipe.teacher.overrides, "distill.mode=normal"]
    return load_recipe(recipe.teacher.recipe, overrides, check_files=check_files)


def teacher_weights(recipe: Recipe) -> Path:
    """Return the path of the teacher's weights: those given, or `best/` of the run of `teacher.recipe`."""
    if recipe.teacher.weights is not None:
        return Path(recipe.teacher.weights)
    return teacher_recipe(recipe, check_files=False).run.directory / "best"


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(f"{path}: no such recipe" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections ({', '.join(Recipe.model_fields)})")
    return values


def _apply_override(values: dict[str, Any], override: str) -> list[str]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [f"{override}: an override is key.path=value"]
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        if not isinstance(values[parent], dict):
            return [f"{key}: {parent!r} is a value, not a section"]
        values = values[parent]
    try:
        values[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a text like a date that does not exist
        return [f"{key}: {text!r} is not a YAML value"]
    return []


def _explain(detail: ErrorDetails, *section: str) -> str:
    location, value = (*section, *(key for key in detail["loc"] if key not in (PATH, DATASETS))), detail["input"]
    path = ".".join(map(str, location))
    match detail["type"]:
        case "extra_forbidden":
            return f"{path}: unknown key; {_did_you_mean(str(location[-1]), _names_at(location[:-1]))}"
        case "missing":
            return f"{path}: missing; it has no default"
        case "literal_error":
            choices = [choice.strip("'") for choice in re.split(r", | or ", detail["ctx"]["expected"])]
            return f"{path}: {value!r} is not a choice; {_did_you_mean(str(value), choices)}"
        case "model_type" | "model_attributes_type":
            return f"{path}: {value!r} is not a section with keys {', '.join(_names_at(location))}"
        case _:
            text = detail["msg"].replace("Input should", "should").replace("String should", "should")
            return f"{path}: {value!r} {text}"


def _names_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for key in location:
        if isinstance(key, int):  # the index in a list, which was unpacked with its field
            continue
        inner = _unpacked(model.model_fields[key].annotation)
        model = next(kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)


def _unpacked(annotation: Any) -> list[Any]:
    """Return a type and the types that it consists of, such as `Section` in `tuple[Section, ...] | None`."""
    return [annotation, *(inner for argument in get_args(annotation) for inner in _unpacked(argument))]


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}choices: {', '.join(choices)}"
