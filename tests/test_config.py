"""Recipes: what they resolve to, and that every mistake in one is named before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fpd_accel.config import (
    ARCHITECTURES,
    Recipe,
    accumulation_steps,
    differences,
    dump_recipe,
    load_recipe,
    teacher_recipe,
    teacher_weights,
    total_steps,
)
from fpd_accel.errors import ConfigError, UserError

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


def mistakes(path: Path, *overrides: str, check_files: bool = False) -> list[str]:
    """The lines of the refusal, but for the first, which names the file."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides, check_files=check_files)
    first, *lines = str(caught.value).splitlines()
    assert str(path) in first
    return [line.strip() for line in lines]


def test_what_is_not_given_has_its_default(recipe_file: Path) -> None:
    recipe = load(recipe_file)
    assert (recipe.run.seed, recipe.codec.name, recipe.distill.alpha) == (0, "heatmap", 0.5)
    assert recipe.data.input_size == (256, 192)
    assert recipe.heatmap_size == (64, 48)
    assert recipe.run.directory == Path("runs/sound")


def test_every_mistake_is_listed_at_once_with_its_path_and_the_nearest_name(recipe_file: Path) -> None:
    found = mistakes(
        recipe_file,
        "distill.alhpa=0.5",
        "trian.steps=3",
        "data.augment.flip=1.5",
        "optim.name=adm",
        "student.arch=tiny_w9",
        "train.global_batch=many",
    )
    paths = {line.partition(":")[0] for line in found}
    expected = "distill.alhpa trian data.augment.flip optim.name train.global_batch"
    assert paths >= set(expected.split())
    meant = {line.partition(":")[0]: line for line in found}
    assert "did you mean 'alpha'?" in meant["distill.alhpa"]
    assert "did you mean 'train'?" in meant["trian"]
    assert "1.5" in meant["data.augment.flip"]
    assert "did you mean 'adam'?" in meant["optim.name"]


def test_a_contradiction_is_listed_beside_a_wrong_value(recipe_file: Path) -> None:
    found = mistakes(recipe_file, "distill.alpha=2", "data.input_size=[64, 66]", "student.arch=tiny_w9")
    assert [line.partition(":")[0] for line in found] == ["distill.alpha", "student.arch", "data.input_size"]
    assert "did you mean 'tiny_w8'?" in found[1]
    assert "multiples of 4" in found[2]


def test_a_wrong_required_value_does_not_hide_a_contradiction_elsewhere(recipe_file: Path) -> None:
    found = mistakes(recipe_file, "train.global_batch=0", "data.input_size=[64, 66]")
    assert {line.partition(":")[0] for line in found} == {"train.global_batch", "data.input_size"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.steps=abc"],
        ["optim.schedule=cosin"],
        ["distill.alpha_schedule=linaer", "distill.alpha_final=0.1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_one_wrong_value_does_not_accuse_others(recipe_file: Path, overrides: list[str]) -> None:
    found = mistakes(recipe_file, *overrides)
    assert [line.partition(":")[0] for line in found] == [overrides[0].partition("=")[0]]


@pytest.mark.parametrize("key", ["qqqq", "1", "train.qqqq", "data.augment.qqqq"])
def test_an_unknown_key_that_is_near_to_nothing_is_named_with_the_choices(recipe_file: Path, key: str) -> None:
    (found,) = mistakes(recipe_file, f"{key}=2")
    assert found.startswith(f"{key}: unknown key; choices: ")
    assert "did you mean" not in found


def test_a_literal_that_is_near_to_nothing_is_named_with_the_choices(recipe_file: Path) -> None:
    (found,) = mistakes(recipe_file, "optim.name=qqqq")
    assert found == "optim.name: 'qqqq' is not a choice; choices: adam, adamw, sgd"


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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "an override is key.path=value"),
        ("=3", "an override is key.path=value"),
        ("train.steps=[1", "is not a YAML value"),
        ("distill.mode.x=3", "'mode' is a value, not a section"),
        ("distill=3", "is not a section with keys mode, alpha"),
        ("train..steps=3", "train"),
        ("run.name=2024-13-45", "run.name"),  # YAML takes it for a date, and there is no such date
    ],
)
def test_a_malformed_override_is_named(recipe_file: Path, override: str, words: str) -> None:
    found = mistakes(recipe_file, override)
    assert words in found[0]


