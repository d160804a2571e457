"""Multi-scale testing: heatmaps of larger and smaller regions are averaged in the cells of the region at scale 1."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.schema import Evaluate
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream
from fpd_accel.decode import decode_heatmaps, fuse_scales
from fpd_accel.evaluation.evaluate import evaluate


def bump(x: float, y: float, *, sigma: float = 2.0, size: tuple[int, int] = (24, 18)) -> Tensor:
    """Return a heatmap (1, 1, height, width) with a Gaussian at (x, y) cells."""
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in size), indexing="ij")
    return torch.exp(-((columns - x).square() + (rows - y).square()) / (2 * sigma**2))[None, None]


@pytest.mark.parametrize("scale", [0.8, 1.25, 1.5])
def test_a_value_lies_at_the_same_point_of_the_image_whatever_the_region(scale: float) -> None:
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(18.0), indexing="ij")
    ramp = columns + 2 * rows  # in cells of the region at scale 1; interpolation of a ramp is exact
    # The centre, at half the width and height, is fixed; a cell is `scale` times as large.
    seen_there = ((columns - 9) * scale + 9) + 2 * ((rows - 12) * scale + 12)
    seen = fuse_scales([seen_there[None, None]], [scale])[0, 0]
    shown = slice(3, 20), slice(2, 15)  # also in the smallest of these regions
    torch.testing.assert_close(seen[shown], ramp[shown], atol=1e-4, rtol=0)


def test_one_scale_changes_nothing() -> None:
    heatmaps = torch.rand(2, 3, 24, 18)
    assert torch.equal(fuse_scales([heatmaps], (1.0,)), heatmaps)


def test_the_mean_is_over_the_regions_that_show_a_cell() -> None:
    ones, threes = torch.ones(1, 1, 24, 18), torch.full((1, 1, 24, 18), 3.0)
    fused = fuse_scales([ones, threes], (1.0, 0.5))[0, 0]
    assert fused[0, 0] == 1.0  # outside the smaller region
    assert fused[12, 9] == 2.0
    assert int((fused == 2.0).sum()) == pytest.approx(24 * 18 / 4, rel=0.15)
    torch.testing.assert_close(fuse_scales([ones, threes], (1.0, 1.5)), torch.full((1, 1, 24, 18), 2.0))


class Oracle(nn.Module):
    """A network whose heatmaps are the targets of the next batch, which comes at one scale after the other."""

    def __init__(self, shards: Shards, codec: HeatmapCodec, scales: tuple[float, ...], *, batch: int) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.codec = codec
        self.batches = iter(
            batch
            for batches in zip(
                *(PoseStream(shards, input_size=codec.input_size, batch_size=batch, padding=1.25 * s) for s in scales),
                strict=True,
            )
            for batch in batches
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        batch = next(self.batches)
        assert len(batch) == len(images)
        return (self.codec.encode(batch.keypoints, batch.visible)[0],)


def test_people_are_found_where_they_are_from_several_scales(tiny_valid: object) -> None:
    shards, codec, scales = Shards(str(tiny_valid)), HeatmapCodec((128, 96), (32, 24)), (0.8, 1.0, 1.25)
    options = Evaluate(batch=4, flip_test=False, scales=scales)
    metrics, people = evaluate(
        Oracle(shards, codec, scales, batch=4), shards, input_size=codec.input_size, options=options
    )
    once, others = evaluate(
        Oracle(shards, codec, (1.0,), batch=4),
        shards,
        input_size=codec.input_size,
        options=Evaluate(batch=4, flip_test=False),
    )
    assert metrics["AP50"] > 0.95
    assert metrics["AP"] > once["AP"] - 0.02
    assert people != others


def test_two_regions_agree_on_one_place_in_the_image() -> None:
    centers, sizes = torch.tensor([[50.0, 60.0]]), torch.tensor([[90.0, 120.0]])
    right, _ = decode_heatmaps(
        fuse_scales([bump(10, 10), bump(1 / 1.25 + 9, -2 / 1.25 + 12)], (1.0, 1.25)), centers, sizes
    )
    np.testing.assert_allclose(right[0, 0].numpy(), [50 + 5, 60 - 10], atol=1.3)  # pixels; a quarter of a cell
