import math
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import config

from fpd_accel.codecs import HeatmapCodec
from fpd_accel.decode import argmax_2d, decode_heatmaps, flip_back, fuse_flip, heatmap_accuracy
from fpd_accel.skeleton import COCO

FIXTURE = Path(__file__).parents[1].parent / "shared" / "reference" / "decode_losses_nms.npz"


def whole(heatmaps):
    """Return centre and size of a region in which one heatmap cell is one image pixel."""
    batch, _, height, width = heatmaps.shape
    return torch.tensor([[width / 2, height / 2]]).expand(batch, 2), torch.tensor([[width, height]]).expand(
        batch, 2
    ) * 1.0


def slow_decode(heatmaps, centers, sizes):
    keypoints, scores = np.zeros((*heatmaps.shape[:2], 2)), np.zeros(heatmaps.shape[:2])
    for b, k in np.ndindex(*scores.shape):
        heatmap = heatmaps[b, k].astype(np.float64)
        height, width = heatmap.shape
        y, x = divmod(int(heatmap.argmax()), width)
        scores[b, k] = heatmap.max()
        if scores[b, k] <= 0:
            x = y = 0
        step = np.zeros(2)
        if 1 < x < width - 1 and 1 < y < height - 1:
            step = 0.25 * np.sign([heatmap[y, x + 1] - heatmap[y, x - 1], heatmap[y + 1, x] - heatmap[y - 1, x]])
        keypoints[b, k] = (np.array([x, y]) + step - (width / 2, height / 2)) * sizes[b, 0] / width + centers[b]
    return keypoints, scores


def slow_accuracy(predicted, target, norm_x, norm_y):
    shares = []
    for k in range(target.shape[1]):
        hits = []
        for b in range(target.shape[0]):
            (y, x), (found_y, found_x) = (np.unravel_index(m[b, k].argmax(), m.shape[2:]) for m in (target, predicted))
            x, y = (x, y) if target[b, k].max() > 0 else (0, 0)
            found_x, found_y = (found_x, found_y) if predicted[b, k].max() > 0 else (0, 0)
            if x > 1 and y > 1:
                hits.append(math.hypot((x - found_x) / norm_x, (y - found_y) / norm_y) < 0.5)
        if hits:
            shares.append(np.mean(hits))
    return float(np.mean(shares)) if shares else 0.0


@pytest.mark.skipif(not FIXTURE.is_file(), reason="no published numbers beside this checkout")
def test_decoding_gives_the_keypoints_of_the_published_code():
    with np.load(FIXTURE) as fixture:
        heatmaps, centers = torch.tensor(fixture["heatmaps"]), torch.tensor(fixture["center"])
        sizes = torch.tensor(fixture["scale"]) * 200
        expected, expected_scores = fixture["preds"], fixture["maxvals"][..., 0]
    for dtype in (torch.float16, torch.float32, torch.float64):
        keypoints, scores = decode_heatmaps(heatmaps.to(dtype), centers, sizes)
        np.testing.assert_allclose(keypoints.numpy(), expected, rtol=0, atol=1e-3)  # image pixels
        np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=0, atol=5e-4)  # stored in half precision


def test_decoding_equals_a_loop_over_noise_with_peaks_everywhere():
    random = np.random.default_rng(1)
    heatmaps = random.normal(size=(6, 40, 8, 6)).astype(np.float32)  # small, so that many maxima lie on a border
    heatmaps[0, :5] = -np.abs(heatmaps[0, :5])  # no positive value
    heatmaps[1] = np.round(heatmaps[1])  # ties, of the maximum and of its neighbours
    centers, sizes = (
        random.uniform(0, 600, (6, 2)).astype(np.float32),
        random.uniform(50, 500, (6, 2)).astype(np.float32),
    )
    keypoints, scores = decode_heatmaps(torch.tensor(heatmaps), torch.tensor(centers), torch.tensor(sizes))
    expected, expected_scores = slow_decode(heatmaps, centers, sizes)
    np.testing.assert_allclose(keypoints.numpy(), expected, rtol=0, atol=1e-3)  # image pixels
    np.testing.assert_array_equal(scores.numpy(), expected_scores.astype(np.float32))


