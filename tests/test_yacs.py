"""Experiment files of the original: what they convert to, against its published runs, and what is refused."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from fpd_accel import cli
from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Recipe
from fpd_accel.errors import ConfigError
from fpd_accel.import_config.convert import import_config
from fpd_accel.import_config.text import write_recipe
from fpd_accel.import_config.yacs import DEFAULTS, EXTRA, Experiment

ROOT = Path(__file__).parents[1]
STAGES = {2: (2, 1), 3: (3, 4), 4: (4, 3)}  # of HRNet: branches and modules
TEMPLATE, W48 = "fpd_coco_hrnet_hrnet_template.yaml", "fpd_coco_hrnet_w48_256x192_adam_lr1e-3.yaml"
HOURGLASS = "fpd_mpii_hourglass_hg4_256x256_d256x3_adam_lr2.5e-4.yaml"
MPII_HRNET = "mpii_hrnet_w32_256x256_adam_lr1e-3.yaml"
LEGACY = (
    *("coco_resnet_res50_256x192_d256x3_adam_lr1e-3.yaml", TEMPLATE, "fpd_coco_hrnet_w32_256x192_adam_lr1e-3.yaml"),
    *(W48, HOURGLASS, MPII_HRNET),
)


def hrnet(width: int) -> dict[str, Any]:
    """Return `MODEL.EXTRA` of a published HRNet."""
    extra: dict[str, Any] = {"FINAL_CONV_KERNEL": 1}
    for stage, (branches, modules) in STAGES.items():
        extra[f"STAGE{stage}"] = {
            "NUM_MODULES": modules,
            "NUM_BRANCHES": branches,
            "BLOCK": "BASIC",
            "NUM_BLOCKS": [4] * branches,
            "NUM_CHANNELS": [width * 2**branch for branch in range(branches)],
            "FUSE_METHOD": "SUM",
        }
    return extra


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the experiment file of a student; its sections add to these."""

    def write(name: str = "student.yaml", **sections: Any) -> Path:
        values: dict[str, Any] = {
            "MODEL": {"IMAGE_SIZE": [192, 256], "HEATMAP_SIZE": [48, 64], "EXTRA": hrnet(32)},
            "DATASET": {"DATASET": "coco", "ROOT": "data/coco", "TRAIN_SET": "train2017", "TEST_SET": "val2017"},
            "TEST": {"USE_GT_BBOX": True, "POST_PROCESS": True},
        }
        for section, value in sections.items():
            values[section] = {**values.get(section, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def pair(write: Callable[..., Path]) -> tuple[Path, Path]:
    """Experiment files of a student, and of a teacher of which only the network is said."""
    teacher = write("teacher.yaml")
    teacher.write_text(yaml.safe_dump({"MODEL": {"EXTRA": hrnet(48)}}), encoding="utf-8")
    return write(), teacher


FPD = ["KD.TRAIN_TYPE", "FPD", "KD.TEACHER", "w48.pth"]


def convert(path: Path, *overrides: str, teacher: Path | None = None) -> Recipe:
    return import_config(path, overrides, teacher=teacher)[0]


def mistakes(path: Path, *overrides: str, teacher: Path | None = None) -> list[str]:
    """The lines of the refusal, but for the first."""
    with pytest.raises(ConfigError) as caught:
        import_config(path, overrides, teacher=teacher)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


# --- the published runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEGACY)
def test_every_published_file_converts_to_a_recipe_that_loads_as_what_it_was_checked_as(
    name: str, shared: Path, tmp_path: Path
) -> None:
    recipe, text = import_config(shared / "reference" / "legacy_configs" / name)
    written = tmp_path / "recipe.yaml"
    write_recipe(text, written)
    assert load_recipe(written, check_files=False) == recipe
    assert recipe.distill.mode == "normal"
    assert name in text
    assert all(len(line) <= 120 or " " not in line.strip("# ") for line in text.splitlines())


def test_the_published_files_are_all_tested(shared: Path) -> None:
    assert sorted(LEGACY) == sorted(path.name for path in (shared / "reference" / "legacy_configs").glob("*.yaml"))


MAY_DIFFER = {
    "run.name": "a name",
    "student.weights": "a path",
    "student.init": "a path",
    "teacher.weights": "a path",
    "teacher.compile": "speed",
    "data.workers": "speed",
    "train.precision": "fp32 there; the shipped recipe says that it takes bf16",
    "evaluate.every_epochs": "how often; every epoch there",
    "evaluate.batch": "speed",
    "evaluate.boxes": "the detector's file there; the shipped recipe says that it takes ground truth",
    "evaluate.box_threshold": "of these boxes",
    "log.every_steps": "logging",
    "log.pictures_every_steps": "logging",
    "checkpoint.every_steps": "how often",
}


def assert_same_run(converted: Recipe, shipped: str) -> None:
    """Assert that all fields are equal, except those of `MAY_DIFFER`."""
    theirs, ours = flat(converted.model_dump()), flat(load_recipe(ROOT / shipped, check_files=False).model_dump())
    different = {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)}
    assert different <= MAY_DIFFER.keys()
    # What a run's result hangs on is compared, not left out by a change of names.
    decisive = "data.train data.input_size data.augment.scale codec.sigma student.arch student.color teacher.arch "
    decisive += (
        "teacher.color distill.mode distill.alpha train.epochs train.global_batch train.device_batch optim.name "
    )
    decisive += "optim.lr optim.weight_decay optim.schedule optim.milestones optim.gamma evaluate.flip_test"
    assert set(decisive.split()) <= theirs.keys() & ours.keys() - MAY_DIFFER.keys()


def test_the_published_coco_run_is_the_shipped_recipe(shared: Path) -> None:
    legacy = shared / "reference" / "legacy_configs"
    command = (
        "GPUS (0,1,2,3) DATASET.NUM_JOINTS_HALF_BODY 8 DATASET.PROB_HALF_BODY 0.3 MODEL.IMAGE_SIZE 192,256 "
        "MODEL.HEATMAP_SIZE 48,64 MODEL.SIGMA 2 TRAIN.BATCH_SIZE_PER_GPU 24 TRAIN.END_EPOCH 210 TRAIN.LR 0.001 "
        "TRAIN.LR_STEP 170,200 TRAIN.CHECKPOINT w32.pth TEST.USE_GT_BBOX False KD.TRAIN_TYPE FPD KD.TEACHER w48.pth "
        "KD.ALPHA 0.5"
    )
    recipe, text = import_config(legacy / TEMPLATE, command.split(), teacher=legacy / W48)
    assert_same_run(recipe, "recipes/coco/hrnet_w48_to_w32_256x192.yaml")
    assert (recipe.student.weights, recipe.teacher.weights) == ("w32.pth", "w48.pth")
    for word in ("TRAIN.WD 0.0001", "TRAIN.GAMMA1 0.99", "TEST.USE_GT_BBOX", "one epoch earlier", "from --tcfg", W48):
        assert word in text


def test_the_published_mpii_runs_are_the_shipped_recipes(shared: Path, tmp_path: Path) -> None:
    legacy = shared / "reference" / "legacy_configs"
    teacher = tmp_path / "hg8.yaml"
    text = (legacy / HOURGLASS).read_text(encoding="utf-8")
    teacher.write_text(text.replace("NUM_STACKS: 4", "NUM_STACKS: 8"), encoding="utf-8")
    command = (
        "GPUS (0,) DATASET.COLOR_RGB False DATASET.PROB_HALF_BODY -1.0 MODEL.EXTRA.NUM_FEATURES 128 "
        "MODEL.EXTRA.NUM_STACKS 4 TRAIN.BATCH_SIZE_PER_GPU 4 TRAIN.END_EPOCH 140 TRAIN.LR 0.00025 TRAIN.CHECKPOINT "
        "hg4.pth KD.TRAIN_TYPE FPD KD.TEACHER hg8.pth KD.ALPHA 0.5"
    )
    recipe = convert(legacy / HOURGLASS, *command.split(), teacher=teacher)
    assert_same_run(recipe, "recipes/mpii/hourglass_8x256_to_4x128.yaml")

    teacher = tmp_path / "w48.yaml"
    teacher.write_text(yaml.safe_dump({"MODEL": {"EXTRA": hrnet(48)}}), encoding="utf-8")
    command = (
        "GPUS (0,) TRAIN.BATCH_SIZE_PER_GPU 16 TRAIN.END_EPOCH 20 TRAIN.LR 0.00001 TRAIN.LR_STEP 5,10,15 "
        "TRAIN.CHECKPOINT w32.pth KD.TRAIN_TYPE FPD KD.TEACHER w48.pth KD.ALPHA 0.5"
    )
    recipe = convert(legacy / MPII_HRNET, *command.split(), teacher=teacher)
    assert_same_run(recipe, "recipes/mpii/hrnet_w48_to_w32.yaml")


# --- networks ---------------------------------------------------------------------------------------------------


def test_every_published_network_is_recognised_by_its_configuration(shared: Path, write: Callable[..., Path]) -> None:
    files = sorted((shared / "reference" / "state_dicts").glob("*.json"))
    assert len(files) == 7
    for file in files:
        network = json.loads(file.read_text(encoding="utf-8"))
        joints, family = network["num_keypoints"], file.stem.rpartition("_")[0]
        path = write(
            MODEL={
                "NAME": {"hrnet": "pose_hrnet"}.get(family, family),
                "NUM_JOINTS": joints,
                "IMAGE_SIZE": network["image_size_wh"],
                "HEATMAP_SIZE": [side // 4 for side in network["image_size_wh"]],
                "EXTRA": network["extra"],
            },
            DATASET={"DATASET": "coco" if joints == 17 else "mpii"},
        )
        recipe = convert(path)
        assert recipe.student.arch == network["model"]
        assert recipe.data.input_size == tuple(network["image_size_wh"][::-1])


@pytest.mark.parametrize("width", [18, 32, 40, 48])
def test_an_hrnet_is_named_after_its_width(width: int, write: Callable[..., Path]) -> None:
    assert convert(write(MODEL={"EXTRA": hrnet(width)})).student.arch == f"hrnet_w{width}"


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["MODEL.EXTRA.STAGE2.NUM_CHANNELS", "64,128"], "MODEL.EXTRA.STAGE2.NUM_CHANNELS", "18, 32, 40, 48"),
        (["MODEL.EXTRA.STAGE2.NUM_CHANNELS", "()"], "MODEL.EXTRA.STAGE2.NUM_CHANNELS", "not supported"),
        (["MODEL.EXTRA.STAGE4.NUM_CHANNELS", "32,64,128,300"], "MODEL.EXTRA.STAGE4.NUM_CHANNELS", "[32, 64, 128, 256]"),
        (["MODEL.EXTRA.STAGE3.NUM_MODULES", "2"], "MODEL.EXTRA.STAGE3.NUM_MODULES", "has 4"),
        (["MODEL.EXTRA.STAGE3.BLOCK", "BOTTLENECK"], "MODEL.EXTRA.STAGE3.BLOCK", "'BASIC'"),
        (["MODEL.EXTRA.STAGE2.NUM_BLOCKS", "2,2"], "MODEL.EXTRA.STAGE2.NUM_BLOCKS", "[4, 4]"),
        (["MODEL.EXTRA.FINAL_CONV_KERNEL", "3"], "MODEL.EXTRA.FINAL_CONV_KERNEL", "has 1"),
        (["MODEL.NAME", "hrnet"], "MODEL.NAME", "did you mean 'pose_hrnet'?"),
    ],
)
def test_another_network_than_the_published_is_refused_with_the_one_value(
    overrides: list[str], key: str, words: str, write: Callable[..., Path]
) -> None:
    (found,) = mistakes(write(), *overrides)
    assert found.startswith(f"override: {key}: ")
    assert words in found


