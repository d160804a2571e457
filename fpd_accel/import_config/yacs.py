"""Read experiment files of the HRNet and Fast Pose Distillation repositories as their own programs do.

These files are YAML for yacs (github.com/rbgirshick/yacs): a file replaces defaults in code, and trailing `KEY VALUE`
pairs replace values of the file. Here a setting has one dotted key, such as `TRAIN.LR`. Keys and defaults are those of
`lib/config/default.py` in the GitHub repositories leoxiaobin/deep-high-resolution-net.pytorch and
ilovepose/fast-human-pose-estimation.pytorch. The package yacs is not needed.
"""

import ast
import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fpd_accel.errors import ConfigError

OVERRIDE = "override"  # the source of a value that is not from a file
LARGEST = 2**63  # limit of whole numbers; there are literals with more digits than Python writes


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


DEFAULTS: dict[str, Any] = _flatten(
    yaml.safe_load("""
    {OUTPUT_DIR: '', LOG_DIR: '', DATA_DIR: '', GPUS: [0], WORKERS: 4, PRINT_FREQ: 20, AUTO_RESUME: false,
    PIN_MEMORY: true, RANK: 0,
    CUDNN: {BENCHMARK: true, DETERMINISTIC: false, ENABLED: true},
    MODEL: {NAME: pose_hrnet, NAME2: hourglass, INIT_WEIGHTS: true, PRETRAINED: '', NUM_JOINTS: 17, TAG_PER_JOINT: true,
      TARGET_TYPE: gaussian, IMAGE_SIZE: [256, 256], HEATMAP_SIZE: [64, 64], SIGMA: 2},  # sizes: (width, height)
    LOSS: {USE_OHKM: false, TOPK: 8, USE_TARGET_WEIGHT: true, USE_DIFFERENT_JOINTS_WEIGHT: false, BETA: 1.0,
      COARSE_TO_FINE: false},
    DATASET: {ROOT: '', DATASET: mpii, TRAIN_SET: train, TEST_SET: valid, DATA_FORMAT: jpg, HYBRID_JOINTS_TYPE: '',
      SELECT_DATA: false, FLIP: true, SCALE_FACTOR: 0.25, ROT_FACTOR: 30, PROB_HALF_BODY: 0.0, NUM_JOINTS_HALF_BODY: 8,
      COLOR_RGB: false, CACHE_ROOT: data/cache},
    TRAIN: {LR: 0.001, LR_STEP: [90, 110], LR_FACTOR: 0.1, OPTIMIZER: adam, MOMENTUM: 0.9, WD: 0.0001, NESTEROV: false,
      GAMMA1: 0.99, GAMMA2: 0.0, BEGIN_EPOCH: 0, END_EPOCH: 140, BATCH_SIZE_PER_GPU: 32, SHUFFLE: true, RESUME: false,
      CHECKPOINT: ''},
    TEST: {BATCH_SIZE_PER_GPU: 32, FLIP_TEST: false, POST_PROCESS: false, SHIFT_HEATMAP: false, USE_GT_BBOX: false,
      COCO_BBOX_FILE: '', BBOX_THRE: 1.0, IMAGE_THRE: 0.1, NMS_THRE: 0.6, SOFT_NMS: false, OKS_THRE: 0.5,
      IN_VIS_THRE: 0.0, MODEL_FILE: ''},
    KD: {TRAIN_TYPE: NORMAL, TEACHER: '', ALPHA: 0.5, VALID_TYPE: hm},
    DEBUG: {DEBUG: false, SAVE_BATCH_IMAGES_GT: false, SAVE_BATCH_IMAGES_PRED: false, SAVE_HEATMAPS_GT: false,
      SAVE_HEATMAPS_PRED: false}}
    """)
)
"""Every key that has a default, whose type is the type that a value must have."""

_EXTRA = yaml.safe_load("""
    pose_hrnet: {PRETRAINED_LAYERS: [''], FINAL_CONV_KERNEL: 1, STAGE2: &stage {NUM_MODULES: 1, NUM_BRANCHES: 2,
      NUM_BLOCKS: [4], NUM_CHANNELS: [32], BLOCK: '', FUSE_METHOD: ''}, STAGE3: *stage, STAGE4: *stage}
    pose_resnet: {NUM_LAYERS: 50, FINAL_CONV_KERNEL: 1, DECONV_WITH_BIAS: false, NUM_DECONV_LAYERS: 3,
      NUM_DECONV_FILTERS: [256], NUM_DECONV_KERNELS: [4]}
    hourglass: {NUM_FEATURES: 256, NUM_STACKS: 8, NUM_BLOCKS: 1}
    """)
EXTRA: dict[str, dict[str, Any]] = {family: _flatten(keys) for family, keys in _EXTRA.items()}
"""Keys under `MODEL.EXTRA` that each network reads, with a value of the right type. They have no defaults."""

EXAMPLES = DEFAULTS | {f"MODEL.EXTRA.{name}": value for keys in EXTRA.values() for name, value in keys.items()}
SECTIONS = {key[:dot] for key in EXAMPLES for dot, character in enumerate(key) if character == "."}


