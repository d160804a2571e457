"""A frozen network without its normalisations: each is folded into the convolution before it.

In evaluation mode a batch normalisation is one factor and one offset per channel, and so may be multiplied into the
weights of the convolution that feeds it (Ioffe, Szegedy, ICML 2015, section 3.1: a fixed affine transform). The network
computes the same, to rounding, with one pass over the features less for each.
"""

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_norm(model: nn.Module) -> int:
    """Fold in place, and return how many were folded; the network must be in evaluation mode.

    A normalisation belongs to the convolution of as many channels that its parent registers right before it; so it is
    in every network of the package, and a test looks at each class. Those behind no convolution, as the first of a
    pre-activation block, stay as they are. Afterwards the convolutions have a bias, and the folded normalisations
    neither weights nor statistics: save the network's weights before.
    """
    folded = 0
    for parent in list(model.modules()):
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
