"""Scenes: a cluttered background, people, objects in front of them, and the defects of a camera."""

import math
from statistics import NormalDist
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float

from fpd_accel.synthetic.body import articulate, random_body, random_pose
from fpd_accel.synthetic.clothing import REGIONS, DrawnPerson, dress, random_cloth, random_colour, random_outfit
from fpd_accel.synthetic.rendering import BodyPart, Canvas, Cloth, Cover, Light, Picture, Planes, Shape, cover

MIN_LABELLED = 5  # joints of each person inside the image
MAX_COVERED = 0.4  # share of a silhouette that nearer people and objects may hide
_TRIES = 20  # random positions per person
_FRACTION_BITS = 3  # of the fixed-point coordinates for OpenCV
_ONE = 1 << _FRACTION_BITS

# Quantiles of the standard normal at 256 equal steps of probability, indexed by a random byte.
_NORMAL = np.array([NormalDist().inv_cdf((step + 0.5) / 256) for step in range(256)], dtype=np.float32)


class Placed(NamedTuple):
    """A person or object in the image; those with larger `nearness` are painted later."""

    nearness: float
    person: DrawnPerson | None
    shapes: list[tuple[Shape, Cover]]
    silhouette: Bool[np.ndarray, "height width"]


def plan_scene(rng: np.random.Generator, image_size: tuple[int, int], people: tuple[int, int]) -> list[Placed]:
    """Return people and, in a fifth of the images, objects in front of them, from far to near.

    A random position is accepted if at least 5 joints are inside the image and no person is hidden by more than 40 %.
    A person without an accepted position in 20 tries is left out, so `people` is an upper bound in a crowded image.
    """
    count = int(rng.integers(people[0], people[1] + 1))
    placed: list[Placed] = []
    for _ in range(count * _TRIES):
        if len(placed) == count:
            break
        candidate = _random_person(rng, image_size)
        if candidate.person and inside_image(candidate.person.keypoints, image_size).sum() >= MIN_LABELLED:
            placed = _try_add(placed, candidate)
    for _ in range(int(rng.choice((0, 1, 2), p=(0.8, 0.15, 0.05)))):
        placed = _try_add(placed, _random_obstacle(rng, image_size))
    return placed


def inside_image(points: Float[np.ndarray, "17 2"], image_size: tuple[int, int]) -> Bool[np.ndarray, "17"]:
    """Return which points (x, y) are inside the image: between the centres of its outermost pixels."""
    height, width = image_size
    x, y = points.T
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def paint_scene(rng: np.random.Generator, placed: list[Placed], image_size: tuple[int, int]) -> Canvas:
    """Paint the background, then `placed` from far to near; pixels of `placed[i]` are owned by i·REGIONS + region."""
    angle = rng.uniform(0, 2 * math.pi)
    light = Light((math.cos(angle), math.sin(angle)), float(rng.uniform(0.15, 0.55)))
    canvas = Canvas(_background(rng, image_size))
    worn = [random_cloth(rng), random_cloth(rng)]
    for outfit in (thing.person.outfit for thing in placed if thing.person is not None):
        worn += [outfit.skin, outfit.shirt, outfit.trousers]
    # Bars in the colours and shades of limbs, as distractors.
    for _ in range(int(rng.integers(0, 4))):
        bar = _random_bar(rng, image_size, worn[rng.integers(len(worn))])
        if where := cover(bar, image_size):
            canvas.paint(bar, where, 0, light)
    for index, thing in enumerate(placed):
        for shape, where in thing.shapes:
            canvas.paint(shape, where, index * REGIONS + shape.region, light)
    return canvas


