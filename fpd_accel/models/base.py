"""The interface of the pose networks, SimCC heads, and a check of what a network returns."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from fpd_accel.errors import ModelError
from fpd_accel.outputs import BINS_PER_PIXEL, STRIDE, SimCC

Images = Float[Tensor, "batch 3 height width"]
Heatmaps = tuple[Float[Tensor, "batch joint heatmap_height heatmap_width"], ...]  # of each stage


class PoseModel(nn.Module):
    """A network from normalised images to one heatmap per keypoint at a quarter of the input size.

    `forward` returns a tuple with the heatmaps of each stage; the last stage is the prediction. A network of one stage
    returns a tuple of one, so that losses and decoders have a single case.
    """

    stride: ClassVar[int] = STRIDE  # input pixels per heatmap pixel
    input_multiple: ClassVar[int]  # height and width of the input must be multiples of this, in pixels
    units: ClassVar[tuple[str, ...]] = ()  # classes of the blocks that FSDP2 and torch.compile take one by one

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

    def check_input(self, images: Images) -> None:
        """Raise ModelError unless height and width are multiples of `input_multiple`."""
        height, width = images.shape[-2:]
        if any(side < self.input_multiple or side % self.input_multiple for side in (height, width)):
            raise ModelError(
                f"{type(self).__name__} takes images whose height and width are multiples of {self.input_multiple}, "
                f"not {height} x {width} (height x width)"
            )

    def check_size(self, images: Images, size: tuple[int, int]) -> None:
        """Raise ModelError unless the images have the (height, width) that the network was built for."""
        if tuple(images.shape[-2:]) != size:
            raise ModelError(
                f"this {type(self).__name__} was built for images of {size[0]} x {size[1]} (height x width), not "
                f"{images.shape[-2]} x {images.shape[-1]}; create it with their size as input_size"
            )


class SimCCModel(PoseModel):
    """A pose network under a SimCC head, for images of one size; returns one stage, the logits.

    The head reads the last stage of `network`; `input_size` is (height, width) in pixels.
    """

    input_multiple: ClassVar[int] = 1  # the network inside checks the size

    def __init__(self, network: PoseModel, *, input_size: tuple[int, int]) -> None:
        super().__init__(network.num_keypoints)
        self.network, self.input_size = network, input_size
        height, width = input_size
        cells = (height // self.stride) * (width // self.stride)
        self.mlp_head_x = nn.Linear(cells, BINS_PER_PIXEL * width)
        self.mlp_head_y = nn.Linear(cells, BINS_PER_PIXEL * height)

    def forward(self, images: Images) -> tuple[SimCC, ...]:
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


def deconvolutions(inputs: int, outputs: int, *, layers: int) -> nn.Sequential:
    """Return bias-free transposed 4x4 convolutions with normalisation and ReLU; each doubles the size."""
    modules: list[nn.Module] = []
    for channels in [inputs] + [outputs] * (layers - 1):
        modules += [
            nn.ConvTranspose2d(channels, outputs, kernel_size=4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*modules)


def initialise(*parts: nn.Module) -> None:
    """Draw convolutions from N(0, 0.001) with zero bias, as the published trainers do; normalisations keep 1 and 0."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def check_outputs(
    outputs: object, *, arch: str, num_keypoints: int, input_size: tuple[int, int], batch: int | None = None
) -> None:
    """Check that `forward` returned a tuple of stages, each of heatmaps or SimCC logits of the right shape.

    The images have (height, width) `input_size`, in pixels; `batch` is their number, of which None accepts any.

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
