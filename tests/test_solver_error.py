"""benchmarks/solver_error.py, at a size that takes seconds."""

import re
from functools import partial

import click.testing
import numpy as np
import pytest
import torch

import sampler_2nd
from benchmarks import solver_error
from sampling import draw, networks

SEEDS = [3, 14]


@pytest.fixture(scope='module')
def net():
    return networks.open_network(str(networks.SHIPPED_NETWORK), torch.device('cpu'))


@pytest.mark.parametrize('scheme', ['taylor', 'rk'])
@pytest.mark.parametrize(('batch', 'pixels'), [(2, 0), (1, 2)])
def test_the_images_are_those_of_generate(net, scheme, batch, pixels):
    """generate.py has both images in one batch; apart they are rounded otherwise: in so many pixels, by one level."""
    problem = solver_error.Problem(net, SEEDS, rho=7, batch=batch)
    sampler = partial(sampler_2nd.ito_taylor_sampler, num_steps=4, rho=7, scheme=scheme)
    classes, cpu = range(net.label_dim), torch.device('cpu')
    [(_, images)] = draw.generate_images(net, [SEEDS], sampler, cpu, classes, noise='path')
    mine, seconds = problem.solve(scheme, 4)
    difference = np.abs(draw.to_uint8(mine).astype(int) - images)
    assert seconds > 0
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= pixels


def test_errors_in_closed_form():
    solution = torch.tensor([[1.0, -1.0], [0.5, 0.0]]).reshape(2, 1, 1, 2)
    x = solution + torch.tensor([[0.1, 0.1], [0.3, 0.3]]).reshape(2, 1, 1, 2)
    strong, weak, spread = solver_error.errors(x, solution)
    assert strong == pytest.approx(127.5 * ((0.01 + 0.09) / 2) ** 0.5)
    gaps = [((1.1**2 - 1) + (0.9**2 - 1)) / 2, ((0.8**2 - 0.5**2) + 0.3**2) / 2]
    assert weak == pytest.approx(sum(gaps) / 2)
    assert spread == pytest.approx(abs(gaps[0] - gaps[1]) / 2)


def test_errors_fall_with_the_steps(monkeypatch):
    monkeypatch.setattr(solver_error, 'SOLUTION_STEPS', 32)
    drawn = []
    monkeypatch.setattr(solver_error.plots, 'draw', lambda _, panels, *__: drawn.extend(panels))
    arguments = ['--seeds=0,1', '--evaluations=4,16', '--sampler=rk', '--plot=plot.png']
    result = click.testing.CliRunner().invoke(solver_error.main, arguments)
    assert result.exit_code == 0, result.output
    header, _, row, energy = result.output.splitlines()
    assert re.fullmatch(r'E x\*² = 0\.\d{4} ± 0\.\d{4} \(rk\)', energy)
    assert header == '| strong error; weak error | 4 | 16 |'
    name, *cells = row.strip('| ').split(' | ')
    coarse, fine = (float(cell.split(';')[0]) for cell in cells)
    assert name == 'rk'
    assert fine < coarse
    assert [panel.xlabel for panel in drawn] == ['network evaluations', 'processor seconds per image']
    (work, errors), (seconds, same_errors) = (panel.lines['rk'] for panel in drawn)
    assert work == [4, 16]
    assert errors == same_errors == pytest.approx([coarse, fine], abs=0.05)
    assert len(seconds) == 2
    assert min(seconds) > 0


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('--sampler=heun', "--sampler='heun' is not one of: k-diffusion-dpmpp_2m_sde"),
        ('--seeds=3', '--seeds: one image has no standard error'),
        ('--device=gpu', "--device must be 'cuda', 'cuda:N', 'mps' or 'cpu', got 'gpu'"),
    ],
)
def test_bad_options(option, message):
    result = click.testing.CliRunner().invoke(solver_error.main, [option])
    assert result.exit_code == 2
    assert message in result.output
