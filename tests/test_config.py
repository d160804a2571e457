"""Recipes: the values that they resolve to. Their mistakes are in the table of `refusals.py`."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fpd_accel.config.loading import dump_recipe, load_recipe, teacher_recipe, teacher_weights
from fpd_accel.config.plan import accumulation_steps, total_steps
from fpd_accel.config.schema import Recipe
from fpd_accel.errors import ConfigError, UserError
from fpd_accel.training.resume_rules import differences

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "skeletons")

SOUND = """
run: {name: sound}
data: {train: shards/train}
student: {arch: tiny_w8}
distill: {mode: normal}
train: {steps: 10, global_batch: 96}
optim: {schedule: constant}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "sound.yaml"
    path.write_text(SOUND, encoding="utf-8")
    return path


def load(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, overrides, check_files=False)


def test_values_that_are_not_given_have_their_defaults(recipe_file: Path) -> None:
    recipe = load(recipe_file)
    assert (recipe.run.seed, recipe.codec.name, recipe.distill.alpha) == (0, "heatmap", 0.5)
    assert recipe.data.input_size == (256, 192)
    assert recipe.run.directory == Path("runs/sound")


def test_an_exponent_without_a_point_is_a_number(tmp_path: Path, recipe_file: Path) -> None:
    assert yaml.safe_load("1e-3") == "1e-3"  # YAML 1.1, as PyYAML reads it: a string
    written = tmp_path / "exponent.yaml"
    written.write_text(SOUND.replace("schedule: constant", "schedule: constant, lr: 1e-3"), encoding="utf-8")
    assert load(written).optim.lr == 0.001
    assert load(recipe_file, "optim.lr=5e-4").optim.lr == 0.0005


def test_overrides_reach_nested_sections_and_create_those_that_are_not_there(recipe_file: Path) -> None:
    recipe = load(
        recipe_file,
        "train.steps=3",
        "data.augment.rotation=0",
        "teacher.weights=teacher.safetensors",
        "teacher.arch=hrnet_w48",
        "data.synthetic.seed=4",
        "data.input_size=[128, 96]",
        "train.clip_norm=1",
        "train.clip_norm=null",
    )
    assert recipe.train.steps == 3
    assert recipe.train.global_batch == 96  # its neighbour stays
    assert recipe.data.augment.rotation == 0
    assert recipe.data.augment.flip == 0.5
    assert (recipe.teacher.weights, recipe.teacher.arch) == ("teacher.safetensors", "hrnet_w48")
    assert recipe.data.synthetic is not None
    assert recipe.data.synthetic.seed == 4
    assert recipe.data.input_size == (128, 96)
    assert recipe.train.clip_norm is None  # the last of two overrides
    assert load(recipe_file, f"run.seed={2**32 - 1}").run.seed == 2**32 - 1  # the largest that NumPy's old one takes


def test_a_recipe_cannot_be_changed(recipe_file: Path) -> None:
    recipe = load(recipe_file)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train = recipe.train
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.steps = 3
    hash(recipe)  # nor any list in it


def test_a_refusal_is_a_user_error_and_a_value_error() -> None:
    assert issubclass(ConfigError, UserError)
    assert issubclass(ConfigError, ValueError)


