import math
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import config

from fpd_accel.codecs import HeatmapCodec
from fpd_accel.errors import UserError

FIXTURE = Path(__file__).parents[1].parent / "shared" / "reference" / "coco_val_inputs.npz"
STRIDE = 4  # input pixels per heatmap cell of the default codec


def slow_encode(keypoints, visible, heatmap_size, stride, sigma):
    """Return the heatmap by its definition, cell by cell, in double precision."""
    batch, joints = visible.shape
    height, width = heatmap_size
    heatmaps, weight = np.zeros((batch, joints, height, width)), np.array(visible, dtype=np.float64)
    for b, k in np.ndindex(batch, joints):
        x0, y0 = (int(float(value) / stride + 0.5) for value in keypoints[b, k])
        reach = 3 * sigma
        if x0 - reach >= width or y0 - reach >= height or x0 + reach + 1 < 0 or y0 + reach + 1 < 0:
            weight[b, k] = 0
        if weight[b, k] > 0.5:
            for y, x in np.ndindex(height, width):
                if abs(x - x0) <= reach and abs(y - y0) <= reach:
                    heatmaps[b, k, y, x] = math.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * sigma**2))
    return heatmaps, weight


def encode_one(x, y, visible=1.0):
    heatmaps, weight = HeatmapCodec().encode(torch.tensor([[[x, y]]]), torch.tensor([[visible]]))
    return heatmaps[0, 0], float(weight)


@pytest.mark.skipif(not FIXTURE.is_file(), reason="no published numbers beside this checkout")
def test_targets_of_real_people_are_those_of_the_published_code():
    with np.load(FIXTURE) as fixture:
        keypoints, visible = fixture["joints"][..., :2], fixture["joints_vis"][..., 0]
        target, target_weight = fixture["target"], fixture["weight"][..., 0]
    for dtype in (torch.float64, torch.float32):
        heatmaps, weight = HeatmapCodec().encode(torch.tensor(keypoints, dtype=dtype), torch.tensor(visible))
        np.testing.assert_allclose(heatmaps.numpy(), target, rtol=0, atol=1e-6)  # of a peak of 1
        np.testing.assert_array_equal(weight.numpy(), target_weight)


@pytest.mark.parametrize("sigma", [2.0, 3.0])
def test_targets_equal_a_loop_over_cells_inside_and_around_the_borders(sigma):
    random = np.random.default_rng(0)
    keypoints = random.uniform(-60, 180, size=(4, 25, 2))  # pixels of a 128 x 96 input: a margin beyond every border
    keypoints[-1] = np.round(keypoints[-1])  # ties of the rounding
    visible = random.choice([0.0, 0.4, 0.6, 1.0], size=(4, 25))
    codec = HeatmapCodec(input_size=(128, 96), heatmap_size=(32, 24), sigma=sigma)
    heatmaps, weight = codec.encode(torch.tensor(keypoints), torch.tensor(visible))
    slow_heatmaps, slow_weight = slow_encode(keypoints, visible, (32, 24), STRIDE, sigma)
    assert {0.0, 1.0} <= set(slow_heatmaps.max(axis=(2, 3)).ravel())
    np.testing.assert_allclose(heatmaps.numpy(), slow_heatmaps, rtol=0, atol=1e-6)  # of a peak of 1
    np.testing.assert_allclose(weight.numpy(), slow_weight, rtol=1e-7)


# A patch reaches 6 cells to each side: its exclusive end is the centre's cell + 7.
@pytest.mark.parametrize(
    ("cell", "weight", "drawn_columns"),
    [(-8, 0.0, 0), (-7, 1.0, 0), (-6, 1.0, 1), (0, 1.0, 7), (24, 1.0, 13), (47, 1.0, 7), (53, 1.0, 1), (54, 0.0, 0)],
)
def test_weight_survives_until_the_patch_ends_two_cells_before_the_heatmap(cell, weight, drawn_columns):
    # Truncation towards zero rounds negative coordinates up by one cell more than positive ones.
    x = (cell - 0.5) * STRIDE if cell < 0 else cell * STRIDE
    heatmap, found = encode_one(float(x), 128.0)
    assert found == weight
    assert int((heatmap > 0).any(dim=0).sum()) == drawn_columns


@pytest.mark.parametrize(("x", "cell"), [(1.9, 0), (2.0, 1), (-3.0, 0), (-5.9, 0), (5.9, 1), (6.0, 2)])
def test_centers_round_half_up_and_truncate_towards_zero_left_of_the_image(x, cell):
    heatmap, _ = encode_one(x, 0.0)
    assert heatmap[0, cell] == 1.0
    assert heatmap.max() == 1.0


@pytest.mark.parametrize("visible", [0.0, 0.4, 0.5])
def test_joints_of_at_most_half_a_weight_keep_it_and_draw_nothing(visible):
    heatmap, weight = encode_one(100.0, 100.0, visible)
    assert weight == pytest.approx(visible)
    assert not heatmap.any()


def test_nobody_visible_gives_empty_targets_even_for_keypoints_that_are_not_numbers():
    keypoints = torch.full((1, 3, 2), float("nan"))
    for visible in (torch.zeros(1, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)):
        heatmaps, weight = HeatmapCodec().encode(keypoints, visible)
        assert not heatmaps.any()
        assert not weight.any()
        assert heatmaps.dtype == weight.dtype == torch.float32


def test_heatmap_and_input_may_differ_in_aspect():
    codec = HeatmapCodec(input_size=(64, 96), heatmap_size=(32, 24), sigma=1.0)
    heatmaps, _ = codec.encode(torch.tensor([[[48.0, 32.0]]]), torch.ones(1, 1))
    assert heatmaps[0, 0, 16, 12] == 1.0


def test_encoding_reads_no_value_back_from_the_device():
    # The meta device has no values: reading one back raises.
    heatmaps, weight = HeatmapCodec().encode(torch.empty(2, 17, 2, device="meta"), torch.ones(2, 17, device="meta"))
    assert heatmaps.shape == (2, 17, 64, 48)
    assert weight.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_encoding_on_a_gpu_equals_the_cpu_and_never_synchronises(without_waiting):
    keypoints = torch.rand(8, 17, 2, generator=torch.Generator().manual_seed(0)) * 300 - 50
    expected, expected_weight = HeatmapCodec().encode(keypoints, torch.ones(8, 17))
    keypoints, visible = keypoints.cuda(), torch.ones(8, 17).cuda()
    with without_waiting():
        heatmaps, weight = HeatmapCodec().encode(keypoints, visible)
    torch.testing.assert_close(heatmaps.cpu(), expected, rtol=0, atol=1e-6)  # of a peak of 1
    torch.testing.assert_close(weight.cpu(), expected_weight, rtol=0, atol=0)


@pytest.fixture
def unchecked_types():
    """Disable the tests' type checker, which would refuse some mistakes before the code with the message."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_size", (256,)),
        ("input_size", (256, 0)),
        ("heatmap_size", (64.0, 48.0)),
        ("heatmap_size", (-64, 48)),
        ("sigma", 0.0),
        ("sigma", -1.0),
        ("sigma", math.inf),
        ("sigma", math.nan),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_impossible_sizes_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        HeatmapCodec(**{field: value})


@pytest.mark.usefixtures("unchecked_types")
def test_codecs_are_values():
    assert HeatmapCodec(input_size=[256, 192]) == HeatmapCodec()
    assert len({HeatmapCodec(heatmap_size=[64, 48]), HeatmapCodec(), HeatmapCodec(sigma=3.0)}) == 2