@pytest.mark.parametrize(
    ("name", "extra", "key"),
    [
        ("pose_resnet", {"NUM_LAYERS": 51}, "NUM_LAYERS"),
        ("pose_resnet", {"NUM_DECONV_FILTERS": [128, 128, 128]}, "NUM_DECONV_FILTERS"),
        ("pose_resnet", {"DECONV_WITH_BIAS": True}, "DECONV_WITH_BIAS"),
        ("hourglass", {"NUM_FEATURES": 130}, "NUM_FEATURES"),
        ("hourglass", {"NUM_STACKS": 0}, "NUM_STACKS"),
        ("hourglass", {"NUM_BLOCKS": 2}, "NUM_BLOCKS"),
    ],
)
def test_other_resnets_and_hourglasses_are_refused_likewise(
    name: str, extra: dict[str, Any], key: str, write: Callable[..., Path]
) -> None:
    sound = {
        "pose_resnet": {
            **{"NUM_LAYERS": 50, "FINAL_CONV_KERNEL": 1, "DECONV_WITH_BIAS": False, "NUM_DECONV_LAYERS": 3},
            **{"NUM_DECONV_FILTERS": [256] * 3, "NUM_DECONV_KERNELS": [4] * 3},
        },
        "hourglass": {"NUM_FEATURES": 128, "NUM_STACKS": 2, "NUM_BLOCKS": 1},
    }[name]
    assert convert(write(MODEL={"NAME": name, "EXTRA": sound})).student.arch in ("pose_resnet_50", "hourglass_2x128")
    path = write(MODEL={"NAME": name, "EXTRA": {**sound, **extra}})
    (found,) = mistakes(path)
    assert found.startswith(f"{path}: MODEL.EXTRA.{key}: ")
    assert "not supported" in found
    del sound[key]
    (found,) = mistakes(write(MODEL={"NAME": name, "EXTRA": sound}))
    assert found == f"MODEL.EXTRA.{key}: missing; MODEL.NAME {name} needs it"


