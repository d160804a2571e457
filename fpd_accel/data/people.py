"""People: a random figure in random clothes at some place of a picture, as shapes to paint and joints to learn."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from fpd_accel.data.figure import JOINTS, SIDES, Figure
from fpd_accel.data.painting import PATTERNS, Cloth, Colour, Head, Part, Shape

HEAD, HAIR, TORSO = 1, 2, 3
LEFT_UPPER_ARM, LEFT_FOREARM, LEFT_THIGH, LEFT_SHIN = 4, 5, 6, 7
RIGHT_UPPER_ARM, RIGHT_FOREARM, RIGHT_THIGH, RIGHT_SHIN = 8, 9, 10, 11
REGIONS = 12  # of one person, 0 left free

# Where a joint is seen, the pixel over it shows one of these regions of the same person.
REGIONS_AT = {
    **dict.fromkeys(JOINTS[:5], (HEAD,)),
    "left_shoulder": (TORSO, LEFT_UPPER_ARM),
    "right_shoulder": (TORSO, RIGHT_UPPER_ARM),
    "left_elbow": (LEFT_UPPER_ARM, LEFT_FOREARM),
    "right_elbow": (RIGHT_UPPER_ARM, RIGHT_FOREARM),
    "left_wrist": (LEFT_FOREARM,),
    "right_wrist": (RIGHT_FOREARM,),
    "left_hip": (TORSO, LEFT_THIGH),
    "right_hip": (TORSO, RIGHT_THIGH),
    "left_knee": (LEFT_THIGH, LEFT_SHIN),
    "right_knee": (RIGHT_THIGH, RIGHT_SHIN),
    "left_ankle": (LEFT_SHIN,),
    "right_ankle": (RIGHT_SHIN,),
}
_SKINS = np.array([(244, 208, 177), (226, 182, 143), (198, 146, 104), (152, 102, 66), (104, 68, 44), (70, 46, 34)])
_HAIRS = np.array([(28, 22, 18), (60, 38, 22), (112, 74, 38), (196, 160, 96), (150, 64, 28), (160, 158, 154)])
# Where nose and long hair begin and end, in half axes of the head (left, down, forward) from its middle.
_ON_HEAD = {"bridge": (0.0, -0.05, 0.92), "crown": (0.0, -0.3, -0.35), "lock": (0.0, 1.25, -0.75)}


class Outfit(NamedTuple):
    """What a person wears; ``sleeve`` and ``leg`` say how far down: 0.6 of upper arm or thigh, 2 to the very end."""

    skin: Cloth
    shirt: Cloth
    trousers: Cloth
    shoes: Cloth
    hair: Colour
    hairline: float
    long_hair: bool
    beard: bool
    sleeve: float
    leg: float
    skirt: bool


@dataclass(frozen=True)
class Person:
    """Shapes from far to near, in pixels; ``keypoints`` (x, y) of the 17 joints; those the body itself turns away."""

    shapes: list[Shape]
    keypoints: Float[np.ndarray, "17 2"]
    turned_away: Bool[np.ndarray, "17"]
    outfit: Outfit
    stature: float


def random_colour(rng: np.random.Generator) -> Colour:
    """RGB of any hue, mostly muted."""
    grey = rng.uniform(25, 235)
    return np.clip(grey + rng.uniform(0.1, 0.7) * rng.uniform(-150, 150, 3), 5, 250)


def random_cloth(rng: np.random.Generator) -> Cloth:
    """Plain in three of four cases, otherwise one of the patterns; its period is in statures."""
    pattern = "plain" if rng.random() < 0.75 else str(rng.choice(PATTERNS[1:]))
    return Cloth(
        pattern, random_colour(rng), random_colour(rng), float(rng.uniform(0.03, 0.11)), float(rng.uniform(0, 6))
    )


def plain(colour: Colour) -> Cloth:
    """Cloth, or skin, of one colour."""
    return Cloth("plain", colour, colour, 1.0, 0.0)


def random_outfit(rng: np.random.Generator) -> Outfit:
    """Clothes, skin and hair of one person."""
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


def dress(figure: Figure, outfit: Outfit, stature: float, origin: tuple[float, float]) -> Person:
    """A figure in clothes, so many pixels tall when upright, the middle of its hips at ``origin`` (x, y)."""
    keypoints = np.stack([figure.points[name][:2] for name in JOINTS]) * stature + origin
    turned_away = figure.turned_away.copy()
    if outfit.long_hair:
        turned_away[[JOINTS.index("left_ear"), JOINTS.index("right_ear")]] = True
    tailor = _Tailor(figure, outfit, stature, origin)
    shapes = [*tailor.trunk(), *tailor.head()]
    for side, _ in SIDES:
        shapes += tailor.arm(side)
        shapes += tailor.leg(side)
    return Person(sorted(shapes, key=lambda shape: shape.depth), keypoints, turned_away, outfit, stature)


class _Tailor:
    """Turns points in space into shapes: the discs of each, its place in depth, its cloth."""

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
        discs: list[tuple[str, float]],
        axis: tuple[str, str],
        cloth: Cloth,
        *,
        nearer: float = 0.0,
    ) -> Part:
        """A hull of discs (name of the point, radius in statures); its depth is the mean of theirs plus ``nearer``."""
        x, y = self.origin
        places = [(*self.points[name].tolist(), radius * self.body.bulk) for name, radius in discs]
        ends = [self.points[name].tolist() for name in axis]
        size = self.stature
        return Part(
            region=region,
            depth=sum(place[2] for place in places) / len(places) + nearer,
            discs=np.array([(x + u * size, y + v * size, radius * size) for u, v, _, radius in places]),
            axis=np.array([(x + u * size, y + v * size) for u, v, _ in ends]),
            unit=size,
            cloth=cloth,
        )

    def trunk(self) -> list[Shape]:
        """Neck, chest, the part about the hips, perhaps a skirt."""
        outfit = self.outfit
        both = ("left", "right")
        waist = [(f"{side}_waist", 0.038) for side in both]
        chest = [("chest", 0.062), *waist, *((f"{side}_shoulder", 0.03) for side in both)]
        hips = [*waist, ("hips", 0.06), *((f"{side}_hip", 0.042) for side in both)]
        shapes: list[Shape] = [
            self.part(TORSO, [("neck", 0.03), ("head", 0.026)], ("neck", "head"), outfit.skin, nearer=-0.03),
            self.part(TORSO, hips, ("waist", "hips"), outfit.trousers, nearer=-0.04),
            self.part(TORSO, chest, ("neck", "waist"), outfit.shirt),
        ]
        if outfit.skirt:
            hems = [(f"{side}_hem", 0.06) for side in both]
            shapes.append(self.part(TORSO, [*hips, *hems], ("waist", "left_hem"), outfit.trousers, nearer=0.035))
        return shapes

    def arm(self, side: str) -> list[Shape]:
        """Upper arm, forearm, hand."""
        outfit = self.outfit
        upper, fore = (LEFT_UPPER_ARM, LEFT_FOREARM) if side == "left" else (RIGHT_UPPER_ARM, RIGHT_FOREARM)
        shoulder, elbow, wrist, hand = (f"{side}_{name}" for name in ("shoulder", "elbow", "wrist", "hand"))
        sleeve = outfit.sleeve
        below = sleeve - 1.0 if sleeve < 2.0 else 0.95
        arm = self.part(upper, [(shoulder, 0.034), (elbow, 0.025)], (shoulder, elbow), outfit.shirt, nearer=0.012)
        forearm = self.part(fore, [(elbow, 0.025), (wrist, 0.017)], (elbow, wrist), outfit.shirt, nearer=0.02)
        palm = self.part(fore, [(wrist, 0.016), (hand, 0.02)], (wrist, hand), outfit.skin, nearer=0.02)
        return [replace(arm, lower=outfit.skin, cut=sleeve), replace(forearm, lower=outfit.skin, cut=below), palm]

    def leg(self, side: str) -> list[Shape]:
        """Thigh, shin, foot."""
        outfit = self.outfit
        upper, lower = (LEFT_THIGH, LEFT_SHIN) if side == "left" else (RIGHT_THIGH, RIGHT_SHIN)
        hip, knee, ankle, heel, toe = (f"{side}_{name}" for name in ("hip", "knee", "ankle", "heel", "toe"))
        covered = -0.1 if outfit.skirt else outfit.leg
        thigh = self.part(upper, [(hip, 0.05), (knee, 0.036)], (hip, knee), outfit.trousers)
        shin = self.part(lower, [(knee, 0.036), (ankle, 0.023)], (knee, ankle), outfit.trousers)
        shoe = [(heel, 0.024), (toe, 0.016), (ankle, 0.022)]
        return [
            replace(thigh, lower=outfit.skin, cut=covered),
            replace(shin, lower=outfit.skin, cut=covered - 1.0),
            self.part(lower, shoe, (heel, toe), outfit.shoes, nearer=0.004),
        ]

    def head(self) -> list[Shape]:
        """The head, ears, nose, perhaps hair down to the shoulders."""
        outfit, size, middle = self.outfit, self.body.head, self.points["head"]
        head = Head(
            region=HEAD,
            depth=float(middle[2]) + 0.02,
            middle=middle[:2] * self.stature + self.origin,
            axes=self.head_axes * self.stature,
            skin=outfit.skin.colour,
            hair=outfit.hair,
            hairline=outfit.hairline,
            beard=outfit.beard,
        )
        flesh = plain(outfit.skin.colour * 0.93)
        radius = 0.1 * size / self.body.bulk
        nose = [("bridge", 0.5 * radius), ("nose", 0.75 * radius)]
        shapes: list[Shape] = [head, self.part(HEAD, nose, ("bridge", "nose"), flesh, nearer=0.01)]
        if outfit.long_hair:
            hair = plain(outfit.hair * 0.9)
            mane = [("crown", 3.9 * radius), ("lock", 3.0 * radius)]
            return [*shapes, self.part(HAIR, mane, ("crown", "lock"), hair, nearer=0.01)]
        ears = [[(f"{side}_ear", 0.9 * radius)] for side, _ in SIDES]
        return [*shapes, *(self.part(HEAD, ear, ("head", ear[0][0]), flesh, nearer=0.01) for ear in ears)]
