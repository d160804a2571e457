"""Networks outside the package: built by name, probed, kept in model folders, evaluated; and what is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fpd_accel import Predictor, Shards, evaluate, load_model
from fpd_accel.cli import main
from fpd_accel.config.schema import Evaluate
from fpd_accel.errors import ModelError, WeightsError
from fpd_accel.models.base import PoseModel, check_outputs
from fpd_accel.models.create import create_model, probe_model
from fpd_accel.models.names import MODELS
from fpd_accel.outputs import SimCC
from fpd_accel.skeleton import COCO
from fpd_accel.weights.model_cost import model_cost
from fpd_accel.weights.model_folder import ModelConfig, read_model_config, save_model

SOURCE = """
import torch
from torch import nn

from fpd_accel.models.base import PoseModel
from fpd_accel.outputs import SimCC


class Plain(nn.Module):
    stride = 4

    def __init__(self, num_keypoints, width=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, self.stride, self.stride), nn.Conv2d(width, num_keypoints, 1))

    def forward(self, images):
        return (self.layers(images),)


class Coarse(Plain):
    stride = 8


class Bare(Plain):
    def forward(self, images):
        return super().forward(images)[0]


class Empty(Plain):
    def forward(self, images):
        return ()


class Mapped(Plain):
    def forward(self, images):
        return ({"heatmaps": super().forward(images)[0]},)


class FirstImage(Plain):
    def forward(self, images):
        return (super().forward(images)[0][:1],)


class Failing(Plain):
    def forward(self, images):
        raise KeyError("no such layer")


class NeedsNumbers(Plain):
    def __init__(self, num_keypoints):
        super().__init__(num_keypoints)
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]

    def forward(self, images):
        assert images.sum().item() == 0
        return super().forward(images)


class Fixed(nn.Module):
    def __init__(self, *, input_size, joints):
        super().__init__()
        height, width = input_size
        self.x, self.y = nn.Linear(width, 2 * width), nn.Linear(height, 2 * height)
        self.joints = joints

    def forward(self, images):
        rows, columns = images[:, :1].mean(-1), images[:, :1].mean(-2)
        return (SimCC(self.x(columns).expand(-1, self.joints, -1), self.y(rows).expand(-1, self.joints, -1)),)


class Derived(PoseModel):
    input_multiple = 8

    def __init__(self, num_keypoints):
        super().__init__(num_keypoints)
        self.layer = nn.Conv2d(3, num_keypoints, 4, 4)

    def forward(self, images):
        self.check_input(images)
        return (self.layer(images),)


class NoNetwork:
    def __init__(self):
        raise AssertionError("must not be called")


def function():
    raise AssertionError("must not be called")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """A function that names a class of a module which Python can import, as long as the test runs."""
    import sys

    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_networks.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield lambda name: f"own_networks:{name}"
    sys.modules.pop("own_networks", None)


# ---- created by name ----


def test_a_class_gets_the_arguments_that_it_takes(own: Callable[[str], str]) -> None:
    plain = create_model(own("Plain"), 5, arguments={"width": 6})
    assert [layer.out_channels for layer in plain.layers] == [6, 5]
    fixed = create_model(own("Fixed"), 5, input_size=(64, 32), arguments={"joints": 3})
    assert (fixed.joints, fixed.x.in_features, fixed.y.in_features) == (3, 32, 64)
    assert isinstance(create_model(own("Derived"), 5), PoseModel)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("nowhere.at_all:Net", {}, "nowhere.at_all cannot be imported: No module named 'nowhere'; .* PYTHONPATH"),
        ("own_networks:Missing", {}, "own_networks has no Missing"),
        ("own_networks:NoNetwork", {}, "NoNetwork is not a class derived from torch.nn.Module"),
        ("own_networks:function", {}, "function is not a class derived from torch.nn.Module"),
        ("os:system", {}, "system is not a class derived from torch.nn.Module"),
        ("own_networks:Plain", {"wdith": 4}, "cannot be built: .* unexpected keyword argument 'wdith'"),
        ("own_networks:Fixed", {}, "cannot be built: .* missing 1 required keyword-only argument: 'joints'"),
    ],
)
def test_a_class_that_cannot_be_built_is_refused_by_name(
    name: str, arguments: dict, words: str, own: Callable[[str], str]
) -> None:
    with pytest.raises(ModelError, match=f"^{name}: {words}"):
        create_model(name, 5, arguments=arguments)
    with pytest.raises(ModelError, match=f"^{name}: {words}"):
        probe_model(name, 5, (64, 64), arguments)


