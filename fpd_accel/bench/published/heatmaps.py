"""Heatmaps and crop geometry as the published code computes them: per person and per joint, in NumPy.

Rewritten from the behaviour of the code of Zhang, Zhu, Ye (CVPR 2019), which builds on HRNet's. Its loader, step and
evaluation share these functions. Keypoints are (x, y), sizes (height, width); `scale` is the (width, height) of a
person's region in units of 200 pixels.
"""

import numpy as np

PIXELS_PER_SCALE = 200.0


def draw_target(
    joints: np.ndarray, visible: np.ndarray, input_size: tuple[int, int], heatmap_size: tuple[int, int], sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return heatmaps and weights (joint, 1) of one person, drawn as a patch of 6 sigma + 1 cells per joint."""
    height, width = heatmap_size
    image_side, heatmap_side = np.array(input_size[::-1]), np.array(heatmap_size[::-1])
    weights = np.ones((len(joints), 1), dtype=np.float32)
    weights[:, 0] = visible
    heatmaps = np.zeros((len(joints), height, width), dtype=np.float32)
    reach = sigma * 3
    for joint in range(len(joints)):
        stride = image_side / heatmap_side  # the published code recomputes it for each joint
        column = int(joints[joint][0] / stride[0] + 0.5)
        row = int(joints[joint][1] / stride[1] + 0.5)
        start = [int(column - reach), int(row - reach)]
        end = [int(column + reach + 1), int(row + reach + 1)]
        if start[0] >= width or start[1] >= height or end[0] < 0 or end[1] < 0:
            weights[joint] = 0
            continue
        size = 2 * reach + 1
        x = np.arange(0, size, 1, dtype=np.float32)
        y = x[:, np.newaxis]
        middle = size // 2
        patch = np.exp(-((x - middle) ** 2 + (y - middle) ** 2) / (2 * sigma**2))
        patch_x = max(0, -start[0]), min(end[0], width) - start[0]
        patch_y = max(0, -start[1]), min(end[1], height) - start[1]
        cells_x = max(0, start[0]), min(end[0], width)
        cells_y = max(0, start[1]), min(end[1], height)
        if weights[joint] > 0.5:
            inside = patch[patch_y[0] : patch_y[1], patch_x[0] : patch_x[1]]
            heatmaps[joint][cells_y[0] : cells_y[1], cells_x[0] : cells_x[1]] = inside
    return heatmaps, weights


def find_maxima(heatmaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return cells (batch, joint, 2) of the maxima, (0, 0) where a maximum is <= 0, and values (batch, joint, 1)."""
    batch, joints, _, width = heatmaps.shape
    flat = heatmaps.reshape((batch, joints, -1))
    index = np.argmax(flat, 2).reshape((batch, joints, 1))
    maxima = np.amax(flat, 2).reshape((batch, joints, 1))
    coordinates = np.tile(index, (1, 1, 2)).astype(np.float32)
    coordinates[:, :, 0] = coordinates[:, :, 0] % width
    coordinates[:, :, 1] = np.floor(coordinates[:, :, 1] / width)
    return coordinates * np.tile(np.greater(maxima, 0.0), (1, 1, 2)).astype(np.float32), maxima


def corresponding_points(
    center: np.ndarray, scale: np.ndarray, rotation: float, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return three points (3, 2) in the image and the same three in the crop; they define the affine map.

    The points are the centre, the middle of the upper side, and the third corner of a square with these two. Rotation
    is in degrees; `size` is that of the crop or of its heatmaps.
    """
    angle, source_width = np.pi * rotation / 180, scale[0] * PIXELS_PER_SCALE
    height, width = size
    up = np.array([0, source_width * -0.5])
    direction = np.array([up[0] * np.cos(angle) - up[1] * np.sin(angle), up[0] * np.sin(angle) + up[1] * np.cos(angle)])
    source, target = np.zeros((3, 2), dtype=np.float32), np.zeros((3, 2), dtype=np.float32)
    source[0, :], source[1, :] = center, center + direction
    target[0, :] = [width * 0.5, height * 0.5]
    target[1, :] = np.array([width * 0.5, height * 0.5]) + np.array([0, width * -0.5])
    for points in (source, target):
        difference = points[0] - points[1]
        points[2, :] = points[1] + np.array([-difference[1], difference[0]], dtype=np.float32)
    return source, target
