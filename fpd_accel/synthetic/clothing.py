"""Dressed figures: shapes to paint and keypoints, for a posed body in random clothes."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from fpd_accel.synthetic.body import JOINTS, SIDES, Figure
from fpd_accel.synthetic.rendering import PATTERNS, BodyPart, Cloth, Colour, Head, Outfit, Shape

HEAD, HAIR, TORSO = 1, 2, 3
LIMBS = {"left": (4, 5, 6, 7), "right": (8, 9, 10, 11)}  # upper arm, forearm, thigh, shin
REGIONS = 12  # number of region values of one person; 0 is unused

# A joint is visible if its pixel shows one of these regions of the same person.
REGIONS_AT = dict.fromkeys(JOINTS[:5], (HEAD,)) | {
    f"{side}_{joint}": regions
    for side, (upper_arm, forearm, thigh, shin) in LIMBS.items()
    for joint, regions in {
        "shoulder": (TORSO, upper_arm),
        "elbow": (upper_arm, forearm),
        "wrist": (forearm,),
        "hip": (TORSO, thigh),
        "knee": (thigh, shin),
        "ankle": (shin,),
    }.items()
}
_SKINS = np.array([(244, 208, 177), (226, 182, 143), (198, 146, 104), (152, 102, 66), (104, 68, 44), (70, 46, 34)])
_HAIRS = np.array([(28, 22, 18), (60, 38, 22), (112, 74, 38), (196, 160, 96), (150, 64, 28), (160, 158, 154)])
# Ends of nose and long hair, in half axes of the head (left, down, forward) from its middle.
_ON_HEAD = {"bridge": (0.0, -0.05, 0.92), "crown": (0.0, -0.3, -0.35), "lock": (0.0, 1.25, -0.75)}


@dataclass(frozen=True)
class DrawnPerson:
    """A dressed figure in an image."""

    shapes: list[Shape]  # from far to near
    keypoints: Float[np.ndarray, "17 2"]  # (x, y), pixels
    turned_away: Bool[np.ndarray, "17"]  # joints on the side away from the viewer
    outfit: Outfit


def random_colour(rng: np.random.Generator) -> Colour:
    """Return an RGB colour of any hue, mostly muted."""
    grey = rng.uniform(25, 235)
    return np.clip(grey + rng.uniform(0.1, 0.7) * rng.uniform(-150, 150, 3), 5, 250)


def random_cloth(rng: np.random.Generator) -> Cloth:
    """Return a cloth: plain in three of four cases, otherwise with a pattern whose period is in statures."""
    pattern = "plain" if rng.random() < 0.75 else str(rng.choice(PATTERNS[1:]))
    colour, other = random_colour(rng), random_colour(rng)
    return Cloth(pattern, colour, other, float(rng.uniform(0.03, 0.11)), float(rng.uniform(0, 6)))


def plain(colour: Colour) -> Cloth:
    """Return cloth or skin of one colour."""
    return Cloth("plain", colour, colour, 1.0, 0.0)


def random_outfit(rng: np.random.Generator) -> Outfit:
    """Return random clothes, skin and hair of a person."""
    skin = np.clip(_SKINS[rng.integers(len(_SKINS))] * rng.uniform(0.88, 1.08) + rng.normal(0, 5, 3), 0, 255)
    hair = np.clip(_HAIRS[rng.integers(len(_HAIRS))] * rng.uniform(0.8, 1.2), 0, 255)
    cap = rng.random() < 0.12
    bald = rng.random() < 0.07
    return Outfit(
        skin=plain(skin),
        shirt=random_cloth(rng),
        trousers=random_cloth(rng),
        shoes=plain(random_colour(rng) * 0.8),
        hair=random_colour(rng) if cap else hair,
        hairline=0.95 if bald and not cap else float(rng.uniform(-0.2, 0.2)),
        long_hair=not cap and not bald and rng.random() < 0.3,
        beard=rng.random() < 0.12,
        sleeve=float(rng.choice((0.1, 0.6, 2.0), p=(0.1, 0.4, 0.5))),
        leg=float(rng.choice((0.7, 1.4, 2.0), p=(0.2, 0.05, 0.75))),
        skirt=rng.random() < 0.12,
    )


def dress(figure: Figure, outfit: Outfit, stature: float, origin: tuple[float, float]) -> DrawnPerson:
    """Return a dressed figure in an image.

    `stature` is the height of the upright person, and `origin` (x, y) the point midway between the hips, in pixels.
    """
    keypoints = np.stack([figure.points[name][:2] for name in JOINTS]) * stature + origin
    turned_away = figure.turned_away.copy()
    if outfit.long_hair:
        turned_away[[JOINTS.index("left_ear"), JOINTS.index("right_ear")]] = True
    builder = _ShapeBuilder(figure, outfit, stature, origin)
    shapes = [*builder.trunk(), *builder.head()]
    for side, _ in SIDES:
        shapes += builder.arm(side)
        shapes += builder.leg(side)
    return DrawnPerson(sorted(shapes, key=lambda shape: shape.depth), keypoints, turned_away, outfit)


class _ShapeBuilder:
    """A converter of points in space to shapes with discs, depth and cloth."""

    def __init__(self, figure: Figure, outfit: Outfit, stature: float, origin: tuple[float, float]) -> None:
        self.points, self.body, self.head_axes = dict(figure.points), figure.body, figure.head_axes
        for name, direction in _ON_HEAD.items():
            self.points[name] = figure.points["head"] + figure.head_axes @ direction
        for side, _ in SIDES:
            hip, knee = figure.points[f"{side}_hip"], figure.points[f"{side}_knee"]
            self.points[f"{side}_hem"] = hip + 0.6 * (knee - hip)
        self.outfit, self.stature, self.origin = outfit, stature, origin

    def part(
        self,
        region: int,
        cloth: Cloth,
        *discs: tuple[str, float],
        axis: tuple[str, str] | None = None,
        nearer: float = 0.0,
        cut: float | None = None,
    ) -> BodyPart:
        """Return a hull of discs (point name, radius in statures); its depth is their mean depth plus `nearer`.

        The axis is by default that of the first two discs; below `cut`, a share of it, there is skin instead of cloth.
        """
        places = [(*self.points[name].tolist(), radius * self.body.bulk) for name, radius in discs]
        ends = [self.points[name].tolist() for name in axis or (discs[0][0], discs[1][0])]
        (x, y), size = self.origin, self.stature
        return BodyPart(
            region=region,
            depth=sum(place[2] for place in places) / len(places) + nearer,
            discs=np.array([(x + u * size, y + v * size, radius * size) for u, v, _, radius in places]),
            axis=np.array([(x + u * size, y + v * size) for u, v, _ in ends]),
            unit=size,
            cloth=cloth,
            below=None if cut is None else (self.outfit.skin, cut),
        )

    def trunk(self) -> list[Shape]:
        """Return neck, chest, hips and, in some outfits, a skirt."""
        outfit, both = self.outfit, ("left", "right")
        waist = [(f"{side}_waist", 0.038) for side in both]
        chest = [("chest", 0.062), *waist, *((f"{side}_shoulder", 0.03) for side in both)]
        hips = [*waist, ("hips", 0.06), *((f"{side}_hip", 0.042) for side in both)]
        shapes: list[Shape] = [
            self.part(TORSO, outfit.skin, ("neck", 0.03), ("head", 0.026), nearer=-0.03),
            self.part(TORSO, outfit.trousers, *hips, axis=("waist", "hips"), nearer=-0.04),
            self.part(TORSO, outfit.shirt, *chest, axis=("neck", "waist")),
        ]
        if outfit.skirt:
            hems = [(f"{side}_hem", 0.06) for side in both]
            shapes.append(self.part(TORSO, outfit.trousers, *hips, *hems, axis=("waist", "left_hem"), nearer=0.035))
        return shapes

    def arm(self, side: str) -> list[Shape]:
        """Return upper arm, forearm and hand."""
        (upper, fore, _, _), sleeve = LIMBS[side], self.outfit.sleeve
        shoulder, elbow, wrist, hand = (f"{side}_{name}" for name in ("shoulder", "elbow", "wrist", "hand"))
        below = sleeve - 1.0 if sleeve < 2.0 else 0.95
        return [
            self.part(upper, self.outfit.shirt, (shoulder, 0.034), (elbow, 0.025), nearer=0.012, cut=sleeve),
            self.part(fore, self.outfit.shirt, (elbow, 0.025), (wrist, 0.017), nearer=0.02, cut=below),
            self.part(fore, self.outfit.skin, (wrist, 0.016), (hand, 0.02), nearer=0.02),
        ]

    def leg(self, side: str) -> list[Shape]:
        """Return thigh, shin and foot."""
        (_, _, upper, lower), outfit = LIMBS[side], self.outfit
        hip, knee, ankle, heel, toe = (f"{side}_{name}" for name in ("hip", "knee", "ankle", "heel", "toe"))
        covered = -0.1 if outfit.skirt else outfit.leg
        return [
            self.part(upper, outfit.trousers, (hip, 0.05), (knee, 0.036), cut=covered),
            self.part(lower, outfit.trousers, (knee, 0.036), (ankle, 0.023), cut=covered - 1.0),
            self.part(lower, outfit.shoes, (heel, 0.024), (toe, 0.016), (ankle, 0.022), nearer=0.004),
        ]

    def head(self) -> list[Shape]:
        """Return head, nose, and ears or long hair."""
        outfit, middle = self.outfit, self.points["head"]
        place, axes = middle[:2] * self.stature + self.origin, self.head_axes * self.stature
        head = Head(HEAD, float(middle[2]) + 0.02, place, axes, outfit)
        flesh = plain(outfit.skin.colour * 0.93)
        radius = 0.1 * self.body.head / self.body.bulk
        nose = self.part(HEAD, flesh, ("bridge", 0.5 * radius), ("nose", 0.75 * radius), nearer=0.01)
        if outfit.long_hair:
            hair = plain(outfit.hair * 0.9)
            return [head, nose, self.part(HAIR, hair, ("crown", 3.9 * radius), ("lock", 3.0 * radius), nearer=0.01)]
        ears = [
            self.part(HEAD, flesh, (ear, 0.9 * radius), axis=("head", ear), nearer=0.01)
            for ear in ("left_ear", "right_ear")
        ]
        return [head, nose, *ears]