@pytest.mark.parametrize(
    ("path", "value", "choices"),
    [
        ("distill.mode", "teach", "fpd, normal"),
        ("distill.alpha_schedule", "linaer", "constant, linear, cosine"),
        ("train.precision", "fp16", "fp32, bf16"),
        ("optim.schedule", "stepped", "constant, step, cosine"),
        ("student.color", "gray", "rgb, bgr"),
    ],
)
def test_a_word_that_is_no_choice_is_refused_with_the_choices(
    recipe_file: Path, path: str, value: str, choices: str
) -> None:
    found = mistakes(recipe_file, f"{path}={value}")
    assert found[0].startswith(f"{path}: {value!r} is not a choice; ")
    assert found[0].endswith(f"choices: {choices}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("distill.alpha", "1.01"),
        ("distill.alpha", "-0.1"),
        ("distill.alpha", ".nan"),
        ("data.augment.scale", "1"),
        ("data.augment.rotation", "181"),
        ("data.box_padding", "0.9"),
        ("codec.sigma", "0"),
        ("train.global_batch", "0"),
        ("train.ema_decay", "1"),
        ("optim.lr", "0"),
        ("optim.lr", ".inf"),
        ("run.seed", "-1"),
        ("run.name", "a/b"),
        ("run.name", ".."),  # the run directory would be the parent of run.root
        ("evaluate.batch", "1.5"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(recipe_file: Path, path: str, value: str) -> None:
    (found,) = mistakes(recipe_file, f"{path}={value}")
    assert found.startswith(f"{path}: ")


def test_a_seed_that_no_generator_takes_is_refused(recipe_file: Path) -> None:
    assert load(recipe_file, f"run.seed={2**32 - 1}").run.seed == 2**32 - 1  # the largest that NumPy's old one takes
    (found,) = mistakes(recipe_file, f"run.seed={2**32}")
    assert found.startswith("run.seed: ")


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["train.epochs=2"], "train.steps, train.epochs", "exactly one"),
        (["train.steps=null"], "train.steps, train.epochs", "exactly one"),
        (["train.device_batch=7"], "train.device_batch", "does not divide train.global_batch (96)"),
        (["optim.schedule=step"], "optim.milestones", "needs them"),
        (["optim.schedule=step", "optim.milestones=[3, 2]"], "optim.milestones", "do not increase"),
        (["optim.schedule=cosine", "optim.final_lr=1"], "optim.final_lr", "above optim.lr"),
        (["optim.warmup_steps=11"], "optim.warmup_steps", "more than train.steps (10)"),
        (["distill.alpha_final=0"], "distill.alpha_final", "alpha_schedule"),
        (["distill.alpha_schedule=linear"], "distill.alpha_final", "alpha_schedule"),
        (["teacher.weights=a", "teacher.recipe=b"], "teacher.weights, teacher.recipe", "give one"),
        (["teacher.arch=hrnet_48"], "teacher.arch", "did you mean 'hrnet_w48'?"),
        (["student.arch=hourglass_0x128"], "student.arch", "hourglass_{stacks}x{features}"),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    recipe_file: Path, overrides: list[str], path: str, words: str
) -> None:
    (found,) = mistakes(recipe_file, *overrides)
    assert found.startswith(f"{path}: ")
    assert words in found


def test_a_file_that_is_no_yaml_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("run: {name: a\ndata: [\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not readable as YAML.*line 2"):
        load_recipe(path)
    path.write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a word", "3"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"list\.yaml: a recipe is a mapping of sections \(run, data, codec"):
        load_recipe(path)


def test_a_recipe_that_does_not_exist_is_refused_with_its_neighbour(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path / "suond.yaml")
    assert str(caught.value) == f"{tmp_path}/suond.yaml: no such recipe; did you mean {recipe_file}?"
    with pytest.raises(ConfigError, match=r"no such recipe$"):
        load_recipe(tmp_path / "nowhere" / "sound.yaml")
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path)  # a folder


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


def test_distillation_names_the_teacher_file_that_is_missing(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "dataset.json").write_text("{}", encoding="utf-8")
    data = f"data.train={tmp_path / 'shards'}"
    absent = tmp_path / "teacher.safetensors"
    (found,) = mistakes(recipe_file, data, "distill.mode=fpd", f"teacher.weights={absent}", check_files=True)
    assert found.startswith(f"teacher.weights: {absent}: no such file")
    load_recipe(recipe_file, [data, f"teacher.weights={absent}"])  # without distillation nobody asks for it


def test_distillation_asks_what_a_bare_weights_file_is(recipe_file: Path, tmp_path: Path) -> None:
    weights = tmp_path / "teacher.safetensors"
    weights.touch()
    found = mistakes(recipe_file, "distill.mode=fpd", f"teacher.weights={weights}", check_files=True)
    assert [line for line in found if line.startswith("teacher.arch: missing")]


def test_distillation_without_any_teacher_is_refused(recipe_file: Path) -> None:
    (found,) = mistakes(recipe_file, "distill.mode=fpd")
    assert found.startswith("distill.mode: 'fpd' needs a teacher")


def test_missing_files_are_listed_together(recipe_file: Path) -> None:
    found = mistakes(recipe_file, "data.valid=shards/valid", "student.weights=finished.pth", check_files=True)
    assert [line.partition(":")[0] for line in found] == ["data.train", "data.valid", "student.weights"]
    assert "fpd-accel prepare" in found[0]


def test_data_that_will_be_drawn_need_not_exist(recipe_file: Path) -> None:
    load_recipe(recipe_file, ["data.synthetic.train_images=5"])


