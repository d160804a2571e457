"""Run commands in this process as a shell would, and make the files that they read."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from string import Template
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from safetensors.torch import save_file

from fpd_accel import cli
from fpd_accel.config.schema import Codec
from fpd_accel.data.coco import prepare_coco
from fpd_accel.models.create import create_model
from fpd_accel.skeleton import COCO, Skeleton, load_skeleton
from fpd_accel.weights.model_folder import ModelConfig, save_model

ROOT = Path(__file__).parents[1]
LEEDS = ROOT / "recipes" / "skeletons" / "lsp.yaml"


def script(name: str) -> ModuleType:
    """Return a recipe script as a module: an interpreter of its own would import torch for seconds."""
    specification = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "recipes" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class Terminal:
    """Runs commands as a shell would, and reads their messages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, name: str, *arguments: object) -> tuple[int, str]:
        """Return the exit code and stderr of `recipes/<name>.py` or `fpd-accel`."""
        main = cli.main if name == "fpd-accel" else script(name).main
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            code = main()
        except SystemExit as leaving:  # argparse
            code = leaving.code if isinstance(leaving.code, int) else 1
        return code, self.capsys.readouterr().err

    def refuses(self, name: str, *arguments: object) -> str:
        """Return the message of a command that has to end with exit code 2 and one error."""
        code, message = self(name, *arguments)
        assert code == 2, message
        assert message.count("error:") == 1
        assert "Traceback" not in message
        return message


def write_model(folder: Path, arch: str, *, skeleton: Skeleton = COCO, input_size: tuple[int, int] = (64, 64)) -> Path:
    """Write a model folder with fresh weights."""
    codec = Codec(name="simcc" if arch.endswith("_simcc") else "heatmap")
    config = ModelConfig(arch=arch, skeleton=skeleton, input_size=input_size, codec=codec)
    save_model(folder, config.create_model().state_dict(), config)
    return folder


def write_people(folder: Path, keypoints: tuple[str, ...] = COCO.keypoints) -> tuple[Path, Path]:
    """Write a folder with one image, and the annotations of one person in it; return both paths."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / "images" / "a.jpg"), np.full((40, 30, 3), 128, dtype=np.uint8))
    person = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 20, 30], "keypoints": [9, 9, 2] * len(keypoints)}
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 30, "height": 40}],
        "annotations": [person],
        "categories": [{"id": 1, "name": "person", "keypoints": list(keypoints)}],
    }
    (folder / "people.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "images", folder / "people.json"


class Place(dict[str, str]):
    """Paths by name; the files are made when a path is first asked for, in the working directory.

    The names are those of the methods `make_…`, and of architectures, whose model folders have fresh weights.
    """

    def __missing__(self, name: str) -> str:
        make = getattr(self, f"make_{name}", lambda: write_model(Path(name), name))
        self[name] = str(make())
        return self[name]

    def fill(self, text: str) -> str:
        """Return a text with paths in place of their names, `$name`."""
        return Template(text).substitute(self)

    def write(self, files: Mapping[str, str]) -> None:
        """Write texts by file name; a name that ends with a slash is a folder."""
        for name, text in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                Path(name).mkdir()
            else:
                Path(name).write_text(self.fill(text), encoding="utf-8", errors="surrogateescape")

    def contents(self) -> dict[str, bytes | None]:
        """Return every file of the working directory with its bytes, and every folder."""
        return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}

    def make_lsp(self) -> Path:
        return LEEDS

    def make_images(self) -> Path:
        return write_people(Path())[0]

    def make_people(self) -> Path:
        return write_people(Path())[1]

    def make_other(self) -> str:
        """Another image of the same name without its extension."""
        Path("other").mkdir()
        cv2.imwrite("other/a.png", np.full((40, 30, 3), 128, dtype=np.uint8))
        return "other"

    def make_lsp_shards(self) -> Path:
        lsp = load_skeleton(LEEDS)
        images, annotations = write_people(Path("leeds"), lsp.keypoints)
        prepare_coco(images=images, annotations=annotations, output="leeds/shards", skeleton=lsp)
        return Path("leeds/shards")

    def make_lsp_model(self) -> Path:
        return write_model(Path("lsp_model"), "tiny_w8", skeleton=load_skeleton(LEEDS))

    def make_large_model(self) -> Path:
        return write_model(Path("large_model"), "tiny_w8", input_size=(128, 96))

    def make_unknown_model(self) -> Path:
        """A model folder of an architecture that does not exist."""
        folder = write_model(Path("unknown_model"), "tiny_w8")
        text = (folder / "config.json").read_text(encoding="utf-8")
        (folder / "config.json").write_text(text.replace("tiny_w8", "tiny_w9"), encoding="utf-8")
        return folder

    def make_damaged_model(self) -> Path:
        folder = write_model(Path("damaged_model"), "tiny_w8")
        (folder / "config.json").write_text("{", encoding="utf-8")
        return folder

    def make_bare(self) -> str:
        """Weights without a description, of `tiny_w16`."""
        save_file(create_model("tiny_w16", 17).state_dict(), "bare.safetensors")
        return "bare.safetensors"

    def make_damaged(self) -> str:
        weights = Path(self["bare"]).read_bytes()
        Path("damaged.safetensors").write_bytes(weights[:-100])
        return "damaged.safetensors"

    def make_run(self) -> Path:
        """A copy of the run of two steps whose directory is `self["finished_run"]`."""
        return shutil.copytree(self["finished_run"], "finished")

    def make_spoilt(self) -> str:
        """The root of a copy of the finished run without a whole checkpoint."""
        run = shutil.copytree(self["finished_run"], Path("spoilt/finished"))
        (checkpoint,) = (run / "checkpoints").glob("step_*")
        (checkpoint / "student.safetensors").write_bytes(b"")
        return "spoilt"
