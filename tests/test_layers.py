"""Imports point one way: a module imports only from layers above its own."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fpd_accel"
LAYERS = [
    {"errors", "stop", "watchdog"},
    {"config", "skeleton"},
    {"files", "geometry", "log", "legacy", "outputs", "similarity", "yacs"},
    {"codecs", "decode", "fold", "fp8", "losses", "models", "layouts"},
    {"compilation"},
    {"data", "augment", "weights", "convert", "fixtures", "model_folder", "teacher", "optim", "metrics", "visualize"},
    {"distill", "evaluation", "scoring", "checkpoint", "report", "cache_key"},
    {"processes"},
    {"guard", "student", "run_directory", "shared_folder"},
    {"trainer", "predict", "detect", "check", "import_weights", "run_data", "run_networks", "teacher_cache"},
    {"run", "bench"},
    {"cli"},
]
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}
WITHIN = {"bench", "data", "models", "check", "yacs"}  # packages: what is inside may import what is beside it
TOP_OF_DATA_IMPORTS = {"augment"}  # stream draws its geometry there
SAME_LAYER = {
    ("decode", "codecs"),
    ("convert", "weights"),
    ("evaluation", "scoring"),
    ("fixtures", "weights"),
    ("fp8", "models"),
    ("model_folder", "data"),
    ("model_folder", "weights"),
    ("teacher", "data"),
    ("visualize", "data"),
}


def imports() -> list[tuple[str, str]]:
    """(module, imported module) of every import of ours, by their dotted names inside the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [(module, name.removeprefix("fpd_accel.")) for name in names if name.startswith("fpd_accel.")]
    return [(importer, imported) for importer, imported in found if importer != "__init__"]


def test_every_module_has_a_layer() -> None:
    modules = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert modules - {"__init__"} == set(RANK)


def test_modules_import_only_from_layers_above() -> None:
    wrong = []
    for importer, imported in imports():
        a, b = importer.split(".")[0], imported.split(".")[0]
        allowed = RANK[b] < RANK[a] or (a, b) in SAME_LAYER or (a == b and a in WITHIN)
        if not allowed and not (a == "data" and b in TOP_OF_DATA_IMPORTS):
            wrong.append(f"{importer} imports {imported}")
    assert not wrong


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for importer, imported in imports():
        graph.setdefault(importer, set()).add(imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_configuration_and_skeletons_do_without_torch() -> None:
    for name in ("errors", "config", "skeleton", "geometry"):
        text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        assert "import torch" not in text, name
