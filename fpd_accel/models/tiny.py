"""Tiny: a residual U-shaped network that learns from scratch within minutes on two processor cores.

For tests and first steps. It follows U-Net (Ronneberger, Fischer, Brox, MICCAI 2015) with residual blocks (He, Zhang,
Ren, Sun, CVPR 2016) and skips that are added instead of concatenated. Shapes, with `width` = w:

    images                3 channels, stride 1
    stem                  w at stride 4     two strided convolutions
    down8, down16         2w at stride 8, 4w at stride 16: a strided convolution and residual blocks
    up8, up4              back to 2w and w: 1x1 convolution, nearest upsampling, plus the skip, one residual block
    head                  keypoints at stride 4

A residual block costs the same at every stride (a quarter of the positions, twice the input and output channels), so
most of them are at strides 8 and 16, where they see more of the person and need less memory.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fpd_accel.models.base import Heatmaps, Images, PoseModel, convolution, initialise


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside an identity, with a ReLU after the sum; the shape stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            *convolution(channels, channels), nn.ReLU(inplace=True), *convolution(channels, channels)
        )

    def forward(self, feature: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
        """Return the refined feature."""
        return F.relu(feature + self.change(feature), inplace=True)


def down(inputs: int, outputs: int, *, blocks: int) -> nn.Sequential:
    """Return a strided convolution that halves the size, followed by residual blocks."""
    return nn.Sequential(
        *convolution(inputs, outputs, stride=2),
        nn.ReLU(inplace=True),
        *(ResidualBlock(outputs) for _ in range(blocks)),
    )


class Up(nn.Module):
    """Upsampling of coarse features to the size and channels of a skip, which is added, and a residual block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(*convolution(inputs, outputs, kernel=1))
        self.refine = ResidualBlock(outputs)

    def forward(
        self, coarse: Float[Tensor, "batch inputs half_h half_w"], skip: Float[Tensor, "batch outputs h w"]
    ) -> Float[Tensor, "batch outputs h w"]:
        """Return the refined sum of both features."""
        enlarged = F.interpolate(self.reduce(coarse), scale_factor=2, mode="nearest")
        return self.refine(F.relu(enlarged + skip, inplace=True))


class TinyPose(PoseModel):
    """The network above, with one stage. `width` is the number of channels at stride 4, an even number."""

    input_multiple: ClassVar[int] = 16
    units: ClassVar[tuple[str, ...]] = ("ResidualBlock",)

    def __init__(self, num_keypoints: int, *, width: int) -> None:
        super().__init__(num_keypoints)
        self.stem = nn.Sequential(
            *convolution(3, width // 2, stride=2),
            nn.ReLU(inplace=True),
            *convolution(width // 2, width, stride=2),
            nn.ReLU(inplace=True),
        )
        self.down8 = down(width, 2 * width, blocks=2)
        self.down16 = down(2 * width, 4 * width, blocks=3)
        self.up8 = Up(4 * width, 2 * width)
        self.up4 = Up(2 * width, width)
        self.head = nn.Conv2d(width, num_keypoints, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        initialise(self.head)  # near zero, as nearly all of a heatmap is

    def forward(self, images: Images) -> Heatmaps:
        """Return the heatmaps at a quarter of the input size; raise ModelError unless 16 divides the input size."""
        self.check_input(images)
        stride4 = self.stem(images)
        stride8 = self.down8(stride4)
        stride16 = self.down16(stride8)
        return (self.head(self.up4(self.up8(stride16, stride8), stride4)),)
