"""Skeletons: what the keypoints of a person are called and how they belong together. No torch here."""

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fpd_accel.errors import ConfigError

Pair = tuple[str, str]


class Skeleton(BaseModel):
    """Names and relations of the K keypoints of a person; the order of ``keypoints`` is the order of every array.

    ``sigmas`` may be left out, or be null for some joints: those are then estimated by :func:`estimated_sigma`, and
    ``sigmas_estimated`` names them wherever the skeleton is written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    keypoints: tuple[str, ...] = Field(min_length=1)
    flip_pairs: tuple[Pair, ...] = ()  # (left, right): exchanged when the image is mirrored
    limbs: tuple[Pair, ...] = ()  # drawn as lines
    upper_body: tuple[str, ...] = ()  # the half that half-body augmentation calls upper
    torso: Pair | None = None  # its length normalises PCK; without it the box's longer side does
    sigmas: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()  # OKS: standard deviation of a labeller / sqrt(area)
    sigmas_estimated: tuple[str, ...] = ()  # joints whose sigma nobody measured on these labels

    @model_validator(mode="before")
    @classmethod
    def _estimate_sigmas(cls, values: Any) -> Any:
        names, given = (values.get("keypoints"), values.get("sigmas")) if isinstance(values, dict) else (None, None)
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            return values  # types are refused field by field
        if given is None:
            given = [None] * len(names)
        if not isinstance(given, list | tuple) or len(given) != len(names) or None not in given:
            return values
        filled = [estimated_sigma(name)[0] if s is None else s for name, s in zip(names, given, strict=True)]
        missing = [name for name, s in zip(names, given, strict=True) if s is None]
        return {**values, "sigmas": filled, "sigmas_estimated": missing}

    @model_validator(mode="after")
    def _check(self) -> "Skeleton":
        known, mistakes = set(self.keypoints), []
        if len(known) != len(self.keypoints):
            mistakes.append("keypoints: a name appears twice")
        if len(self.sigmas) != len(self.keypoints):
            mistakes.append(f"sigmas: {len(self.sigmas)} values for {len(self.keypoints)} keypoints")
        named = {"flip_pairs": sum(self.flip_pairs, ()), "limbs": sum(self.limbs, ()), "upper_body": self.upper_body}
        named["sigmas_estimated"] = self.sigmas_estimated
        for field, names in {**named, "torso": self.torso or ()}.items():
            mistakes += [f"{field}: {name!r} is not a keypoint" for name in names if name not in known]
        flipped = named["flip_pairs"]
        mistakes += [
            f"flip_pairs: {name!r} is in two pairs" for name in sorted({n for n in flipped if flipped.count(n) > 1})
        ]
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @property
    def num_keypoints(self) -> int:
        return len(self.keypoints)

    def index(self, name: str) -> int:
        """Row of a keypoint in every array of keypoints."""
        return self.keypoints.index(name)

    @property
    def flip_index(self) -> tuple[int, ...]:
        """Permutation that exchanges left and right: ``mirrored[k] = original[flip_index[k]]``."""
        partner = {a: b for pair in self.flip_pairs for a, b in (pair, pair[::-1])}
        return tuple(self.index(partner.get(name, name)) for name in self.keypoints)

    @property
    def sigma_note(self) -> str:
        """What a title says of AP under these sigmas: nothing, or that they are estimated."""
        if not self.sigmas_estimated:
            return ""
        estimated, joints = len(self.sigmas_estimated), self.num_keypoints
        return f", OKS sigmas of {'all' if estimated == joints else f'{estimated} of'} {joints} keypoints estimated"

    @property
    def limb_indices(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.index(a), self.index(b)) for a, b in self.limbs)

    @property
    def upper_body_indices(self) -> tuple[int, ...]:
        return tuple(self.index(name) for name in self.upper_body)


def _sides(*parts: str) -> tuple[Pair, ...]:
    return tuple((f"left_{part}", f"right_{part}") for part in parts)


_SIDES = ("left", "right")
_BODY = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
_BONES = ("ankle knee", "knee hip", "hip shoulder", "shoulder elbow", "elbow wrist")

# Names, order and sigmas of COCO's person keypoints (Lin et al., ECCV 2014; cocodataset.org/#keypoints-eval).
COCO = Skeleton(
    name="coco",
    keypoints=("nose", *sum(_sides("eye", "ear", *_BODY), ())),
    flip_pairs=_sides("eye", "ear", *_BODY),
    limbs=(
        *((f"{side}_{a}", f"{side}_{b}") for a, b in map(str.split, _BONES) for side in ("left", "right")),
        *_sides("hip", "shoulder", "eye"),
        *(("nose", f"{side}_eye") for side in ("left", "right")),
        *((f"{side}_eye", f"{side}_ear") for side in ("left", "right")),
    ),
    upper_body=("nose", *sum(_sides("eye", "ear", "shoulder", "elbow", "wrist"), ())),
    torso=("left_shoulder", "right_hip"),
    sigmas=(0.026, *(s for s in (0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089) for _ in ("left", "right"))),
)

# Names and order of MPII Human Pose (Andriluka et al., CVPR 2014); limbs and upper body as the published implementation
# has them. MPII measures by head size and publishes no sigmas: these are the ones that MMPose 1.3 adapted from COCO's
# (configs/_base_/datasets/mpii.py), taken as they are so that its similarities and ours agree, although its 0.083 and
# 0.179 for knees and shoulders are 0.087 and 0.079 in COCO.
MPII = Skeleton(
    name="mpii",
    keypoints=(
        *(f"right_{part}" for part in ("ankle", "knee", "hip")),
        *(f"left_{part}" for part in ("hip", "knee", "ankle")),
        *("pelvis", "thorax", "upper_neck", "head_top"),
        *(f"right_{part}" for part in ("wrist", "elbow", "shoulder")),
        *(f"left_{part}" for part in ("shoulder", "elbow", "wrist")),
    ),
    flip_pairs=_sides(*_BODY),
    limbs=(
        *(
            (f"{side}_{a}", f"{side}_{b}")
            for a, b in map(str.split, ("ankle knee", "knee hip", "wrist elbow", "elbow shoulder"))
            for side in _SIDES
        ),
        *(
            (f"{side}_{part}", middle)
            for part, middle in (("hip", "pelvis"), ("shoulder", "thorax"))
            for side in _SIDES
        ),
        *(("pelvis", "thorax"), ("thorax", "upper_neck"), ("upper_neck", "head_top")),
    ),
    upper_body=("thorax", "upper_neck", "head_top", *sum(_sides("shoulder", "elbow", "wrist"), ())),
    torso=("left_shoulder", "right_hip"),
    sigmas=(
        *(0.089, 0.083, 0.107, 0.107, 0.083, 0.089),
        *(0.026, 0.026, 0.026, 0.026),
        *(0.062, 0.072, 0.179, 0.179, 0.072, 0.062),
    ),
)

BUILT_IN = {skeleton.name: skeleton for skeleton in (COCO, MPII)}


# Sigmas that others published, for joints that COCO does not have: CrowdPose (Li et al., CVPR 2019) and the feet of
# COCO-WholeBody (Jin et al., ECCV 2020), whose evaluation gives the sides apart.
_CROWDPOSE = dict.fromkeys(("head", "head_top", "top_head", "neck"), 0.079)
_WHOLEBODY = {
    **{"left_big_toe": 0.068, "left_small_toe": 0.066, "left_heel": 0.066},
    **{"right_big_toe": 0.092, "right_small_toe": 0.094, "right_heel": 0.094},
}
PUBLISHED_SIGMAS = {
    "COCO": dict(zip(COCO.keypoints, COCO.sigmas, strict=True)),
    "CrowdPose": _CROWDPOSE,
    "COCO-WholeBody": _WHOLEBODY,
}
NEUTRAL_SIGMA = 0.072  # the median of COCO's 17, that of an elbow


def split_side(name: str) -> tuple[str, str]:
    """``("left" or "right" or "", what remains)`` of a joint's name, in lower case with underscores.

    Understands ``left_hip``, ``hip_left``, ``LeftHip``, ``l_hip``, ``hip.R`` and the like; a lone ``l`` or ``r`` counts
    only as a word of its own.
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    words = [word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word]
    sides = {"left": "left", "l": "left", "right": "right", "r": "right"}
    found = [word for word in words if word in sides]
    if len(found) != 1 or len(words) == 1:
        return "", "_".join(words)
    words.remove(found[0])
    return sides[found[0]], "_".join(words)


