"""Objectives: masks, distances, stages, people without labels, and SimCC students."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_distill import CODEC, random_batch
from torch import Tensor

from fpd_accel import Distiller, create_model
from fpd_accel.codecs import HeatmapCodec, SimCCCodec
from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Augment, Distill
from fpd_accel.data.batch import Batch
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream
from fpd_accel.decode import accuracy
from fpd_accel.errors import CheckpointError, ConfigError, DataError, ModelError
from fpd_accel.losses import heatmap_kl, heatmap_mse, heatmap_ohkm, marginals, simcc_kl
from fpd_accel.outputs import SimCC, mean_output


def train(recipe: Path, *overrides: str) -> None:
    from fpd_accel.training.run import run

    run(load_recipe(recipe, overrides))


def training(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the model folder of a teacher with fresh weights."""
    from fpd_accel.config.schema import Codec
    from fpd_accel.skeleton import COCO
    from fpd_accel.weights.model_folder import ModelConfig, save_model

    def write(arch: str = "tiny_w16", codec: str = "heatmap") -> Path:
        torch.manual_seed(7)
        config = ModelConfig(arch=arch, skeleton=COCO, input_size=(64, 64), codec=Codec(name=codec))
        save_model(tmp_path / f"teacher_{arch}", config.create_model().state_dict(), config)
        return tmp_path / f"teacher_{arch}"

    return write


# --- losses -----------------------------------------------------------------------------------------------------------