def test_a_dumped_recipe_reads_back_as_an_equal_one(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load(
        recipe_file,
        "optim.lr=1e-5",
        "optim.milestones=[1.5, 170]",
        "optim.betas=[0.5, 1]",
        "teacher.overrides=['optim.lr=1e-3', 'train.steps=7']",
        "data.synthetic.seed=3",
        "run.name='007'",
        "run.root='ein Ordner: für Läufe'",
        "optim.final_lr=0.1234567890123456789",
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load(again) == recipe


def test_a_dumped_recipe_writes_every_field_out(recipe_file: Path) -> None:
    values = yaml.safe_load(dump_recipe(load(recipe_file)))
    assert values.keys() == Recipe.model_fields.keys()
    assert values["data"]["augment"]["rotation"] == 45.0
    assert values["evaluate"]["nms_threshold"] == 0.9


def test_there_are_shipped_recipes() -> None:
    assert {"quickstart.yaml", "quickstart_teacher.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_a_shipped_recipe_loads_and_resolves_to_itself(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # paths in recipes are relative to the working directory
    recipe = load(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load(resolved) == recipe
    if recipe.teacher.recipe is not None:
        assert teacher_recipe(recipe, check_files=False).run.directory != recipe.run.directory


def test_a_teacher_file_may_be_missing_where_nothing_is_distilled(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}", encoding="utf-8")
    load_recipe(recipe_file, [f"data.train={tmp_path}", "teacher.weights=nothing.safetensors"])


def test_data_that_will_be_drawn_need_not_exist(recipe_file: Path) -> None:
    load_recipe(recipe_file, ["data.synthetic.train_images=5"])


def test_the_teachers_own_recipe_is_run_as_its_overrides_say(recipe_file: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(SOUND.replace("name: sound", "name: wise"), encoding="utf-8")
    recipe = load(recipe_file, "distill.mode=fpd", f"teacher.recipe={teacher}", "teacher.overrides=['train.steps=7']")
    own = teacher_recipe(recipe, check_files=False)
    assert (own.run.name, own.train.steps, own.distill.mode) == ("wise", 7, "normal")
    assert teacher_weights(recipe) == Path("runs/wise/best")


@pytest.mark.parametrize(
    ("device_batch", "ranks", "expected"),
    [("null", 1, (96, 1)), ("null", 4, (24, 1)), ("24", 4, (24, 1)), ("24", 2, (24, 2)), ("8", 1, (8, 12))],
)
def test_accumulation_makes_up_the_global_batch(
    recipe_file: Path, device_batch: str, ranks: int, expected: tuple[int, int]
) -> None:
    recipe = load(recipe_file, f"train.device_batch={device_batch}")
    per_forward, forwards = accumulation_steps(recipe.train, ranks)
    assert (per_forward, forwards) == expected
    assert per_forward * forwards * ranks == 96


@pytest.mark.parametrize(
    ("global_batch", "device_batch", "ranks", "advice"),
    [
        (5, "null", 2, "5 does not divide by 2 ranks; use 4 or 6"),
        (3, "null", 4, "3 does not divide by 4 ranks; use 4,"),
        (96, "24", 3, "96 does not divide by 3 ranks x 24 samples per device; use 72 or 144"),
        (24, "24", 2, "24 does not divide by 2 ranks x 24 samples per device; use 48,"),
    ],
)
def test_a_global_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(
    recipe_file: Path, global_batch: int, device_batch: str, ranks: int, advice: str
) -> None:
    recipe = load(recipe_file, f"train.global_batch={global_batch}", f"train.device_batch={device_batch}")
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(recipe.train, ranks)
    assert str(caught.value).startswith("train.global_batch: ")
    assert advice in str(caught.value)


def steps(recipe: Recipe, people: int) -> int:
    return total_steps(recipe.train, recipe.data, people)


def test_epochs_become_steps(recipe_file: Path) -> None:
    assert steps(load(recipe_file), 1000) == 10
    recipe = load(recipe_file, "train.steps=null", "train.epochs=2.5")
    assert steps(recipe, 960) == 25
    assert steps(recipe, 1) == 1  # never none at all


def test_differences_that_alter_the_result_are_told_from_those_that_do_not(recipe_file: Path) -> None:
    old = load(recipe_file)
    new = load(
        recipe_file,
        "run.seed=1",
        "data.augment.flip=0",
        "optim.lr=0.5",
        "train.global_batch=48",
        "run.name=other",
        "data.workers=7",
        "data.train=elsewhere",
        "evaluate.flip_test=false",
        "checkpoint.keep=5",
        "log.tensorboard=false",
        "teacher.weights=moved",
        "train.steps=20",
    )
    altering, harmless = differences(old.model_dump(mode="json"), new.model_dump(mode="json"))
    assert altering == [
        "data.augment.flip: 0.5 -> 0.0",
        "optim.lr: 0.001 -> 0.5",
        "run.seed: 0 -> 1",
        "train.global_batch: 96 -> 48",
    ]
    assert {line.partition(":")[0] for line in harmless} == {
        "run.name", "data.workers", "data.train", "evaluate.flip_test", "checkpoint.keep", "log.trackers",
        "teacher.weights", "train.steps",
    }  # fmt: skip
    assert differences(old.model_dump(mode="json"), old.model_dump(mode="json")) == ([], [])


def test_a_recipe_is_checked_without_importing_torch(recipe_file: Path) -> None:
    program = (
        "import sys, fpd_accel, fpd_accel.config.schema\n"
        "fpd_accel.load_recipe(sys.argv[1], ['train.steps=3'], check_files=False)\n"
        "print(','.join(name for name in ('torch', 'accelerate', 'datasets', 'cv2') if name in sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(recipe_file)], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.strip() == ""