@pytest.mark.parametrize(
    ("x", "y", "moves"),
    [
        (1, 3, False),
        (2, 3, True),
        (4, 3, True),
        (5, 3, False),
        (3, 1, False),
        (3, 2, True),
        (3, 6, True),
        (3, 7, False),
    ],
)
def test_the_quarter_step_stops_at_the_second_and_at_the_last_cell(x, y, moves):
    heatmaps = torch.zeros(1, 1, 8, 6)
    heatmaps[0, 0, y, x] = 1.0
    heatmaps[0, 0, y, x - 1] = heatmaps[0, 0, y - 1, x] = 0.5
    keypoints, _ = decode_heatmaps(heatmaps, *whole(heatmaps))
    step = 0.25 if moves else 0.0
    assert keypoints[0, 0].tolist() == pytest.approx([x - step, y - step], abs=1e-5)  # cells


def test_no_refinement_leaves_whole_cells_and_equal_neighbours_do_not_pull():
    heatmaps, _ = HeatmapCodec().encode(torch.tensor([[[96.0, 128.0]]]), torch.ones(1, 1))
    for refine in ("none", "quarter"):
        keypoints, scores = decode_heatmaps(heatmaps, *whole(heatmaps), refine=refine)
        assert keypoints[0, 0].tolist() == [24.0, 32.0]
        assert scores.item() == 1.0


def test_only_the_width_of_the_region_sets_the_scale():
    heatmaps = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    centers, sizes = torch.tensor([[100.0, 50.0], [30.0, 70.0]]), torch.tensor([[96.0, 128.0], [240.0, 320.0]])
    one, _ = decode_heatmaps(heatmaps, centers, sizes)
    other, _ = decode_heatmaps(heatmaps, centers, sizes * torch.tensor([1.0, 7.0]))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_heatmap_without_positive_values_points_at_cell_zero_with_its_score():
    heatmaps = torch.full((1, 2, 8, 6), -1.0)
    heatmaps[0, 0, 4, 3] = -0.5
    heatmaps[0, 1, 4, 3] = 0.0  # not positive either
    coordinates, scores = argmax_2d(heatmaps)
    assert not coordinates.any()
    assert scores.tolist() == [[-0.5, 0.0]]


def test_the_first_of_equal_maxima_wins():
    heatmaps = torch.zeros(1, 1, 8, 6)
    heatmaps[0, 0, [2, 2, 5], [3, 4, 1]] = 1.0
    assert argmax_2d(heatmaps)[0][0, 0].tolist() == [3.0, 2.0]


