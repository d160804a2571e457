"""Random geometry: a pure function of its key, with the published distributions, and half bodies by hand."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from fpd_accel.config.schema import Augment
from fpd_accel.data.augment import Geometry, draw_geometry, half_body, sample_generator
from fpd_accel.skeleton import COCO

DRAWS = 3000
CENTER, SIZE = np.array([100.0, 150.0]), np.array([120.0, 160.0])  # image pixels; aspect 3:4
KEYPOINTS = np.random.default_rng(0).uniform(50, 200, (17, 2))
UPPER, LOWER = KEYPOINTS[:11], KEYPOINTS[11:]
EVERYONE = np.ones(17, dtype=bool)


def draw(augment: Augment, person: int, *, seed: int = 0, epoch: int = 0, visible: np.ndarray = EVERYONE) -> Geometry:
    return draw_geometry(
        sample_generator(seed, epoch, person),
        augment,
        skeleton=COCO,
        center=CENTER,
        size=SIZE,
        keypoints=KEYPOINTS,
        visible=visible,
    )


@functools.cache
def many() -> list[Geometry]:
    """The published augmentation of as many people."""
    return [draw(Augment(), person) for person in range(DRAWS)]


def assert_share(hits: Iterable[bool], probability: float) -> None:
    """As many hits as a coin of that probability gives, within four standard deviations (once in 16,000 by chance)."""
    outcomes = np.array(list(hits))
    deviation = np.sqrt(probability * (1 - probability) / len(outcomes))
    assert abs(outcomes.mean() - probability) < 4 * deviation


def assert_same(one: Geometry, other: Geometry) -> None:
    np.testing.assert_array_equal(one.center, other.center)
    np.testing.assert_array_equal(one.size, other.size)
    assert (one.rotation, one.flip) == (other.rotation, other.flip)


def test_the_same_key_draws_the_same_geometry_in_any_order() -> None:
    for person in (2999, 0, 7, 7):
        assert_same(draw(Augment(), person), many()[person])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"person": 6}])
def test_another_seed_epoch_or_person_draws_another_geometry(change: dict[str, Any]) -> None:
    one, other = draw(Augment(), 5), draw(Augment(), **{"person": 5, **change})
    assert not np.array_equal(one.size, other.size)


def test_switching_one_augmentation_off_leaves_the_draws_of_the_others() -> None:
    for person in range(50):
        whole = draw(Augment(half_body=0), person)
        upright = draw(Augment(half_body=0, rotation_probability=0), person)
        unflipped = draw(Augment(half_body=0, flip=0), person)
        fixed = draw(Augment(half_body=0, scale=0), person)
        halved = draw(Augment(half_body=1), person)
        assert upright.rotation == 0
        assert (upright.flip, unflipped.rotation) == (whole.flip, whole.rotation)
        assert (fixed.rotation, fixed.flip) == (halved.rotation, halved.flip) == (whole.rotation, whole.flip)
        np.testing.assert_array_equal(upright.size, whole.size)
        np.testing.assert_array_equal(fixed.size, SIZE)


def test_no_augmentation_is_the_region_as_it_was() -> None:
    nothing = Augment(flip=0, scale=0, rotation=0, half_body=0)
    for person in range(20):
        assert_same(draw(nothing, person), Geometry(CENTER, SIZE, 0.0, False))


def test_half_of_the_samples_are_mirrored() -> None:
    assert_share((geometry.flip for geometry in many()), 0.5)
    assert all(draw(Augment(flip=1), person).flip for person in range(50))


def test_scale_is_a_normal_clipped_at_one_standard_deviation() -> None:
    factors = np.array([draw(Augment(half_body=0), person).size[0] for person in range(DRAWS)]) / SIZE[0]
    assert factors.min() == pytest.approx(0.65)
    assert factors.max() == pytest.approx(1.35)
    low, high = np.isclose(factors, 0.65, atol=1e-9), np.isclose(factors, 1.35, atol=1e-9)
    assert_share(low | high, 0.3173)  # P(|N| > 1)
    assert_share(low, 0.1587)  # P(N < -1)
    assert_share(np.abs(factors - 1) < 0.175, 0.3829)  # P(|N| < 0.5)


def test_the_region_is_scaled_without_a_change_of_shape() -> None:
    sizes = np.stack([draw(Augment(half_body=0), person).size for person in range(100)])
    np.testing.assert_allclose(sizes[:, 0] / sizes[:, 1], 0.75, rtol=1e-12)


def test_rotation_is_a_normal_clipped_at_two_standard_deviations_in_sixty_percent() -> None:
    angles = np.array([geometry.rotation for geometry in many()])
    assert_share(angles != 0, 0.6)
    turned = angles[angles != 0]
    assert (np.abs(turned) <= 90).all()
    assert_share(np.abs(turned) == 90, 0.0455)  # degrees; P(|N| > 2)
    assert_share(np.abs(turned) < 45, 0.6827)  # P(|N| < 1)
    assert_share(turned > 0, 0.5)


def half_bodies(augment: Augment, visible: np.ndarray = EVERYONE) -> np.ndarray:
    """For each draw: 'whole', 'upper' or 'lower', told by the centre."""
    centers = {"whole": CENTER, "upper": UPPER[visible[:11]].mean(axis=0), "lower": LOWER[visible[11:]].mean(axis=0)}
    drawn = [draw(augment, person, visible=visible).center for person in range(DRAWS)]
    return np.array([next(name for name, at in centers.items() if np.allclose(center, at)) for center in drawn])


def test_three_in_ten_are_half_bodies_and_of_those_two_in_three_upper_ones() -> None:
    kinds = half_bodies(Augment())
    assert_share(kinds != "whole", 0.3)
    assert_share(kinds[kinds != "whole"] == "upper", 0.6915)  # P(N < 0.5)


def test_only_people_with_more_than_eight_visible_keypoints_become_half_bodies() -> None:
    eight, nine = np.zeros(17, dtype=bool), np.zeros(17, dtype=bool)
    eight[[0, 1, 2, 3, 11, 12, 13, 14]] = True
    nine[[0, 1, 2, 3, 11, 12, 13, 14, 15]] = True
    always = Augment(half_body=1, scale=0)
    for person in range(30):
        np.testing.assert_array_equal(draw(always, person, visible=eight).center, CENTER)
        assert not np.array_equal(draw(always, person, visible=nine).center, CENTER)


def frame(keypoints: dict[str, tuple[float, float]], *, prefer_upper: bool) -> tuple[list[float], list[float]]:
    """Centre and size of the half body of a person with these visible keypoints; unseen ones lie far off."""
    points, visible = np.full((17, 2), 1e6), np.zeros(17, dtype=bool)
    for name, point in keypoints.items():
        points[COCO.index(name)], visible[COCO.index(name)] = point, True
    center, size = half_body(CENTER, SIZE, keypoints=points, visible=visible, skeleton=COCO, prefer_upper=prefer_upper)
    return center.tolist(), size.tolist()


WHOLE = (CENTER.tolist(), SIZE.tolist())
HEAD: dict[str, tuple[float, float]] = {"nose": (10, 10), "left_eye": (12, 8), "right_eye": (8, 6)}
LEGS: dict[str, tuple[float, float]] = {"left_knee": (20, 50), "right_knee": (10, 50), "left_ankle": (30, 80)}
HEAD_FRAME = ([10.0, 8.0], [6.0, 8.0])  # mean; 1.5 times 4 x 4, the height grown to 4 / 0.75
LEGS_FRAME = ([20.0, 60.0], [33.75, 45.0])  # mean; 1.5 times 20 x 30, the width grown to 30 * 0.75


def assert_frame(found: tuple[list[float], list[float]], expected: tuple[list[float], list[float]]) -> None:
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-9)


def test_the_preferred_half_is_framed_where_it_has_three_keypoints() -> None:
    assert_frame(frame(HEAD | LEGS, prefer_upper=True), HEAD_FRAME)
    assert_frame(frame(HEAD | LEGS, prefer_upper=False), LEGS_FRAME)


def test_the_other_half_is_framed_where_the_preferred_one_has_fewer_than_three() -> None:
    two_above = {name: HEAD[name] for name in ("nose", "left_eye")}
    two_below = {name: LEGS[name] for name in ("left_knee", "right_knee")}
    assert_frame(frame(two_above | LEGS, prefer_upper=True), LEGS_FRAME)
    assert_frame(frame(HEAD | two_below, prefer_upper=False), HEAD_FRAME)


def test_two_keypoints_above_are_framed_where_both_halves_have_fewer_than_three() -> None:
    two_and_two: dict[str, tuple[float, float]] = {
        "nose": (10, 10), "left_eye": (14, 10), "left_knee": (20, 50), "right_knee": (10, 50),
    }  # fmt: skip
    for prefer_upper in (True, False):
        assert_frame(frame(two_and_two, prefer_upper=prefer_upper), ([12.0, 10.0], [6.0, 8.0]))


def test_the_region_stays_where_fewer_than_two_keypoints_are_left_to_frame() -> None:
    one_and_two = {"nose": (10.0, 10.0), "left_knee": (20.0, 50.0), "right_knee": (10.0, 50.0)}
    for prefer_upper in (True, False):
        assert frame(one_and_two, prefer_upper=prefer_upper) == WHOLE
        assert frame({}, prefer_upper=prefer_upper) == WHOLE


def test_the_region_stays_where_all_keypoints_are_on_one_spot() -> None:
    spot = dict.fromkeys(HEAD, (10.0, 10.0))
    assert frame(spot, prefer_upper=True) == WHOLE


def test_keypoints_on_a_line_are_framed_at_the_regions_shape() -> None:
    upright = {name: (10.0, y) for name, y in zip(HEAD, (10.0, 20.0, 30.0), strict=True)}
    assert_frame(frame(upright, prefer_upper=True), ([10.0, 20.0], [22.5, 30.0]))
    level = {name: (x, 10.0) for name, x in zip(HEAD, (10.0, 20.0, 30.0), strict=True)}
    assert_frame(frame(level, prefer_upper=True), ([20.0, 10.0], [30.0, 40.0]))