def photograph(rng: np.random.Generator, planes: Planes) -> Picture:
    """Return the image of a mediocre camera: uneven light, a colour cast, blur, low contrast and noise."""
    height, width = planes.shape[1:]
    picture = cv2.merge(list(planes))
    contrast, brightness = float(rng.uniform(0.7, 1.1)), float(rng.normal(0, 12))
    corners = contrast * rng.uniform(0.75, 1.15, (2, 2, 1)) * rng.uniform(0.9, 1.1, 3)
    picture *= cv2.resize(corners.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.6:
        picture = cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.4, 1.3)) * height / 240)
    grain = np.frombuffer(rng.bytes(picture.size), dtype=np.uint8).reshape(height, width * 3)
    picture += cv2.LUT(grain, _NORMAL * np.float32(rng.uniform(1.0, 5.0))).reshape(picture.shape)
    picture += 127.0 * (1.0 - contrast) + brightness
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _try_add(placed: list[Placed], candidate: Placed) -> list[Placed]:
    """Return the scene with the candidate, or unchanged if a person would be hidden too much."""
    scene = sorted([*placed, candidate], key=lambda thing: thing.nearness)
    covered = np.zeros_like(candidate.silhouette)
    for thing in reversed(scene):
        hidden = int((thing.silhouette & covered).sum())
        if thing.person is not None and hidden > MAX_COVERED * int(thing.silhouette.sum()):
            return placed
        covered = covered | thing.silhouette
    return scene


def _place(nearness: float, person: DrawnPerson | None, shapes: list[Shape], image_size: tuple[int, int]) -> Placed:
    """Compute the pixels that shapes cover."""
    seen = [(shape, where) for shape in shapes if (where := cover(shape, image_size))]
    silhouette = np.zeros(image_size, dtype=bool)
    for _, where in seen:
        silhouette[where.box] |= where.mask > 127
    return Placed(nearness, person, seen, silhouette)


def _random_person(rng: np.random.Generator, image_size: tuple[int, int]) -> Placed:
    """Return a person of 0.4 to 0.95 image heights, entirely inside the image in nine of ten cases."""
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
    nearness = stature * float(rng.uniform(0.8, 1.25))  # larger people are usually nearer
    return _place(nearness, person, person.shapes, image_size)


def _random_obstacle(rng: np.random.Generator, image_size: tuple[int, int]) -> Placed:
    """Return a bar, or a convex object rising from the lower edge, in front of all people."""
    height, width = image_size
    cloth = random_cloth(rng)
    if rng.random() < 0.5:
        shape = _random_bar(rng, image_size, cloth)
    else:
        middle = np.array((rng.uniform(0, width), rng.uniform(0.75, 1.05) * height))
        corners = middle + rng.uniform(-1, 1, (6, 2)) * (0.2 * width, 0.25 * height)
        discs = np.column_stack([corners, rng.uniform(1, 0.04 * height, 6)])
        shape = BodyPart(0, 0.0, discs, np.stack([middle, middle - (0, 10)]), 0.6 * height, cloth)
    return _place(math.inf, None, [shape], image_size)


def _random_bar(rng: np.random.Generator, image_size: tuple[int, int], cloth: Cloth) -> BodyPart:
    """Return a tapered bar with the proportions of a limb at a random position."""
    height, width = image_size
    start = rng.uniform(0, 1, 2) * (width, height)
    angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0.08, 0.5) * height
    end = start + length * np.array((math.cos(angle), math.sin(angle)))
    radii = rng.uniform(0.008, 0.045, 2) * height
    return BodyPart(0, 0.0, np.column_stack([[start, end], radii]), np.stack([start, end]), 0.6 * height, cloth)


def _background(rng: np.random.Generator, image_size: tuple[int, int]) -> Picture:
    """Return a background of smooth colours, sometimes a floor, polygons, discs and lines, all with noise."""
    height, width = image_size
    rough = np.stack([random_colour(rng) for _ in range(6)]).reshape(2, 3, 3).astype(np.float32)
    smooth = cv2.resize(rough, (width, height), interpolation=cv2.INTER_LINEAR)
    picture = np.clip(smooth, 0, 255).astype(np.uint8)
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
    """Return points in OpenCV's fixed-point integers."""
    return np.rint(points * _ONE).astype(np.int32)
