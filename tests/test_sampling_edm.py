"""sampling/edm.py: EDM's numbers, and what else its two samplers promise."""

import json
import math
from pathlib import Path

import foreign_edm
import pytest
import torch
from denoisers import LATENTS, GaussianDenoiser, constant_noise

import sampler_2nd
from sampling import edm
from training import networks

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / 'tests' / 'data' / 'edm_samplers.json').read_text())
DISCRETIZATIONS = ['vp', 've', 'iddpm', 'edm']


@pytest.mark.parametrize('name', ['edm_sampler', 'ablation_sampler'])
def test_golden_samples_and_noise_levels(name):
    for case in GOLDEN[f'{name}_gaussian_denoiser']:
        net = GaussianDenoiser()
        out = getattr(edm, name)(net, LATENTS, randn_like=constant_noise, **case['kwargs'])
        assert out.dtype == torch.float64
        assert net.sigma_calls == pytest.approx(case['sigma_calls'], rel=1e-9), case['kwargs']
        difference = out.flatten() - torch.tensor(case['out'], dtype=torch.float64)
        # In EDM, and so here, what rounding makes of σ⁻¹(σ(t)) passes for noise. A processor that rounds otherwise than
        # the one that made these numbers has other levels, in their last digit, and other noise of this kind.
        exact = net.sigma_calls == case['sigma_calls'] or case['kwargs'].get('schedule', 'linear') == 'linear'
        tolerance = 1e-9 if exact else 1e-7
        assert (difference / out.flatten()).abs().max() < tolerance, case['kwargs']


def test_golden_counts_of_cases():
    assert [len(GOLDEN[f'{name}_gaussian_denoiser']) for name in ('edm_sampler', 'ablation_sampler')] == [3, 26]


def test_ablation_sampler_with_default_choices_is_the_edm_sampler():
    kwargs = {'num_steps': 7, 'S_churn': 4, 'S_min': 0.05, 'S_max': 50, 'S_noise': 1.003, 'rho': 5}
    results = [
        sampler(GaussianDenoiser(), LATENTS, randn_like=constant_noise, **kwargs)
        for sampler in (edm.edm_sampler, edm.ablation_sampler)
    ]
    assert torch.allclose(*results, rtol=1e-12, atol=0)


def test_edm_sampler_starts_from_images_and_needs_no_noise_levels_of_the_network():
    """The ODE of N(0, s²) takes x at σ to x s/√(s² + σ²). `net` is a plain function."""
    s, level = 0.5, 3.0
    images = torch.linspace(-1, 1, LATENTS[0].numel()).reshape(LATENTS[0].shape).expand_as(LATENTS)
    start = {'num_steps': 200, 'sigma_max': level, 'init': images}
    found = edm.edm_sampler(lambda x, sigma, labels: x * s**2 / (s**2 + sigma**2), LATENTS, **start)
    assert torch.allclose(found, (images + level * LATENTS.double()) * s / math.hypot(s, level), rtol=2e-4)


def test_improved_ddpm_levels_are_spaced_as_edm_spaces_them():
    """Halfway between two levels, (L − 1)·(i/(n − 1)) and ((L − 1)/(n − 1))·i round to different ones for n = 29."""
    levels = edm._iddpm_levels(1000, 0, math.inf, 0.001, 0.008, 999)
    assert len(set(levels)) == 1000
    for num_steps in (2, 29, 57, 113, 400):
        found = edm._iddpm_levels(num_steps, 0, math.inf, 0.001, 0.008, 999)
        steps = torch.arange(num_steps, dtype=torch.float64)
        expected = ((len(levels) - 1) / (num_steps - 1) * steps).round().to(torch.int64)
        assert found == [levels[j] for j in expected]


@pytest.mark.parametrize('kwargs', [{}, *({'discretization': name} for name in DISCRETIZATIONS)])
@pytest.mark.parametrize('S_churn', [0, 40])
def test_one_step_is_the_denoised_image(kwargs, S_churn):
    sampler = edm.ablation_sampler if kwargs else edm.edm_sampler
    net = GaussianDenoiser()
    out = sampler(net, LATENTS, randn_like=constant_noise, num_steps=1, S_churn=S_churn, **kwargs)
    assert len(net.sigma_calls) == 1
    assert torch.isfinite(out).all()
    if not S_churn:
        sigma = net.sigma_calls[0]
        assert torch.allclose(out, LATENTS.double() * sigma * 0.25 / (0.25 + sigma**2), rtol=1e-9)


@pytest.mark.parametrize('sampler', [edm.edm_sampler, edm.ablation_sampler])
def test_rounded_noise_levels_give_no_nan(sampler):
    class RoundsDown(GaussianDenoiser):
        """What it is asked twice, it has rounded twice: t̂ comes out below t."""

        def round_sigma(self, sigma):
            return sigma * 0.99

    coarse = GaussianDenoiser(levels=torch.tensor([80, 20, 5, 1, 0.3, 0.1, 0.02], dtype=torch.float64))
    for net in (RoundsDown(), coarse):
        for S_churn in (0, 2, 40):
            out = sampler(net, LATENTS, randn_like=constant_noise, num_steps=12, S_churn=S_churn, sigma_min=0.02)
            assert torch.isfinite(out).all()


@pytest.mark.parametrize('sampler', [edm.edm_sampler, edm.ablation_sampler])
def test_iddpm_network_gives_no_nan(sampler):
    adm = {'model_channels': 64, 'channel_mult': [1], 'num_blocks': 1, 'attn_resolutions': []}
    net = foreign_edm.randomize(networks.iDDPMPrecond(8, 1, **adm), seed=0).eval()
    counted = sampler_2nd.CountCalls(net)
    out = sampler(counted, torch.randn(1, 1, 8, 8), num_steps=6, S_churn=40)
    assert torch.isfinite(out).all()
    assert counted.calls == 11


def test_ablation_sampler_names_what_it_does_not_know():
    for name in ('solver', 'discretization', 'schedule', 'scaling'):
        with pytest.raises(ValueError, match=f"{name}='none-such' is not one of"):
            edm.ablation_sampler(GaussianDenoiser(), LATENTS, **{name: 'none-such'})


@pytest.mark.parametrize(
    ('sampler', 'kwargs'),
    [
        (edm.edm_sampler, {'sigma_max': 1e200}),
        (edm.ablation_sampler, {'sigma_max': 1e200}),
        (edm.ablation_sampler, {'sigma_min': 1e-200, 'schedule': 'vp'}),
        (edm.ablation_sampler, {'sigma_min': 79.999999, 'discretization': 'vp'}),
    ],
)
def test_settings_that_lead_out_of_the_range_of_float64(sampler, kwargs):
    with pytest.raises(ValueError, match='noise is too extreme'):
        sampler(GaussianDenoiser(), LATENTS, randn_like=constant_noise, num_steps=4, **kwargs)