@pytest.mark.parametrize("size", [(64, 48), (7, 5), (6, 9), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_maximum_is_that_of_one_look_at_all_cells_even_where_they_are_no_numbers(size, dtype):
    heatmaps = torch.randint(-3, 3, (5, 4, *size), generator=torch.Generator().manual_seed(0)).to(dtype)
    heatmaps[0, 0, -1, -1] = torch.nan
    flat = heatmaps.flatten(2)
    index = flat.argmax(dim=2)
    scores = flat.gather(2, index[..., None])[..., 0].float()
    cells = torch.stack((index % size[1], index // size[1]), dim=-1) * (scores > 0)[..., None]
    found, found_scores = argmax_2d(heatmaps)
    torch.testing.assert_close(found, cells.float(), rtol=0, atol=0)
    torch.testing.assert_close(found_scores, scores, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 3)])
def test_tiny_heatmaps_decode_without_a_neighbour_to_look_at(size):
    heatmaps = torch.rand(1, 2, *size)
    keypoints, _ = decode_heatmaps(heatmaps, *whole(heatmaps))
    torch.testing.assert_close(keypoints, argmax_2d(heatmaps)[0])


def test_an_unknown_refinement_is_refused_with_the_choices():
    heatmaps = torch.zeros(1, 1, 8, 6)
    config.update("jaxtyping_disable", True)  # the tests' type checker would refuse it first
    try:
        with pytest.raises(ValueError, match=r"'half' is none of none, quarter"):
            decode_heatmaps(heatmaps, *whole(heatmaps), refine="half")
    finally:
        config.update("jaxtyping_disable", False)


def test_flipping_back_undoes_a_flip_of_image_and_joints():
    heatmaps = torch.rand(2, 17, 8, 6, generator=torch.Generator().manual_seed(0))
    mirrored = torch.stack([heatmaps[:, k] for k in COCO.flip_index], dim=1).flip(-1)
    torch.testing.assert_close(flip_back(mirrored, COCO.flip_index, shift=False), heatmaps, rtol=0, atol=0)
    for flip_index in (COCO.flip_index, torch.tensor(COCO.flip_index)):
        shifted = flip_back(mirrored, flip_index)
        torch.testing.assert_close(shifted[..., 1:], heatmaps[..., :-1], rtol=0, atol=0)
        torch.testing.assert_close(shifted[..., 0], heatmaps[..., 0], rtol=0, atol=0)


def test_fusion_is_the_mean_in_full_precision():
    one, other = (torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    fused = fuse_flip(one, other, (1, 0), shift=False)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, (one.float() + other[:, [1, 0]].flip(-1).float()) / 2, rtol=0, atol=0)
    shifted = (one.float() + flip_back(other, (1, 0), shift=True).float()) / 2
    torch.testing.assert_close(fuse_flip(one, other, (1, 0)), shifted, rtol=0, atol=0)


def test_a_perfect_prediction_is_wholly_accurate():
    target, _ = HeatmapCodec().encode(torch.rand(2, 17, 2) * 150 + 20, torch.ones(2, 17))
    assert float(heatmap_accuracy(target, target)) == 1.0


@pytest.mark.parametrize("reference_norm", [True, False])
def test_accuracy_equals_a_loop_over_joints_and_samples(reference_norm):
    random = np.random.default_rng(2)
    keypoints = random.uniform(-8, 40, (6, 12, 2))
    codec = HeatmapCodec(input_size=(48, 32), heatmap_size=(48, 32), sigma=1.0)
    target, _ = codec.encode(torch.tensor(keypoints), torch.tensor(random.random((6, 12)) > 0.3))
    moved = torch.tensor(keypoints + random.normal(scale=2.0, size=keypoints.shape))
    predicted, _ = codec.encode(moved, torch.ones(6, 12))
    norm_x, norm_y = (4.8, 3.2) if reference_norm else (3.2, 4.8)
    expected = slow_accuracy(predicted.numpy(), target.numpy(), norm_x, norm_y)
    assert 0.2 < expected < 0.9
    found = heatmap_accuracy(predicted, target, reference_norm=reference_norm)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_the_reference_norm_is_stricter_across_than_down():
    # 64 x 48 cells: a tenth of the height is 6.4, of the width 4.8; half of each 3.2 and 2.4 cells.
    target, predicted = torch.zeros(1, 1, 64, 48), torch.zeros(1, 1, 64, 48)
    target[0, 0, 30, 20] = predicted[0, 0, 30, 23] = 1.0
    assert float(heatmap_accuracy(predicted, target)) == 1.0
    assert float(heatmap_accuracy(predicted, target, reference_norm=False)) == 0.0


def test_a_distance_of_exactly_half_the_norm_is_wrong():
    target, predicted = torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 40, 40)
    target[0, 0, 20, 20] = predicted[0, 0, 20, 22] = 1.0
    assert float(heatmap_accuracy(predicted, target)) == 0.0


@pytest.mark.parametrize("cell", [(0, 0), (1, 9), (9, 1), None])
def test_accuracy_without_a_target_that_counts_is_zero(cell):
    target = torch.zeros(1, 1, 16, 12)
    if cell is not None:
        target[0, 0, cell[0], cell[1]] = 1.0
    assert float(heatmap_accuracy(target, target)) == 0.0


def test_decoding_reads_no_value_back_from_the_device():
    # The meta device has no values: reading one back raises.
    heatmaps, boxes = torch.empty(2, 17, 64, 48, device="meta"), torch.empty(2, 2, device="meta")
    keypoints, scores = decode_heatmaps(heatmaps, boxes, boxes)
    assert keypoints.shape == (2, 17, 2)
    assert scores.shape == (2, 17)
    fused = fuse_flip(heatmaps, heatmaps, torch.empty(17, dtype=torch.int64, device="meta"))
    assert heatmap_accuracy(fused, heatmaps).shape == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoding_on_a_gpu_equals_the_cpu_and_never_synchronises(without_waiting):
    heatmaps = torch.randn(4, 17, 64, 48, generator=torch.Generator().manual_seed(0))
    centers, sizes = torch.full((4, 2), 100.0), torch.full((4, 2), 200.0)
    flip_index = torch.tensor(COCO.flip_index)
    fused = fuse_flip(heatmaps, heatmaps, flip_index)
    expected = (*decode_heatmaps(fused, centers, sizes), heatmap_accuracy(fused, heatmaps))
    heatmaps, centers, sizes, flip_index = (t.cuda() for t in (heatmaps, centers, sizes, flip_index))
    with without_waiting():
        fused = fuse_flip(heatmaps, heatmaps, flip_index)
        found = (*decode_heatmaps(fused, centers, sizes), heatmap_accuracy(fused, heatmaps))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-3)  # image pixels, scores, share
