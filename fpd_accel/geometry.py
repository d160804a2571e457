"""From a person's box to a crop and back. The coordinate rule of the whole package is written here.

Keypoints and centres are (x, y). Sizes of images, crops and heatmaps are (height, width). A *region* is the part of
the image that a crop shows: its centre and its (width, height) in image pixels, which have the crop's aspect ratio.
A 2x3 matrix maps image pixels to crop pixels.
"""

import numpy as np
from jaxtyping import Float, Float32, Float64, Int

Matrix = Float64[np.ndarray, "2 3"]
Point = Float[np.ndarray, "2"]
Side = int | Int[np.ndarray, "*batch"]  # of an image, or of the image of each box


def box_to_region(
    box: Float[np.ndarray, "*batch 4"], input_size: tuple[int, int], *, padding: float = 1.25
) -> tuple[Float32[np.ndarray, "*batch 2"], Float32[np.ndarray, "*batch 2"]]:
    """Centres and (width, height) of the regions to crop around (x, y, width, height) boxes.

    The shorter side grows to the crop's aspect ratio, then both by ``padding`` (as the COCO loader of the published
    implementation, which takes the middle of the box for the centre).
    """
    x, y, width, height = np.moveaxis(np.asarray(box, dtype=np.float32), -1, 0)
    aspect = input_size[1] / input_size[0]
    size = np.stack([np.maximum(width, height * aspect), np.maximum(height, width / aspect)], axis=-1)
    center = np.stack([x + width * 0.5, y + height * 0.5], axis=-1)
    return center.astype(np.float32), (size * padding).astype(np.float32)


def clip_box(box: Float[np.ndarray, "*batch 4"], width: Side, height: Side) -> Float[np.ndarray, "*batch 4"]:
    """Boxes cut to the image, in the inclusive pixel convention of the published loader (last pixel = x + w - 1).

    A box that lies outside keeps a width or height of zero or less.
    """
    x, y, w, h = np.moveaxis(np.asarray(box, dtype=np.float64), -1, 0)
    x1, y1 = np.maximum(x, 0), np.maximum(y, 0)
    x2 = np.minimum(width - 1, x1 + np.maximum(w - 1, 0))
    y2 = np.minimum(height - 1, y1 + np.maximum(h - 1, 0))
    return np.stack([x1, y1, x2 - x1, y2 - y1], axis=-1)


def crop_matrix(
    center: Point, width: float, input_size: tuple[int, int], *, rotation: float = 0.0, unbiased: bool = False
) -> Matrix:
    """The map that puts a region of some ``width`` (image pixels), turned by ``rotation`` degrees, into a crop.

    The region's centre lands on (crop width / 2, crop height / 2): the biased grid of the published implementation,
    half a pixel off the one in which pixel centres are at integers (Huang et al., CVPR 2020). ``unbiased`` takes theirs
    instead: the region's corners land on the centres of the crop's corner pixels.
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
    """The same crop of the mirrored image (x becomes width - 1 - x), as one matrix on the image as it is."""
    mirror = np.array([[-1.0, 0.0, image_width - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    return matrix @ mirror


def lowest_row(matrix: Matrix, input_size: tuple[int, int]) -> float:
    """The largest y, in image pixels, of what a crop shows."""
    height, width = input_size
    (a, b, x), (c, d, y) = matrix.tolist()
    determinant = a * d - b * c
    down_right, down = -c * (width - 1) / determinant, a * (height - 1) / determinant  # along the crop's sides
    return (c * x - a * y) / determinant + max(0.0, down_right) + max(0.0, down)


def transform_points(matrix: Matrix, points: Float[np.ndarray, "*batch 2"]) -> Float64[np.ndarray, "*batch 2"]:
    """Points in image pixels, moved to crop pixels."""
    return points @ matrix[:, :2].T + matrix[:, 2]