# --- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["MODEL.IMAGE_SIZE", "288,384", "MODEL.HEATMAP_SIZE", "(72,96)"], {"data.input_size": (384, 288)}),
        (["GPUS", "(0,1,2)"], {"train.global_batch": 96, "train.device_batch": 32, "data.workers": 2}),
        (["GPUS", "[0, 1]", "WORKERS", "24"], {"train.global_batch": 64, "data.workers": 12}),
        (["WORKERS", "0"], {"data.workers": 0}),
        (["TRAIN.LR", "1e-5"], {"optim.lr": 1e-5}),
        (["TRAIN.LR", "1"], {"optim.lr": 1.0}),
        (["TRAIN.LR_STEP", "(170, 200)"], {"optim.schedule": "step", "optim.milestones": (170, 200)}),
        (["TRAIN.LR_STEP", "()"], {"optim.schedule": "constant", "optim.milestones": ()}),
        (["TRAIN.BEGIN_EPOCH", "20", "TRAIN.END_EPOCH", "210"], {"train.epochs": 190}),
        (["DATASET.PROB_HALF_BODY", "-1.0"], {"data.augment.half_body": 0}),
        (["DATASET.PROB_HALF_BODY", "0.3"], {"data.augment.half_body": 0.3}),
        (["DATASET.FLIP", "False"], {"data.augment.flip": 0}),
        (["DATASET.COLOR_RGB", "True"], {"student.color": "rgb"}),
        (["DATASET.COLOR_RGB", "False"], {"student.color": "bgr"}),
        (["DATASET.TEST_SET", "test-dev2017"], {"data.valid": None}),
        (["TRAIN.CHECKPOINT", "'a b.pth'"], {"student.weights": "a b.pth"}),
        (["TRAIN.CHECKPOINT", "1234"], {"student.weights": "1234"}),
        (["TRAIN.OPTIMIZER", "sgd", "TRAIN.WD", "1e-4"], {"optim.name": "sgd", "optim.weight_decay": 1e-4}),
        (["TRAIN.OPTIMIZER", "adam", "TRAIN.WD", "1e-4"], {"optim.name": "adam", "optim.weight_decay": 0}),
        (
            ["TEST.OKS_THRE", "0.7", "TEST.FLIP_TEST", "True"],
            {"evaluate.nms_threshold": 0.7, "evaluate.flip_test": True},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_arrives_in_the_recipe(
    overrides: list[str], expected: dict[str, Any], write: Callable[..., Path]
) -> None:
    recipe = flat(convert(write(), *overrides).model_dump())
    assert {key: recipe[key] for key in expected} == expected


def test_what_no_file_says_has_the_default_of_the_original(write: Callable[..., Path]) -> None:
    recipe = convert(write())
    assert recipe.optim.milestones == (90, 110)
    assert recipe.train.epochs == 140
    assert recipe.data.augment.rotation == 30
    assert (recipe.evaluate.flip_test, recipe.evaluate.nms_threshold) == (False, 0.5)


def test_yaml_leaves_tuples_and_exponents_as_text_and_they_are_read_all_the_same(write: Callable[..., Path]) -> None:
    path = write()
    path.write_text(path.read_text() + "GPUS: (0,1) #(0,1,2,3)\nTRAIN: {LR: 1e-4}\n", encoding="utf-8")
    recipe = convert(path)
    assert (recipe.train.global_batch, recipe.optim.lr) == (64, 1e-4)


def test_the_teacher_takes_from_the_student_what_its_file_leaves_open(pair: tuple[Path, Path]) -> None:
    student, teacher = pair
    recipe = convert(student, *FPD, "DATASET.COLOR_RGB", "True", "KD.ALPHA", "0.9", teacher=teacher)
    assert (recipe.student.arch, recipe.teacher.arch) == ("hrnet_w32", "hrnet_w48")
    assert (recipe.teacher.color, recipe.teacher.weights) == ("rgb", "w48.pth")
    assert (recipe.distill.mode, recipe.distill.alpha) == ("fpd", 0.9)


def test_a_teacher_of_other_colours_keeps_them_and_the_recipe_says_what_the_original_did(
    pair: tuple[Path, Path],
) -> None:
    student, teacher = pair
    values = yaml.safe_load(teacher.read_text())
    teacher.write_text(yaml.safe_dump({**values, "DATASET": {"COLOR_RGB": True}}), encoding="utf-8")
    recipe, text = import_config(student, FPD, teacher=teacher)
    assert (recipe.student.color, recipe.teacher.color) == ("bgr", "rgb")
    assert "the original fed it bgr" in text


def test_without_distillation_the_teacher_is_left_out_and_that_is_said(pair: tuple[Path, Path]) -> None:
    student, teacher = pair
    recipe, text = import_config(student, ["KD.TEACHER", "w48.pth"], teacher=teacher)
    assert (recipe.distill.mode, recipe.teacher.weights) == ("normal", None)
    assert "KD.TEACHER w48.pth: KD.TRAIN_TYPE NORMAL trains without a teacher" in text
    assert "--tcfg: KD.TRAIN_TYPE NORMAL trains without a teacher" in text


def test_imagenet_weights_are_named(write: Callable[..., Path]) -> None:
    overrides = ["DATA_DIR", "/files", "MODEL.PRETRAINED", "hrnet.pth"]
    recipe, text = import_config(write(), overrides)
    assert "/files/hrnet.pth" in text
    assert recipe.student.init == "/files/hrnet.pth"
    _, text = import_config(write(), [*overrides, "TRAIN.CHECKPOINT", "own.pth"])
    assert "TRAIN.CHECKPOINT replaces all weights" in text


def test_commands_prepare_the_folders_that_the_recipe_reads(write: Callable[..., Path]) -> None:
    recipe, text = import_config(write(), ["DATA_DIR", "/my files"])
    prepare = " ".join(text.replace("\\\n#", " ").split())
    assert "--images '/my files/data/coco/images/train2017'" in prepare
    assert "--annotations '/my files/data/coco/annotations/person_keypoints_val2017.json'" in prepare
    assert f"--output {recipe.data.train}" in prepare
    assert f"--output {recipe.data.valid}" in prepare


OTHER_VALUES: dict[str, str] = {
    "GPUS": "(0,1)",
    "MODEL.NAME": "hourglass",
    "MODEL.NUM_JOINTS": "16",
    "MODEL.IMAGE_SIZE": "288,384",
    "MODEL.HEATMAP_SIZE": "24,32",
    "DATASET.DATASET": "mpii",
    "TRAIN.OPTIMIZER": "sgd",
    "TRAIN.LR_STEP": "10,20",
    "KD.TRAIN_TYPE": "FPD",
}


def commands(text: str) -> str:
    """The part of the header that says how to prepare the data."""
    return text[text.index("# Data, ") : text.index("# Differences from")]


def test_no_setting_is_passed_over_in_silence(write: Callable[..., Path]) -> None:
    """Every key with another value than before alters the recipe, or is mentioned by its name, or refused by it."""
    base = write(TEST={"COCO_BBOX_FILE": "boxes.json", "USE_GT_BBOX": False, "POST_PROCESS": True})
    plain, plain_text = import_config(base)
    experiment = Experiment()
    experiment.merge(yaml.safe_load(base.read_text()), "base")
    silent = []
    for key in DEFAULTS:
        match experiment[key]:
            case bool() as before:
                other = str(not before)
            case int() | float() as before:
                other = str(before + 1)
            case _:
                other = OTHER_VALUES.get(key, "something")
        try:
            recipe, text = import_config(base, [key, other])
        except ConfigError as error:
            said = key in str(error)
        else:
            # The header begins with the overrides themselves; what counts is what comes after.
            shown = other.lower() if other in ("True", "False") else other
            said = recipe != plain or f"{key} {shown}" in text[text.index("# Behind each value") :]
            said = said or commands(text) != commands(plain_text)
        if not said:
            silent.append(key)
    assert not silent


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["MODEL.TARGET_TYPE", "laplace"], "MODEL.TARGET_TYPE"),
        (["LOSS.USE_TARGET_WEIGHT", "False"], "LOSS.USE_TARGET_WEIGHT"),
        (["LOSS.USE_DIFFERENT_JOINTS_WEIGHT", "True"], "LOSS.USE_DIFFERENT_JOINTS_WEIGHT"),
        (["DATASET.SELECT_DATA", "True"], "DATASET.SELECT_DATA"),
        (["DATASET.DATASET", "aic"], "DATASET.DATASET"),
        (["DATASET.TRAIN_SET", "test2017"], "DATASET.TRAIN_SET"),
        (["TRAIN.SHUFFLE", "False"], "TRAIN.SHUFFLE"),
        (["TRAIN.OPTIMIZER", "sgd", "TRAIN.NESTEROV", "True"], "TRAIN.NESTEROV"),
        (["TRAIN.OPTIMIZER", "rmsprop"], "TRAIN.OPTIMIZER"),
        (["TRAIN.BEGIN_EPOCH", "140"], "TRAIN.END_EPOCH"),
        (["TRAIN.LR", "-1.0"], "TRAIN.LR"),
        (["TRAIN.LR_STEP", "120,90"], "TRAIN.LR_STEP"),
        (["TRAIN.BATCH_SIZE_PER_GPU", "0"], "TRAIN.BATCH_SIZE_PER_GPU"),
        (["GPUS", "()"], "GPUS"),
        (["MODEL.HEATMAP_SIZE", "96,128"], "MODEL.HEATMAP_SIZE"),
        (["MODEL.IMAGE_SIZE", "192,"], "MODEL.IMAGE_SIZE"),
        (["MODEL.NUM_JOINTS", "16"], "MODEL.NUM_JOINTS"),
        (["MODEL.SIGMA", "0"], "MODEL.SIGMA"),
        (["DATASET.SCALE_FACTOR", "1.5"], "DATASET.SCALE_FACTOR"),
        (["TEST.USE_GT_BBOX", "False"], "TEST.COCO_BBOX_FILE"),
        (["KD.TRAIN_TYPE", "fpd"], "KD.TRAIN_TYPE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_has_no_counterpart_is_refused_by_its_key_alone(
    overrides: list[str], key: str, write: Callable[..., Path]
) -> None:
    (found,) = mistakes(write(), *overrides)
    assert f"{key}: " in found


