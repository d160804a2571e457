"""PoseResNet: torchvision's ResNet, three transposed convolutions and a 1x1 head.

Simple Baselines for Human Pose Estimation and Tracking (Xiao, Wu, Wei, ECCV 2018), section 2; parameter names equal
those of the published `pose_resnet_50`, `_101` and `_152`. The backbone ends at stride 32, the transposed convolutions
bring it back to 4.
"""

from typing import ClassVar

import torchvision
from torch import nn

from fpd_accel.models.base import Heatmaps, Images, PoseModel, deconvolutions, initialise

DECONV_CHANNELS = 256


class PoseResNet(PoseModel):
    """A ResNet of `depth` 18, 34, 50, 101 or 152 layers with a head of transposed convolutions, and one stage.

    The backbone's stages are attributes of the model itself, so that their names have no prefix and torchvision's
    ImageNet weights fit, except for their `fc`. The backbone keeps torchvision's initialisation.
    """

    input_multiple: ClassVar[int] = 32
    units: ClassVar[tuple[str, ...]] = ("BasicBlock", "Bottleneck")

    def __init__(self, num_keypoints: int, *, depth: int) -> None:
        super().__init__(num_keypoints)
        backbone = torchvision.models.get_model(f"resnet{depth}", weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool
        self.layer1, self.layer2, self.layer3 = backbone.layer1, backbone.layer2, backbone.layer3
        self.layer4 = backbone.layer4
        self.deconv_layers = deconvolutions(backbone.fc.in_features, DECONV_CHANNELS, layers=3)
        self.final_layer = nn.Conv2d(DECONV_CHANNELS, num_keypoints, kernel_size=1)
        initialise(self.deconv_layers, self.final_layer)

    def forward(self, images: Images) -> Heatmaps:
        """Return the heatmaps at a quarter of the input size; raise ModelError unless 32 divides the input size."""
        self.check_input(images)
        feature = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        feature = self.layer4(self.layer3(self.layer2(self.layer1(feature))))
        return (self.final_layer(self.deconv_layers(feature)),)
