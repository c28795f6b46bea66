"""Small networks with random weights, their derivatives, and what operations they run."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training import networks

NCSNPP = {
    'embedding_type': 'fourier',
    'encoder_type': 'residual',
    'channel_mult_noise': 2,
    'resample_filter': [1, 3, 3, 1],
}


def noisy_network(class_name, img_resolution=8, **kwargs):
    """A small network in float64 whose every weight is random, so that no path is switched off by a zero init."""
    torch.manual_seed(0)
    net = getattr(networks, class_name)(img_resolution, img_channels=1, **kwargs).double().eval()
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.2 * torch.randn_like(param))
    return net


SONG = {'model_type': 'SongUNet', 'model_channels': 8, 'channel_mult': [1, 2], 'num_blocks': 1, 'attn_resolutions': [4]}
ADM = {
    'model_type': 'DhariwalUNet',
    'model_channels': 64,
    'channel_mult': [1],
    'num_blocks': 1,
    'attn_resolutions': [8],
}
SKIPS = SONG | {'encoder_type': 'skip', 'decoder_type': 'skip', 'resample_filter': [1, 3, 3, 1]}


every_network = pytest.mark.parametrize(
    ('class_name', 'kwargs'),
    [
        ('EDMPrecond', SONG | {'label_dim': 3}),
        ('EDMPrecond', SONG | NCSNPP),
        ('EDMPrecond', SKIPS),
        ('EDMPrecond', ADM | {'label_dim': 3}),
        ('VPPrecond', SONG),
        ('VEPrecond', SONG | NCSNPP),
        ('iDDPMPrecond', ADM),
    ],
)


def jvp_in_x_and_sigma(net):
    """JVP of a network in float32 along fixed tangents in x and sigma."""
    shape = [2, 2, 1, net.img_resolution, net.img_resolution]
    x, tangent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    labels = torch.eye(3)[[0, 2]] if net.label_dim else None
    sigma = torch.tensor([0.5, 2.0])
    return torch.func.jvp(lambda x, sigma: net(x, sigma, labels), (x, sigma), (tangent, torch.ones(2)))


def relative(a, b):
    return float((a - b).norm() / b.norm())


class CountOps(TorchDispatchMode):
    """How often each operation of PyTorch runs: `counts['aten.convolution']`."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def assert_forward_mode(f, primal, tangent, within):
    """The derivative of f along the tangent, in float64, against a central difference of fourth order."""
    out, jvp = torch.func.jvp(f, (primal,), (tangent,))

    def central(h):
        return (f(primal + h * tangent) - f(primal - h * tangent)) / (2 * h)

    reference = (4 * central(1e-5) - central(2e-5)) / 3
    assert out.dtype == jvp.dtype == torch.float64
    assert torch.equal(out, f(primal))
    assert float(reference.norm()) > 1e-3
    assert float((jvp - reference).norm() / reference.norm()) < within
