"""The documents: their commands parse, their recipes load, their Python runs, and their links lead somewhere."""

import argparse
import ast
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from test_layers import RANK

import fpd_accel
from fpd_accel import cli
from fpd_accel.config.loading import check_recipe, load_recipe
from fpd_accel.config.schema import Evaluate, Recipe
from fpd_accel.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "recipes/README.md", "launch/README.md", "fpd_accel/README.md", ".github/CONTRIBUTING.md")
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml"))
TOP_LEVEL = {"fpd_accel", "recipes", "launch", "tests", "pyproject.toml", "README.md", "LICENSE", "uv.lock"}
UNCHECKED = {"ruff", "mypy", "uv", "source", "tensorboard"}
"""Programs of others, whose arguments are not checked here."""
CODE_SPAN = re.compile(r"`([^`\n]+)`")
SECTION_KEY = re.compile(rf"(({'|'.join(Recipe.model_fields)})(?:\.[a-z_]+)+)(?:=(.+))?")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Return the text of each fenced block of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def code_spans(page: str) -> list[str]:
    return CODE_SPAN.findall(prose(page))


def table_rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading, without its header."""
    section = read(page).split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def split_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of shell text; `sh -c` and what `uv run` starts are opened."""
    text = re.sub(r"\\\n", " ", text)
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split, lexer.commenters = True, ""
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word == "&&":
                yield from opened(words)
                words = []
            else:
                words.append(word)


def opened(words: list[str]) -> Iterator[list[str]]:
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:3] == ["python3", "-m", "uv"]:
        words = words[2:]
    if words[:2] == ["uv", "run"]:
        words = [word for word in words[2:] if word != "--locked"]
    if words[:2] == ["sh", "-c"]:
        yield from split_commands(words[2])
    else:
        yield words


def header(recipe: str) -> str:
    """Return the commands in the comment that opens a recipe, one on a line."""
    lines = [line.removeprefix("#").strip() for line in read(recipe).splitlines() if line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return "\n".join(line for line in joined.splitlines() if line.startswith(("fpd-accel ", "accelerate launch ")))


def commands_of(document: str) -> list[list[str]]:
    if document.endswith(".yaml"):
        return list(split_commands(header(document)))
    found = [words for block in blocks(document, "bash") for words in split_commands(block)]
    for block in blocks(document, "console"):
        typed = "\n".join(line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ "))
        found += list(split_commands(typed))
    return found


class CaughtParser(Exception):  # noqa: N818 - no error
    """Raised in place of parsing; holds the parser."""


@pytest.fixture
def parser_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], argparse.ArgumentParser]:
    """A function that returns the real parser of `fpd-accel` or of a script, caught when it is about to parse."""

    def catch(self: argparse.ArgumentParser, *_args: Any, **_kwargs: Any) -> None:
        raise CaughtParser(self)

    def parser(program: str) -> argparse.ArgumentParser:
        if program == "fpd-accel":
            start: Callable[[], int] = lambda: cli.main(["info", "folder"])  # noqa: E731
        else:
            specification = importlib.util.spec_from_file_location(f"script_{Path(program).stem}", ROOT / program)
            assert specification is not None
            assert specification.loader is not None
            script = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(script)
            start = script.main
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", catch)
            patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", catch)
            with pytest.raises(CaughtParser) as caught:
                start()
        return caught.value.args[0]

    return parser


@pytest.fixture
def check_command(
    parser_of: Callable[[str], argparse.ArgumentParser], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], None]:
    """A function that raises, or fails, if a command of a document would be refused for its words."""
    monkeypatch.chdir(ROOT)

    def check_script(script: str, words: list[str]) -> None:
        assert (ROOT / script).is_file(), script
        if script == "recipes/distill.py":
            arguments = parser_of(script).parse_intermixed_args(words)
            load_recipe(arguments.config, arguments.overrides, check_files=False)
        elif script == "recipes/evaluate.py":
            keys = dict(word.split("=", 1) for word in words if re.match(r"[a-z_]+=", word))
            parser_of(script).parse_args([word for word in words if not re.match(r"[a-z_]+=", word)])
            Evaluate.model_validate({key: yaml.safe_load(value) for key, value in keys.items()})

    def check(words: list[str]) -> None:
        program, *rest = words
        if program == "fpd-accel":
            parser_of(program).parse_args(rest)
        elif words[:2] == ["accelerate", "launch"]:
            from accelerate.commands.launch import launch_command_parser

            launched = launch_command_parser().parse_args(words[2:])
            assert launched.config_file is None or Path(launched.config_file).is_file(), launched.config_file
            check_script(launched.training_script, launched.training_script_args)
        elif program == "launch/local.sh":
            assert int(rest[0]) > 0
            check_script("recipes/distill.py", ["--config", *rest[1:]])
        elif program == "sbatch":
            script = rest.index("launch/slurm.sbatch")
            check_script("recipes/distill.py", ["--config", *rest[script + 1 :]])
        elif program == "pytest":
            assert all((ROOT / word).exists() for word in rest if "/" in word), words
        elif program in ("python", "python3"):
            assert rest[0] == "-m" or (ROOT / rest[0]).is_file(), words
        else:
            assert program in UNCHECKED, words

    return check