def test_soft_suppression_is_taken_up(write: Callable[..., Path]) -> None:
    assert convert(write(), "TEST.SOFT_NMS", "True").evaluate.nms == "soft"


def test_settings_of_coco_alone_are_no_obstacle_on_mpii(write: Callable[..., Path]) -> None:
    path = write(DATASET={"DATASET": "mpii", "TRAIN_SET": "train", "TEST_SET": "valid"}, MODEL={"NUM_JOINTS": 16})
    recipe, text = import_config(path, ["LOSS.USE_DIFFERENT_JOINTS_WEIGHT", "True", "TEST.SOFT_NMS", "True"])
    assert recipe.data.train == "data/mpii/train"
    assert "LOSS.USE_DIFFERENT_JOINTS_WEIGHT true" in text
    assert "--format mpii" in text
    assert "gt_valid.mat" in text


# --- mistakes ---------------------------------------------------------------------------------------------------


def test_every_mistake_of_files_and_overrides_is_listed_at_once(pair: tuple[Path, Path]) -> None:
    student, teacher = pair
    tree = yaml.safe_load(student.read_text())
    tree["TRIAN"] = {"LR": 1}
    tree["MODEL"] |= {"SIGMA": 2.5, "EXTRA": {**tree["MODEL"]["EXTRA"], "NUM_STAKS": 4}}
    tree["TRAIN"] = {"LR_STEPS": [1, 2], "END_EPOCH": "many"}
    tree["DEBUG"] = True
    student.write_text(yaml.safe_dump(tree), encoding="utf-8")
    teacher.write_text("MODEL: {NAME: 3}\n", encoding="utf-8")
    found = mistakes(student, *FPD, "KD.ALHPA", "0.3", "LR", "1", "KD.ALPHA=1", "TRAIN.LR_STEP", "170", teacher=teacher)
    assert sorted(found) == sorted(
        [
            f"{student}: TRIAN: unknown key; did you mean 'TRAIN'?",
            f"{student}: MODEL.SIGMA: wanted a whole number, not 2.5",
            f"{student}: MODEL.EXTRA.NUM_STAKS: unknown key; did you mean 'MODEL.EXTRA.NUM_STACKS'?",
            f"{student}: TRAIN.LR_STEPS: unknown key; did you mean 'TRAIN.LR_STEP'?",
            f"{student}: TRAIN.END_EPOCH: wanted a whole number, not 'many'",
            f"{student}: DEBUG: a section with keys of its own, not True",
            f"{teacher}: MODEL.NAME: wanted text, not 3",
            "override: '170' has no value; they are pairs, KEY VALUE KEY VALUE",
            "override: KD.ALHPA: unknown key; did you mean 'KD.ALPHA'?",
            "override: LR: unknown key; did you mean 'TRAIN.LR'?",
            "override: KD.ALPHA=1: unknown key; an override is two words, KEY VALUE, as in the original",
        ]
    )


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("TRAIN.LR_STEP", "170", "a list, such as 192,256"),
        ("TRAIN.LR_STEP", "170,x", "a list"),
        ("TRAIN.LR_STEP", "(170,'x')", "a whole number, not 'x' in (170, 'x')"),
        ("TRAIN.LR", "fast", "a number, not 'fast'"),
        ("TRAIN.LR", "None", "a number, not None"),
        ("DATASET.FLIP", "1", "true or false, not 1"),
        ("WORKERS", "True", "a whole number, not True"),
        ("WORKERS", "2.0", "a whole number, not 2.0"),
        ("WORKERS", "0x" + "f" * 6000, "a whole number, not a number of thousands of digits"),
        ("WORKERS", "(" * 5000, "a whole number, not '((("),
        ("KD.ALPHA", "nan", "a number, not 'nan'"),
        ("MODEL.EXTRA.NUM_LAYERS", "None", "a whole number, not None"),  # of another network than the file's
    ],
)
def test_a_value_of_the_wrong_type_is_an_error(key: str, value: str, wanted: str, write: Callable[..., Path]) -> None:
    (found,) = mistakes(write(), key, value)
    assert found.startswith(f"override: {key}: wanted ")
    assert wanted in found