def random_maps(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_heatmap_kl_agrees_with_a_loop_over_joints() -> None:
    predicted, target = (random_maps(2, 3, 5, 4, seed=seed) for seed in (0, 1))
    weight = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    total = 0.0
    for person in range(2):
        for joint in range(3):
            p, q = (torch.softmax(maps[person, joint].double().flatten() / 0.2, 0) for maps in (target, predicted))
            total += float(weight[person, joint]) * float((p * (p / q).log()).sum()) * 0.2**2
    loss = heatmap_kl(predicted, target, weight, temperature=0.2)
    assert float(loss) == pytest.approx(total / 6, rel=1e-5)
    assert float(heatmap_kl(target, target, weight)) == pytest.approx(0.0, abs=1e-7)


def test_simcc_kl_agrees_with_torchs_divergence() -> None:
    logits = SimCC(random_maps(2, 3, 8, seed=0), random_maps(2, 3, 6, seed=1))
    target = SimCC(random_maps(2, 3, 8, seed=2), random_maps(2, 3, 6, seed=3)).softmax()
    weight = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    expected = 0.0
    for axis_logits, axis_target in zip(logits, target, strict=True):
        each = torch.nn.functional.kl_div((axis_logits / 2).log_softmax(-1), axis_target, reduction="none").sum(-1)
        expected += 4 * float((each * weight).sum()) / 6 / 2
    assert float(simcc_kl(logits, target, weight, temperature=2.0)) == pytest.approx(expected, rel=1e-5)


def test_simcc_kl_ignores_joints_whose_target_is_empty() -> None:
    logits = SimCC(random_maps(1, 2, 8, seed=0), random_maps(1, 2, 6, seed=1))
    empty = SimCC(torch.zeros(1, 2, 8), torch.zeros(1, 2, 6))
    assert float(simcc_kl(logits, empty, torch.ones(1, 2))) == 0.0


def test_marginals_of_gaussians_are_the_labels_that_a_simcc_student_would_get() -> None:
    codec, keypoints = SimCCCodec((64, 48)), 12 + 24 * random_maps(4, 17, 2, seed=0)
    keypoints = (keypoints / 4).round() * 4  # cells: rounding is not the subject
    heatmaps, _ = HeatmapCodec((64, 48), (16, 12), 1.5).encode(keypoints, torch.ones(4, 17))
    labels, _ = codec.encode(keypoints, torch.ones(4, 17))
    bins_per_cell, (sigma_x, sigma_y) = 8, codec.sigmas
    sharpness = tuple((1.5 * bins_per_cell / sigma) ** 2 for sigma in (sigma_x, sigma_y))
    found = marginals(heatmaps, (96, 128), sharpness=sharpness)
    for mine, theirs in zip(found, labels, strict=True):
        torch.testing.assert_close(mine.sum(-1), torch.ones(4, 17))
        assert (mine.argmax(-1) - theirs.argmax(-1)).abs().max() == 0
        assert 0.5 * (mine - theirs).abs().sum(-1).max() < 0.01  # total variation


def test_marginals_of_empty_heatmaps_are_zero() -> None:
    assert all(
        float(axis.abs().sum()) == 0 for axis in marginals(-torch.ones(1, 2, 4, 4), (32, 32), sharpness=(4.0, 4.0))
    )


# --- the objective ----------------------------------------------------------------------------------------------------


def test_masks_decide_which_keypoints_the_teacher_teaches() -> None:
    torch.manual_seed(0)
    student, teacher, batch = create_model("tiny_w8", 17).eval(), create_model("tiny_w16", 17).eval(), random_batch()
    images = Distiller(student, None, CODEC).normalization(batch.crops)
    teacher_output, stage = teacher(images)[-1].detach(), student(images)[-1].detach()
    peaks = teacher_output.amax(dim=(2, 3))
    threshold = float(peaks.clamp(0, 1).median())
    _, visible = CODEC.encode(batch.keypoints, batch.visible)
    weights = {"visible": visible, "all": torch.ones(3, 17), "confident": (peaks > threshold).float()}
    assert len({float(weight.sum()) for weight in weights.values()}) == 3
    for mask, weight in weights.items():
        losses = Distiller(student, teacher, CODEC, mask=mask, options=Distill(confidence=threshold))(batch)
        torch.testing.assert_close(losses.kd, heatmap_mse(stage, teacher_output, weight), msg=mask)
        torch.testing.assert_close(losses.pose, Distiller(student, None, CODEC)(batch).pose)


def test_hard_keypoints_and_kl_select_ohkm_and_divergence() -> None:
    torch.manual_seed(0)
    student, teacher, batch = create_model("tiny_w8", 17).eval(), create_model("tiny_w16", 17).eval(), random_batch()
    options = Distill(hard_keypoints=5, distance="kl", temperature=0.3)
    losses = Distiller(student, teacher, CODEC, alpha=0.25, options=options)(batch)
    images = Distiller(student, None, CODEC).normalization(batch.crops)
    target, weight = CODEC.encode(batch.keypoints, batch.visible)
    pose = heatmap_ohkm(student(images)[-1], target, weight, 5).detach()
    kd = heatmap_kl(student(images)[-1], teacher(images)[-1], weight, temperature=0.3).detach()
    torch.testing.assert_close(losses.pose, pose)
    torch.testing.assert_close(losses.kd, kd)
    torch.testing.assert_close(losses.total.detach(), 0.75 * pose + 0.25 * kd)


def test_each_stage_can_have_the_teachers_stage_of_its_number() -> None:
    torch.manual_seed(0)
    student, teacher = create_model("hourglass_2x16", 17).eval(), create_model("hourglass_2x16", 17).eval()
    batch = random_batch()
    losses = Distiller(student, teacher, CODEC, options=Distill(teacher_stage="each"))(batch)
    images = Distiller(student, None, CODEC).normalization(batch.crops)
    _, weight = CODEC.encode(batch.keypoints, batch.visible)
    pairs = zip(student(images), teacher(images), strict=True)
    torch.testing.assert_close(losses.kd, sum(heatmap_mse(a, b, weight) for a, b in pairs).detach())


def test_the_teachers_loss_of_unlabelled_people_is_separate() -> None:
    torch.manual_seed(0)
    student, teacher = create_model("tiny_w8", 17).eval(), create_model("tiny_w16", 17).eval()
    batch = random_batch(4)
    labelled = torch.tensor([1.0, 0.0, 1.0, 0.0])
    mixed = Batch(**{**vars(batch), "visible": batch.visible * labelled[:, None], "labelled": labelled})
    losses = Distiller(student, teacher, CODEC, mask="all")(mixed)
    images = Distiller(student, None, CODEC).normalization(batch.crops)
    weight = (1 - labelled)[:, None].expand(4, 17)
    torch.testing.assert_close(
        losses.kd_unlabelled, heatmap_mse(student(images)[-1], teacher(images)[-1], weight).detach()
    )
    assert 0 < losses.kd_unlabelled < losses.kd


@pytest.mark.parametrize("teacher_arch", ["tiny_w16", "tiny_w16_simcc"])
def test_simcc_student_learns_from_heatmaps_and_from_distributions(teacher_arch: str) -> None:
    torch.manual_seed(0)
    student = create_model("tiny_w8_simcc", 17, input_size=(64, 64))
    teacher = create_model(teacher_arch, 17, input_size=(64, 64))
    codec, options = SimCCCodec((64, 64)), Distill(distance="kl")
    teacher_codec = codec if teacher_arch.endswith("_simcc") else CODEC
    distiller = Distiller(student, teacher, codec, alpha=1.0, mask="all", options=options, teacher_codec=teacher_codec)
    optimizer, curve = torch.optim.Adam(student.parameters(), lr=3e-3), []
    for _ in range(20):
        losses = distiller(random_batch())
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        curve.append(float(losses.kd))
    assert all(np.isfinite(curve))
    assert curve[-1] < 0.8 * curve[0]


@pytest.mark.parametrize("arch", ["hrnet_w18", "vitpose_s", "pose_resnet_18", "hourglass_2x16"])
def test_simcc_heads_go_on_networks_of_every_kind(arch: str) -> None:
    model = create_model(f"{arch}_simcc", 5, input_size=(64, 128)).eval()
    (output,) = model(torch.zeros(1, 3, 64, 128))
    assert output.x.shape == (1, 5, 256)
    assert output.y.shape == (1, 5, 128)
    with pytest.raises(ModelError, match="built for images of 64 x 128"):
        model(torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize("temperature", [None, 2.0, 4.0])
def test_a_simcc_student_equal_to_the_labels_has_nothing_to_learn_from_perfect_heatmaps(
    temperature: float | None,
) -> None:
    size, keypoints = (64, 48), (12 + 24 * random_maps(4, 17, 2, seed=0)).div(4).round() * 4
    heatmap_codec, codec = HeatmapCodec(size, (16, 12), 1.5), SimCCCodec(size)
    visible = torch.ones(4, 17)
    heatmaps, labels = heatmap_codec.encode(keypoints, visible)[0], codec.encode(keypoints, visible)[0]
    batch = Batch(
        crops=torch.zeros(4, *size, 3, dtype=torch.uint8), keypoints=keypoints, visible=visible,
        centers=torch.zeros(4, 2), sizes=torch.ones(4, 2), rows=torch.arange(4),
    )  # fmt: skip

    class Perfect(torch.nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002
            return (heatmaps,)

    options = Distill(distance="kl", temperature=temperature)
    distiller = Distiller(torch.nn.Identity(), Perfect(), codec, options=options, teacher_codec=heatmap_codec)
    known = labels.map(lambda axis: axis.clamp(min=1e-30).log())
    assert float(distiller.compare((known,), batch).kd) < 5e-3
    shifted = known.map(lambda axis: axis.roll(6, -1))
    assert float(distiller.compare((shifted,), batch).kd) > 0.5


def test_mean_of_stages_is_their_mean() -> None:
    a, b = random_maps(1, 2, 3, 4, seed=0), random_maps(1, 2, 3, 4, seed=1)
    torch.testing.assert_close(mean_output((a, b)), (a + b) / 2)
    pair = mean_output((SimCC(a[0], a[0]), SimCC(b[0], b[0])))
    torch.testing.assert_close(pair.x, (a[0] + b[0]) / 2)


# --- people without labels --------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tiny_shards: Path, tiny_valid: Path) -> Callable[..., PoseStream]:
    def stream(*, share: float = 0.3, **changes: int) -> PoseStream:
        values = {"batch_size": 4, "seed": 3, "start": 0, "stop": 240, **changes}
        return PoseStream(
            Shards(tiny_shards),
            input_size=(64, 64),
            augment=Augment(),
            unlabelled=Shards(tiny_valid),
            share=share,
            **values,
        )

    return stream


def test_unlabelled_people_have_their_share_of_any_stretch_and_come_once_per_pass(
    mixture: Callable[..., PoseStream], tiny_shards: Path, tiny_valid: Path
) -> None:
    stream = mixture()
    places = [stream.place(sample) for sample in range(2000)]
    for first in range(0, 1900, 37):
        count = sum(place.source for place in places[first : first + 100])
        assert count in (29, 30, 31)
    for source, shards in enumerate((Shards(tiny_shards), Shards(tiny_valid))):
        own = [place for place in places if place.source == source]
        for start in range(0, len(own) - len(shards), len(shards)):
            one_pass = own[start : start + len(shards)]
            assert len({place.epoch for place in one_pass}) == 1
            assert sorted(place.row for place in one_pass) == shards.usable.tolist()


def test_mixture_is_the_same_on_two_ranks_and_from_the_middle(mixture: Callable[..., PoseStream]) -> None:
    whole = list(mixture(stop=48))
    halves = [list(mixture(stop=48, rank=rank, ranks=2)) for rank in (0, 1)]
    interleaved = [batch for pair in zip(*halves, strict=True) for batch in pair]
    later = list(mixture(start=24, stop=48))
    for a, b in [*zip(whole, interleaved, strict=True), *zip(whole[6:], later, strict=True)]:
        assert torch.equal(a.crops, b.crops)
        assert torch.equal(a.labelled, b.labelled)
        assert torch.equal(a.visible, b.visible)
    assert 0 < sum(float((1 - batch.labelled).sum()) for batch in whole) < 48


def test_unlabelled_people_have_no_visible_keypoint_although_their_shards_have_some(
    mixture: Callable[..., PoseStream],
) -> None:
    for batch in mixture(stop=40):
        assert float(batch.visible[batch.labelled == 0].sum()) == 0
        assert (batch.visible[batch.labelled == 1].sum(dim=1) > 0).any()


@pytest.mark.faults
def test_a_run_with_unlabelled_people_logs_both_shares_and_resumes_exactly(
    tiny_recipe: Callable[..., Path], teacher_folder: Callable[..., Path], tiny_valid: Path, tmp_path: Path
) -> None:
    def recipe(name: str) -> Path:
        return tiny_recipe(
            file_name=f"{name}.yaml",
            run={"name": name},
            data={"unlabelled": {"shards": str(tiny_valid), "share": 0.5}, "valid": None},
            teacher={"weights": str(teacher_folder())},
            distill={"mode": "fpd", "mask": "confident", "confidence": 0.0},
            train={"steps": 6},
            checkpoint={"every_steps": 3},
        )

    train(recipe("whole"))
    train(recipe("halves"), "train.steps=3")
    train(recipe("halves"))
    whole, halves = training(tmp_path / "whole"), training(tmp_path / "halves")
    names = (
        "train_loss",
        "train_pose_loss",
        "train_kd_pose_loss",
        "train_kd_labelled_loss",
        "train_kd_unlabelled_loss",
    )
    assert [[r[name] for name in names] for r in whole] == [[r[name] for name in names] for r in halves]
    for record in whole:
        parts = record["train_kd_labelled_loss"], record["train_kd_unlabelled_loss"]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(record["train_kd_pose_loss"], rel=1e-5)
    students = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "halves")]
    assert all(torch.equal(value, students[1][key]) for key, value in students[0].items())
    with pytest.raises(CheckpointError, match=r"data\.unlabelled"):
        train(recipe("halves"), "train.steps=9", f"data.unlabelled.shards={load_recipe(recipe('halves')).data.train}")


def test_unlabelled_people_can_come_from_detected_boxes(
    tiny_recipe: Callable[..., Path], teacher_folder: Callable[..., Path], tiny_valid: Path, tmp_path: Path
) -> None:
    image = int(Shards(tiny_valid).images[2]["id"])
    boxes = tmp_path / "boxes.json"
    found = [
        {"image_id": image, "category_id": 1, "bbox": [10, 5, 40 + i, 80], "score": 0.3 + 0.2 * i} for i in range(4)
    ]
    boxes.write_text(json.dumps(found))
    recipe = tiny_recipe(
        run={"name": "run"},
        data={"unlabelled": {"shards": str(tiny_valid), "boxes": str(boxes), "share": 0.5}, "valid": None},
        teacher={"weights": str(teacher_folder())},
        distill={"mode": "fpd", "mask": "all"},
        train={"steps": 2},
    )
    train(recipe)
    assert all(record["train_kd_unlabelled_loss"] > 0 for record in training(tmp_path / "run"))
    with pytest.raises(DataError, match="none of its 4 boxes can be used"):
        train(recipe, "run.name=other", "data.unlabelled.box_threshold=0.95")
    with pytest.raises(ConfigError, match=r"data\.unlabelled\.boxes: nothing\.json: no such file"):
        load_recipe(recipe, ["data.unlabelled.boxes=nothing.json"])


def test_epochs_are_those_of_the_labelled_people(
    tiny_recipe: Callable[..., Path], tiny_shards: Path, tiny_valid: Path
) -> None:
    from fpd_accel.config.plan import total_steps

    values = {"teacher.weights": str(tiny_valid), "distill.mode": "fpd", "distill.mask": "all", "train.steps": "null"}
    overrides = [f"{key}={value}" for key, value in values.items()] + ["train.epochs=3"]
    recipe = load_recipe(tiny_recipe(), overrides)
    mixed = load_recipe(tiny_recipe(), [*overrides, f"data.unlabelled={{shards: {tiny_valid}, share: 0.75}}"])
    assert total_steps(mixed.train, mixed.data, 40) == 4 * total_steps(recipe.train, recipe.data, 40) == 4 * 30


# --- runs -------------------------------------------------------------------------------------------------------------


def test_alpha_zero_is_bit_for_bit_a_run_without_a_teacher(
    tiny_recipe: Callable[..., Path], teacher_folder: Callable[..., Path], tmp_path: Path
) -> None:
    train(tiny_recipe(run={"name": "normal"}, data={"valid": None}))
    distilled = tiny_recipe(
        run={"name": "alpha0"},
        data={"valid": None},
        teacher={"weights": str(teacher_folder())},
        distill={"mode": "fpd", "alpha": 0.0},
    )
    train(distilled)
    students = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("normal", "alpha0")]
    assert all(torch.equal(value, students[1][key]) for key, value in students[0].items())
    assert [r["train_loss"] for r in training(tmp_path / "normal")] == [
        r["train_loss"] for r in training(tmp_path / "alpha0")
    ]


