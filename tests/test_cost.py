"""The cost benchmark compares what it says it compares."""

import pytest
import torch
from small_networks import CountOps

from benchmarks import cost
from training import fast, networks


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        8, 1, label_dim=3, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1
    )
    cost.randomize_zeros(net.eval().requires_grad_(False))
    return net


def count_operations(net):
    x, tangent = torch.randn([2, 2, 1, 8, 8])
    with CountOps() as ops:
        torch.func.jvp(lambda x: net(x, torch.ones(2)), (x,), (tangent,))
    return ops.counts


@torch.no_grad()
def test_plain_is_pytorch_without_our_rules(net):
    ours = count_operations(fast.install(net))
    plain = count_operations(fast.remove(net))
    # PyTorch convolves with the zero tangent of the weight as well.
    assert 2 * plain['aten.convolution'] == 3 * ours['aten.convolution']
    in_place = ['aten.silu_', 'aten.add_', 'aten.mul_']
    assert all(ours[name] > 0 and plain[name] == 0 for name in in_place)
    assert count_operations(fast.install(net)) == ours


def test_measure_times_four_ways_and_compares_the_tangents():
    seconds, distance = cost.time_ways(
        'the shipped network', batch=2, rounds=2, sets=1, dtype=torch.float32, device='cpu'
    )
    assert {way: len(values) for way, values in seconds.items()} == dict.fromkeys(
        ['ours forward', 'direct forward', 'plain forward', 'ours jvp', 'plain jvp'], 2
    )
    assert 0 < distance < 1e-5
