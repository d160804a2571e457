"""Detect the people in a folder of images: boxes by torchvision's Faster R-CNN, in COCO's result format.

The network is `fasterrcnn_resnet50_fpn_v2` (Ren et al., NeurIPS 2015; Li et al., arXiv 2111.11429) for COCO's classes,
with the weights that torchvision publishes or those of a file.
"""

import http.client
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights, fasterrcnn_resnet50_fpn_v2

from fpd_accel.console import console, track, warn
from fpd_accel.data.coco import read_json
from fpd_accel.data.detections import PERSON
from fpd_accel.data.images import decode_image
from fpd_accel.errors import DataError, WeightsError
from fpd_accel.files import prepare_file, write_whole
from fpd_accel.weights.load import load_weights

PUBLISHED = FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1
NUM_CLASSES = 91  # of COCO, including the background
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def detect_people(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    annotations: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    threshold: float = 0.05,
    device: str = "cpu",
    batch: int = 1,
) -> list[dict[str, Any]]:
    """Detect the people in a folder of images, write their boxes to a JSON file, and return the boxes.

    The file is written whole or not at all.

    Args:
        folder: The folder of images.
        output: The JSON file to write.
        annotations: COCO file whose `images` name the images and their ids; None: all images of the folder, with ids
            from `list_images`.
        weights: Weights of the detector, see `load_detector`.
        threshold: Lowest score of a box that is written. Boxes of low score count in average precision too.
        device: A torch device.
        batch: Images per forward pass; smaller images are padded to the largest, which moves their boxes slightly.

    Raises:
        UserError: Folder, annotations, weights or device cannot be used, no image can be read, or `output` cannot be
            written.
    """
    folder, output = Path(folder), Path(output)
    images = list_images(folder, annotations)
    prepare_file(output)
    boxes = find_boxes(load_detector(weights, device=device, threshold=threshold), folder, images, batch=batch)
    write_whole(output, json.dumps(boxes))
    return boxes


def list_images(folder: Path, annotations: str | os.PathLike[str] | None = None) -> dict[str, int]:
    """Return the image ids by file name: those of an annotation file, or of all images of the folder.

    Without annotations the id is the number at the end of the file name, as in COCO's own names, if every name has one
    and all differ; otherwise images are numbered from 1 in the order of their names.

    Raises:
        DataError: There is no such folder, no image in it, or the annotation file does not list images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such image folder")
    if annotations is not None:
        return _listed_images(Path(annotations))
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not names:
        raise DataError(f"{folder}: no image in it ({', '.join(SUFFIXES)})")
    numbers = [int(match[0]) for name in names if (match := re.search(r"\d+$", Path(name).stem))]
    if len(set(numbers)) != len(names):
        numbers = list(range(1, len(names) + 1))
    return dict(zip(names, numbers, strict=True))


def _listed_images(path: Path) -> dict[str, int]:
    dataset = read_json(path)
    listed = dataset.get("images") if isinstance(dataset, dict) else None
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{path}: not a COCO annotation file: it has no list of images")
    images: dict[str, int] = {}
    for entry in listed:
        valid = isinstance(entry, dict) and isinstance(entry.get("file_name"), str) and isinstance(entry.get("id"), int)
        if not valid:
            raise DataError(f"{path}: images holds {entry!r}, without a file_name or an integer id")
        images[entry["file_name"]] = entry["id"]
    return images


def load_detector(
    weights: str | os.PathLike[str] | None = None, *, device: str = "cpu", threshold: float = 0.05, **options: Any
) -> nn.Module:
    """Return Faster R-CNN in evaluation mode, for lists of RGB images (3, H, W) in 0..1 of any sizes.

    Args:
        weights: A `.pth` or `.safetensors` file for this network, loaded strictly and without running code from it;
            None: torchvision's published weights, downloaded once into PyTorch's cache.
        device: A torch device.
        threshold: Lowest score of a box that the detector returns.
        **options: Options of torchvision's `FasterRCNN`, such as `min_size`, the pixels to which the shorter side of an
            image is resized (800).

    Raises:
        WeightsError: The weights cannot be downloaded, cannot be read, or do not fit.
        DataError: The device cannot be used.
    """
    path = Path(weights) if weights is not None else download_weights()
    detector = fasterrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES, box_score_thresh=threshold, **options
    )
    try:
        load_weights(detector, path)
    except WeightsError as error:
        raise WeightsError(
            f"{error}\n  the detector is torchvision's fasterrcnn_resnet50_fpn_v2 of {NUM_CLASSES} classes"
        ) from None
    try:
        return detector.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"device {device!r} cannot be used: {error}") from None


def download_weights() -> Path:
    """Return the path of torchvision's published weights in PyTorch's cache, after downloading them if necessary.

    Raises:
        WeightsError: The download fails, or its hash is not that of the published file.
    """
    name = PUBLISHED.url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    prefix = re.search(r"-([0-9a-f]+)\.", name)  # the file name contains the start of the SHA-256
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            PUBLISHED.url, str(path), hash_prefix=prefix[1] if prefix else None, progress=console.is_terminal
        )
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise WeightsError(
            f"{PUBLISHED.url}: cannot be downloaded to {path} ({error}); download this file on another machine, and "
            "name it with --weights"
        ) from None
    return path


@torch.inference_mode()
def find_boxes(detector: nn.Module, folder: Path, images: Mapping[str, int], *, batch: int = 1) -> list[dict[str, Any]]:
    """Return the people in images of a folder: `image_id`, `category_id`, `bbox`, `score` and `file_name` of each.

    Boxes are (x, y, width, height) in pixels of the image as stored; EXIF orientation is ignored, as everywhere in the
    package. Images that cannot be read are skipped and counted in a warning. `images` has the ids by file name; the
    detector takes `batch` images at a time, and returns a dict with `boxes`, `labels` and `scores` for each.

    Raises:
        DataError: No image can be read.
    """
    device = next(detector.parameters()).device
    boxes: list[dict[str, Any]] = []
    skipped: list[str] = []
    for readable in _batches(folder, track(images, f"detecting people in {folder}"), batch, skipped):
        pixels = (torch.from_numpy(image).to(device) for image in readable.values())
        found = detector([image.permute(2, 0, 1).float() / 255 for image in pixels])
        for name, people in zip(readable, found, strict=True):
            corners, scores = (people[key][people["labels"] == PERSON].cpu() for key in ("boxes", "scores"))
            for (x1, y1, x2, y2), score in zip(corners.tolist(), scores.tolist(), strict=True):
                box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
                person = {"image_id": images[name], "category_id": PERSON, "bbox": box, "score": round(score, 6)}
                boxes.append({**person, "file_name": name})
    if len(skipped) == len(images):
        raise DataError(f"{folder}: none of {len(images)} images can be read; the first is {folder / skipped[0]}")
    if skipped:
        warn(f"{len(skipped)} of {len(images)} images are missing or do not decode, for example {folder / skipped[0]}")
    return boxes


def _batches(folder: Path, names: Iterable[str], batch: int, skipped: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yield RGB pixels of readable images by name, `batch` at a time; append the names of the others to `skipped`."""
    readable: dict[str, np.ndarray] = {}
    for name in names:
        try:
            image = decode_image((folder / name).read_bytes())
        except OSError:
            image = None
        if image is None:
            skipped.append(name)
            continue
        readable[name] = image
        if len(readable) == batch:
            yield readable
            readable = {}
    if readable:
        yield readable
