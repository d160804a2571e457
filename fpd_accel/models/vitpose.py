"""ViTPose: a plain vision transformer on patches of 16 pixels, and a small head that upsamples to stride 4.

ViTPose: Simple Vision Transformer Baselines for Human Pose Estimation (Xu, Zhang, Zhang, Tao, NeurIPS 2022), section
3.1, on the transformer of Dosovitskiy et al. (ICLR 2021); parameter names equal those of the published checkpoints.
Shapes, with `width` = D and N = height / 16 * width / 16 patches:

    images       3 channels, stride 1
    tokens       (batch, N, D): one per patch, plus its position
    features     D channels, stride 16: the tokens after all blocks, back on their grid
    head         classic: two deconvolutions to 256 channels at stride 4, then a 1x1 convolution
                 simple: ReLU, bilinear upsampling by 4, a 3x3 convolution
"""

from collections import OrderedDict
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fpd_accel.errors import ModelError
from fpd_accel.models.base import Heatmaps, Images, PoseModel, deconvolutions, initialise

PATCH = 16  # pixels
PATCH_PADDING = 2  # pixels, as published: the first patch begins 2 pixels outside the image
MLP_RATIO = 4
HEAD_CHANNELS = 256
EPSILON = 1e-6  # of the layer normalisations


class Size(NamedTuple):
    """Channels of a token, number of blocks, and attention heads of each block."""

    width: int
    depth: int
    heads: int


SIZES = {"s": Size(384, 12, 12), "b": Size(768, 12, 12), "l": Size(1024, 24, 16), "h": Size(1280, 32, 16)}


class Attention(nn.Module):
    """Self-attention of all patches with each other."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "batch patch channel"]) -> Float[Tensor, "batch patch channel"]:
        """Return the tokens mixed by softmax attention."""
        # (batch, patch, 3 * channel) -> query, key and value, each (batch, head, patch, channel / heads)
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def mlp(width: int) -> nn.Sequential:
    """Return the two linear layers on each token, with a GELU between them, by their published names."""
    fc1, fc2 = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)
    return nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(), fc2=fc2))


class Block(nn.Module):
    """Attention and MLP, each after normalisation and beside a skip connection."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=EPSILON), Attention(width, heads=heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=EPSILON), mlp(width)

    def forward(self, tokens: Float[Tensor, "batch patch channel"]) -> Float[Tensor, "batch patch channel"]:
        """Return the tokens after both parts."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    """The backbone: blocks on a fixed grid of patches, whose positions are learned."""

    def __init__(self, size: Size, *, grid: tuple[int, int]) -> None:
        """Take the number of patches (down, across) as `grid`."""
        super().__init__()
        self.grid = grid
        proj = nn.Conv2d(3, size.width, kernel_size=PATCH, stride=PATCH, padding=PATCH_PADDING)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        # One row more than patches: pre-training had a class token; its row is added to every patch.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], size.width))
        self.blocks = nn.ModuleList(Block(size.width, heads=size.heads) for _ in range(size.depth))
        self.last_norm = nn.LayerNorm(size.width, eps=EPSILON)

    def forward(self, images: Images) -> Float[Tensor, "batch channel grid_height grid_width"]:
        """Return the tokens after all blocks, on their grid."""
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = tokens + self.pos_embed[:, 1:] + self.pos_embed[:, :1]
        for block in self.blocks:
            tokens = block(tokens)
        return self.last_norm(tokens).transpose(1, 2).unflatten(-1, self.grid)


def classic_head(inputs: int, num_keypoints: int) -> nn.Sequential:
    """Return two transposed convolutions, which double the size each, and a 1x1 convolution."""
    deconv_layers = deconvolutions(inputs, HEAD_CHANNELS, layers=2)
    final_layer = nn.Conv2d(HEAD_CHANNELS, num_keypoints, kernel_size=1)
    return nn.Sequential(OrderedDict(deconv_layers=deconv_layers, final_layer=final_layer))


def simple_head(inputs: int, num_keypoints: int) -> nn.Sequential:
    """Return a ReLU, bilinear upsampling by 4 and one 3x3 convolution."""
    upsample = nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False)
    final_layer = nn.Conv2d(inputs, num_keypoints, kernel_size=3, padding=1)
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), upsample=upsample, final_layer=final_layer))


class ViTPose(PoseModel):
    """A vision transformer of one of `SIZES` with a classic or simple head, for images of one size; one stage."""

    input_multiple: ClassVar[int] = PATCH
    units: ClassVar[tuple[str, ...]] = ("Block",)

    def __init__(
        self,
        num_keypoints: int,
        *,
        size: Literal["s", "b", "l", "h"],
        head: Literal["classic", "simple"] = "classic",
        input_size: tuple[int, int] = (256, 192),
    ) -> None:
        """Take `input_size` as (height, width) in pixels; raise ModelError unless 16 divides both."""
        super().__init__(num_keypoints)
        height, width = self.input_size = input_size
        if any(side < PATCH or side % PATCH for side in input_size):
            raise ModelError(f"ViTPose takes input sizes of multiples of {PATCH}, not {height} x {width}")
        self.backbone = VisionTransformer(SIZES[size], grid=(height // PATCH, width // PATCH))
        build_head = classic_head if head == "classic" else simple_head
        self.keypoint_head = build_head(SIZES[size].width, num_keypoints)
        for module in self.backbone.modules():  # the patch convolution keeps PyTorch's initialisation
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        initialise(self.keypoint_head)
        nn.init.trunc_normal_(self.backbone.pos_embed, std=0.02)

    def forward(self, images: Images) -> Heatmaps:
        """Return the heatmaps at a quarter of the input size; raise ModelError for another than `input_size`."""
        self.check_input(images)
        self.check_size(images, self.input_size)
        return (self.keypoint_head(self.backbone(images)),)
