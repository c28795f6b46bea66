"""comparison/: the cells that options make, what they cost, and other people's samplers among ours."""

import math

import numpy as np
import pytest
import torch
from tiny_network import save_network

import dnnlib
from comparison import command, peers
from comparison.cells import Cell, OnePixel, affordable_steps, count_work
from sampling import choose, draw, levels, networks

NEEDS_K_DIFFUSION = pytest.mark.skipif('k-diffusion-heun' not in peers.installed(), reason='needs k-diffusion')


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp('network') / 'tiny.pkl', seed=0)


@pytest.mark.parametrize(
    ('sampler', 'settings', 'steps', 'work'),
    [
        ('heun', {'rho': 7}, 8, (15, 0)),
        ('heun', {'rho': 3, 'S_churn': 40, 'S_min': 0.05}, 8, (15, 0)),
        ('euler', {'rho': 7, 'eta': 1}, 16, (16, 0)),
        ('taylor', {'rho': 7, 'eta': 1}, 8, (8, 7)),
        ('taylor', {'rho': 7, 'eta': 0.5}, 8, (8, 7)),
        ('rk', {'rho': 7}, 16, (16, 0)),
        ('er-sde-3', {'rho': 7}, 16, (16, 0)),
        ('seeds-3', {'rho': 7}, 6, (16, 0)),
        pytest.param('k-diffusion-dpmpp_2m_sde', {'rho': 7}, 16, (16, 0), marks=NEEDS_K_DIFFUSION),
        pytest.param('k-diffusion-dpmpp_sde', {'rho': 7}, 8, (15, 0), marks=NEEDS_K_DIFFUSION),
    ],
)
def test_steps_that_sixteen_evaluations_pay_for(sampler, settings, steps, work):
    cell = Cell(sampler, tuple(settings.items()), steps, 16)
    assert affordable_steps(sampler, cell.settings, 16) == steps
    assert count_work(cell) == work


def test_each_sampler_has_its_own_dials():
    opts = dnnlib.EasyDict(
        samplers=['heun', 'taylor', 'rk'], rho=[3.0, 7.0], eta=[0.0, 1.0], S_churn=[0.0, 40.0], steps=[5]
    )
    opts.sigma_min = None
    opts |= {'S_min': 0.05, 'S_max': [math.inf], 'S_noise': None}
    cells = command.make_cells(opts)
    assert [cell.label({'rho'}) for cell in cells] == [
        'heun, rho 3', 'heun, rho 3, S_churn 40, S_min 0.05', 'heun, rho 7', 'heun, rho 7, S_churn 40, S_min 0.05',
        'taylor, rho 3, eta 0', 'taylor, rho 3, S_min 0.05', 'taylor, rho 7, eta 0', 'taylor, rho 7, S_min 0.05',
        'rk, rho 3, eta 0', 'rk, rho 3, S_min 0.05', 'rk, rho 7, eta 0', 'rk, rho 7, S_min 0.05',
    ]  # fmt: skip


def test_noise_is_limited_where_there_is_some():
    opts = dnnlib.EasyDict(
        samplers=['heun', 'rk', 'k-diffusion-heun'], rho=[7.0], eta=[0.0, 1.0], S_churn=[0.0], steps=[5]
    )
    opts.sigma_min = None
    opts |= {'S_min': None, 'S_max': [5.0, math.inf], 'S_noise': 1.01}
    cells = command.make_cells(opts)
    assert [cell.settings[1:] for cell in cells] == [
        (('S_churn', 0),),
        (('eta', 0),), (('eta', 1), ('S_max', 5), ('S_noise', 1.01)), (('eta', 1), ('S_noise', 1.01)),
        (),
    ]  # fmt: skip


@NEEDS_K_DIFFUSION
def test_a_peer_draws_by_seed_whatever_the_batch(network):
    net = networks.open_network(network, torch.device('cpu')).double()
    sampler = Cell('k-diffusion-dpmpp_sde', (('rho', 7),), 3, 3).make()

    def images(*batches):
        return np.concatenate([each for _, each in draw.generate_images(net, batches, sampler, torch.device('cpu'))])

    assert np.array_equal(images([5, 9, 2]), images([5], [9], [2]))


@NEEDS_K_DIFFUSION
def test_heun_is_the_same_through_the_adapter(network):
    net = networks.open_network(network, torch.device('cpu'))
    one, other = (
        next(draw.generate_images(net, [[0, 1]], Cell(name, (('rho', 5),), 6, 6).make(), torch.device('cpu')))
        for name in ('heun', 'k-diffusion-heun')
    )
    assert np.abs(one[1].astype(int) - other[1]).max() <= 1


