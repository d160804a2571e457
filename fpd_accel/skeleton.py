"""Skeletons: what the keypoints of a person are called and how they belong together. No torch here."""

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fpd_accel.errors import ConfigError

Pair = tuple[str, str]


class Skeleton(BaseModel):
    """Names and relations of the K keypoints of a person; the order of ``keypoints`` is the order of every array."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    keypoints: tuple[str, ...] = Field(min_length=1)
    flip_pairs: tuple[Pair, ...] = ()  # (left, right): exchanged when the image is mirrored
    limbs: tuple[Pair, ...] = ()  # drawn as lines
    upper_body: tuple[str, ...] = ()  # the half that half-body augmentation calls upper
    torso: Pair | None = None  # its length normalises PCK; without it the box's longer side does
    sigmas: tuple[Annotated[float, Field(gt=0, lt=1)], ...]  # OKS: standard deviation of a labeller / sqrt(area)

    @model_validator(mode="after")
    def _check(self) -> "Skeleton":
        known, mistakes = set(self.keypoints), []
        if len(known) != len(self.keypoints):
            mistakes.append("keypoints: a name appears twice")
        if len(self.sigmas) != len(self.keypoints):
            mistakes.append(f"sigmas: {len(self.sigmas)} values for {len(self.keypoints)} keypoints")
        named = {"flip_pairs": sum(self.flip_pairs, ()), "limbs": sum(self.limbs, ()), "upper_body": self.upper_body}
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
