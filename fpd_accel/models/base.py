"""What every pose network of the package has in common."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from fpd_accel.errors import ModelError
from fpd_accel.outputs import STRIDE


class PoseModel(nn.Module):
    """A network from normalised images to one heatmap per keypoint at a quarter of the input size.

    `forward` returns a tuple with the heatmaps of every stage, the last being the prediction, even where there is
    one stage only; so losses and decoders need no second case.
    """

    stride: ClassVar[int] = STRIDE
    """Input pixels per heatmap pixel."""
    input_multiple: ClassVar[int]
    """Height and width of the input must be multiples of this."""
    units: ClassVar[tuple[str, ...]] = ()
    """Classes of its parts that are gathered one at a time where the network is sharded over several processes."""
    num_keypoints: int
    num_stages: int = 1
    """Entries of the tuple that `forward` returns."""

    def __init__(self, num_keypoints: int) -> None:
        """Raises ModelError unless there is a keypoint to predict."""
        super().__init__()
        if num_keypoints < 1:
            raise ModelError(f"num_keypoints must be at least 1, not {num_keypoints}")
        self.num_keypoints = num_keypoints

    def unit_modules(self) -> list[nn.Module]:
        """The parts that ``units`` names, of this network and of one inside it."""
        names = {name for module in self.modules() if isinstance(module, PoseModel) for name in module.units}
        return [module for module in self.modules() if type(module).__name__ in names]

    def check_input(self, images: Float[Tensor, "batch 3 height width"]) -> None:
        """Raise ModelError unless the size fits the downsampling. Host integers only: nothing waits for the device."""
        height, width = images.shape[-2:]
        multiple = self.input_multiple
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise ModelError(
                f"{type(self).__name__} takes images whose height and width are multiples of {multiple}, "
                f"not {height} x {width} (height x width)"
            )

    def check_size(self, images: Float[Tensor, "batch 3 height width"], size: tuple[int, int]) -> None:
        """Raise ModelError unless the images have the one (height, width) that the network was built for."""
        if tuple(images.shape[-2:]) != size:
            raise ModelError(
                f"{type(self).__name__} was built for images of {size[0]} x {size[1]} (height x width), "
                f"not {images.shape[-2]} x {images.shape[-1]}"
            )