@dataclass
class Experiment:
    """The settings that the original's program would run with, their sources and their mistakes."""

    values: dict[str, Any] = field(default_factory=lambda: dict(DEFAULTS))  # by dotted key
    sources: dict[str, str] = field(default_factory=dict)  # file, or OVERRIDE, by key; values by default have none
    mistakes: list[str] = field(default_factory=list)  # messages
    wrong: set[str] = field(default_factory=set)  # keys with a mistake, so that its consequences are not reported too

    def __getitem__(self, key: str) -> Any:
        """Return the value of a key, None for one under `MODEL.EXTRA` that is not given."""
        return self.values.get(key) if key.startswith("MODEL.EXTRA.") else self.values[key]

    def refuse(self, key: str, problem: str) -> None:
        """Record a mistake in the value of a key; only the first of each key counts."""
        if key not in self.wrong:
            self.wrong.add(key)
            source = self.sources.get(key)
            self.mistakes.append(f"{source}: {key}: {problem}" if source else f"{key}: {problem}")

    def merge(self, tree: Mapping[Any, Any], source: str, *, prefix: str = "") -> None:
        """Take the values of a YAML file."""
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if key not in SECTIONS:
                self.assign(key, value, source)
            elif isinstance(value, dict):
                self.merge(value, source, prefix=f"{key}.")
            else:
                self.mistakes.append(f"{source}: {key}: a section with keys of its own, not {show(value)}")

    def assign(self, key: str, value: Any, source: str) -> None:
        """Set the value of a key; record a mistake if the key is unknown or the type is wrong."""
        if key not in EXAMPLES:
            near = nearest(key, [*EXAMPLES, *SECTIONS])
            self.wrong |= {near} if near else set()
            self.mistakes.append(f"{source}: {one_line(key)}: unknown key; {_hint(key, near)}")
            return
        self.sources[key] = source
        try:
            self.values[key] = _fit(value, EXAMPLES[key])
            self.wrong.discard(key)
        except ValueError as error:
            self.refuse(key, str(error))

    def override(self, pairs: Sequence[str]) -> None:
        """Take the values of trailing `KEY VALUE` pairs, which are Python literals or else text."""
        if len(pairs) % 2:
            self.mistakes.append(f"{OVERRIDE}: {show(pairs[-1])} has no value; they are pairs, KEY VALUE KEY VALUE")
        for key, text in zip(pairs[::2], pairs[1::2], strict=False):
            self.assign(key, text, OVERRIDE)


def read_yaml(path: Path) -> dict[Any, Any]:
    """Return the mapping in an experiment file.

    Raises:
        ConfigError: The file does not exist, or is not YAML with a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give an experiment file (YAML) of the original") from None
    except OSError as error:
        raise ConfigError(f"{path}: not readable: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not readable as YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: an experiment file is a mapping of sections (MODEL, DATASET, TRAIN, …)")
    return tree


def one_line(text: str) -> str:
    """Return the text on one line, so that it cannot end the line or comment that it is written to."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def show(value: Any) -> str:
    """Return a value for a message: as Python writes it, on one line, of at most 200 characters."""
    try:
        text = one_line(repr(value))
    except ValueError:  # a whole number of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:199]}…"


def plain(value: Any) -> str:
    """Return a value for a comment: as it is written in an experiment file or an override."""
    if isinstance(value, list):
        return ",".join(map(plain, value)) or "()"
    return str(value).lower() if isinstance(value, bool) else one_line(str(value)) or "''"


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that was probably meant: similar as a whole, or with the same last part."""
    choices = sorted(choices)
    last = word.rpartition(".")[2].upper()
    close = difflib.get_close_matches(word.upper(), choices, n=1, cutoff=0.75)
    close += [choice for choice in choices if choice.rpartition(".")[2] == last]
    close += difflib.get_close_matches(word.upper(), choices, n=1)
    return close[0] if close else None


def _hint(key: str, near: str | None) -> str:
    if "=" in key:
        return "an override is two words, KEY VALUE, as in the original"
    if near:
        return f"did you mean {near!r}?"
    parent = key.rpartition(".")[0]
    prefix = f"{parent}." if parent in SECTIONS else ""
    names = {known[len(prefix) :].partition(".")[0] for known in EXAMPLES if known.startswith(prefix)}
    return f"choices: {', '.join(sorted(names))}"


def _decode(text: str) -> Any:
    """Return the value of a Python literal, such as `1e-3`, `(0,1)` or `192,256`; return other text unchanged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of odd escapes in text that is not Python
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _fit(value: Any, example: Any) -> Any:
    """Return the value in the type of the example. As in yacs, a number is not a boolean and a tuple is a list."""
    given, value = value, _decode(value) if isinstance(value, str) else value
    match example:
        case str() if isinstance(given, str | None):
            return value if isinstance(value, str) else given or ""  # a file name may look like a number
        case bool() if isinstance(value, bool):
            return value
        case int() if type(value) is int and type(example) is int and abs(value) < LARGEST:
            return value
        case float() if type(value) is float or (type(value) is int and abs(value) < LARGEST):
            return float(value)
        case list() if isinstance(value, list | tuple):
            try:
                return [_fit(item, example[0]) for item in value]
            except ValueError as error:
                raise ValueError(f"{error} in {show(value)}") from None
    kind = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}.get(type(example))
    raise ValueError(f"wanted {kind or 'a list, such as 192,256 (of one: 192,)'}, not {show(value)}")