@pytest.mark.parametrize(
    ("overrides", "with_teacher", "expected"),
    [
        (["KD.TRAIN_TYPE", "FPD"], True, ["KD.TEACHER: missing"]),
        (FPD, False, ["--tcfg: missing"]),
        (["KD.TRAIN_TYPE", "FPD"], False, ["KD.TEACHER: missing", "--tcfg: missing"]),
    ],
)
def test_distillation_without_a_teacher_names_what_is_missing(
    overrides: list[str], with_teacher: bool, expected: list[str], pair: tuple[Path, Path]
) -> None:
    found = mistakes(pair[0], *overrides, teacher=pair[1] if with_teacher else None)
    assert [line.partition(";")[0] for line in found] == expected


def test_a_mistake_that_the_teacher_inherits_is_told_once(pair: tuple[Path, Path]) -> None:
    student, teacher = pair
    overrides = [*FPD, "MODEL.NUM_JOINTS", "16", "LOSS.USE_TARGET_WEIGHT", "False", "MODEL.NAME", "resnet"]
    assert len(mistakes(student, *overrides, teacher=teacher)) == 3


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"- 1\n", b"MODEL: [", b"\xff\xfe\x00", b"MODEL: &a {EXTRA: *a}\n", b"[" * 600),
        b"a: !!python/object/apply:os.system [exit]\n",
        b"5: 1\nnull: {x: 1}\n? [1, 2]\n: 3\n",
        b"MODEL: {NAME: &a [*a], IMAGE_SIZE: *a}\n",
    ],
)
def test_a_file_that_is_none_is_refused_without_a_traceback(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "strange.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"strange\.yaml"):
        import_config(path)


def test_both_files_are_named_when_both_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        import_config(tmp_path / "a.yaml", teacher=tmp_path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path / 'a.yaml'}: no such file")
    assert second.startswith(f"{tmp_path}: not readable: ")


@pytest.mark.parametrize(
    "text", ["a\nrun: {name: evil}", "a\u2028b\x85c", "a\x00b\x1bc", "# : - {", "ä ö", "'", "null", "~"]
)
def test_no_text_of_a_user_leaves_its_value_or_its_comment(
    text: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    overrides = ["TRAIN.CHECKPOINT", text, "DATASET.ROOT", text, "OUTPUT_DIR", text, "DATASET.HYBRID_JOINTS_TYPE", text]
    recipe, written = import_config(write(), overrides)
    assert recipe.student.weights == text
    path = tmp_path / "recipe.yaml"
    write_recipe(written, path)
    assert load_recipe(path, check_files=False) == recipe


# --- the command ------------------------------------------------------------------------------------------------


def command(*words: object) -> int:
    return cli.main(["import-config", *map(str, words)])


def test_the_command_prints_the_recipe_or_writes_it_but_never_over_another(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = pair
    files: Sequence[object] = ("--cfg", student, "--tcfg", teacher)
    overrides = [*FPD, "DATASET.PROB_HALF_BODY", "-1.0"]
    assert command(*files, *overrides) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["teacher"]["arch"] == "hrnet_w48"

    output = tmp_path / "new" / "recipe.yaml"
    assert command(*files, "--output", output, *overrides) == 0
    assert output.read_text(encoding="utf-8") == printed
    assert command(*files, *FPD, "--output", output) == 2
    assert "--force" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == printed
    assert command(*files, *FPD, "TRAIN.LR", "0.5", "--output", output, "--force") == 0
    assert load_recipe(output, check_files=False).optim.lr == 0.5
    assert [path.name for path in output.parent.iterdir()] == ["recipe.yaml"]


def test_the_command_refuses_with_one_message_and_writes_nothing(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "recipe.yaml"
    assert command("--cfg", write(), "--output", output, "TRAIN.LR", "x", "FOO", "1") == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    assert "TRAIN.LR: wanted a number" in message
    assert "FOO: unknown key" in message
    assert not output.parent.exists()
    for place in (tmp_path, write() / "below.yaml"):
        assert command("--cfg", write(), "--output", place, "--force") == 2
        assert "Traceback" not in capsys.readouterr().err


def test_the_command_of_the_readme_converts_the_published_run(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    (line,) = (line for line in readme.splitlines() if line.startswith("fpd-accel import-config"))
    for name, published in (("hrnet_template.yaml", TEMPLATE), ("w48_256x192_adam_lr1e-3.yaml", W48)):
        (tmp_path / name).write_bytes((shared / "reference" / "legacy_configs" / published).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(line)[1:]) == 0
    assert_same_run(load_recipe("my_recipe.yaml", check_files=False), "recipes/coco/hrnet_w48_to_w32_256x192.yaml")


def test_converting_does_without_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, fpd_accel.import_config.convert; assert 'torch' not in sys.modules"],
        check=True,
        cwd=ROOT,
    )


def test_keys_under_extra_are_those_of_the_published_networks(shared: Path) -> None:
    for file in (shared / "reference" / "state_dicts").glob("*.json"):
        extra = json.loads(file.read_text(encoding="utf-8"))["extra"]
        family = file.stem.rpartition("_")[0]
        experiment = Experiment()
        experiment.merge({"MODEL": {"EXTRA": extra}}, "file")
        assert not experiment.mistakes
        given = {key.removeprefix("MODEL.EXTRA.") for key in experiment.sources}
        assert given == EXTRA[{"hrnet": "pose_hrnet"}.get(family, family)].keys()
