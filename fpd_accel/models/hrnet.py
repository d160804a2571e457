"""HRNet: parallel branches at strides 4, 8, 16 and 32 that exchange features repeatedly.

Deep High-Resolution Representation Learning for Human Pose Estimation (Sun, Xiao, Liu, Wang, CVPR 2019), section 3;
parameter names equal those of the published `pose_hrnet_w32` and `pose_hrnet_w48`. Branch b has `width * 2**b`
channels at stride `4 * 2**b`; a feature list is ordered from the finest branch to the coarsest.
"""

from collections.abc import Sequence
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from fpd_accel.models.base import Heatmaps, Images, PoseModel, convolution, initialise

BLOCKS_PER_BRANCH = 4
STEM_CHANNELS = 64
LAYER1_CHANNELS = 256


def first_layer() -> nn.Sequential:
    """Return the four bottlenecks at stride 4 that come before the branches."""
    project = nn.Sequential(*convolution(STEM_CHANNELS, LAYER1_CHANNELS, kernel=1))
    first = Bottleneck(STEM_CHANNELS, STEM_CHANNELS, downsample=project)
    return nn.Sequential(first, *(Bottleneck(LAYER1_CHANNELS, STEM_CHANNELS) for _ in range(3)))


def transition(before: Sequence[int], after: Sequence[int]) -> nn.ModuleList:
    """Return one path into each branch of the next stage; the new branch starts from the coarsest, halved.

    The other paths convert the channels where they differ. `before` and `after` are the channels of the branches;
    `after` has one branch more.
    """
    paths: list[nn.Module] = [
        nn.Identity() if inputs == outputs else nn.Sequential(*convolution(inputs, outputs), nn.ReLU(inplace=True))
        for inputs, outputs in zip(before, after[:-1], strict=True)
    ]
    halve = nn.Sequential(*convolution(before[-1], after[-1], stride=2), nn.ReLU(inplace=True))
    return nn.ModuleList([*paths, nn.Sequential(halve)])


def exchange_path(channels: Sequence[int], *, source: int, target: int) -> nn.Module:
    """Return the module that maps branch `source` to the size and channels of branch `target`.

    Coarse to fine is a 1x1 convolution and nearest upsampling. Fine to coarse is one strided 3x3 convolution for each
    halving; only the last one changes the channels, and it has no ReLU.
    """
    if source == target:
        return nn.Identity()
    if source > target:
        enlarge = nn.Upsample(scale_factor=2 ** (source - target), mode="nearest")
        return nn.Sequential(*convolution(channels[source], channels[target], kernel=1), enlarge)
    halvings = [
        nn.Sequential(*convolution(channels[source], channels[source], stride=2), nn.ReLU(inplace=True))
        for _ in range(target - source - 1)
    ]
    return nn.Sequential(*halvings, nn.Sequential(*convolution(channels[source], channels[target], stride=2)))


class Fusion(nn.ModuleList):
    """The paths from every branch into one branch, summed in order."""

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return the branch that the features of all branches add up to."""
        arrivals = [path(feature) for path, feature in zip(self, features, strict=True)]
        return F.relu(reduce(torch.add, arrivals), inplace=True)


class ExchangeModule(nn.Module):
    """Four residual blocks on each branch; then each output branch is the sum of all branches brought to its size."""

    def __init__(self, channels: Sequence[int], *, outputs: int) -> None:
        """Take the `channels` of each branch; only the finest `outputs` branches are computed."""
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(count, count) for _ in range(BLOCKS_PER_BRANCH))) for count in channels
        )
        self.fuse_layers = nn.ModuleList(
            Fusion(exchange_path(channels, source=source, target=target) for source in range(len(channels)))
            for target in range(outputs)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return the output branches, finest first."""
        features = [branch(feature) for branch, feature in zip(self.branches, features, strict=True)]
        return [fusion(features) for fusion in self.fuse_layers]


def stage(channels: Sequence[int], *, modules: int, last_outputs: int | None = None) -> nn.Sequential:
    """Return `modules` exchange modules; the last computes `last_outputs` branches, by default all."""
    outputs = [len(channels)] * (modules - 1) + [last_outputs or len(channels)]
    return nn.Sequential(*(ExchangeModule(channels, outputs=count) for count in outputs))


class HRNet(PoseModel):
    """A high-resolution network with a heatmap head on its finest branch, and one stage.

    `width` is the number of channels at stride 4: 32 and 48 are published, 18 and 40 follow the same pattern.
    """

    input_multiple: ClassVar[int] = 32
    units: ClassVar[tuple[str, ...]] = ("ExchangeModule",)

    def __init__(self, num_keypoints: int, *, width: int) -> None:
        super().__init__(num_keypoints)
        channels = [width, 2 * width, 4 * width, 8 * width]
        self.conv1, self.bn1 = convolution(3, STEM_CHANNELS, stride=2)
        self.conv2, self.bn2 = convolution(STEM_CHANNELS, STEM_CHANNELS, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = first_layer()
        self.transition1 = transition([LAYER1_CHANNELS], channels[:2])
        self.stage2 = stage(channels[:2], modules=1)
        self.transition2 = transition(channels[:2], channels[:3])
        self.stage3 = stage(channels[:3], modules=4)
        self.transition3 = transition(channels[:3], channels)
        # The head uses the finest branch alone, so the last module computes no other.
        self.stage4 = stage(channels, modules=3, last_outputs=1)
        self.final_layer = nn.Conv2d(width, num_keypoints, kernel_size=1)
        initialise(self)

    def forward(self, images: Images) -> Heatmaps:
        """Return the heatmaps at a quarter of the input size; raise ModelError unless 32 divides the input size."""
        self.check_input(images)
        feature = self.relu(self.bn1(self.conv1(images)))
        feature = self.relu(self.bn2(self.conv2(feature)))
        features = [self.layer1(feature)]
        for paths, stage_modules in (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        ):
            # The new branch of each stage starts from the coarsest one so far.
            sources = [*features, features[-1]]
            features = stage_modules([path(source) for path, source in zip(paths, sources, strict=True)])
        return (self.final_layer(features[0]),)