def test_networks_of_the_package_take_no_arguments() -> None:
    with pytest.raises(ModelError, match="tiny_w8 takes no arguments, but got width"):
        create_model("tiny_w8", 5, arguments={"width": 8})


# ---- probed ----


@pytest.mark.parametrize("name", [*MODELS, "hourglass_1x32", "hourglass_3x32", "tiny_w8_simcc", "vitpose_s_simcc"])
def test_every_network_is_probed_without_memory_and_without_a_random_number(name: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = probe_model(name, 5, (64, 128)).model
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", ["hrnet_w18", "pose_resnet_18_simcc", "hourglass_1x32", "tiny_w8", "vitpose_s"])
def test_a_probe_refuses_a_size_that_does_not_fit(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} takes images whose height and width are multiples of .* 100 x 64"):
        probe_model(name, 5, (100, 64))


@pytest.mark.parametrize("name", ["Plain", "Derived", "NeedsNumbers"])
def test_own_networks_are_probed_without_a_random_number(name: str, own: Callable[[str], str]) -> None:
    before = torch.get_rng_state()
    model = probe_model(own(name), 5, (64, 32)).model
    assert torch.equal(torch.get_rng_state(), before)
    # On the CPU only if it computes with numbers, which the meta device has not.
    assert next(model.parameters()).device.type == ("cpu" if name == "NeedsNumbers" else "meta")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Bare", r"the output is a tensor of shape \(2, 5, 16, 8\); forward must return a tuple"),
        ("Empty", "the output is an empty tuple"),
        ("Mapped", r"stage 0 of the output is of type dict; .* must be \(2, 5, 16, 8\)"),
        ("FirstImage", r"stage 0 of the output is a tensor of shape \(1, 5, 16, 8\); .* must be \(2, 5, 16, 8\)"),
        (
            "Coarse",
            r"stage 0 .* shape \(2, 5, 8, 4\); for 5 keypoints and images of 64 x 32 .* must be \(2, 5, 16, 8\)",
        ),
        ("Failing", "fails on images of 64 x 32 .*: KeyError: 'no such layer'"),
        ("Derived", "fails on images of 60 x 32 .*: Derived takes images .* multiples of 8"),
    ],
)
def test_a_probe_refuses_wrong_outputs_by_name(name: str, words: str, own: Callable[[str], str]) -> None:
    with pytest.raises(ModelError, match=f"^{own(name)}: {words}"):
        probe_model(own(name), 5, (60 if name == "Derived" else 64, 32))


def test_heatmaps_and_simcc_are_checked_stage_by_stage() -> None:
    def check(*stages: Tensor | SimCC) -> None:
        check_outputs(stages, arch="net", num_keypoints=3, input_size=(64, 32))

    good, logits = torch.zeros(7, 3, 16, 8), SimCC(torch.zeros(7, 3, 64), torch.zeros(7, 3, 128))
    check(good, good)
    check(logits)
    with pytest.raises(ModelError, match=r"net: stage 1 .* must be \(batch, 3, 16, 8\)"):
        check(good, good.mT)
    with pytest.raises(ModelError, match=r"net: stage 0 .* must be \(batch, 3, 64\)"):
        check(SimCC(logits.y, logits.x))
    with pytest.raises(ModelError, match="net: the output is of type SimCC; forward must return a tuple"):
        check_outputs(logits, arch="net", num_keypoints=3, input_size=(64, 32))