@pytest.mark.parametrize(
    ('options', 'levels'),
    [
        ({'num_steps': 3, 'rho': 2, 'sigma_max': 100, 'sigma_min': 1}, [100, 30.25, 1]),
        ({'num_steps': 3}, [80, 2.5152190, 0.002]),
        ({'sigmas': [40, 3, 0.5, 0.01]}, [40, 3, 0.5, 0.01]),
        ({'sigmas': [40, 3, 0.01, 0], 'num_steps': 9, 'rho': 3, 'sigma_max': 7}, [40, 3, 0.01]),
    ],
)
def test_a_peer_takes_any_levels(options, levels):
    seen = []

    def net(x, sigma, class_labels=None):
        seen.append(float(sigma))
        return 0 * x

    peers.make('ipndm-3', **options)(net, torch.ones(1, 1, 2, 2))
    assert seen == pytest.approx(levels)


@pytest.mark.parametrize('sigmas', [[], [0, 80], [80, 90, 1], [80, 1, -1], [80, math.nan]])
def test_levels_of_a_peer_descend(sigmas):
    with pytest.raises(ValueError, match='noise levels are finite, above 0, and fall'):
        peers.make('ipndm-3', sigmas=sigmas)(OnePixel(), torch.zeros(1, 1, 1, 1))


def test_levels_that_are_asked_for(tmp_path):
    """Own: the curve beside the network for rk, EDM's for others; a file: the same for all."""
    network = str(tmp_path / 'net.pkl')
    mine, given = (levels.LossCurve((80, 1, 0.01), (1.0, low, 1e-9)) for low in (0.3, 0.1))
    mine.save(levels.beside(network))
    opts = dnnlib.EasyDict(samplers=['rk', 'er-sde-3'], rho=None, network=network, eta=[1.0], S_churn=[0.0], steps=[4])
    opts |= {'S_min': None, 'S_max': [math.inf], 'S_noise': None, 'levels': ['own', 'edm', ('a.json', given)]}
    found = [(cell.label({'levels'}), dict(cell.settings).get('rho'), cell.sigmas) for cell in command.make_cells(opts)]
    assert found == [
        ('rk, own levels', None, tuple(mine.levels(4))), ('rk, EDM levels', 7, None),
        ('rk, levels of a.json', None, tuple(given.levels(4))),
        ('er-sde-3, EDM levels', 7, None), ('er-sde-3, levels of a.json', None, tuple(given.levels(4))),
    ]  # fmt: skip


def test_a_cell_samples_at_its_levels():
    seen = []

    def net(x, sigma, class_labels=None):
        seen.append(float(sigma))
        return x / (1 + sigma**2)

    for name in ('er-sde-3', 'heun'):
        seen.clear()
        Cell(name, (), 3, 3, sigmas=(50.0, 5.0, 0.1)).make()(net, torch.ones(1, 1, 2, 2))
        assert list(dict.fromkeys(seen)) == pytest.approx([50, 5, 0.1])


def test_package_of_a_peer():
    assert [peers.package_of(name) for name in ('k-diffusion-heun', 'diffusers-unipc-3', 'deis-3')] == [
        'k-diffusion', 'diffusers', None,
    ]  # fmt: skip
    assert {'er-sde-3', 'seeds-3', 'ipndm-3', 'ipndm-v-3', 'deis-3', 'dpm-solver-3'} <= peers.installed().keys()


def test_noise_of_a_peer_is_brownian_motion():
    """Increments over parts add up to that over the whole, which has the variance of its length."""
    x = torch.zeros(20_000, 1, dtype=torch.float64)
    noise = peers.SeededNoise(x, lambda like: torch.randn_like(like))
    torch.manual_seed(0)
    late, whole = noise(3.0, 1.0), noise(4.0, 0.0)
    ends = noise(4.0, 3.0) + noise(1.0, 0.0)
    assert torch.allclose(2 * whole, ends + math.sqrt(2) * late)
    assert float(whole.var()) == pytest.approx(1, abs=0.04)  # four standard deviations
    assert float((late * whole).mean()) == pytest.approx(math.sqrt(2 / 4), abs=0.035)


def test_divergence_is_an_error(monkeypatch):
    def diverge(*args, num_steps, **kwargs):
        return torch.tensor([1, math.nan])

    monkeypatch.setitem(choose.SAMPLERS, 'rk', choose.SAMPLERS['rk']._replace(function=diverge))
    with pytest.raises(ValueError, match='rk with 4 steps diverged'):
        Cell('rk', (), 4, 4).make()()
