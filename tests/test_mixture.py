"""Several datasets trained on as one: shares, order, resume, and what is refused."""

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fpd_accel.config.loading import load_recipe
from fpd_accel.config.plan import steps_per_epoch
from fpd_accel.config.schema import Augment
from fpd_accel.data.batch import Batch
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, make_loader
from fpd_accel.errors import CheckpointError, ConfigError, DataError

FIELDS = [field.name for field in dataclasses.fields(Batch)]


@pytest.fixture(scope="session")
def third(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four prepared images of other people than those of the usual two datasets."""
    from conftest import _draw_shards

    return _draw_shards(tmp_path_factory.mktemp("third"), images=4, seed=2)


@pytest.fixture
def three(tiny_shards: Path, tiny_valid: Path, third: Path) -> tuple[Shards, ...]:
    return Shards(tiny_shards), Shards(tiny_valid), Shards(third)


def renamed(shards: Path, copy: Path, **skeleton: Any) -> Path:
    """The same people under another skeleton."""
    shutil.copytree(shards, copy)
    description = json.loads((copy / "dataset.json").read_bytes())
    description["skeleton"] |= skeleton
    (copy / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return copy


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1, 1), (2.0, 1, 0.5), (0.1, 0.2, 0.7), (100, 1, 1), (1, 1, 100), None])
def test_shares_are_exact_over_a_period_and_near_it_in_any_stretch(
    three: tuple[Shards, ...], weights: tuple[float, ...] | None
) -> None:
    mixture = Mixture(three, weights)
    period = sum(mixture.parts)
    wanted = np.array(weights or [len(shards) for shards in three], dtype=np.float64)
    np.testing.assert_allclose(np.array(mixture.parts) / period, wanted / wanted.sum(), rtol=1e-12)
    located = [mixture.locate(sample) for sample in range(3 * period + 500)]
    for number in range(3):
        own = [k for dataset, k in located if dataset == number]
        assert own == list(range(len(own)))  # of each dataset sample after sample, none twice
    hits = np.eye(3)[[dataset for dataset, _ in located]]
    counts = np.concatenate([np.zeros((1, 3)), hits.cumsum(axis=0)])
    np.testing.assert_array_equal(counts[period], mixture.parts)
    np.testing.assert_array_equal(counts[3 * period], 3 * np.array(mixture.parts))
    for length in (1, 2, 7, 64, 333):
        deviation = counts[length:] - counts[:-length] - length * np.array(mixture.parts) / period
        assert np.abs(deviation).max() < 3  # samples


def test_a_sample_far_out_is_located_exactly(three: tuple[Shards, ...]) -> None:
    """No floating point: after 10^18 periods every dataset has had exactly its part."""
    mixture = Mixture(three, (0.3, 0.1, 0.7))
    start = 10**18 * sum(mixture.parts)
    located = [mixture.locate(start + sample) for sample in range(sum(mixture.parts))]
    for sample, (dataset, k) in enumerate(located):
        assert (dataset, k - 10**18 * mixture.parts[dataset]) == mixture.locate(sample)


def test_without_weights_everybody_comes_once_per_epoch(three: tuple[Shards, ...]) -> None:
    mixture = Mixture(three)
    stream = PoseStream(mixture, input_size=(32, 24), batch_size=1, augment=Augment(), seed=4)
    everybody = {(number, row) for number, shards in enumerate(three) for row in shards.usable.tolist()}
    assert len(mixture) == len(everybody)
    for epoch in range(3):
        samples = range(epoch * len(mixture), (epoch + 1) * len(mixture))
        places = [stream.place(sample) for sample in samples]
        assert Counter((place.source, place.row) for place in places) == Counter(everybody)
        assert {place.epoch for place in places} == {epoch}


def test_with_weights_everybody_of_a_dataset_comes_once_per_pass_over_it(three: tuple[Shards, ...]) -> None:
    stream = PoseStream(Mixture(three, (1, 2, 3)), input_size=(32, 24), batch_size=1, augment=Augment(), seed=4)
    places = [stream.place(sample) for sample in range(1500)]
    for number, shards in enumerate(three):
        own = [place for place in places if place.source == number]
        passes = [own[start : start + len(shards)] for start in range(0, len(own) - len(shards), len(shards))]
        assert len(passes) >= 5
        for epoch, one in enumerate(passes):
            assert {place.epoch for place in one} == {epoch}
            assert sorted(place.row for place in one) == shards.usable.tolist()
        assert len({tuple(place.row for place in one) for one in passes[:5]}) == 5


def test_people_without_labels_keep_their_share_beside_a_mixture(three: tuple[Shards, ...]) -> None:
    stream = PoseStream(
        Mixture(three[:2], (3, 1)), input_size=(32, 24), batch_size=1, augment=Augment(), unlabelled=three[2], share=0.2
    )
    places = [stream.place(sample) for sample in range(1000)]
    assert Counter(place.source for place in places) == {0: 600, 1: 200, 2: 200}
    batch = stream.batch(range(60))
    assert batch.labelled is not None
    assert batch.labelled.tolist() == [float(place.source < 2) for place in places[:60]]
    assert float(batch.visible[batch.labelled == 0].sum()) == 0
    assert (batch.visible[batch.labelled == 1].sum(dim=1) > 0).all()


# --- order ------------------------------------------------------------------------------------------------------------

SAMPLES = 72


def stream(mixture: Mixture | Shards, batch_size: int, **options: Any) -> PoseStream:
    values = {"augment": Augment(), "seed": 5, "stop": SAMPLES, **options}
    return PoseStream(mixture, input_size=(32, 24), batch_size=batch_size, **values)


def joined(batches: Iterable[Batch]) -> Batch:
    kept = list(batches)
    columns = {name: [getattr(batch, name) for batch in kept] for name in FIELDS}
    return Batch(**{name: None if values[0] is None else torch.cat(values) for name, values in columns.items()})


def assert_same(found: Batch, expected: Batch, start: int = 0) -> None:
    for name in FIELDS:
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None and b is None) or torch.equal(a, b[start:]), name


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine may have cores
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.faults
def test_a_mixture_is_the_same_for_any_number_of_ranks_and_workers(
    three: tuple[Shards, ...], ranks: int, workers: int
) -> None:
    mixture, unlabelled = Mixture(three[:2], (2, 1)), {"unlabelled": three[2], "share": 0.25}
    whole = joined(stream(mixture, 1, **unlabelled))
    assert whole.labelled is not None
    assert float(whole.labelled.sum()) == 0.75 * SAMPLES
    streams = [stream(mixture, 6 // ranks, rank=rank, ranks=ranks, **unlabelled) for rank in range(ranks)]
    per_rank = [list(make_loader(own, workers, torch.device("cpu"))) for own in streams]
    assert_same(joined(itertools.chain(*zip(*per_rank, strict=True))), whole)


@pytest.mark.parametrize("start", [1, 33, 50, 71])
def test_a_mixture_goes_on_from_any_sample(three: tuple[Shards, ...], start: int) -> None:
    mixture = Mixture(three, (0.5, 1, 1))
    assert_same(joined(stream(mixture, 1, start=start)), joined(stream(mixture, 1)), start)


def test_one_dataset_comes_in_the_order_of_always(tiny_shards: Path) -> None:
    """As since the first version: anything else would move every recorded result."""
    shards = Shards(tiny_shards)
    expected = [
        np.random.Generator(np.random.Philox(key=[5, epoch], counter=[0, 0, 0, 0])).permutation(len(shards))
        for epoch in range(3)
    ]
    rows = shards.usable[np.concatenate(expected)[:SAMPLES]].tolist()
    for people in (shards, Mixture((shards,)), Mixture((shards,), (7.0,))):
        assert joined(stream(people, 1)).rows.tolist() == rows
    assert Mixture((shards,), (7.0,)).fingerprint == shards.fingerprint
    mixed = stream(shards, 1, unlabelled=shards, share=0.5)
    assert [place.source for place in map(mixed.place, range(4))] == [0, 1, 0, 1]


# --- runs -------------------------------------------------------------------------------------------------------------


def train(recipe: Path, *overrides: str) -> None:
    from fpd_accel.training.run import run

    run(load_recipe(recipe, overrides))


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record["train_loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


@pytest.fixture
def mixed_recipe(
    tiny_recipe: Callable[..., Path], tiny_shards: Path, third: Path
) -> Callable[[str, float, float], Path]:
    def write(name: str, first: float = 2.0, second: float = 1.0) -> Path:
        datasets = [{"shards": str(tiny_shards), "weight": first}, {"shards": str(third), "weight": second}]
        return tiny_recipe(
            file_name=f"{name}.yaml",
            run={"name": name},
            data={"train": datasets, "valid": None},
            train={"steps": 6},
            checkpoint={"every_steps": 3},
        )

    return write


@pytest.mark.faults
def test_a_run_on_a_mixture_resumes_exactly_and_says_what_it_trains_on(
    mixed_recipe: Callable[..., Path], tmp_path: Path, third: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(mixed_recipe("whole"))
    people = len(Shards(third))
    assert f"{people} from {third} (33.3%)" in capfd.readouterr().err
    train(mixed_recipe("halves"), "train.steps=3")
    copy = Path(shutil.copytree(third, tmp_path / "moved"))  # and the weights in another unit
    overrides = f"[{{shards: {load_recipe(mixed_recipe('halves')).data.train[0].shards}, weight: 1}}, "
    train(mixed_recipe("halves"), f"data.train={overrides}{{shards: {copy}, weight: 0.5}}]")
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    students = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "halves")]
    assert all(torch.equal(value, students[1][key]) for key, value in students[0].items())


@pytest.mark.faults
def test_resuming_on_another_mixture_is_refused(
    mixed_recipe: Callable[..., Path], tiny_shards: Path, tiny_valid: Path, third: Path
) -> None:
    recipe = mixed_recipe("run")
    train(recipe, "train.steps=3")
    mixed = "[{{shards: {}, weight: {}}}, {{shards: {}, weight: {}}}]".format
    for changed, message in (
        (mixed(tiny_shards, 1, third, 1), "the weights were as 2 : 1, and are as 1 : 1 now"),
        (f"[{{shards: {tiny_shards}}}, {{shards: {third}}}]", "the weights were as 2 : 1"),
        (mixed(tiny_shards, 2, tiny_valid, 1), rf"data\.train\.1\.shards was {third}, and {tiny_valid} holds other"),
        (mixed(third, 2, tiny_shards, 1), rf"data\.train\.0\.shards was {tiny_shards}, and {third} holds other"),
        (str(tiny_shards), "datasets then: 2, now: 1"),
    ):
        with pytest.raises(CheckpointError, match=rf"data\.train is not what this run was begun with .*{message}"):
            train(recipe, f"data.train={changed}")


def test_an_epoch_of_a_mixture_has_as_many_labelled_samples_as_there_are_people(
    mixed_recipe: Callable[..., Path], tmp_path: Path, tiny_shards: Path, third: Path
) -> None:
    recipe = load_recipe(mixed_recipe("run"), ["train.steps=null", "train.epochs=1"])
    people = len(Shards(tiny_shards)) + len(Shards(third))
    assert steps_per_epoch(recipe.train, recipe.data, people) == people / 4
    train(mixed_recipe("run"), "train.steps=null", "train.epochs=1")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == round(people / 4)
    assert lines[-1]["epoch"] == pytest.approx(1, abs=0.1)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[]", "data.train: [] is neither the path of a dataset nor a list of {shards: PATH, weight: NUMBER}"),
        ("null", "data.train: None is neither the path of a dataset"),
        ("{shards: a}", "data.train: {'shards': 'a'} is neither the path of a dataset"),
        ("[a, b]", "data.train.0: 'a' is not a section with keys shards, weight"),
        ("[{shard: a}]", "data.train.0.shard: unknown key; did you mean 'shards'?"),
        ("[{weight: 1}]", "data.train.0.shards: missing"),
        ("[{shards: a, weight: 0}]", "data.train.0.weight: 0 should be greater than 0"),
        ("[{shards: a, weight: .inf}]", "data.train.0.weight: inf"),
        ("[{shards: a, weight: 1}, {shards: b}]", "data.train: some datasets have a weight and some have none"),
        ("[{shards: a}, {shards: ./a}]", "data.train: a is listed more than once; give it a larger weight"),
        ("[{shards: a}, {shards: b}]", "data.train.1.shards: b: no prepared dataset there"),
    ],
)
def test_a_wrong_list_of_datasets_is_refused(tiny_recipe: Callable[..., Path], train: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(tiny_recipe(), [f"data.train={train}"])
    assert message in str(caught.value)


def test_several_datasets_are_not_drawn(tiny_recipe: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"data\.synthetic: draws one dataset, but data\.train is a list"):
        load_recipe(tiny_recipe(data={"train": [{"shards": "a"}, {"shards": "b"}], "synthetic": {}}))


def test_datasets_of_other_keypoints_are_refused(three: tuple[Shards, ...], third: Path, tmp_path: Path) -> None:
    names = list(three[0].skeleton.keypoints)
    pairs = [list(pair) for pair in three[0].skeleton.flip_pairs]
    for changes, message in (
        ({"keypoints": [names[1], names[0], *names[2:]]}, "keypoint 1 of 17 is 'left_eye', not 'nose'"),
        ({"flip_pairs": pairs[1:]}, "mirroring turns 'left_eye' into 'left_eye', not 'right_eye'"),
        (
            {"keypoints": [*names, "tail"], "sigmas": [0.1] * 18, "sigmas_estimated": []},
            "it has 18 keypoints, not 17",
        ),
    ):
        other = renamed(third, tmp_path / str(len(message)), **changes)
        with pytest.raises(DataError, match=rf"{other}: cannot be mixed with {three[0].path}: {message}; prepare"):
            Mixture((three[0], Shards(other)))
    Mixture((three[0], Shards(renamed(third, tmp_path / "lines", name="mine", limbs=[]))))


def test_a_dataset_of_a_mixture_with_nobody_in_it_is_named(
    tiny_recipe: Callable[..., Path], tiny_shards: Path, third: Path, tmp_path: Path
) -> None:
    empty = Path(shutil.copytree(third, tmp_path / "empty"))
    description = json.loads((empty / "dataset.json").read_bytes())
    description["counts"] |= {"people": 0, "usable": 0}
    (empty / "usable.npy").unlink()
    (empty / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    recipe = tiny_recipe(data={"train": [{"shards": str(tiny_shards)}, {"shards": str(empty)}]})
    with pytest.raises(ConfigError, match=rf"data\.train\.1\.shards: {empty} has images, but no people"):
        train(recipe)


def test_a_file_of_any_dataset_that_is_exchanged_is_named(tiny_shards: Path, third: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(third, tmp_path / "copy"))
    mixture = Mixture((Shards(tiny_shards), Shards(copy)))
    assert mixture.path == f"{tiny_shards} + {copy}"
    for shards in mixture.datasets:
        shards.open()
    assert mixture.changed() is None
    next((copy / "people").glob("*.arrow")).unlink()
    assert str(mixture.changed()).startswith(f"{copy}/people/")
