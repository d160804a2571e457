"""Scenes: a cluttered background, people in front of it, things in front of them, and the faults of the camera."""

import math
from statistics import NormalDist
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from fpd_accel.data.figure import articulate, random_body, random_pose
from fpd_accel.data.painting import Canvas, Cloth, Cover, Light, Part, Shape, cover
from fpd_accel.data.people import REGIONS, Person, dress, random_cloth, random_colour, random_outfit

MIN_LABELLED = 5  # joints inside the picture, of every person that is painted
MAX_COVERED = 0.4  # share of a silhouette that nearer people and things may hide
_TRIES = 20
_FRACTION_BITS = 3  # of coordinates handed to OpenCV
_ONE = 1 << _FRACTION_BITS

# Normal deviates at 256 equal steps of probability: a byte picks one.
_NORMAL = np.array([NormalDist().inv_cdf((step + 0.5) / 256) for step in range(256)], dtype=np.float32)

Silhouette = Bool[np.ndarray, "height width"]


class Placed(NamedTuple):
    """Something that has its place in the picture: the larger ``nearness``, the later it is painted."""

    nearness: float
    person: Person | None
    shapes: list[tuple[Shape, Cover | None]]
    silhouette: Silhouette


def plan_scene(rng: np.random.Generator, image_size: tuple[int, int], people: tuple[int, int]) -> list[Placed]:
    """People and, in a fifth of the pictures, things before them, from far to near.

    A random place is taken if it leaves at least 5 joints inside the picture and hides no more than 40 % of anyone.
    Who finds none in 20 tries is left out, so that ``people`` is an upper bound in a crowded picture.
    """
    count = int(rng.integers(people[0], people[1] + 1))
    placed: list[Placed] = []
    for _ in range(count * _TRIES):
        if len(placed) == count:
            break
        candidate = _random_person(rng, image_size)
        if count_inside(candidate.person, image_size) >= MIN_LABELLED:
            placed = _with(placed, candidate)
    for _ in range(int(rng.choice((0, 1, 2), p=(0.8, 0.15, 0.05)))):
        placed = _with(placed, _random_obstacle(rng, image_size))
    return placed


def count_inside(person: Person | None, image_size: tuple[int, int]) -> int:
    """How many joints of a person lie within the picture."""
    return 0 if person is None else int(inside_image(person.keypoints, image_size).sum())


def inside_image(points: Float[np.ndarray, "17 2"], image_size: tuple[int, int]) -> Bool[np.ndarray, "17"]:
    """Which points (x, y) lie on the picture: between the middles of its outermost pixels."""
    height, width = image_size
    x, y = points.T
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def paint_scene(rng: np.random.Generator, placed: list[Placed], image_size: tuple[int, int]) -> Canvas:
    """Background, then everything from far to near. What is ``placed[i]`` owns i·REGIONS + its region of the canvas."""
    angle = rng.uniform(0, 2 * math.pi)
    light = Light((math.cos(angle), math.sin(angle)), float(rng.uniform(0.15, 0.55)))
    canvas = Canvas(_background(rng, image_size))
    worn = [random_cloth(rng), random_cloth(rng)]
    for thing in placed:
        if thing.person is not None:
            outfit = thing.person.outfit
            worn += [outfit.skin, outfit.shirt, outfit.trousers]
    # Bars in the colours and shades of limbs: what a network must not take for people.
    for _ in range(int(rng.integers(0, 4))):
        bar = _random_bar(rng, image_size, worn[rng.integers(len(worn))])
        canvas.paint(bar, cover(bar, image_size), 0, light)
    for index, thing in enumerate(placed):
        for shape, where in thing.shapes:
            canvas.paint(shape, where, index * REGIONS + shape.region, light)
    return canvas


