"""Articulated figures: random bodies and poses, and the positions of their joints in space.

Lengths are in statures (1 = the height of the upright person). The axes are those of the viewer: x to the right, y
down, z towards the viewer; the origin is midway between the hips. A figure with yaw 0 faces the viewer, so its left
side is at positive x; with yaw 90 it faces the right of the image.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from fpd_accel.skeleton import COCO

JOINTS = COCO.keypoints
Vector = Float[np.ndarray, "3"]
Matrix = Float[np.ndarray, "3 3"]

# Joint -> direction from the middle of the head in its own axes (x: left, y: down, z: forward), and the z component
# towards the viewer below which the head hides the joint. Noses and ears protrude, eyes lie in sockets.
FACE = {
    "nose": ((0.0, 0.12, 1.08), -0.15),
    "left_eye": ((0.42, -0.1, 0.88), 0.1),
    "right_eye": ((-0.42, -0.1, 0.88), 0.1),
    "left_ear": ((1.02, 0.05, -0.08), -0.3),
    "right_ear": ((-1.02, 0.05, -0.08), -0.3),
}
SIDES = (("left", 1.0), ("right", -1.0))


class Body(NamedTuple):
    """Lengths in statures; `shoulder` and `hip` are half widths, and `bulk` multiplies every thickness."""

    head: float
    neck: float
    shoulder: float
    trunk: float
    hip: float
    upper_arm: float
    forearm: float
    hand: float
    thigh: float
    shin: float
    foot: float
    bulk: float


class Arm(NamedTuple):
    """Angles of an arm in degrees: forward, outward, inward about the bone, bend of the elbow; all zero: hanging."""

    forward: float
    outward: float
    inward: float
    bend: float


class Leg(NamedTuple):
    """Angles of a leg in degrees: forward, outward, bend of the knee; all zero: straight down."""

    forward: float
    outward: float
    bend: float


class PoseFamily(NamedTuple):
    """Poses of one kind."""

    share: float  # of all people
    lean: float  # of the trunk, degrees
    legs: tuple[Leg, Leg]
    arms: tuple[str, ...]  # names in `ARMS` to choose from


ARMS = {
    "hanging": Arm(0, 9, 10, 14),
    "forth": Arm(30, 5, 15, 35),
    "back": Arm(-30, 8, 5, 25),
    "pumping": Arm(45, 5, 25, 95),
    "drawn": Arm(-45, 12, 10, 80),
    "on hip": Arm(-15, 48, 60, 95),
    "folded": Arm(38, 6, 70, 95),
    "phone": Arm(38, 15, 25, 125),
    "raised": Arm(0, 150, 0, 20),
    "waving": Arm(0, 88, -85, 75),
    "ahead": Arm(85, 6, 5, 12),
    "aside": Arm(0, 85, 0, 14),
    "lap": Arm(28, 8, 25, 55),
}

_STANDING_ARMS = ("hanging",) * 9 + ("on hip", "folded", "phone", "raised", "waving", "ahead", "aside", "forth")
FAMILIES = {
    "standing": PoseFamily(0.42, 1, (Leg(1, 4, 3), Leg(1, 4, 3)), _STANDING_ARMS),
    "relaxed": PoseFamily(0.16, 3, (Leg(12, 7, 20), Leg(-2, 4, 2)), _STANDING_ARMS),
    "astride": PoseFamily(0.07, 3, (Leg(3, 22, 6), Leg(3, 22, 6)), ("raised", "aside", "waving", "on hip", "hanging")),
    "walking": PoseFamily(0.22, 5, (Leg(24, 2, 8), Leg(-16, 2, 24)), ("forth", "back", "hanging")),
    "running": PoseFamily(0.05, 14, (Leg(58, 2, 80), Leg(-22, 2, 60)), ("pumping", "drawn")),
    "lunging": PoseFamily(0.02, 12, (Leg(62, 6, 55), Leg(-22, 4, 12)), ("ahead", "aside", "raised", "drawn")),
    "sitting": PoseFamily(0.04, 4, (Leg(86, 9, 86), Leg(86, 9, 86)), ("lap", "lap", "folded", "phone", "forth")),
    "bending": PoseFamily(0.01, 62, (Leg(8, 5, 10), Leg(8, 5, 10)), ("ahead", "forth", "hanging")),
    "squatting": PoseFamily(0.02, 25, (Leg(104, 16, 120), Leg(104, 16, 120)), ("ahead", "lap", "forth")),
    "lying": PoseFamily(0.01, 2, (Leg(8, 5, 12), Leg(8, 5, 12)), ("hanging", "raised", "aside", "folded")),
}


class Pose(NamedTuple):
    """Angles of a posed body in degrees."""

    view: tuple[float, float, float]  # yaw, elevation of the viewer, rotation in the image
    trunk: tuple[float, float, float]  # forward, sideways, twist
    head: tuple[float, float, float]  # to its left, down, sideways
    arms: tuple[Arm, Arm]  # left, right
    legs: tuple[Leg, Leg]  # left, right


@dataclass(frozen=True)
class Figure:
    """A posed body."""

    body: Body
    points: dict[str, Vector]  # statures; the 17 joints and others, such as `left_toe`
    head_axes: Matrix  # columns: from the middle of the head to its left, lowest and front points
    turned_away: Bool[np.ndarray, "17"]  # joints on the side away from the viewer


def random_body(rng: np.random.Generator) -> Body:
    """Return an adult or, in one case of ten, a child of random age, with a larger head and shorter legs."""
    child = rng.uniform(0.2, 1.0) if rng.random() < 0.1 else 0.0
    leg = 0.245 - 0.035 * child
    arm = 0.168 - 0.025 * child
    lengths = np.array(
        [0.132 + 0.055 * child, 0.038 - 0.012 * child, 0.112, 0.285, 0.076, arm, 0.87 * arm, 0.075, leg, leg, 0.115]
    )
    lengths *= np.clip(rng.normal(1.0, 0.05, len(lengths)), 0.85, 1.15)
    lengths[9] = lengths[8] * rng.uniform(0.93, 1.05)
    bulk = float(np.clip(rng.normal(1.25, 0.12), 0.9, 1.6))
    return Body(*[*lengths.tolist(), bulk])


def random_pose(rng: np.random.Generator) -> Pose:
    """Return a pose of a random family and view: seven of eight from the front, one of sixteen from behind."""
    shares = [family.share for family in FAMILIES.values()]
    name = str(rng.choice(list(FAMILIES), p=np.array(shares) / sum(shares)))
    family = FAMILIES[name]
    arms = [ARMS[str(arm)] for arm in rng.choice(family.arms, 2, replace=len(set(family.arms)) != 2)]
    legs = list(family.legs)
    if rng.random() < 0.5:
        legs.reverse()
    # The arm opposite to the front leg swings forward.
    if name in ("walking", "running") and (arms[0].forward < arms[1].forward) == (legs[0].forward < legs[1].forward):
        arms.reverse()
    yaw = rng.choice((0.0, 90.0, -90.0, 180.0), p=(0.88, 0.03, 0.03, 0.06)) + rng.uniform(-25, 25)
    roll = rng.normal(0, 15 if rng.random() < 0.1 else 4)
    if name == "lying":
        roll += rng.choice((-90, 90))
    return Pose(
        view=(float(yaw), float(rng.uniform(-2, 18)), float(roll)),
        trunk=(family.lean + float(rng.normal(0, 5)), float(rng.normal(0, 5)), float(rng.normal(0, 9))),
        head=(float(rng.normal(0, 22)), float(rng.normal(6, 9)), float(rng.normal(0, 6))),
        arms=(Arm(*_spread(rng, arms[0], 10.0)), Arm(*_spread(rng, arms[1], 10.0))),
        legs=(Leg(*_spread(rng, legs[0], 6.0)), Leg(*_spread(rng, legs[1], 6.0))),
    )


def _spread(rng: np.random.Generator, angles: Arm | Leg, degrees: float) -> list[float]:
    """Return the angles of a limb with noise; the last one, of elbow or knee, does not bend backwards."""
    spread = (np.array(angles) + rng.normal(0, degrees, len(angles))).tolist()
    return [*spread[:-1], max(spread[-1], 0.0)]


def rotation(axis: str, degrees: float) -> Matrix:
    """Return the matrix of a rotation about "x", "y" or "z"."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows = {
        "x": ((1.0, 0.0, 0.0), (0.0, cosine, -sine), (0.0, sine, cosine)),
        "y": ((cosine, 0.0, sine), (0.0, 1.0, 0.0), (-sine, 0.0, cosine)),
        "z": ((cosine, -sine, 0.0), (sine, cosine, 0.0), (0.0, 0.0, 1.0)),
    }
    return np.array(rows[axis])


