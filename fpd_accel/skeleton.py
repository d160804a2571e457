"""Skeletons: the names of a person's keypoints and the relations between them. Does not import torch."""

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fpd_accel.errors import ConfigError

Pair = tuple[str, str]


class Skeleton(BaseModel):
    """Names and relations of the K keypoints of a person; the order of `keypoints` is the order of every array.

    If `sigmas` is left out, or null for some keypoints, `estimated_sigma` fills them in, and `sigmas_estimated` names
    these keypoints wherever the skeleton is written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    keypoints: tuple[str, ...] = Field(min_length=1)
    flip_pairs: tuple[Pair, ...] = ()  # (left, right): exchanged when the image is mirrored
    limbs: tuple[Pair, ...] = ()  # drawn as lines
    upper_body: tuple[str, ...] = ()  # the upper half for half-body augmentation
    torso: Pair | None = None  # its length normalises PCK; None: the box's longer side does
    sigmas: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()  # OKS: annotators' standard deviation / sqrt(area)
    sigmas_estimated: tuple[str, ...] = ()  # keypoints whose sigma was not measured on these labels

    @model_validator(mode="before")
    @classmethod
    def _estimate_sigmas(cls, values: Any) -> Any:
        names, given = (values.get("keypoints"), values.get("sigmas")) if isinstance(values, dict) else (None, None)
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            return values  # wrong types are reported field by field
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
        flipped = sum(self.flip_pairs, ())
        references: dict[str, tuple[str, ...]] = {
            "flip_pairs": flipped,
            "limbs": sum(self.limbs, ()),
            "upper_body": self.upper_body,
            "sigmas_estimated": self.sigmas_estimated,
            "torso": self.torso or (),
        }
        for field, names in references.items():
            mistakes += [f"{field}: {name!r} is not a keypoint" for name in names if name not in known]
        repeated = sorted({name for name in flipped if flipped.count(name) > 1})
        mistakes += [f"flip_pairs: {name!r} is in two pairs" for name in repeated]
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @property
    def num_keypoints(self) -> int:
        """Number of keypoints, K."""
        return len(self.keypoints)

    def index(self, name: str) -> int:
        """Return the row of a keypoint in every array of keypoints."""
        return self.keypoints.index(name)

    @property
    def flip_partner(self) -> dict[str, str]:
        """The keypoint of the other side, for each keypoint that is in a flip pair."""
        return {a: b for pair in self.flip_pairs for a, b in (pair, pair[::-1])}

    @property
    def flip_index(self) -> tuple[int, ...]:
        """Permutation that exchanges left and right: `mirrored[k] = original[flip_index[k]]`."""
        partner = self.flip_partner
        return tuple(self.index(partner.get(name, name)) for name in self.keypoints)

    @property
    def sigma_note(self) -> str:
        """Note for titles of tables with AP: how many OKS sigmas are estimated; empty if none is."""
        if not self.sigmas_estimated:
            return ""
        estimated, total = len(self.sigmas_estimated), self.num_keypoints
        return f", OKS sigmas of {'all' if estimated == total else f'{estimated} of'} {total} keypoints estimated"

    @property
    def limb_indices(self) -> tuple[tuple[int, int], ...]:
        """The limbs as pairs of rows."""
        return tuple((self.index(a), self.index(b)) for a, b in self.limbs)

    @property
    def upper_body_indices(self) -> tuple[int, ...]:
        """The rows of the upper body's keypoints."""
        return tuple(self.index(name) for name in self.upper_body)


def _pairs(*parts: str) -> tuple[Pair, ...]:
    return tuple((f"left_{part}", f"right_{part}") for part in parts)


def _limbs(*bones: str) -> tuple[Pair, ...]:
    """Return each bone, given as two parts such as `"ankle knee"`, on both sides."""
    return tuple((f"{side}_{a}", f"{side}_{b}") for a, b in map(str.split, bones) for side in ("left", "right"))


_PARTS = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")

# Names, order and sigmas of COCO's person keypoints (Lin et al., ECCV 2014; cocodataset.org/#keypoints-eval).
COCO = Skeleton(
    name="coco",
    keypoints=("nose", *sum(_pairs("eye", "ear", *_PARTS), ())),
    flip_pairs=_pairs("eye", "ear", *_PARTS),
    limbs=(
        *_limbs("ankle knee", "knee hip", "hip shoulder", "shoulder elbow", "elbow wrist"),
        *_pairs("hip", "shoulder", "eye"),
        *(("nose", "left_eye"), ("nose", "right_eye")),
        *_limbs("eye ear"),
    ),
    upper_body=("nose", *sum(_pairs("eye", "ear", "shoulder", "elbow", "wrist"), ())),
    torso=("left_shoulder", "right_hip"),
    sigmas=(0.026, *(s for s in (0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089) for _ in ("left", "right"))),
)