# ---- in a model folder ----


def write_folder(folder: Path, arch: str) -> tuple[ModelConfig, nn.Module]:
    config = ModelConfig(arch=arch, arguments={"width": 6}, skeleton=COCO, input_size=(64, 64))
    torch.manual_seed(0)
    model = config.create_model()
    save_model(folder, model.state_dict(), config)
    return config, model


def test_a_model_folder_of_an_own_network_loads_evaluates_and_predicts(
    own: Callable[[str], str], tmp_path: Path, tiny_valid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, model = write_folder(tmp_path / "model", own("Plain"))
    assert read_model_config(tmp_path / "model") == config
    loaded = load_model(tmp_path / "model")
    assert not loaded.training
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    metrics, people = evaluate(loaded, Shards(tiny_valid), input_size=(64, 64), options=Evaluate(batch=4))
    assert 0 <= metrics["AP"] <= 1
    assert people
    image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    assert Predictor(tmp_path / "model")(image, torch.tensor([[0.0, 0.0, 64.0, 64.0]]).numpy()).scores.shape == (1, 17)
    parameters, macs = model_cost(config)
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    assert macs == 16 * 16 * (3 * 4 * 4 * 6 + 6 * 17)
    assert main(["info", str(tmp_path / "model")]) == 0
    assert "own_networks:Plain with width 6" in capsys.readouterr().out


def test_weights_of_an_own_network_are_loaded_strictly(own: Callable[[str], str], tmp_path: Path) -> None:
    config, model = write_folder(tmp_path / "model", own("Plain"))
    save_model(tmp_path / "model", model.state_dict(), config.model_copy(update={"arguments": {"width": 7}}))
    with pytest.raises(WeightsError, match=r"do not fit Plain: .*\n.* layers\.0\.weight is \(6, 3, 4, 4\) in the file"):
        load_model(tmp_path / "model")


def test_cost_of_a_network_that_needs_numbers_is_counted_on_the_cpu(own: Callable[[str], str]) -> None:
    config = ModelConfig(arch=own("NeedsNumbers"), skeleton=COCO, input_size=(64, 64))
    assert model_cost(config)[1] == 16 * 16 * (3 * 4 * 4 * 4 + 4 * 17)


def test_description_of_a_network_of_the_package_has_no_arguments(tmp_path: Path) -> None:
    config = ModelConfig(arch="tiny_w8", skeleton=COCO, input_size=(64, 64))
    save_model(tmp_path, config.create_model().state_dict(), config)
    assert "arguments" not in json.loads((tmp_path / "config.json").read_text())
    assert read_model_config(tmp_path) == config


def test_code_in_a_model_folder_is_not_run(
    own: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "model", own("Plain"))
    for path in ("planted.py", "planted_package/__init__.py", "planted_space/inner.py"):
        (tmp_path / "model" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / path).write_text(f"raise AssertionError\n{SOURCE}")
    description = tmp_path / "model" / "config.json"
    monkeypatch.chdir(tmp_path / "model")
    monkeypatch.syspath_prepend("")
    for module in ("planted", "planted_package", "planted_space.inner"):
        config = json.loads(description.read_text()) | {"arch": f"{module}:Plain"}
        description.write_text(json.dumps(config))
        for folder in (".", tmp_path / "model"):
            with pytest.raises(WeightsError, match="would be imported from the folder itself"):
                load_model(folder)


def test_a_missing_module_is_named_where_a_model_folder_is_loaded(own: Callable[[str], str], tmp_path: Path) -> None:
    write_folder(tmp_path / "model", own("Plain"))
    description = tmp_path / "model" / "config.json"
    description.write_text(description.read_text().replace("own_networks:", "gone.networks:"))
    with pytest.raises(ModelError, match=r"gone\.networks:Plain: gone\.networks cannot be imported"):
        load_model(tmp_path / "model")
