"""SimCC: a pose network whose keypoints are classified along x and along y instead of looked for on a heatmap.

SimCC: a Simple Coordinate Classification Perspective for Human Pose Estimation (Li et al., ECCV 2022), section 3. The
network's last map of each keypoint is its representation: flattened, one linear layer gives the bins along x, another
those along y. Any network of the package takes this head.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from fpd_accel.models.base import PoseModel
from fpd_accel.outputs import BINS_PER_PIXEL, SimCC

SUFFIX = "_simcc"  # of the architecture's name


class SimCCModel(PoseModel):
    """A network with a SimCC head; one output, the logits. It takes images of one size alone.

    Args:
        network: what gives each keypoint a map at a quarter of the input size; the last stage is read.
        input_size: (height, width) of the images, pixels.
    """

    input_multiple: ClassVar[int] = 1  # the network inside checks its own

    def __init__(self, network: PoseModel, *, input_size: tuple[int, int]) -> None:
        super().__init__(network.num_keypoints)
        self.network, self.input_size = network, input_size
        height, width = input_size
        cells = (height // self.stride) * (width // self.stride)
        self.mlp_head_x = nn.Linear(cells, BINS_PER_PIXEL * width)
        self.mlp_head_y = nn.Linear(cells, BINS_PER_PIXEL * height)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[SimCC, ...]:
        """Return the logits along both axes; raises ModelError where the images are not of ``input_size``."""
        self.check_size(images, self.input_size)
        maps = self.network(images)[-1].flatten(2)
        return (SimCC(self.mlp_head_x(maps), self.mlp_head_y(maps)),)