# Names and order of MPII Human Pose (Andriluka et al., CVPR 2014); limbs and upper body as in the published
# implementation. MPII measures by head size and publishes no sigmas. These are the sigmas that MMPose 1.3 adapted from
# COCO's (configs/_base_/datasets/mpii.py), unchanged so that OKS agrees with MMPose, although its 0.083 and 0.179 for
# knees and shoulders are 0.087 and 0.079 in COCO.
MPII = Skeleton(
    name="mpii",
    keypoints=(
        *("right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle"),
        *("pelvis", "thorax", "upper_neck", "head_top"),
        *("right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist"),
    ),
    flip_pairs=_pairs(*_PARTS),
    limbs=(
        *_limbs("ankle knee", "knee hip", "wrist elbow", "elbow shoulder"),
        *(("left_hip", "pelvis"), ("right_hip", "pelvis"), ("left_shoulder", "thorax"), ("right_shoulder", "thorax")),
        *(("pelvis", "thorax"), ("thorax", "upper_neck"), ("upper_neck", "head_top")),
    ),
    upper_body=("thorax", "upper_neck", "head_top", *sum(_pairs("shoulder", "elbow", "wrist"), ())),
    torso=("left_shoulder", "right_hip"),
    sigmas=(
        *(0.089, 0.083, 0.107, 0.107, 0.083, 0.089),
        *(0.026, 0.026, 0.026, 0.026),
        *(0.062, 0.072, 0.179, 0.179, 0.072, 0.062),
    ),
)

BUILT_IN = {skeleton.name: skeleton for skeleton in (COCO, MPII)}


# Published sigmas by keypoint, those of COCO and of others for keypoints that COCO does not have: CrowdPose (Li et al.,
# CVPR 2019) and the feet of COCO-WholeBody (Jin et al., ECCV 2020), whose evaluation treats the sides separately.
PUBLISHED_SIGMAS = {
    "COCO": dict(zip(COCO.keypoints, COCO.sigmas, strict=True)),
    "CrowdPose": dict.fromkeys(("head", "head_top", "top_head", "neck"), 0.079),
    "COCO-WholeBody": {
        **{"left_big_toe": 0.068, "left_small_toe": 0.066, "left_heel": 0.066},
        **{"right_big_toe": 0.092, "right_small_toe": 0.094, "right_heel": 0.094},
    },
}
NEUTRAL_SIGMA = 0.072  # the median of COCO's 17 sigmas, that of an elbow


def split_side(name: str) -> tuple[str, str]:
    """Split a keypoint's name into (`"left"`, `"right"` or `""`, the body part), in lower case with underscores.

    `left_hip`, `hip_left`, `LeftHip`, `l_hip`, `hip.R` and similar spellings are understood; a single `l` or `r` counts
    only as a separate word.
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
    """Estimate the OKS sigma of a keypoint that has none, and return it with its source.

    A sigma is the standard deviation between annotators who label the same person, relative to the person's size
    (cocodataset.org, "Keypoint evaluation"). One label per person cannot give it, so it is not fitted: a keypoint of
    the same name in a published set lends its own, any other gets `NEUTRAL_SIGMA`.

    Returns:
        The sigma and its source: a key of `PUBLISHED_SIGMAS`, or `neutral`.
    """
    side, part = split_side(name)
    for source, sigmas in PUBLISHED_SIGMAS.items():
        sigma = sigmas.get(f"{side}_{part}" if side else part)
        if sigma is not None:
            return sigma, source
    return NEUTRAL_SIGMA, "neutral"


def load_skeleton(source: str | Path) -> Skeleton:
    """Return the built-in skeleton `coco` or `mpii`, or read one from a YAML file with the fields of `Skeleton`.

    Raises:
        ConfigError: There is no such file, it is not YAML, or its fields contradict each other.
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
        mistakes = [f"{'.'.join(map(str, e['loc'])) or 'skeleton'}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n  ".join([f"{path}: this skeleton cannot be used", *mistakes])) from None