def photograph(
    rng: np.random.Generator, planes: Float[np.ndarray, "3 height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    """A picture as a middling camera takes it: uneven light, a colour cast, blur, contrast and noise."""
    height, width = planes.shape[1:]
    picture = cv2.merge(list(planes))
    contrast, brightness = float(rng.uniform(0.7, 1.1)), float(rng.normal(0, 12))
    corners = contrast * rng.uniform(0.75, 1.15, (2, 2, 1)) * rng.uniform(0.9, 1.1, 3)
    picture *= cv2.resize(corners.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.6:
        picture = cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.4, 1.3)) * height / 240)
    grain = np.frombuffer(rng.bytes(picture.size), dtype=np.uint8).reshape(height, width * 3)
    noise = cv2.LUT(grain, _NORMAL * np.float32(rng.uniform(1.0, 5.0))).reshape(picture.shape)
    picture += noise
    picture += 127.0 * (1.0 - contrast) + brightness
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _with(placed: list[Placed], candidate: Placed) -> list[Placed]:
    """The scene with one thing more, or as it was if someone would be hidden too much."""
    scene = sorted([*placed, candidate], key=lambda thing: thing.nearness)
    covered = np.zeros_like(candidate.silhouette)
    for thing in reversed(scene):
        hidden = int((thing.silhouette & covered).sum())
        if thing.person is not None and hidden > MAX_COVERED * int(thing.silhouette.sum()):
            return placed
        covered = covered | thing.silhouette
    return scene


def _place(nearness: float, person: Person | None, shapes: list[Shape], image_size: tuple[int, int]) -> Placed:
    """Work out the pixels that shapes cover."""
    covers = [cover(shape, image_size) for shape in shapes]
    silhouette = np.zeros(image_size, dtype=bool)
    for where in covers:
        if where is not None:
            left, top, mask = where
            silhouette[top : top + mask.shape[0], left : left + mask.shape[1]] |= mask > 127
    return Placed(nearness, person, list(zip(shapes, covers, strict=True)), silhouette)


def _random_person(rng: np.random.Generator, image_size: tuple[int, int]) -> Placed:
    """A person of 0.4 to 0.95 image heights, wholly in the picture in nine of ten cases."""
    height, width = image_size
    figure = articulate(random_body(rng), random_pose(rng))
    stature = float(rng.uniform(0.4, 0.95)) * height
    joints = np.stack([point[:2] for point in figure.points.values()]) * stature
    low, high = joints.min(axis=0) - 0.04 * stature, joints.max(axis=0) + 0.04 * stature
    first, last = -low, np.array((width, height)) - high
    origin = np.minimum(first, last) + rng.random(2) * np.abs(last - first)
    if rng.random() < 0.1:
        origin = origin + rng.uniform(-0.45, 0.45, 2) * (high - low)
    person = dress(figure, random_outfit(rng), stature, (float(origin[0]), float(origin[1])))
    # Who is nearer looks larger, more often than not.
    nearness = stature * float(rng.uniform(0.8, 1.25))
    return _place(nearness, person, person.shapes, image_size)


def _random_obstacle(rng: np.random.Generator, image_size: tuple[int, int]) -> Placed:
    """A post, a bar, or some convex thing that rises from the lower edge, in front of everyone."""
    height, width = image_size
    cloth = Cloth(*random_cloth(rng))
    if rng.random() < 0.5:
        shape = _random_bar(rng, image_size, cloth)
    else:
        middle = np.array((rng.uniform(0, width), rng.uniform(0.75, 1.05) * height))
        corners = middle + rng.uniform(-1, 1, (6, 2)) * (0.2 * width, 0.25 * height)
        discs = np.column_stack([corners, rng.uniform(1, 0.04 * height, 6)])
        shape = Part(0, 0.0, discs, np.stack([middle, middle - (0, 10)]), 0.6 * height, cloth)
    return _place(math.inf, None, [shape], image_size)


def _random_bar(rng: np.random.Generator, image_size: tuple[int, int], cloth: Cloth) -> Part:
    """A tapered bar of the proportions of a limb, anywhere."""
    height, width = image_size
    start = rng.uniform(0, 1, 2) * (width, height)
    angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0.08, 0.5) * height
    end = start + length * np.array((math.cos(angle), math.sin(angle)))
    radii = rng.uniform(0.008, 0.045, 2) * height
    return Part(0, 0.0, np.column_stack([[start, end], radii]), np.stack([start, end]), 0.6 * height, cloth)


def _background(rng: np.random.Generator, image_size: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
    """Patches of light, perhaps a floor, polygons, discs and lines, over all of it a grain."""
    height, width = image_size
    rough = np.stack([random_colour(rng) for _ in range(6)]).reshape(2, 3, 3).astype(np.float32)
    picture = cv2.resize(rough, (width, height), interpolation=cv2.INTER_LINEAR)
    picture = np.clip(picture, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        horizon = rng.uniform(0.35, 0.85, 2) * height
        floor = np.array([(0, horizon[0]), (width, horizon[1]), (width, height), (0, height)])
        cv2.fillConvexPoly(picture, _fixed(floor), random_colour(rng).tolist(), cv2.LINE_AA, _FRACTION_BITS)
    for _ in range(int(rng.integers(0, 6))):
        middle, size = rng.random(2) * (width, height), rng.uniform(0.05, 0.3) * height
        colour = random_colour(rng).tolist()
        match int(rng.integers(3)):
            case 0:
                corners = middle + rng.uniform(-size, size, (int(rng.integers(3, 7)), 2))
                cv2.fillPoly(picture, [_fixed(corners)], colour, cv2.LINE_AA, _FRACTION_BITS)
            case 1:
                corners = middle + np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * rng.uniform(0.2, 1, 2) * size
                cv2.fillConvexPoly(picture, _fixed(corners), colour, cv2.LINE_AA, _FRACTION_BITS)
            case _:
                radius = int(0.5 * size * _ONE)
                cv2.circle(picture, _fixed(middle).tolist(), radius, colour, -1, cv2.LINE_AA, _FRACTION_BITS)
    for _ in range(int(rng.integers(0, 5))):
        start, end = _fixed(rng.random((2, 2)) * (width, height)).tolist()
        thickness = int(rng.integers(1, max(2, height // 48)))
        cv2.line(picture, start, end, random_colour(rng).tolist(), thickness, cv2.LINE_AA, _FRACTION_BITS)
    cell = int(rng.choice((2, 5, 12)))
    grain = rng.standard_normal((height // cell + 1, width // cell + 1, 1), dtype=np.float32) * rng.uniform(0, 12)
    grain = cv2.resize(grain, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(picture + grain[..., None], 0, 255).astype(np.uint8)


def _fixed(points: Float[np.ndarray, "*point 2"]) -> np.ndarray:
    """Points as the fixed-point whole numbers OpenCV takes."""
    return np.rint(points * _ONE).astype(np.int32)
