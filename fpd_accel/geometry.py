"""Boxes to crops and back. The coordinate conventions of the whole package are stated here.

Keypoints and centres are (x, y). Sizes of images, crops and heatmaps are (height, width). A *region* is the part of
the image that a crop shows: a centre and a (width, height) in image pixels, with the aspect ratio of the crop. A 2x3
matrix maps image pixels to crop pixels.
"""

import numpy as np
from jaxtyping import Float, Float32, Float64, Int

Matrix = Float64[np.ndarray, "2 3"]
Point = Float[np.ndarray, "2"]
Side = int | Int[np.ndarray, "*batch"]  # width or height of an image in pixels, or of the image of each box


def box_to_region(
    box: Float[np.ndarray, "*batch 4"], input_size: tuple[int, int], *, padding: float = 1.25
) -> tuple[Float32[np.ndarray, "*batch 2"], Float32[np.ndarray, "*batch 2"]]:
    """Return centres and (width, height) of the regions to crop around boxes, in image pixels.

    The shorter side grows to the aspect ratio of the crop, then both sides are multiplied by `padding`. The centre is
    the middle of the box. Both are as in the COCO loader of the published implementation.

    Args:
        box: (x, y, width, height) in image pixels.
        input_size: (height, width) of a crop, pixels.
        padding: Factor on both sides of the region.
    """
    x, y, width, height = np.moveaxis(np.asarray(box, dtype=np.float32), -1, 0)
    aspect = input_size[1] / input_size[0]
    size = np.stack([np.maximum(width, height * aspect), np.maximum(height, width / aspect)], axis=-1)
    center = np.stack([x + width * 0.5, y + height * 0.5], axis=-1)
    return center.astype(np.float32), (size * padding).astype(np.float32)


def clip_box(box: Float[np.ndarray, "*batch 4"], width: Side, height: Side) -> Float[np.ndarray, "*batch 4"]:
    """Clip (x, y, width, height) boxes to images of `width` by `height` pixels.

    Boxes use the inclusive pixel convention of the published loader: the last pixel is x + width - 1. A box that lies
    outside its image gets a width or height of zero or less.
    """
    x, y, w, h = np.moveaxis(np.asarray(box, dtype=np.float64), -1, 0)
    x1, y1 = np.maximum(x, 0), np.maximum(y, 0)
    x2 = np.minimum(width - 1, x1 + np.maximum(w - 1, 0))
    y2 = np.minimum(height - 1, y1 + np.maximum(h - 1, 0))
    return np.stack([x1, y1, x2 - x1, y2 - y1], axis=-1)


def crop_matrix(
    center: Point, width: float, input_size: tuple[int, int], *, rotation: float = 0.0, unbiased: bool = False
) -> Matrix:
    """Return the matrix that maps a region to a crop.

    The centre of the region maps to (crop width / 2, crop height / 2): the biased grid of the published implementation,
    half a pixel away from the grid with pixel centres at integers (Huang et al., UDP, CVPR 2020). `unbiased` uses that
    grid instead: the corners of the region map to the centres of the crop's corner pixels.

    Args:
        center: (x, y) of the region, image pixels.
        width: Width of the region, image pixels; its height follows from the aspect ratio of the crop.
        input_size: (height, width) of the crop, pixels.
        rotation: Clockwise rotation of the region, degrees.
        unbiased: Whether to use the grid of UDP.
    """
    height, crop_width = input_size
    angle = np.deg2rad(rotation)
    cosine, sine = np.cos(angle), np.sin(angle)
    if unbiased:
        region = np.array([width, width * height / crop_width])
        scale, target = np.array([crop_width - 1, height - 1]) / region, np.array([crop_width - 1, height - 1]) / 2
    else:
        scale, target = np.full(2, crop_width / width), np.array([crop_width / 2, height / 2])
    linear = scale[:, None] * np.array([[cosine, sine], [-sine, cosine]])
    shift = target - linear @ np.asarray(center, dtype=np.float64)
    return np.concatenate([linear, shift[:, None]], axis=1)


def mirror_matrix(matrix: Matrix, image_width: int) -> Matrix:
    """Return a matrix that takes the same crop from the mirrored image (x becomes image_width - 1 - x).

    It is applied to the image that is not mirrored, so that mirroring costs no extra pass over the pixels.
    """
    mirror = np.array([[-1.0, 0.0, image_width - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    return matrix @ mirror


def lowest_row(matrix: Matrix, input_size: tuple[int, int]) -> float:
    """Return the largest y that a crop shows, in image pixels."""
    height, width = input_size
    (a, b, x), (c, d, y) = matrix.tolist()
    determinant = a * d - b * c
    # Change of y, in image pixels, along the crop's upper side and along its left side.
    along_width, along_height = -c * (width - 1) / determinant, a * (height - 1) / determinant
    return (c * x - a * y) / determinant + max(0.0, along_width) + max(0.0, along_height)


def transform_points(matrix: Matrix, points: Float[np.ndarray, "*batch 2"]) -> Float64[np.ndarray, "*batch 2"]:
    """Map (x, y) points from image pixels to crop pixels."""
    return points @ matrix[:, :2].T + matrix[:, 2]
