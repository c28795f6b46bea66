"""EDM2's networks for evaluation: weights that are normalized once, not at every call.

The copy that `fold_weights` makes computes what the network does, up to rounding, and so do its derivatives. It is no
part of a file: `torch_utils.network_io.save_network` refuses it, as a file holds raw weights.
"""

import copy

import torch

from training.networks_edm2 import MPConv, convolve


class FoldedConv(torch.nn.Module):
    """An `MPConv` in eval mode, with its weight as it is used: normalized, and divided by √fan_in."""

    def __init__(self, conv):
        super().__init__()
        self.out_channels = conv.out_channels
        self.register_buffer('weight', conv.scaled_weight().detach())

    def forward(self, x, gain=None):
        y = convolve(x, self.weight.to(x.dtype))
        return y if gain is None else y * gain


def fold_weights(net: torch.nn.Module) -> torch.nn.Module:
    """A copy of an EDM2 network for evaluation, or of any network with `MPConv`s, in eval mode and without grad.

    `net` stays as it is. The folded weights are in float32, or in float64 where the raw ones are. A network without
    `MPConv`s, such as EDM's, is returned as it is.
    """
    raw = {id(module.weight): module.weight for module in net.modules() if isinstance(module, MPConv)}
    if not raw:
        return net
    folded = copy.deepcopy(net, raw).eval()  # the raw weights are not copied, only to be dropped
    for module in [*folded.modules()]:
        for name, child in module.named_children():
            if isinstance(child, MPConv):
                setattr(module, name, FoldedConv(child))
    return folded.requires_grad_(False)
