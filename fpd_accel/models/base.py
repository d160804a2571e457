"""The interface of the pose networks, SimCC heads, and a check of what a network returns."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from fpd_accel.errors import ModelError
from fpd_accel.outputs import BINS_PER_PIXEL, STRIDE, SimCC


class PoseModel(nn.Module):
    """A network from normalised images to one heatmap per keypoint at a quarter of the input size.

    `forward` returns a tuple with the heatmaps of each stage; the last stage is the prediction. A network of one stage
    returns a tuple of one, so that losses and decoders have a single case.
    """

    stride: ClassVar[int] = STRIDE
    """Input pixels per heatmap pixel."""
    input_multiple: ClassVar[int]
    """Height and width of the input must be multiples of this, in pixels."""
    units: ClassVar[tuple[str, ...]] = ()
    """Class names of the repeated blocks, which FSDP2 shards and torch.compile compiles one by one."""
    num_keypoints: int
    num_stages: int = 1
    """Length of the tuple that `forward` returns."""

    def __init__(self, num_keypoints: int) -> None:
        """Raise ModelError unless there is at least one keypoint to predict."""
        super().__init__()
        if num_keypoints < 1:
            raise ModelError(f"num_keypoints must be at least 1, not {num_keypoints}")
        self.num_keypoints = num_keypoints

    def unit_modules(self) -> list[nn.Module]:
        """Return the blocks whose classes `units` names, in this network and in pose networks inside it."""
        names = {name for module in self.modules() if isinstance(module, PoseModel) for name in module.units}
        return [module for module in self.modules() if type(module).__name__ in names]

    def check_input(self, images: Float[Tensor, "batch 3 height width"]) -> None:
        """Raise ModelError unless height and width are multiples of `input_multiple`."""
        height, width = images.shape[-2:]
        multiple = self.input_multiple
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise ModelError(
                f"{type(self).__name__} takes images whose height and width are multiples of {multiple}, "
                f"not {height} x {width} (height x width)"
            )

    def check_size(self, images: Float[Tensor, "batch 3 height width"], size: tuple[int, int]) -> None:
        """Raise ModelError unless the images have the (height, width) that the network was built for."""
        if tuple(images.shape[-2:]) != size:
            raise ModelError(
                f"this {type(self).__name__} was built for images of {size[0]} x {size[1]} (height x width), not "
                f"{images.shape[-2]} x {images.shape[-1]}; create it with their size as input_size"
            )


class SimCCModel(PoseModel):
    """A pose network under a SimCC head, for images of one size; returns one stage, the logits.

    Args:
        network: Computes one map per keypoint at a quarter of the input size; its last stage is used.
        input_size: (height, width) of the images, pixels.
    """

    input_multiple: ClassVar[int] = 1  # the network inside checks the size

    def __init__(self, network: PoseModel, *, input_size: tuple[int, int]) -> None:
        super().__init__(network.num_keypoints)
        self.network, self.input_size = network, input_size
        height, width = input_size
        cells = (height // self.stride) * (width // self.stride)
        self.mlp_head_x = nn.Linear(cells, BINS_PER_PIXEL * width)
        self.mlp_head_y = nn.Linear(cells, BINS_PER_PIXEL * height)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[SimCC, ...]:
        """Return the logits along both axes; raise ModelError unless the images have size `input_size`."""
        self.check_size(images, self.input_size)
        maps = self.network(images)[-1].flatten(2)
        return (SimCC(self.mlp_head_x(maps), self.mlp_head_y(maps)),)


def convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Return a bias-free convolution with "same" padding, and its normalisation."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def check_outputs(
    outputs: object, *, arch: str, num_keypoints: int, input_size: tuple[int, int], batch: int | None = None
) -> None:
    """Check that a network returned a tuple of stages, each of heatmaps or SimCC logits of the right shape.

    Args:
        outputs: What `forward` returned.
        arch: Name of the network, for the message.
        num_keypoints: Keypoints of the skeleton.
        input_size: (height, width) of the images, pixels.
        batch: Number of images; None accepts any.

    Raises:
        ModelError: The outputs are not a tuple, there are none, or a shape is wrong.
    """
    if not isinstance(outputs, tuple) or isinstance(outputs, SimCC):
        raise ModelError(
            f"{arch}: the output is {_describe(outputs)}; forward must return a tuple with the output of each stage, "
            "(heatmaps,) for a network of one stage"
        )
    if not outputs:
        raise ModelError(f"{arch}: the output is an empty tuple; forward must return the output of at least one stage")
    height, width = input_size
    for number, output in enumerate(outputs):
        parts: list[tuple[object, tuple[int, ...]]] = [(output, (height // STRIDE, width // STRIDE))]
        if isinstance(output, SimCC):
            parts = [(output.x, (BINS_PER_PIXEL * width,)), (output.y, (BINS_PER_PIXEL * height,))]
        for part, sizes in parts:
            shape, wanted = tuple(getattr(part, "shape", ())), (num_keypoints, *sizes)
            if shape[1:] != wanted or (batch is not None and shape[0] != batch):
                raise ModelError(
                    f"{arch}: stage {number} of the output is {_describe(part)}; for {num_keypoints} keypoints and "
                    f"images of {height} x {width} (height x width) its shape must be "
                    f"({', '.join(map(str, (batch or 'batch', *wanted)))})"
                )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"of type {type(value).__name__}"