def estimated_sigma(name: str) -> tuple[float, str]:
    """A sigma for a joint whose labellers nobody measured, and where it is from: a published set, or ``neutral``.

    A sigma is the deviation between labellers of one person, relative to the person's size (cocodataset.org,
    "Keypoint evaluation"). One label per person cannot give it, so none is fitted: a joint of the same name in a
    published set lends its own, any other takes :data:`NEUTRAL_SIGMA`.
    """
    side, part = split_side(name)
    for source, sigmas in PUBLISHED_SIGMAS.items():
        sigma = sigmas.get(f"{side}_{part}" if side else part)
        if sigma is not None:
            return sigma, source
    return NEUTRAL_SIGMA, "neutral"


def load_skeleton(source: str | Path) -> Skeleton:
    """The built-in skeleton ``coco`` or ``mpii``, or one read from a YAML file with the fields of :class:`Skeleton`.

    Raises:
        ConfigError: there is no such file, it is not YAML, or its fields contradict each other.
    """
    if str(source) in BUILT_IN:
        return BUILT_IN[str(source)]
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such skeleton; give 'coco', 'mpii' or a YAML file with keypoints, flip_pairs, limbs and sigmas"
        )
    try:
        return Skeleton.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or 'skeleton'}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join([f"{path}: this skeleton cannot be used", *lines])) from None
