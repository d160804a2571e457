"""What a stage of a pose network puts out: heatmaps, a tensor (B, K, h, w), or SimCC's pair of distributions."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

STRIDE = 4  # input pixels per heatmap cell, of every network here
BINS_PER_PIXEL = 2  # SimCC's k


class SimCC(NamedTuple):
    """Keypoints as one distribution over bins along each axis (Li et al., SimCC, ECCV 2022).

    Logits where a network put them out, probabilities where a codec or a teacher's heatmaps made them.
    """

    x: Float[Tensor, "batch joint x_bin"]
    y: Float[Tensor, "batch joint y_bin"]

    def map(self, function: Callable[[Tensor], Tensor]) -> "SimCC":
        return SimCC(function(self.x), function(self.y))

    def softmax(self) -> "SimCC":
        """Probabilities, float32, of logits."""
        return self.map(lambda logits: logits.float().softmax(dim=-1))


Output = Float[Tensor, "batch joint heatmap_height heatmap_width"] | SimCC


def each(output: Output, function: Callable[[Tensor], Tensor]) -> Output:
    """The same function of the heatmaps, or of both distributions."""
    return output.map(function) if isinstance(output, SimCC) else function(output)


def mean_output(stages: tuple[Output, ...]) -> Output:
    """The mean over stages, float32; the stages have one shape."""
    if isinstance(stages[0], SimCC):
        pairs = [stage for stage in stages if isinstance(stage, SimCC)]
        return SimCC(*(sum(axis.float() for axis in axes) / len(pairs) for axes in zip(*pairs, strict=True)))
    return sum(stage.float() for stage in stages) / len(stages)  # type: ignore[union-attr, return-value, misc]