def articulate(body: Body, pose: Pose) -> Figure:
    """Return the posed body: forward kinematics from the hips outwards."""
    yaw, height, roll = pose.view
    pelvis = rotation("z", roll) @ rotation("x", -height) @ rotation("y", yaw)
    lean, aside, twist = pose.trunk
    chest = pelvis @ rotation("x", -lean) @ rotation("z", aside) @ rotation("y", twist)
    turn, nod, tilt = pose.head
    # The head compensates half of the trunk's lean, to keep looking ahead.
    head = chest @ rotation("y", turn) @ rotation("x", 0.5 * lean - nod) @ rotation("z", tilt)
    neck = chest @ (0.0, -body.trunk, 0.0)
    points = {"hips": np.zeros(3), "neck": neck, "waist": chest @ (0.0, -0.3 * body.trunk, 0.0)}
    points["chest"] = chest @ (0.0, -0.72 * body.trunk, 0.012)
    points["head"] = neck + chest @ (0.0, -body.neck, 0.008) + head @ (0.0, -0.5 * body.head, 0.012)
    for (side, sign), arm, leg in zip(SIDES, pose.arms, pose.legs, strict=True):
        points |= _place_arm(side, sign, body, arm, chest, neck)
        points |= _place_leg(side, sign, body, leg, pelvis)
        points[f"{side}_waist"] = points["waist"] + chest @ (sign * 0.6 * body.shoulder, 0.0, 0.0)
    axes = head * (np.array([0.375, 0.5, 0.44]) * body.head)  # half the width, height and depth
    points |= {name: points["head"] + axes @ direction for name, (direction, _) in FACE.items()}
    away = {name for name, (direction, edge) in FACE.items() if (head @ direction)[2] < edge}
    for joint, middle, half_width in (("shoulder", neck, body.shoulder), ("hip", points["hips"], body.hip)):
        names = (f"{side}_{joint}" for side, _ in SIDES)
        away |= {name for name in names if points[name][2] - middle[2] < -0.85 * half_width}
    return Figure(body, points, axes, np.array([name in away for name in JOINTS]))


