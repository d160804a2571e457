"""Skeletons and heatmaps as pictures: RGB, uint8, (height, width, 3)."""

import colorsys
import math
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from fpd_accel.codecs import PoseCodec, SimCCCodec
from fpd_accel.data.batch import Batch
from fpd_accel.decode import decode
from fpd_accel.files import write_whole
from fpd_accel.outputs import BINS_PER_PIXEL, STRIDE, Output, SimCC, each
from fpd_accel.skeleton import Skeleton

FLAT_SIMCC = 0.05  # above the score of a distribution without a peak
Picture = UInt8[np.ndarray, "height width 3"]


def keypoint_colors(skeleton: Skeleton) -> list[tuple[int, int, int]]:
    """A colour per keypoint: warm for left, cool for right, green between, so that exchanged sides show at once."""
    left, right = {a for a, _ in skeleton.flip_pairs}, {b for _, b in skeleton.flip_pairs}
    count = max(skeleton.num_keypoints, 1)
    colors = []
    for i, name in enumerate(skeleton.keypoints):
        start = 0.0 if name in left else 0.5 if name in right else 0.3
        red, green, blue = colorsys.hsv_to_rgb(start + 0.17 * i / count, 0.85, 1.0)
        colors.append((int(255 * red), int(255 * green), int(255 * blue)))
    return colors


def draw_skeleton(
    picture: Picture, keypoints: Float[np.ndarray, "joint 2"], shown: Bool[np.ndarray, " joint"], skeleton: Skeleton
) -> Picture:
    """A copy with the limbs between ``shown`` keypoints as lines and the keypoints as dots."""
    canvas = picture.copy()
    thickness = max(1, round(min(picture.shape[:2]) / 120))
    colors = keypoint_colors(skeleton)
    points = [(round(float(x) * 16), round(float(y) * 16)) for x, y in np.clip(keypoints, -1e4, 1e4)]  # 1/16 pixels
    for a, b in skeleton.limb_indices:
        if shown[a] and shown[b]:
            cv2.line(canvas, points[a], points[b], colors[b], thickness, cv2.LINE_AA, shift=4)
    for point, color, visible in zip(points, colors, shown, strict=True):
        if visible:
            cv2.circle(canvas, point, 16 * (thickness + 1), color, -1, cv2.LINE_AA, shift=4)
    return canvas


def draw_heatmaps(picture: Picture, heatmaps: Float[np.ndarray, "joint h w"]) -> Picture:
    """The strongest response of any keypoint, as a colour map over the darkened picture; 0 is blue, 1 is red."""
    height, width = picture.shape[:2]
    strongest = cv2.resize(heatmaps.max(axis=0).astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    levels = (255 * np.clip(strongest, 0, 1)).astype(np.uint8)
    colored = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(picture, 0.4, colored, 0.6, 0)


def comparison(
    batch: Batch, sources: Mapping[str, tuple[Output, PoseCodec]], skeleton: Skeleton, *, people: int = 6
) -> Picture:
    """A row for each of the first people of a batch: for every source the skeleton it sees and its heatmaps.

    Args:
        sources: name -> output for the batch, and the codec that it belongs to.
    """
    height, width = batch.crops.shape[1:3]
    zoom = max(1, round(256 / height))
    middle = torch.tensor([width / 2, height / 2]).expand(len(batch), 2)
    whole = torch.tensor([float(width), float(height)]).expand(len(batch), 2)
    outputs = {name: (_on_host(output), codec) for name, (output, codec) in sources.items()}
    decoded = {name: decode(output, codec, middle, whole) for name, (output, codec) in outputs.items()}
    maps = {name: _as_heatmaps(output, codec) for name, (output, codec) in outputs.items()}
    labelled = batch.visible.cpu().numpy() > 0
    rows = []
    for i, crop in enumerate(batch.crops[:people].cpu().numpy()):
        large = cv2.resize(crop, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_LINEAR)
        cells = []
        for name, heatmaps in maps.items():
            keypoints, scores = (part[i].numpy() for part in decoded[name])
            least = FLAT_SIMCC if isinstance(outputs[name][1], SimCCCodec) else 0.0
            shown = labelled[i] & (scores > least)  # a target outside the crop is empty
            cells += [
                draw_skeleton(large, keypoints * zoom, shown, skeleton),
                draw_heatmaps(large, heatmaps[i].numpy()),
            ]
        rows.append(np.concatenate(cells, axis=1))
    header = np.full((22, rows[0].shape[1], 3), 255, np.uint8)
    for number, name in enumerate(maps):
        place = (number * 2 * width * zoom + 6, 16)
        cv2.putText(header, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([header, *rows], axis=0)


def _on_host(output: Output) -> Output:
    return each(output, lambda tensor: tensor.detach().float().cpu())


def _as_heatmaps(output: Output, codec: PoseCodec) -> Tensor:
    """Heatmaps as they are; of SimCC's logits the product of both distributions, in units of its label's peak."""
    if not isinstance(output, SimCC):
        return output
    assert isinstance(codec, SimCCCodec)
    peaks = (1 / (sigma * math.sqrt(2 * math.pi)) for sigma in codec.sigmas)
    pairs = zip(output.softmax(), peaks, strict=True)
    x, y = (F.avg_pool1d(axis, STRIDE * BINS_PER_PIXEL) / peak for axis, peak in pairs)
    return (y[..., :, None] * x[..., None, :]).clamp(max=1.0)


def save_picture(path: Path, picture: Picture) -> None:
    """Write a PNG or JPEG, by the suffix of ``path``; whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    write_whole(path, encode_picture(picture, path.suffix))


def encode_picture(picture: Picture, suffix: str) -> bytes:
    """The bytes of a PNG or JPEG file, by its suffix."""
    return cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
