"""Draw skeletons and heatmaps as RGB pictures: uint8, (height, width, 3)."""

import colorsys
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
from fpd_accel.errors import DataError
from fpd_accel.files import write_whole
from fpd_accel.outputs import BINS_PER_PIXEL, STRIDE, Output, SimCC, each
from fpd_accel.skeleton import Skeleton

# Above the score of a flat SimCC distribution, 0.44 / sqrt(longer side in pixels), for longer sides of at least 80 px
# and the default sigma.
MIN_SIMCC_SCORE = 0.05
Picture = UInt8[np.ndarray, "height width 3"]


def keypoint_colors(skeleton: Skeleton) -> list[tuple[int, int, int]]:
    """Return RGB colours (0-255) of the keypoints, in the skeleton's order.

    Left is warm, right cool and the rest green, so that swapped left and right stand out.
    """
    left, right = {a for a, _ in skeleton.flip_pairs}, {b for _, b in skeleton.flip_pairs}
    colors = []
    for i, name in enumerate(skeleton.keypoints):
        start = 0.0 if name in left else 0.5 if name in right else 0.3
        red, green, blue = colorsys.hsv_to_rgb(start + 0.17 * i / skeleton.num_keypoints, 0.85, 1.0)
        colors.append((int(255 * red), int(255 * green), int(255 * blue)))
    return colors


def draw_skeleton(
    picture: Picture, keypoints: Float[np.ndarray, "joint 2"], is_shown: Bool[np.ndarray, " joint"], skeleton: Skeleton
) -> Picture:
    """Return a copy of the picture with keypoints as dots and the limbs between them as lines.

    Args:
        picture: The picture to draw on.
        keypoints: Finite (x, y) in pixels of the picture.
        is_shown: Whether to draw each keypoint. A limb is drawn if both its ends are.
        skeleton: Names, limbs and left-right pairs of the keypoints.
    """
    canvas = picture.copy()
    thickness = max(1, round(min(picture.shape[:2]) / 120))
    colors = keypoint_colors(skeleton)
    near = np.clip(keypoints, -1e4, 1e4)  # OpenCV takes 32-bit coordinates
    points = [(round(float(x) * 16), round(float(y) * 16)) for x, y in near]  # in 1/16 pixels
    for a, b in skeleton.limb_indices:
        if is_shown[a] and is_shown[b]:
            cv2.line(canvas, points[a], points[b], colors[b], thickness, cv2.LINE_AA, shift=4)
    for point, color, drawn in zip(points, colors, is_shown, strict=True):
        if drawn:
            cv2.circle(canvas, point, 16 * (thickness + 1), color, -1, cv2.LINE_AA, shift=4)
    return canvas


def draw_heatmaps(picture: Picture, heatmaps: Float[np.ndarray, "joint h w"]) -> Picture:
    """Blend a JET map of the maximum over joints, resized to the picture, 60:40 with the picture.

    Args:
        picture: The picture that shows through.
        heatmaps: Heatmaps of h x w cells, any size; values are clipped to [0, 1], of which 0 is blue and 1 red.
    """
    height, width = picture.shape[:2]
    strongest = cv2.resize(heatmaps.max(axis=0).astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    levels = (255 * np.clip(strongest, 0, 1)).astype(np.uint8)
    colored = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(picture, 0.4, colored, 0.6, 0)


def comparison(
    batch: Batch, sources: Mapping[str, tuple[Output, PoseCodec]], skeleton: Skeleton, *, people: int = 6
) -> Picture:
    """Draw a row for each of the first people of a batch, with skeleton and heatmaps of every source side by side.

    Of the keypoints, those are drawn that are labelled and score above 0, or for SimCC above `MIN_SIMCC_SCORE`.

    Args:
        batch: The batch whose crops are shown; at least one.
        sources: (output for the batch, its codec) by name, such as target, student and teacher; columns follow the
            mapping's order. Heatmaps range over [0, 1]. SimCC outputs must be logits, so pass targets as
            log-probabilities.
        skeleton: The skeleton of the dataset.
        people: Maximum number of people, at least 1.

    Returns:
        A picture of 22 + zoom * height * rows by 2 * zoom * width * sources pixels, for crops of height x width pixels,
        which are enlarged by a whole factor, the zoom, to about 256 rows; larger crops keep their size.
    """
    height, width = batch.crops.shape[1:3]
    zoom = max(1, round(256 / height))  # to about 256 rows
    # The whole crop as region, so that decoded keypoints are in crop pixels.
    crop_centers = torch.tensor([width / 2, height / 2]).expand(len(batch), 2)
    crop_sizes = torch.tensor([float(width), float(height)]).expand(len(batch), 2)
    columns = []
    for device_output, codec in sources.values():
        output = each(device_output, lambda tensor: tensor.detach().float().cpu())
        # An empty target (keypoint outside the crop) scores 0, or about as a flat distribution for SimCC.
        threshold = MIN_SIMCC_SCORE if isinstance(codec, SimCCCodec) else 0.0
        columns.append((*decode(output, codec, crop_centers, crop_sizes), _as_heatmaps(output, codec), threshold))
    labelled = batch.visible.cpu().numpy() > 0
    rows = []
    for i, crop in enumerate(batch.crops[:people].cpu().numpy()):
        large = cv2.resize(crop, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_LINEAR)
        cells = []
        for keypoints, scores, heatmaps, threshold in columns:
            is_shown = labelled[i] & (scores[i].numpy() > threshold)
            cells.append(draw_skeleton(large, keypoints[i].numpy() * zoom, is_shown, skeleton))
            cells.append(draw_heatmaps(large, heatmaps[i].numpy()))
        rows.append(np.concatenate(cells, axis=1))
    header = np.full((22, rows[0].shape[1], 3), 255, np.uint8)
    for number, name in enumerate(sources):
        place = (number * 2 * width * zoom + 6, 16)
        cv2.putText(header, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([header, *rows], axis=0)


def _as_heatmaps(output: Output, codec: PoseCodec) -> Tensor:
    """Return heatmaps (B, K, h, w).

    SimCC logits become probabilities, averaged per cell and divided by the target's peak; a heatmap is the outer
    product of both axes, at most 1.
    """
    if not isinstance(output, SimCC):
        return output
    assert isinstance(codec, SimCCCodec)
    pairs = zip(output.softmax(), codec.peaks, strict=True)
    x, y = (F.avg_pool1d(axis, STRIDE * BINS_PER_PIXEL) / peak for axis, peak in pairs)
    return (y[..., :, None] * x[..., None, :]).clamp(max=1.0)


def save_picture(path: Path, picture: Picture) -> None:
    """Write a picture file, whole or not at all; the suffix of `path` (.png, .jpg or .jpeg) names the format.

    Raises:
        DataError: The suffix is not that of a picture, or the file cannot be written.
    """
    write_whole(path, encode_picture(picture, path.suffix))


def encode_picture(picture: Picture, suffix: str) -> bytes:
    """Return the bytes of a picture file in the format of `suffix`: ".png", ".jpg" or ".jpeg", dot included.

    Raises:
        DataError: The suffix is not that of a picture.
    """
    if not cv2.haveImageWriter(f"picture{suffix}"):
        raise DataError(f"{suffix!r} is not the suffix of a picture; choose .png, .jpg or .jpeg")
    return cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
