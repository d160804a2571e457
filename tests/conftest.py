"""Fixtures of all tests: shapes and types are checked while the package runs, and data are small enough to train on."""

import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]

# PYTHONDONTWRITEBYTECODE keeps bytecode out of the source folders; here it goes to a folder of its own instead. Without
# any, each process of the tests would compile the 3,000 modules of torch and its libraries again, for ten seconds.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = sys.pycache_prefix or str(ROOT / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

# Before anything imports the package. The numeric tower: an int is accepted as a float, as PEP 484 specifies.
install_import_hook("fpd_accel", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# One thread per process: networks this small are no faster on two, and much slower where threads wait for each other.
# The trainer divides the cores by LOCAL_WORLD_SIZE, other code reads OMP_NUM_THREADS. Threads sleep while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("LOCAL_WORLD_SIZE", str(os.cpu_count() or 1))
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts a command in the background (`nohup … &`) with Ctrl-C ignored, and every child would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Beartype reads the bases of PyTorch's own classes, and those are spelled typing.Iterable.
    config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection: the end of every run collects, and would scan them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_accelerator(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reset Accelerate's global state and the environment, so that each test is a job of its own.

    Accelerate keeps precision and topology for the life of a process, and in the environment for the next process. Only
    tests marked `gpu` may use a GPU.
    """
    before = dict(os.environ)
    if request.node.get_closest_marker("gpu") is None:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None:
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    if "torch" in sys.modules:  # a trainer may have changed it
        sys.modules["torch"].set_num_threads(THREADS)


@pytest.fixture
def without_waiting() -> Callable[[], AbstractContextManager[None]]:
    """Return a context manager in which every wait for the GPU raises an error."""
    import torch

    @contextmanager
    def block() -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype feature")
                torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return block


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """End all jobs that the test has started, whether it passed or failed."""
    yield
    if "jobs" in sys.modules:
        sys.modules["jobs"].FORKS.leave_nothing_running()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else compiled extensions report leaks at exit
    if "jobs" in sys.modules:
        sys.modules["jobs"].FORKS.close()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of sample data and reference values that lies beside the repository, or skip the test."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared beside the project: its fixtures and sample data are needed here")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that fills a named folder once per session, for all xdist workers, and returns the folder."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def fill(name: str, write: Callable[[Path], object]) -> Path:
        with FileLock(base / f"{name}.lock"):
            if not (base / name / "complete").exists():
                (base / name).mkdir()
                write(base / name)
                (base / name / "complete").touch()
        return base / name

    return fill


def _draw_shards(folder: Path, *, images: int, seed: int) -> Path:
    from fpd_accel.data.coco import prepare_coco
    from fpd_accel.synthetic.dataset import draw_dataset

    drawn = draw_dataset(folder / "coco", images=images, seed=seed, image_size=(120, 160))
    prepare_coco(images=drawn / "images", annotations=drawn / "person_keypoints.json", output=folder / "shards")
    return folder / "shards"


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def tiny_shards(once: Once) -> Path:
    """Return prepared shards of twelve images of synthetic people, to train on; tests must not change them."""
    return once("train", lambda folder: _draw_shards(folder, images=12, seed=0)) / "shards"


@pytest.fixture(scope="session")
def tiny_valid(once: Once) -> Path:
    """Return prepared shards of six images of other synthetic people, to evaluate on; tests must not change them."""
    return once("valid", lambda folder: _draw_shards(folder, images=6, seed=1)) / "shards"


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_shards: Path, tiny_valid: Path) -> Callable[..., Path]:
    """Return a function that writes the recipe of a run of seconds; keyword sections override or add to its values."""

    def write(*, file_name: str = "tiny.yaml", **sections: dict[str, Any]) -> Path:
        values: dict[str, dict[str, Any]] = {
            "run": {"name": "tiny", "root": str(tmp_path)},
            "data": {"train": str(tiny_shards), "valid": str(tiny_valid), "input_size": [64, 64], "workers": 0},
            "student": {"arch": "tiny_w8"},
            "distill": {"mode": "normal"},
            "train": {"steps": 4, "global_batch": 4},
            "optim": {"lr": 0.001, "schedule": "constant"},
            "evaluate": {"batch": 4},
            "log": {"every_steps": 1, "pictures_every_steps": None, "trackers": []},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        path = tmp_path / file_name
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return write