@pytest.mark.parametrize("document", [*PAGES, *RECIPES])
def test_commands_are_accepted_by_the_programs_that_they_start(
    document: str, check_command: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands_of(document):
        if "distill.alhpa=0.3" in words:  # the mistake that the page shows on purpose
            continue
        try:
            check_command(words)
        except (SystemExit, ConfigError) as error:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err or error}")


def test_pages_have_the_commands_that_everything_begins_with() -> None:
    programs = {" ".join(words[:2]) for page in PAGES for words in commands_of(page)}
    assert {"accelerate launch", "fpd-accel prepare", "fpd-accel check", "fpd-accel import-config"} <= programs


@pytest.mark.parametrize("words", ["fpd-accel chekc data", "fpd-accel check data --josn x", "fpd-accel check"])
def test_a_planted_mistake_in_a_command_is_found(words: str, check_command: Callable[[list[str]], None]) -> None:
    with pytest.raises(SystemExit):
        check_command(words.split())


@pytest.mark.parametrize("page", PAGES)
def test_a_refusal_that_a_page_shows_is_the_one_printed(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "console"):
        command, *printed = block.splitlines()
        (words,) = split_commands(command.removeprefix("$ "))
        position = words.index("--config") + 1
        with pytest.raises(ConfigError) as caught:
            load_recipe(words[position], words[position + 1 :])
        for shown, line in zip(printed, f"error: {caught.value}".splitlines(), strict=True):
            assert line.startswith(shown.removesuffix("…"))
            assert shown.endswith("…") or shown == line


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_in_the_text_exist(page: str, parser_of: Callable[[str], argparse.ArgumentParser]) -> None:
    for span in code_spans(page):
        if not re.match(r"fpd-accel [a-z]", span):
            continue
        parser, words = parser_of("fpd-accel"), span.split()[1:]
        while words and not words[0].startswith("-"):
            inner = next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
            if inner is None:
                break  # a positional argument
            assert words[0] in inner, span
            parser, words = inner[words[0]], words[1:]
        options = [word for word in words if word.startswith("--")]
        assert set(options) <= parser._option_string_actions.keys(), span


def test_files_named_in_the_text_exist() -> None:
    for page in PAGES:
        for span in code_spans(page):
            name = span.split()[0]
            if re.match(r"(fpd_accel|recipes|launch|tests)/[\w./-]+\.\w+$", name) and "/X." not in name:
                assert (ROOT / name).is_file(), f"{page}: {name}"


def inner_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from inner_models(argument)


@pytest.mark.parametrize("page", [*PAGES, ".github/CHANGELOG.md"])
def test_recipe_fields_in_the_text_exist_and_take_the_value_that_is_given(page: str) -> None:
    for span in code_spans(page):
        match = SECTION_KEY.fullmatch(span)
        if match is None or re.search(r"\.(json|jsonl|yaml|py|png)$", match[1]) or span == "log.tensorboard":
            continue
        section, *path = match[1].split(".")
        (model,) = inner_models(Recipe.model_fields[section].annotation)
        for i, name in enumerate(path):
            assert name in model.model_fields, f"{page}: {span}"
            if i < len(path) - 1:
                (model,) = inner_models(model.model_fields[name].annotation)
        if match[3] is not None:
            values = yaml.safe_load(read("recipes/lsp_extended.yaml"))[section]
            value = yaml.safe_load(match[3])
            for name in reversed(path):
                value = {name: value}
            (whole,) = inner_models(Recipe.model_fields[section].annotation)
            whole.model_validate(values | value)


