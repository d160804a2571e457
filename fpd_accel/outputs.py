"""The outputs of a pose network's stages: heatmaps, a tensor (B, K, h, w), or SimCC's pair of distributions."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Float32
from torch import Tensor

STRIDE = 4  # input pixels per heatmap cell along each axis, in every architecture of the package
BINS_PER_PIXEL = 2  # SimCC's splitting factor k

Heatmaps = Float[Tensor, "batch joint height width"]
PerJoint = Float[Tensor, "batch joint"]
Scalar = Float32[Tensor, ""]


class SimCC(NamedTuple):
    """One distribution per keypoint over the bins of each axis (Li et al., SimCC, ECCV 2022).

    A network returns logits. Codecs return probabilities, and so does `marginals` of a teacher's heatmaps.
    """

    x: Float[Tensor, "batch joint x_bin"]
    y: Float[Tensor, "batch joint y_bin"]

    def map(self, function: Callable[[Tensor], Tensor]) -> "SimCC":
        """Apply a function to both distributions."""
        return SimCC(function(self.x), function(self.y))

    def softmax(self) -> "SimCC":
        """Convert logits to probabilities, float32."""
        return self.map(lambda logits: logits.float().softmax(dim=-1))


Output = Float[Tensor, "batch joint heatmap_height heatmap_width"] | SimCC


def each(output: Output, function: Callable[[Tensor], Tensor]) -> Output:
    """Apply a function to heatmaps, or to both distributions of SimCC."""
    return output.map(function) if isinstance(output, SimCC) else function(output)


def mean_output(stages: tuple[Output, ...]) -> Output:
    """Return the mean over stages of one shape, float32."""
    if isinstance(stages[0], SimCC):
        pairs = [stage for stage in stages if isinstance(stage, SimCC)]
        return SimCC(*(sum(axis.float() for axis in axes) / len(pairs) for axes in zip(*pairs, strict=True)))
    return sum(stage.float() for stage in stages) / len(stages)  # type: ignore[union-attr, return-value, misc]
