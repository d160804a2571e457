"""What every test shares: shapes and types checked while the package runs, and data small enough to train on."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from jaxtyping import install_import_hook

# Before anything imports the package. The tower: an int will do where a float is asked for, as PEP 484 has it.
install_import_hook("fpd_accel", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# The trainer divides the cores by this: networks as small as these are no faster on two threads than on one, and on a
# busy machine, where threads wait for each other, many times slower.
os.environ.setdefault("LOCAL_WORLD_SIZE", str(os.cpu_count() or 1))
THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))  # of everything else

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # Beartype reads the bases of PyTorch's own classes, and those are spelled typing.Iterable.
    config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_accelerator(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test is a job of its own: Accelerate keeps precision and topology for the life of a process, and in its
    environment for the next one. It takes a GPU for tests that are marked so, and for no other."""
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
    if "torch" in sys.modules:  # a trainer has taken fewer threads
        sys.modules["torch"].set_num_threads(THREADS)


@pytest.fixture
def without_waiting() -> Callable[[], AbstractContextManager[None]]:
    """A block in which whatever waits for the GPU is an error."""
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
    """Jobs end with the test that started them, however that went."""
    yield
    if "jobs" in sys.modules:
        sys.modules["jobs"].FORKS.leave_nothing_running()


def pytest_unconfigure() -> None:
    if "jobs" in sys.modules:
        sys.modules["jobs"].FORKS.close()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Fixtures and sample data that lie beside the project, not in it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared beside the project: its fixtures and sample data are needed here")
    return folder


def _draw_shards(folder: Path, *, images: int, seed: int) -> Path:
    from fpd_accel.data.coco import prepare_coco
    from fpd_accel.data.synthetic import draw_dataset

    drawn = draw_dataset(folder / "coco", images=images, seed=seed, image_size=(120, 160))
    prepare_coco(images=drawn / "images", annotations=drawn / "person_keypoints.json", output=folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prepared images of synthetic people, to train on."""
    return _draw_shards(tmp_path_factory.mktemp("train"), images=12, seed=0)


@pytest.fixture(scope="session")
def tiny_valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prepared images of other synthetic people, to evaluate on."""
    return _draw_shards(tmp_path_factory.mktemp("valid"), images=6, seed=1)


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_shards: Path, tiny_valid: Path) -> Callable[..., Path]:
    """A function that writes the recipe of a run of seconds; its sections take the place of, or add to, these."""

    def write(*, file_name: str = "tiny.yaml", **sections: dict[str, Any]) -> Path:
        values: dict[str, dict[str, Any]] = {
            "run": {"name": "tiny", "root": str(tmp_path)},
            "data": {"train": str(tiny_shards), "valid": str(tiny_valid), "input_size": [64, 64], "workers": 0},
            "student": {"arch": "tiny_w8"},
            "distill": {"mode": "normal"},
            "train": {"steps": 4, "global_batch": 4},
            "optim": {"lr": 0.001, "schedule": "constant"},
            "evaluate": {"batch": 4},
            "log": {"every_steps": 1, "pictures_every_steps": None, "tensorboard": False},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        path = tmp_path / file_name
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return write
