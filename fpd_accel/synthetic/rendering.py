"""Rendering of shapes with cloth patterns, painted on a canvas one over the other.

Each shape has a convex outline and a function for the colour of its pixels. `Canvas.paint` blends it in with
antialiased edges and records the owner of each pixel, from which silhouettes and occluded joints are derived.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Integer, UInt8

Colour = Float[np.ndarray, "3"]
Row = Float[np.ndarray, "1 width"]
Column = Float[np.ndarray, "height 1"]
Plane = Float[np.ndarray, "height width"]
Planes = Float[np.ndarray, "3 height width"]  # R, G, B; 0 to 255
Picture = UInt8[np.ndarray, "height width 3"]  # RGB
_CIRCLE = np.stack([np.cos(np.arange(12) * math.pi / 6), np.sin(np.arange(12) * math.pi / 6)], axis=1)
_FINE_CIRCLE = np.stack([np.cos(np.arange(24) * math.pi / 12), np.sin(np.arange(24) * math.pi / 12)], axis=1)
_FRACTION_BITS = 4  # of the fixed-point coordinates for OpenCV
# Eyes and mouth: position on the unit sphere of the head (left, down, forward), darkness, width / height.
_MARKS = (((0.43, -0.1, 0.897), 0.75, 1.2), ((-0.43, -0.1, 0.897), 0.75, 1.2), ((0.0, 0.52, 0.854), 0.35, 1.6))
PATTERNS = ("plain", "hoops", "stripes", "checks", "dots", "mottled")


class Cloth(NamedTuple):
    """A pattern in two colours (RGB, 0 to 255); `period` is in the unit of the shape that wears it."""

    pattern: str
    colour: Colour
    other: Colour
    period: float
    phase: float

    def at(self, along: Plane, across: Plane, unit: float) -> Float[np.ndarray, "3 #height #width"]:
        """Return RGB at positions along and across a shape, in pixels; `unit` is the unit length in pixels."""
        colour = self.colour.astype(np.float32)[:, None, None]
        if self.pattern == "plain":
            return colour
        turns = 2 * math.pi / (self.period * unit)
        first = along * turns + self.phase
        second = across * turns + 0.3 * self.phase
        match self.pattern:
            case "hoops":
                wave = np.sin(first)
            case "stripes":
                wave = np.sin(second)
            case "checks":
                wave = np.sin(first) * np.sin(second) * 1.5
            case "dots":
                wave = np.sin(first) + np.sin(second) - 0.9
            case _:
                wave = np.sin(first + 2 * np.sin(0.7 * second)) + np.sin(1.3 * second + 2 * np.sin(0.6 * first))
        share = np.clip(1.5 * wave + 0.5, 0.0, 1.0)
        return colour + share * (self.other.astype(np.float32)[:, None, None] - colour)


class Outfit(NamedTuple):
    """Skin, hair and clothes of a person.

    `sleeve` and `leg` are lengths: up to 1 a share of upper arm or thigh, 2 down to wrist or ankle.
    """

    skin: Cloth
    shirt: Cloth
    trousers: Cloth
    shoes: Cloth
    hair: Colour
    hairline: float  # hair covers directions from the middle of the head whose component along (up, back) is larger
    long_hair: bool
    beard: bool
    sleeve: float
    leg: float
    skirt: bool


class Light(NamedTuple):
    """The direction that light comes from (a unit vector in the image), and the strength of shadows, 0 to 1."""

    direction: tuple[float, float]
    strength: float


@dataclass(frozen=True)
class BodyPart:
    """A convex hull of discs, shaded like a cylinder about its axis."""

    region: int  # of the person (0: none)
    depth: float  # larger is nearer
    discs: Float[np.ndarray, "disc 3"]  # x, y, radius, pixels
    axis: Float[np.ndarray, "2 2"]  # two points, pixels
    unit: float  # unit length of cloth patterns, pixels
    cloth: Cloth
    below: tuple[Cloth, float] | None = None  # worn below a share of the axis, such as the skin below a sleeve

    def outline(self) -> Float[np.ndarray, "point 2"]:
        """Return the corners of the hull in pixels."""
        points = self.discs[:, None, :2] + self.discs[:, None, 2:] * _CIRCLE
        return cv2.convexHull(points.reshape(-1, 2).astype(np.float32))[:, 0]

    def colours(self, x: Row, y: Column, light: Light) -> Planes:
        """Return RGB for a grid of pixels: cloth, darker towards the sides and away from the light."""
        # Python floats: NumPy scalars would promote the planes to double precision.
        (start_x, start_y), (end_x, end_y) = self.axis.tolist()
        length = math.hypot(end_x - start_x, end_y - start_y)
        ahead_x, ahead_y = ((end_x - start_x) / length, (end_y - start_y) / length) if length > 1.0 else (0.0, 1.0)
        along = (x - start_x) * ahead_x + (y - start_y) * ahead_y
        across = (y - start_y) * ahead_x - (x - start_x) * ahead_y
        half = max(abs((v - start_y) * ahead_x - (u - start_x) * ahead_y) + r for u, v, r in self.discs.tolist())
        colour = self.cloth.at(along, across, self.unit)
        if self.below is not None:
            lower, cut = self.below
            share = np.clip(along - (cut * max(length, 1.0) - 0.5), 0.0, 1.0)
            colour = colour + share * (lower.at(along, across, self.unit) - colour)
        side = across / half
        lit = light.direction[1] * ahead_x - light.direction[0] * ahead_y
        return colour * (1.0 - light.strength * side * (0.5 * side - 0.6 * lit))


@dataclass(frozen=True)
class Head:
    """An ellipsoid with hair and a face."""

    region: int  # of the person
    depth: float  # larger is nearer
    middle: Float[np.ndarray, "2"]  # (x, y), pixels
    axes: Float[np.ndarray, "3 3"]  # columns: from the middle to the left, lowest and front points; pixels, z to viewer
    worn: Outfit

    def outline(self) -> Float[np.ndarray, "point 2"]:
        """Return the ellipse that the ellipsoid projects to."""
        spread = self.axes @ self.axes.T
        return (self.middle + _FINE_CIRCLE @ np.linalg.cholesky(spread[:2, :2]).T).astype(np.float32)

    def colours(self, x: Row, y: Column, light: Light) -> Planes:
        """Return RGB for a grid of pixels, each projected onto the visible side of the ellipsoid."""
        inverse = np.linalg.inv(self.axes).astype(np.float32)[..., None, None]
        x, y = x - float(self.middle[0]), y - float(self.middle[1])
        # On the unit sphere the line of sight is flat + z * toward; its nearer intersection solves a quadratic.
        toward = inverse[:, 2]
        flat = x * inverse[:, 0] + y * inverse[:, 1]
        square, slope = (toward * toward).sum(), (toward * flat).sum(axis=0)
        inside = np.maximum(slope * slope - square * ((flat * flat).sum(axis=0) - 1.0), 0.0)
        left, down, ahead = flat + (np.sqrt(inside) - slope) / square * toward
        reach = float(np.linalg.norm(self.axes))
        sharp = 0.5 * reach  # a transition of one pixel at any size
        hair = np.clip(sharp * (-0.66 * down - 0.75 * ahead - self.worn.hairline) + 0.5, 0.0, 1.0)
        if self.worn.beard:
            hair = np.maximum(hair, np.clip(sharp * np.minimum(down - 0.3, ahead + 0.15) + 0.5, 0.0, 1.0))
        shade = 1.0 - light.strength * (0.1 - 0.9 / reach * (x * light.direction[0] + y * light.direction[1]))
        for (place_x, place_y, place_z), dark, flatness in _MARKS:
            far = (left - place_x) ** 2 / flatness + (down - place_y) ** 2 * flatness * 2 + (ahead - place_z) ** 2
            shade = shade * (1.0 - dark * np.clip(1.6 - 38.0 * far, 0.0, 1.0))
        skin, hairs = (colour.astype(np.float32)[:, None, None] for colour in (self.worn.skin.colour, self.worn.hair))
        return (skin + hair * (hairs - skin)) * shade


Shape = BodyPart | Head


class Cover(NamedTuple):
    """The coverage of each pixel by a shape (0 to 255) in a box of the image."""

    box: tuple[slice, slice]  # rows, columns
    mask: UInt8[np.ndarray, "height width"]


def cover(shape: Shape, image_size: tuple[int, int]) -> Cover | None:
    """Return the pixels of an image that a shape covers, or None if it lies outside."""
    outline = shape.outline()
    left, top, width, height = cv2.boundingRect(outline)
    right, bottom = min(left + width + 1, image_size[1]), min(top + height + 1, image_size[0])
    left, top = max(left - 1, 0), max(top - 1, 0)
    if left >= right or top >= bottom:
        return None
    mask = np.zeros((bottom - top, right - left), dtype=np.uint8)
    corners = np.rint((outline - np.array((left, top), dtype=np.float32)) * (1 << _FRACTION_BITS)).astype(np.int32)
    cv2.fillConvexPoly(mask, corners, 255, cv2.LINE_AA, _FRACTION_BITS)
    return Cover((slice(top, bottom), slice(left, right)), mask)


class Canvas:
    """An image being painted: its `planes`, and the `owner` of each pixel (0: the background)."""

    def __init__(self, background: Picture) -> None:
        self.planes: Planes = np.stack(cv2.split(background)).astype(np.float32)
        self.owner: Integer[np.ndarray, "height width"] = np.zeros(background.shape[:2], dtype=np.int32)

    def paint(self, shape: Shape, where: Cover, owner: int, light: Light) -> None:
        """Blend a shape over the image; pixels that it covers by half or more then belong to `owner`."""
        y, x = (axis.astype(np.float32) for axis in np.ogrid[where.box])
        patch = self.planes[:, *where.box]
        patch += where.mask * np.float32(1 / 255) * (shape.colours(x, y, light) - patch)
        self.owner[where.box][where.mask > 127] = owner