@pytest.mark.parametrize("page", PAGES)
def test_pieces_of_recipes_fit_into_a_recipe(page: str) -> None:
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(read("recipes/lsp_extended.yaml"))
        for section, fields in yaml.safe_load(block).items():
            values[section] = values.get(section, {}) | fields
        check_recipe(values, source=page, check_files=False)


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_its_public_names_exist(page: str) -> None:
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        compile(tree, page, "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fpd_accel":
                assert node.attr in fpd_accel.__all__, f"{page}: fpd_accel.{node.attr}"
                getattr(fpd_accel, node.attr)


def test_the_example_of_an_own_network_gives_heatmaps_at_a_quarter_of_the_input_size() -> None:
    import torch

    (code,) = blocks("recipes/README.md", "python")[:1]
    (student,) = (
        values["student"] for block in blocks("recipes/README.md", "yaml")
        if "student" in (values := yaml.safe_load(block))
    )  # fmt: skip
    names: dict[str, Any] = {"__name__": "my_networks"}
    exec(compile(code, "my_networks.py", "exec"), names)
    network = names[student["arch"].partition(":")[2]](num_keypoints=17, **student["arguments"])
    (heatmaps,) = network(torch.zeros(2, 3, 64, 48))
    assert heatmaps.shape == (2, 17, 16, 12)


def test_the_example_of_the_public_interface_trains_a_student() -> None:
    import torch

    from fpd_accel.data.batch import Batch

    code = blocks("fpd_accel/README.md", "python")[0]
    names: dict[str, Any] = {}
    exec(code.replace("hrnet_w18", "tiny_w8").replace("hrnet_w48", "tiny_w16"), names)
    crops, keypoints = torch.randint(0, 255, (2, 256, 192, 3), dtype=torch.uint8), torch.full((2, 17, 2), 90.0)
    region = torch.full((2, 2), 200.0)
    batch = Batch(crops, keypoints, torch.ones(2, 17), centers=region, sizes=region, rows=torch.arange(2))
    optimizer = torch.optim.SGD(names["student"].parameters(), lr=0.1)
    before = [parameter.clone() for parameter in names["teacher"].parameters()]
    assert names["train_step"](batch, optimizer) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, names["teacher"].parameters(), strict=True))


def test_the_example_of_the_loop_runs_to_its_end(
    tiny_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = blocks("fpd_accel/README.md", "python")[1]
    assert "recipes/lsp_extended.yaml" in code
    exec(code.replace("recipes/lsp_extended.yaml", str(tiny_recipe())), {})
    assert "AP" in capsys.readouterr().out
    assert fpd_accel.load_model(tmp_path / "from_python" / "best")


def slug(title: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ".github/CHANGELOG.md", "recipes/RESULTS.md"])
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}"


def test_readme_fits_on_a_page_and_has_the_command_that_continuous_integration_runs() -> None:
    readme = read("README.md")
    assert len(readme.splitlines()) <= 120
    found = re.search(r"<!-- test command -->\n```bash\n(.+)\n```\n", readme)
    assert found is not None
    assert "pytest" in found[1]
    picture = (ROOT / ".github" / "people.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 300_000


def test_the_map_names_every_folder_in_the_direction_of_imports() -> None:
    rows = [
        CODE_SPAN.findall(row[0]) for row in table_rows("fpd_accel/README.md", "Folders and the direction of imports")
    ]
    assert {name for row in rows for name in row} == RANK.keys() - {"__init__"}
    ranks = [RANK[name] for row in rows for name in row]
    assert ranks == sorted(ranks)


def test_the_way_of_a_batch_names_what_its_files_define() -> None:
    rows = table_rows("fpd_accel/README.md", "From a shard to the loss")
    assert len(rows) > 10
    for _, file, names in rows:
        (path,) = re.findall(r"\]\((.+)\)", file)
        tree = ast.parse(read(f"fpd_accel/{path}"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert set(CODE_SPAN.findall(names)) <= defined, path


def test_the_public_names_are_listed() -> None:
    rows = table_rows("fpd_accel/README.md", "Public interface")
    assert {span for row in rows for span in CODE_SPAN.findall(row[0])} == {f"fpd_accel.{n}" for n in fpd_accel.__all__}


def test_the_top_level_has_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def test_files_for_github_are_valid_and_run_the_same_check() -> None:
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert all(isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict) for path in files)
    (job,) = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"].values()
    assert job["steps"][-1] == {"run": "bash .ci/run"}
    assert f"## {fpd_accel.__version__}\n" in read(".github/CHANGELOG.md")
