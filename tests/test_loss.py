"""Losses: EDM's numbers for one draw, and the weights as formulas."""

import json
import math
import pathlib

import pytest
import torch

from training import loss

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'data' / 'edm_losses.json').read_text())


def half(x, _sigma, _labels=None, augment_labels=None):
    return x / 2


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_sums(name):
    torch.manual_seed(0)
    images = (0.37 * torch.arange(4 * 3 * 8 * 8, dtype=torch.float64)).sin().float().reshape(4, 3, 8, 8)
    value = getattr(loss, name)()(half, images, None)
    assert list(value.shape) == GOLDEN[name]['shape']
    assert value.double().sum([1, 2, 3]).tolist() == pytest.approx(GOLDEN[name]['per_sample_sum'], rel=2e-5)


def test_edm_weight_makes_the_loss_of_predicting_zero_one_for_data_of_std_sigma_data():
    """λ(σ) c_out² = 1: the network's own target has unit weight at every noise level."""
    sigma = torch.tensor([0.01, 0.5, 30.0], dtype=torch.float64)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    assert torch.allclose(loss.EDMLoss().weight(sigma) * c_out**2, torch.ones(3, dtype=torch.float64))


def test_laws_of_sigma():
    torch.manual_seed(0)
    n = [100_000, 1, 1, 1]
    log_edm = loss.EDMLoss().draw_sigma(n, 'cpu').log()
    assert float(log_edm.mean()) == pytest.approx(-1.2, abs=0.02)
    assert float(log_edm.std()) == pytest.approx(1.2, abs=0.02)
    ve = loss.VELoss().draw_sigma(n, 'cpu')
    assert float(ve.min()) >= 0.02
    assert float(ve.max()) <= 100
    assert float(ve.median()) == pytest.approx(math.sqrt(2), rel=0.05)
    vp = loss.VPLoss().draw_sigma(n, 'cpu')
    assert float(vp.median()) == pytest.approx(math.sqrt(math.exp(0.5 * 19.9 / 4 + 0.05) - 1), rel=0.05)


def test_augment_pipe_is_applied_between_the_draw_of_sigma_and_the_noise():
    seen = {}

    def pipe(images):
        seen['images'] = images
        return images + 1, torch.full([images.shape[0], 9], 7.0)

    def net(x, sigma, labels, augment_labels=None):
        seen['augment_labels'] = augment_labels
        return x

    torch.manual_seed(3)
    images = torch.zeros(2, 1, 4, 4)
    value = loss.EDMLoss()(net, images, None, pipe)
    torch.manual_seed(3)
    sigma = (1.2 * torch.randn([2, 1, 1, 1]) - 1.2).exp()
    noise = torch.randn([2, 1, 4, 4])
    assert torch.allclose(value, (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * (sigma * noise) ** 2, rtol=1e-4)
    assert float(seen['augment_labels'].mean()) == 7