def _place_arm(side: str, sign: float, body: Body, arm: Arm, chest: Matrix, neck: Vector) -> dict[str, Vector]:
    # A raised arm lifts the shoulder.
    lift = 0.035 * max(0.0, math.sin(math.radians(min(max(arm.outward - 60, 0), 90))))
    shoulder = neck + chest @ (sign * body.shoulder, 0.012 - lift, 0.0)
    upper = chest @ rotation("z", -sign * arm.outward) @ rotation("x", arm.forward) @ rotation("y", -sign * arm.inward)
    lower = upper @ rotation("x", arm.bend)
    elbow = shoulder + upper @ (0.0, body.upper_arm, 0.0)
    wrist = elbow + lower @ (0.0, body.forearm, 0.0)
    hand = wrist + lower @ (0.0, body.hand, 0.0)
    return {f"{side}_shoulder": shoulder, f"{side}_elbow": elbow, f"{side}_wrist": wrist, f"{side}_hand": hand}


def _place_leg(side: str, sign: float, body: Body, leg: Leg, pelvis: Matrix) -> dict[str, Vector]:
    hip = pelvis @ (sign * body.hip, 0.0, 0.0)
    upper = pelvis @ rotation("z", -sign * leg.outward) @ rotation("x", leg.forward) @ rotation("y", sign * 8)
    lower = upper @ rotation("x", -leg.bend)
    knee = hip + upper @ (0.0, body.thigh, 0.0)
    ankle = knee + lower @ (0.0, body.shin, 0.0)
    heel = ankle + lower @ (0.0, 0.022, -0.018)
    toe = ankle + lower @ (0.0, 0.03, body.foot - 0.018)
    points = {"hip": hip, "knee": knee, "ankle": ankle, "heel": heel, "toe": toe}
    return {f"{side}_{name}": point for name, point in points.items()}
