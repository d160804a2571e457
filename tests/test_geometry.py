"""Boxes to crops: compared with affine maps solved from three points, and by round trips."""

import cv2
import numpy as np
import pytest

from fpd_accel.geometry import box_to_region, clip_box, crop_matrix, lowest_row, mirror_matrix, transform_points

SIZES = [(256, 192), (64, 64), (96, 128)]  # (height, width) of crops


def three_point_matrix(
    center: np.ndarray, width: float, input_size: tuple[int, int], rotation: float = 0.0
) -> np.ndarray:
    """Return the affine map through three pairs of points, as the published implementation builds it.

    The region's centre goes to half the crop's size; the point half a width above it, in the direction turned by
    `rotation` degrees, to half a crop's width above; and the corner beside that one to the corner beside.
    """
    height, crop_width = input_size
    angle = np.deg2rad(rotation)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    offsets = np.array([[0.0, 0.0], [0.0, -0.5], [-0.5, -0.5]])
    source = center + (offsets * width) @ turn.T
    target = np.array([crop_width / 2, height / 2]) + offsets * crop_width
    return np.linalg.solve(np.column_stack([source, np.ones(3)]), target).T


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return random colours without edges: less than four grey levels from one pixel to the next."""
    noise = np.random.default_rng(seed).uniform(0, 255, (height // 16 + 2, width // 16 + 2, 3)).astype(np.float32)
    image = cv2.GaussianBlur(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC), (0, 0), 12)
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("input_size", SIZES)
@pytest.mark.parametrize("rotation", [0.0, 30.0, -45.0, 90.0, 180.0])
def test_a_crop_is_the_affine_map_through_three_points(input_size: tuple[int, int], rotation: float) -> None:
    for seed in range(5):
        random = np.random.default_rng(seed)
        center, width = random.uniform(-50, 700, 2), random.uniform(5, 900)
        expected = three_point_matrix(center, width, input_size, rotation)
        np.testing.assert_allclose(
            crop_matrix(center, width, input_size, rotation=rotation), expected, rtol=0, atol=1e-8
        )  # times image coordinates below 1000: 1e-5 crop pixels


def test_a_crop_by_hand() -> None:
    # 100 image pixels become 200: the centre lands in the middle, the region's left edge at x = 0.
    matrix = crop_matrix(np.array([50.0, 80.0]), 100.0, (300, 200))
    np.testing.assert_allclose(matrix, [[2.0, 0.0, 0.0], [0.0, 2.0, -10.0]])
    np.testing.assert_allclose(transform_points(matrix, np.array([[50.0, 80.0], [0.0, 5.0]])), [[100, 150], [0, 0]])


def test_a_positive_angle_turns_the_region_clockwise() -> None:
    # y points down: after a clockwise turn by 90 degrees the right of the region is its top.
    matrix = crop_matrix(np.array([100.0, 100.0]), 64.0, (64, 64), rotation=90.0)
    np.testing.assert_allclose(transform_points(matrix, np.array([[120.0, 100.0]])), [[32.0, 12.0]], atol=1e-9)


@pytest.mark.parametrize("mirrored", [False, True])
def test_points_come_back_from_a_crop(mirrored: bool) -> None:
    random = np.random.default_rng(3)
    points = random.uniform(-100, 800, (2, 17, 2))
    matrix = crop_matrix(np.array([321.5, 222.25]), 187.0, (256, 192), rotation=33.0)
    if mirrored:
        matrix = mirror_matrix(matrix, 640)
    back = cv2.invertAffineTransform(matrix)
    np.testing.assert_allclose(transform_points(back, transform_points(matrix, points)), points, atol=1e-9)  # pixels


@pytest.mark.parametrize("rotation", [0.0, 40.0])
def test_a_mirrored_crop_is_the_crop_of_the_mirrored_image(rotation: float) -> None:
    image = smooth_image(240, 320)
    center, input_size = np.array([131.25, 118.5]), (128, 96)
    matrix = crop_matrix(np.array([319 - center[0], center[1]]), 120.0, input_size, rotation=rotation)
    expected = cv2.warpAffine(np.ascontiguousarray(image[:, ::-1]), matrix, (96, 128), flags=cv2.INTER_LINEAR)
    found = cv2.warpAffine(image, mirror_matrix(matrix, 320), (96, 128), flags=cv2.INTER_LINEAR)
    assert expected.std() > 10  # grey levels: the image is not flat
    assert np.abs(expected.astype(int) - found).max() <= 1  # grey level: rounding of the interpolation
    mirrored = np.array([[319 - 100.0, 50.0]])
    np.testing.assert_allclose(
        transform_points(mirror_matrix(matrix, 320), np.array([[100.0, 50.0]])), transform_points(matrix, mirrored)
    )


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("input_size", SIZES)
def test_the_lowest_row_is_that_of_the_lowest_corner(input_size: tuple[int, int], mirrored: bool) -> None:
    height, width = input_size
    corners = np.array([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]], dtype=np.float64)
    for rotation in range(-180, 181, 15):
        matrix = crop_matrix(np.array([121.5, 222.25]), 187.0, input_size, rotation=float(rotation))
        if mirrored:
            matrix = mirror_matrix(matrix, 640)
        expected = transform_points(cv2.invertAffineTransform(matrix), corners)[:, 1].max()
        assert lowest_row(matrix, input_size) == pytest.approx(expected, abs=1e-9)  # pixels


def test_mirroring_twice_changes_nothing() -> None:
    matrix = crop_matrix(np.array([10.0, 20.0]), 30.0, (64, 48), rotation=10.0)
    np.testing.assert_allclose(mirror_matrix(mirror_matrix(matrix, 77), 77), matrix, atol=1e-12)


@pytest.mark.parametrize("input_size", SIZES)
def test_a_region_is_the_box_at_the_crops_aspect_with_padding(input_size: tuple[int, int]) -> None:
    aspect = input_size[1] / input_size[0]
    boxes = np.random.default_rng(1).uniform(1, 400, (30, 4))
    centers, sizes = box_to_region(boxes, input_size, padding=1.5)
    assert centers.dtype == sizes.dtype == np.float32
    for (x, y, width, height), center, size in zip(boxes.tolist(), centers, sizes, strict=True):
        np.testing.assert_allclose(center, [x + width / 2, y + height / 2], rtol=1e-6)
        if width > aspect * height:
            height = width / aspect
        else:
            width = height * aspect
        np.testing.assert_allclose(size, [1.5 * width, 1.5 * height], rtol=1e-6)


def test_a_region_by_hand() -> None:
    centers, sizes = box_to_region(np.array([[10.0, 20.0, 30.0, 80.0], [0.0, 0.0, 90.0, 40.0]]), (256, 192))
    np.testing.assert_allclose(centers, [[25, 60], [45, 20]])
    np.testing.assert_allclose(
        sizes, [[75.0, 100.0], [112.5, 150.0]]
    )  # 80 x 0.75 = 60 wide, x 1.25; 90 / 0.75 = 120 high


def test_regions_take_any_number_of_boxes() -> None:
    boxes = np.random.default_rng(2).uniform(1, 50, (2, 3, 4))
    centers, sizes = box_to_region(boxes, (64, 48))
    assert centers.shape == sizes.shape == (2, 3, 2)
    center, size = box_to_region(boxes[1, 2], (64, 48))
    np.testing.assert_array_equal(center, centers[1, 2])
    np.testing.assert_array_equal(size, sizes[1, 2])


def slow_clip(box: list[float], width: int, height: int) -> list[float]:
    """One box, as the published loader cuts it: first and last pixel, both inside the image."""
    x, y, w, h = box
    left, top = max(0.0, x), max(0.0, y)
    right = min(width - 1.0, left + max(0.0, w - 1))
    bottom = min(height - 1.0, top + max(0.0, h - 1))
    return [left, top, right - left, bottom - top]


def test_boxes_are_cut_to_the_image_one_by_one_and_together() -> None:
    boxes = np.random.default_rng(4).uniform(-60, 160, (200, 4))
    boxes[:, 2:] = np.abs(boxes[:, 2:])
    expected = np.array([slow_clip(box, 100, 80) for box in boxes.tolist()])
    assert (expected[:, 2:] > 0).all(axis=1).any()
    np.testing.assert_allclose(clip_box(boxes, 100, 80), expected, atol=1e-12)
    np.testing.assert_allclose(clip_box(boxes[7], 100, 80), expected[7], atol=1e-12)


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([10, 10, 20, 20], [10, 10, 19, 19]),  # the last pixel is x + w - 1
        ([-5, -5, 20, 20], [0, 0, 19, 19]),  # the published loader moves such a box instead of cutting it
        ([90, 70, 50, 50], [90, 70, 9, 9]),
        ([0, 0, 100, 80], [0, 0, 99, 79]),
        ([3, 3, 0, 0], [3, 3, 0, 0]),
    ],
)
def test_a_box_cut_by_hand(box: list[float], clipped: list[float]) -> None:
    np.testing.assert_array_equal(clip_box(np.array(box, dtype=np.float64), 100, 80), clipped)


@pytest.mark.parametrize("box", [[150, 10, 20, 20], [10, 90, 20, 20], [99, 10, 20, 20], [10, 10, 1, 20]])
def test_a_box_outside_the_image_or_without_width_keeps_no_area(box: list[float]) -> None:
    assert min(clip_box(np.array(box, dtype=np.float64), 100, 80)[2:]) <= 0
