"""sampling/choose.py: one table of samplers, and what each of them takes."""

import math
from functools import partial

import click
import pytest
import torch

import sampler_2nd
from sampling import choose


@pytest.mark.parametrize(
    ('sampler', 'randn_like', 'scheme', 'options', 'name'),
    [
        (None, None, None, {}, 'heun'),
        (None, 'db', None, {}, 'heun'),
        (None, 'db', None, {'solver': 'euler'}, 'ablation'),
        (None, 'ddb', None, {}, 'taylor'),
        (None, 'ddb', 'rk', {}, 'rk'),
        ('rk', None, None, {'eta': 0.5}, 'rk'),
        ('heun', None, None, {'disc': None}, 'heun'),
        ('heun', None, None, {'scaling': 'none'}, 'ablation'),
    ],
)
def test_one_name_for_every_spelling(sampler, randn_like, scheme, options, name):
    assert choose.name_of(sampler, randn_like, scheme, options) == name


@pytest.mark.parametrize('name', choose.SAMPLERS)
def test_every_sampler_draws_from_the_data_in_many_steps(name):
    """D of standard normal data: what comes out is standard normal, whatever the sampler."""
    torch.manual_seed(0)

    def net(x, sigma, class_labels=None):
        return x / (1 + sigma**2)

    images = choose.make(name, num_steps=400)(net, torch.randn(20_000, 1))
    assert float(images.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize('name', choose.SAMPLERS)
def test_every_sampler_takes_its_dials_and_no_others(name):
    row = choose.SAMPLERS[name]
    values = {'solver': 'euler', 'discretization': 'vp', 'schedule': 've', 'scaling': 'none'}
    for option in choose.OPTIONS:
        given = {option: values.get(option, 1)}
        if option in (*choose.LEVEL_OPTIONS, *row.dials):
            assert choose.make(name, **given).keywords.items() >= given.items()
        else:
            with pytest.raises(click.UsageError, match=f'--sampler={name}'):
                choose.make(name, **given)


def test_options_in_effect_are_those_of_the_command_line():
    noise = {'S_min': 0, 'S_max': math.inf, 'S_noise': 1, 'eta': 1}
    edm_levels = {'sigma_min': 0.002, 'sigma_max': 80, 'rho': 7}
    assert choose.options_in_effect(choose.make('rk', num_steps=40, eta=None)) == {'steps': 40, **edm_levels, **noise}
    few = choose.options_in_effect(choose.make('rk', num_steps=9, eta=None), guidance=4)
    ends = {'sigma_min': pytest.approx(0.02), 'sigma_max': 80, 'rho': pytest.approx(12)}
    assert few == {'steps': 9, **ends, **noise, 'eta': 0.5}
    given = choose.options_in_effect(choose.make('rk', num_steps=9, rho=3))
    assert given == {'steps': 9, **edm_levels, **noise, 'rho': 3}
    listed = choose.options_in_effect(partial(choose.make('rk', num_steps=2), sigmas=[80.0, 1.0]))
    assert listed == {'steps': 2, 'levels': [80.0, 1.0], **noise}


def test_a_scheme_of_ones_own_is_a_sampler_by_one_line_in_the_table(monkeypatch):
    """It takes the plain time integral from a path, and its limit for eta is checked, as those of `rk` are."""
    mine = sampler_2nd.Scheme(sampler_2nd.rk_step, time_integral=True, eta_below=1.2)
    monkeypatch.setitem(sampler_2nd.SCHEMES, 'mine', mine)
    assert choose.samplers()['mine'].path

    def net(x, sigma, class_labels=None):
        return torch.tanh(x) / (1 + sigma**2)

    latents = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    drawn = {
        name: choose.make(name, num_steps=8, rho=7)(net, latents, randn_like=sampler_2nd.BrownianPath([4, 5, 6]))
        for name in ('mine', 'rk', 'taylor')
    }
    assert torch.equal(drawn['mine'], drawn['rk'])
    assert not torch.allclose(drawn['mine'], drawn['taylor'], atol=1e-3)
    with pytest.raises(ValueError, match=r"scheme='mine' needs an eta from 0 to below 1\.2, and this is 1\.3"):
        choose.make('mine', eta=1.3)(net, latents)
