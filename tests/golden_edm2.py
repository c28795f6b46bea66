"""EDM2's numbers (tests/data/edm2_golden.json): the fillings and inputs they were computed with, and the comparison."""

import json
import math
import pathlib

import torch

from training import networks_edm2

DATA = pathlib.Path(__file__).parent / 'data'
GOLDEN = json.loads((DATA / 'edm2_golden.json').read_text())
CASES = GOLDEN['networks']['cases']


def fill(module):
    """The module in eval mode with a = 2 (k⁵ mod p)/p − 1, k = (7919 j + 104729 i + 1) mod p, in its i-th tensor."""
    p = 1000003
    with torch.no_grad():
        for i, (name, tensor) in enumerate([*module.named_parameters(), *module.named_buffers()]):
            k = (7919 * torch.arange(tensor.numel()) + 104729 * i + 1) % p
            k5 = (k * k % p) ** 2 % p * k % p
            a = (2 * k5.double() / p - 1).reshape(tensor.shape)
            tensor.copy_({'freqs': 6 * a, 'phases': math.pi * (a + 1)}.get(name.rpartition('.')[2], a))
            if name in dict(module.named_parameters()) and tensor.ndim == 0:
                tensor.copy_(0.6 + 0.3 * a)
    return module.eval()


def network(name):
    return fill(networks_edm2.Precond(**CASES[name]['kwargs']))


def wave(shape, amplitude=2, frequency=0.37, function=torch.sin):
    """amplitude · function(frequency · j) for the j-th element."""
    angle = frequency * torch.arange(math.prod(shape), dtype=torch.float64)
    return (amplitude * function(angle)).float().reshape(shape)


def inputs(net):
    """(x, sigma, class labels) of the networks' numbers."""
    x = wave([2, net.img_channels, net.img_resolution, net.img_resolution])
    labels = torch.eye(net.label_dim)[[1, 3]] if net.label_dim else None
    return x, torch.tensor([0.7, 3.0]), labels


def assert_matches(out, expected, absolute=2e-6, relative=1e-5):
    """`absolute` is for elements, `relative` for the sums of |x| and x²."""
    out = out.detach().double().flatten()
    assert out.numel() == expected['shape_numel']
    ends = [*expected['first'], *expected.get('last', [])]
    found = torch.cat([out[: len(expected['first'])], out[out.numel() - len(expected.get('last', [])) :]])
    assert float((found - torch.tensor(ends).double()).abs().max()) < absolute
    assert abs(float(out.sum()) - expected['sum']) < relative * float(out.abs().sum())
    assert abs(float(out.square().sum()) - expected['sum_sq']) < relative * expected['sum_sq']
