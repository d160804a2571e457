"""Fold the batch normalisations of a frozen network into the convolutions before them.

In evaluation mode a batch normalisation is one factor and one offset per channel, so it can be multiplied into the
weights of the convolution that feeds it (Ioffe, Szegedy, ICML 2015, section 3.1: a fixed affine transform). The outputs
stay the same to rounding, and each folded normalisation saves one pass over the features.
"""

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Packages whose modules apply a convolution and the normalisation registered after it in this order.
IN_ORDER = ("fpd_accel", "torchvision")


def fold_norm(model: nn.Module) -> int:
    """Fold normalisations in place and return their number; the network must be in evaluation mode.

    A normalisation is folded if its parent registers a convolution of as many channels right before it, and is known to
    apply them in this order: a sequence, or a module of this package (a test checks each class) or torchvision. Others,
    such as the first of a pre-activation block and those in classes of a user's own, stay. Afterwards the convolutions
    have a bias and the folded normalisations have neither weights nor statistics, so save the network's weights first.
    """
    folded = 0
    for parent in list(model.modules()):
        kind = type(parent)
        if kind.forward is not nn.Sequential.forward and kind.__module__.partition(".")[0] not in IN_ORDER:
            continue
        for (before, convolution), (after, norm) in pairwise(list(parent._modules.items())):
            if not isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            if convolution.out_channels != norm.num_features or norm.running_mean is None:
                continue
            transposed = isinstance(convolution, nn.ConvTranspose2d)
            setattr(parent, before, fuse_conv_bn_eval(convolution, norm, transpose=transposed))
            setattr(parent, after, nn.Identity())
            folded += 1
    return folded
