"""Stacked hourglass: U-shaped networks in a row; each one refines the heatmaps of the one before.

Stacked Hourglass Networks for Human Pose Estimation (Newell, Yang, Deng, ECCV 2016), section 3; parameter names equal
those of the published `hourglass_4x128` and `hourglass_8x256`. All features inside the hourglasses have `features`
channels at stride 4 and, level by level, 8, 16, 32 and 64.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fpd_accel.models.base import Heatmaps, Images, PoseModel

DEPTH = 4
EXPANSION = 2


class PreActivationBottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each after normalisation and ReLU, beside a skip connection."""

    def __init__(self, inputs: int, planes: int) -> None:
        """Map `inputs` channels to twice `planes`; the skip is a 1x1 convolution if these numbers differ."""
        super().__init__()
        outputs = EXPANSION * planes
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, planes, kernel_size=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, kernel_size=3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(planes), nn.Conv2d(planes, outputs, kernel_size=1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential() if inputs == outputs else nn.Sequential(nn.Conv2d(inputs, outputs, 1))

    def forward(self, feature: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h w"]:
        """Return the sum of the three convolutions and the skip."""
        change = self.conv1(self.relu(self.bn1(feature)))
        change = self.conv2(self.relu(self.bn2(change)))
        change = self.conv3(self.relu(self.bn3(change)))
        return change + self.downsample(feature)


def residual(inputs: int, planes: int) -> nn.Sequential:
    """Return a sequence of one bottleneck, which gives the parameters their published names."""
    return nn.Sequential(PreActivationBottleneck(inputs, planes))


class Level(nn.ModuleList):
    """The residuals of one size: skip, way down, way up, and at the deepest level the middle."""

    def forward(self, feature: Float[Tensor, "batch features h w"], *deeper: nn.Module) -> Tensor:
        """Return the skip plus the halved feature after the deeper levels (deepest first); the shape stays."""
        halved = self[1](F.max_pool2d(feature, kernel_size=2))
        inside = deeper[-1](halved, *deeper[:-1]) if deeper else self[3](halved)
        return self[0](feature) + F.interpolate(self[2](inside), scale_factor=2, mode="nearest")


class Hourglass(nn.Module):
    """Four nested levels, from `hg[0]`, the deepest, to `hg[3]`; the output has the shape of the input."""

    def __init__(self, features: int) -> None:
        super().__init__()
        planes = features // EXPANSION
        self.hg = nn.ModuleList(
            Level(residual(features, planes) for _ in range(4 if level == 0 else 3)) for level in range(DEPTH)
        )

    def forward(self, feature: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features h w"]:
        """Return the feature after all levels."""
        *deeper, outermost = self.hg
        return outermost(feature, *deeper)


class StackedHourglass(PoseModel):
    """A network of `stacks` hourglasses, one stage each, with PyTorch's initialisation and biased convolutions."""

    input_multiple: ClassVar[int] = 64
    units: ClassVar[tuple[str, ...]] = ("Hourglass",)

    def __init__(self, num_keypoints: int, *, stacks: int, features: int) -> None:
        """Take a multiple of 4, at least 8, as `features`; the stem quarters it."""
        super().__init__(num_keypoints)
        planes = features // EXPANSION
        self.conv1 = nn.Conv2d(3, features // 4, kernel_size=7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm2d(features // 4)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = residual(features // 4, features // 4)
        self.layer2 = residual(features // 2, features // 2)
        self.layer3 = residual(features, planes)

        self.hg = nn.ModuleList(Hourglass(features) for _ in range(stacks))
        self.res = nn.ModuleList(residual(features, planes) for _ in range(stacks))
        self.fc = nn.ModuleList(
            nn.Sequential(nn.Conv2d(features, features, 1), nn.BatchNorm2d(features), self.relu) for _ in range(stacks)
        )
        self.score = nn.ModuleList(nn.Conv2d(features, num_keypoints, 1) for _ in range(stacks))
        # Each stack but the last passes on its features and its heatmaps, both mapped back to features.
        self.fc_ = nn.ModuleList(nn.Conv2d(features, features, 1) for _ in range(stacks - 1))
        self.score_ = nn.ModuleList(nn.Conv2d(num_keypoints, features, 1) for _ in range(stacks - 1))

    def forward(self, images: Images) -> Heatmaps:
        """Return each stack's heatmaps at a quarter of the input size; raise ModelError unless 64 divides that size."""
        self.check_input(images)
        feature = self.layer1(self.relu(self.bn1(self.conv1(images))))
        feature = self.layer3(self.layer2(F.max_pool2d(feature, kernel_size=2)))
        outputs = []
        for stack, hourglass in enumerate(self.hg):
            refined = self.fc[stack](self.res[stack](hourglass(feature)))
            heatmaps = self.score[stack](refined)
            outputs.append(heatmaps)
            if stack < len(self.fc_):
                feature = feature + self.fc_[stack](refined) + self.score_[stack](heatmaps)
        return tuple(outputs)
