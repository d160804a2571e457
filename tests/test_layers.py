"""Imports point one way: a folder, or a module beside the folders, imports only from the layers below its own."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fpd_accel"
LAYERS = (
    ("errors", "files", "console"),  # the ground
    ("skeleton", "geometry", "outputs", "codecs", "decode", "losses", "oks", "metrics"),  # the method
    ("models",),
    ("config",),
    ("distributed", "synthetic", "import_config"),
    ("data",),
    ("visualize",),
    ("weights",),
    ("evaluation",),
    ("training", "check", "predict", "detect"),
    ("bench",),
    ("cli",),
    ("__init__",),
)
"""One rule per folder; modules of the method and of the ground may import from others of the same layer."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FLAT = LAYERS[:2]  # layers of modules side by side instead of one folder


def imports(package: Path) -> list[tuple[str, str]]:
    """(module, imported module) of every import inside the package, by their dotted names without the package's."""
    found = []
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).with_suffix("").as_posix().replace("/", ".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [(module, name.removeprefix("fpd_accel.")) for name in names if name.startswith("fpd_accel.")]
            if isinstance(node, ast.ImportFrom) and node.module == "fpd_accel":
                found += [(module, alias.name) for alias in node.names]
    return found


def upward_imports(package: Path) -> list[str]:
    wrong = []
    for importer, imported in imports(package):
        a, b = importer.split(".")[0], imported.split(".")[0]
        together = any(a in layer and b in layer for layer in FLAT)
        if RANK[b] > RANK[a] or (RANK[b] == RANK[a] and a != b and not together):
            wrong.append(f"{importer} imports {imported}")
    return wrong


def test_every_module_has_a_layer() -> None:
    modules = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert modules == set(RANK)


def test_modules_import_only_from_layers_below() -> None:
    assert not upward_imports(PACKAGE)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("data/stream.py", "from fpd_accel.training.trainer import Trainer"),
        ("errors.py", "from fpd_accel import metrics"),
        ("models/base.py", "from fpd_accel.config.schema import Recipe"),
        ("check/labels.py", "from fpd_accel.predict import Predictor"),
        ("losses.py", "def late():\n    import fpd_accel.data.batch"),
    ],
)
def test_a_planted_upward_import_is_found(tmp_path: Path, module: str, line: str) -> None:
    (tmp_path / module).parent.mkdir(exist_ok=True)
    (tmp_path / module).write_text(line + "\n")
    assert len(upward_imports(tmp_path)) == 1


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for importer, imported in imports(PACKAGE):
        graph.setdefault(importer, set()).add(imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_few_modules_receive_the_whole_recipe() -> None:
    """Outside of `config/`, functions take the section or the values that they need."""
    receivers = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            arguments = node.args if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else None
            annotations = [argument.annotation for argument in ast.walk(arguments or ast.Module([], []))
                           if isinstance(argument, ast.arg) and argument.annotation is not None]  # fmt: skip
            if any("Recipe" in ast.unparse(annotation).replace('"', " ").split() for annotation in annotations):
                receivers.add(path.relative_to(PACKAGE).as_posix())
    outside = {path for path in receivers if not path.startswith("config/")}
    assert outside == {
        "training/networks.py", "training/resume.py", "training/run.py", "training/trainer.py"
    }  # fmt: skip


def test_checking_a_recipe_does_without_torch() -> None:
    import subprocess

    program = (
        "import sys, fpd_accel; fpd_accel.load_recipe; import fpd_accel.skeleton, fpd_accel.geometry\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
