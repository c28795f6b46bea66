"""Folded networks compute what the raw ones do, with less work, and leave those alone."""

import copy

import golden_edm2
import pytest
import torch
from golden_edm2 import CASES, assert_matches, inputs, wave

from torch_utils import network_io
from training import networks
from training.folding import FoldedConv, fold_weights
from training.networks_edm2 import MPConv

pytestmark = pytest.mark.usefixtures('one_thread')


@torch.no_grad()
@pytest.mark.parametrize('name', CASES)
def test_a_folded_network_has_the_same_numbers(name):
    folded = fold_weights(golden_edm2.network(name))
    assert not any(isinstance(module, MPConv) for module in folded.modules())
    D, logvar = folded(*inputs(folded), return_logvar=True)
    assert_matches(D, CASES[name]['D'])
    assert logvar.flatten().tolist() == pytest.approx(CASES[name]['logvar'], rel=2e-6)


@torch.no_grad()
def test_its_derivative_is_the_same():
    net = golden_edm2.network('pixel_cond').double()
    x, sigma, labels = inputs(net)
    tangents = wave(x.shape, 1, 0.5, torch.cos).double(), torch.tensor([1.0, -0.5]).double()
    raw, folded = (
        torch.func.jvp(lambda x, sigma, net=each: net(x, sigma, labels), (x.double(), sigma.double()), tangents)
        for each in (net, fold_weights(net))
    )
    assert torch.allclose(folded[0], raw[0], rtol=0, atol=1e-13)
    assert torch.allclose(folded[1], raw[1], rtol=0, atol=1e-12)


def test_the_raw_network_is_left_alone():
    net = golden_edm2.network('pixel_cond').train()
    before = copy.deepcopy(net.state_dict())
    folded = fold_weights(net)
    assert net.training
    assert all(param.requires_grad for param in net.parameters())
    assert not folded.training
    assert not any(param.requires_grad for param in folded.parameters())
    folded.unet.out_gain.fill_(7)
    folded.unet.enc['16x16_conv'].weight.fill_(7)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert any(isinstance(module, MPConv) for module in net.modules())


def test_folded_weights_are_wide_and_move_with_the_network():
    folded = fold_weights(golden_edm2.network('pixel_cond').half())
    convs = [module for module in folded.modules() if isinstance(module, FoldedConv)]
    assert {conv.weight.dtype for conv in convs} == {torch.float32}
    assert {conv.weight.dtype for conv in convs if folded.double()} == {torch.float64}


@pytest.mark.parametrize('ending', network_io.ENDINGS)
def test_a_folded_network_is_not_saved(tmp_path, ending):
    with pytest.raises(ValueError, match=f'net{ending}: a network with FoldedConv in it is for evaluation only'):
        network_io.save_network(fold_weights(golden_edm2.network('pixel_cond')), tmp_path / f'net{ending}')
    assert list(tmp_path.iterdir()) == []


def test_networks_without_such_layers_come_back_as_they_are():
    net = networks.EDMPrecond(8, 1, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1)
    assert fold_weights(net) is net