@pytest.mark.parametrize(
    ("codec", "student", "teacher", "distill"),
    [
        ("udp", "tiny_w8", ("tiny_w16", "udp"), {}),
        ("dark", "tiny_w8", ("tiny_w16", "heatmap"), {"mask": "all", "distance": "kl"}),
        ("simcc", "tiny_w8_simcc", ("tiny_w16", "heatmap"), {"distance": "kl"}),
        (
            "simcc",
            "tiny_w8_simcc",
            ("tiny_w16_simcc", "simcc"),
            {"distance": "kl", "mask": "confident", "confidence": 0.0},
        ),
    ],
)
def test_every_codec_trains_evaluates_and_predicts(
    codec: str,
    student: str,
    teacher: tuple[str, str],
    distill: dict,
    tiny_recipe: Callable[..., Path],
    teacher_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    from fpd_accel import Predictor

    recipe = tiny_recipe(
        run={"name": "run"},
        codec={"name": codec},
        student={"arch": student},
        teacher={"weights": str(teacher_folder(*teacher))},
        distill={"mode": "fpd", **distill},
        train={"steps": 2},
        log={"pictures_every_steps": 2},
    )
    train(recipe)
    assert (tmp_path / "run" / "pictures" / "step_00000002.png").stat().st_size > 1000
    assert all(record["train_kd_pose_loss"] > 0 for record in training(tmp_path / "run"))
    predictor = Predictor(tmp_path / "run" / "best")
    assert predictor.config.codec.name == codec
    poses = predictor(np.zeros((80, 90, 3), np.uint8), np.array([[10.0, 10.0, 40.0, 60.0]]))
    assert poses.keypoints.shape == (1, 17, 2)


def test_a_bare_teacher_file_is_what_the_recipe_says(
    tiny_recipe: Callable[..., Path], teacher_folder: Callable[..., Path]
) -> None:
    teacher = {"weights": str(teacher_folder() / "model.safetensors"), "arch": "tiny_w16", "codec": {"name": "udp"}}
    train(tiny_recipe(codec={"name": "udp"}, teacher=teacher, distill={"mode": "fpd"}, train={"steps": 1}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("arch", "codec", "distance"),
    [
        ("tiny_w8", "heatmap", "mse"),
        ("tiny_w8", "dark", "kl"),
        ("tiny_w8", "udp", "mse"),
        ("tiny_w8_simcc", "simcc", "kl"),
    ],
)
def test_the_objective_never_waits_for_the_gpu(
    arch: str, codec: str, distance: str, without_waiting: Callable[[], AbstractContextManager[None]]
) -> None:
    from fpd_accel.codecs import create_codec
    from fpd_accel.training.teacher import Teacher

    student = create_model(arch, 17, input_size=(64, 64)).cuda()
    teacher = Teacher(create_model("tiny_w16", 17), device="cuda")
    teacher_codec = CODEC if codec == "simcc" else None
    distiller = Distiller(
        student, teacher, create_codec(codec, (64, 64)), mask="confident",
        options=Distill(distance=distance), teacher_codec=teacher_codec,
    )  # fmt: skip
    batch = random_batch().to("cuda")
    distiller(batch).total.backward()  # the first time, constants are copied
    torch.cuda.synchronize()
    with without_waiting():
        losses = distiller(batch)
        losses.total.backward()
        accuracy(losses.predicted, losses.target)