def test_the_teachers_own_recipe_is_run_as_its_overrides_say(recipe_file: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(SOUND.replace("name: sound", "name: wise"), encoding="utf-8")
    recipe = load(recipe_file, "distill.mode=fpd", f"teacher.recipe={teacher}", "teacher.overrides=['train.steps=7']")
    taught = teacher_recipe(recipe, check_files=False)
    assert (taught.run.name, taught.train.steps, taught.distill.mode) == ("wise", 7, "normal")
    assert teacher_weights(recipe) == Path("runs/wise/best")


def test_mistakes_in_the_teachers_own_recipe_are_listed_as_its(recipe_file: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(SOUND.replace("steps: 10", "stesp: 10"), encoding="utf-8")
    drawn = "data.synthetic.seed=0"
    found = mistakes(recipe_file, drawn, "distill.mode=fpd", f"teacher.recipe={teacher}", check_files=True)
    assert all(line.startswith("teacher.recipe: ") for line in found)
    assert any("train.stesp: unknown key; did you mean 'steps'?" in line for line in found)
    (absent,) = mistakes(
        recipe_file, drawn, "distill.mode=fpd", f"teacher.recipe={tmp_path / 'taecher.yaml'}", check_files=True
    )
    assert absent.startswith("teacher.recipe: ")
    assert f"no such recipe; did you mean {teacher}?" in absent


def test_a_teacher_that_would_train_in_the_students_directory_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(SOUND.replace("shards/train}", "x, synthetic: {seed: 0}}"), encoding="utf-8")  # run.name: sound
    found = mistakes(
        recipe_file,
        "data.synthetic.seed=0",
        "distill.mode=fpd",
        f"teacher.recipe={teacher}",
        check_files=True,
    )
    assert any(line.startswith("teacher.recipe: ") and "run" in line for line in found)


@pytest.mark.parametrize(
    ("device_batch", "ranks", "expected"),
    [("null", 1, (96, 1)), ("null", 4, (24, 1)), ("24", 4, (24, 1)), ("24", 2, (24, 2)), ("8", 1, (8, 12))],
)
def test_accumulation_makes_up_the_global_batch(
    recipe_file: Path, device_batch: str, ranks: int, expected: tuple[int, int]
) -> None:
    recipe = load(recipe_file, f"train.device_batch={device_batch}")
    per_forward, forwards = accumulation_steps(recipe, ranks)
    assert (per_forward, forwards) == expected
    assert per_forward * forwards * ranks == 96


@pytest.mark.parametrize(
    ("global_batch", "device_batch", "ranks", "advice"),
    [
        (5, "null", 2, "5 does not divide by 2 ranks; use 4 or 6"),
        (3, "null", 4, "3 does not divide by 4 ranks; use 4,"),
        (96, "24", 3, "96 does not divide by 3 ranks x 24 people per device; use 72 or 144"),
        (24, "24", 2, "24 does not divide by 2 ranks x 24 people per device; use 48,"),
    ],
)
def test_a_global_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(
    recipe_file: Path, global_batch: int, device_batch: str, ranks: int, advice: str
) -> None:
    recipe = load(recipe_file, f"train.global_batch={global_batch}", f"train.device_batch={device_batch}")
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(recipe, ranks)
    assert str(caught.value).startswith("train.global_batch: ")
    assert advice in str(caught.value)


def test_epochs_become_steps(recipe_file: Path) -> None:
    assert total_steps(load(recipe_file), 1000) == 10
    recipe = load(recipe_file, "train.steps=null", "train.epochs=2.5")
    assert total_steps(recipe, 960) == 25
    assert total_steps(recipe, 1) == 1  # never none at all


def test_differences_tell_what_alters_the_result_from_what_does_not(recipe_file: Path) -> None:
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
    altering, harmless = differences(old, new)
    assert altering == [
        "data.augment.flip: 0.5 -> 0.0",
        "optim.lr: 0.001 -> 0.5",
        "run.seed: 0 -> 1",
        "train.global_batch: 96 -> 48",
    ]
    assert {line.partition(":")[0] for line in harmless} == {
        "run.name", "data.workers", "data.train", "evaluate.flip_test", "checkpoint.keep", "log.tensorboard",
        "teacher.weights", "train.steps",
    }  # fmt: skip
    assert differences(old, old) == ([], [])


def test_a_recipe_is_checked_without_importing_torch(recipe_file: Path) -> None:
    program = (
        "import sys, fpd_accel, fpd_accel.config\n"
        "fpd_accel.load_recipe(sys.argv[1], ['train.steps=3'], check_files=False)\n"
        "print(','.join(name for name in ('torch', 'accelerate', 'datasets', 'cv2') if name in sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(recipe_file)], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.strip() == ""


def test_recipes_know_the_architectures_that_exist() -> None:
    from fpd_accel.models import MODELS

    assert set(ARCHITECTURES) == set(MODELS)
