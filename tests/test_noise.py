"""BrownianPath: the law of its pairs, that they chain, and that nothing but the seed decides them."""

import itertools
import math

import click.testing
import numpy as np
import PIL.Image
import pytest
import torch

import generate
import sampler_2nd
from sampler_2nd import BrownianPath, ito_taylor_sampler

KINDS = [(1, False), (1, True), (0.25, False), (2.25, False)]
LEVELS = [80.0, 31.0, 30.0, 5.5, math.e, 1.0, 0.99, 0.31, 0.004, 0.002]


class PathOfColumns(BrownianPath):
    """A path whose normals are unit vectors, so that covariances are exact inner products."""

    def __init__(self, count):
        super().__init__([0])
        self.eye, self.numbers = torch.eye(count, dtype=torch.float64), {}

    def _node_normals(self, node, x):
        k = self.numbers.setdefault(node, len(self.numbers))
        return self.eye[None, 2 * k], self.eye[None, 2 * k + 1]


def steps_of(levels):
    return itertools.pairwise(levels)


@pytest.mark.parametrize(('kappa', 'time_integral'), KINDS)
def test_law_of_the_steps_of_a_grid(kappa, time_integral):
    """Each step's (N, Z) has the exact covariance, and different steps are uncorrelated."""
    path, like = PathOfColumns(1000), torch.zeros(1, 1000)
    pairs = [torch.cat(path.pair(like, *ends, kappa, time_integral)) for ends in steps_of(LEVELS)]
    for i, (pair, (sigma, sigma_next)) in enumerate(zip(pairs, steps_of(LEVELS), strict=True)):
        h = sampler_2nd.grid_lambda(sigma_next) - sampler_2nd.grid_lambda(sigma)
        covariance = pair @ pair.T / sigma_next**2
        expected = sampler_2nd.noise_moments(kappa, h, time_integral)
        assert [covariance[0, 0], covariance[0, 1], covariance[1, 1]] == pytest.approx(expected, rel=3e-9)
        for other in pairs[:i]:
            assert ((pair @ other.T) / torch.outer(pair.norm(dim=1), other.norm(dim=1))).abs().max() < 1e-10


@pytest.mark.parametrize(('kappa', 'time_integral'), KINDS)
def test_parts_chain_to_the_whole(kappa, time_integral):
    path, like = BrownianPath([3, 4]), torch.zeros(2, 5)
    whole = path.pair(like, LEVELS[0], LEVELS[-1], kappa, time_integral)
    chained = None
    for sigma, sigma_next in steps_of(LEVELS):
        part = path.pair(like, sigma, sigma_next, kappa, time_integral)
        h = sampler_2nd.grid_lambda(sigma_next) - sampler_2nd.grid_lambda(sigma)
        chained = part if chained is None else sampler_2nd.chain(chained, part, (kappa, time_integral), h)
    for found, expected in zip(chained, whole, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))


def test_chaining_by_head():
    """For κ = 1 and a second part of h = ln 2: τ grows from 1 to 4, N/σ'² is ΔB and Z/σ'⁴ is ΔZ.

    ΔZ = ΔZ₁ + 3 ΔB₁ + ΔZ₂ and ΔB = ΔB₁ + ΔB₂.
    """
    B_1, Z_1, B_2, Z_2 = 1.0, 0.5, -2.0, 0.25
    N, Z = sampler_2nd.chain((B_1, Z_1), (B_2 / 4, Z_2 / 16), (1, True), math.log(2))
    found = [4 * N, 16 * Z]
    assert found == pytest.approx([B_1 + B_2, Z_1 + 3 * B_1 + Z_2])


def test_answers_depend_on_seed_and_interval_only():
    """Not on the rest of the batch, nor on the order of the questions."""
    one, three = BrownianPath([7]), BrownianPath([5, 7, -1])
    three.pair(torch.zeros(3, 2, 4), 2.0, 1.0, 1)
    first = three.pair(torch.zeros(3, 2, 4), 80.0, 31.0, 1)
    alone = one.pair(torch.zeros(1, 2, 4), 80.0, 31.0, 1)
    for a, b in zip(first, alone, strict=True):
        assert torch.equal(a[1:2], b)
        assert not torch.equal(a[0], a[1])


def test_normals_are_standard_and_independent():
    """9 moments of 60,000 pairs within 4.5 standard deviations (level 1e-4 for all)."""
    path, like = BrownianPath(range(60)), torch.zeros(60, 1000, dtype=torch.float64)
    z1, z2 = (z.flatten() for z in path.normals(like, 3.0, 2.0, 0.7))
    n = z1.numel()
    for value, variance in [
        *((z, 1) for z in (z1, z2)),
        *((z**2 - 1, 2) for z in (z1, z2)),
        *((z**3, 15) for z in (z1, z2)),
        *((z**4 - 3, 96) for z in (z1, z2)),
        (z1 * z2, 1),
    ]:
        assert abs(float(value.mean())) < 4.5 * math.sqrt(variance / n)


def test_dtype_and_wrong_number_of_seeds():
    path = BrownianPath([0, 1])
    assert path.normals(torch.zeros(2, 3), 2.0, 1.0, 1)[0].dtype == torch.float32
    assert not torch.stack(path.normals(torch.zeros(2, 3), 2.0, 1.0, 0)).any()
    with pytest.raises(ValueError, match='3 images, but the path has 2 seeds'):
        path.pair(torch.zeros(3, 3), 2.0, 1.0, 1)


@pytest.mark.parametrize('kwargs', [{'scheme': 'rk'}, {'scheme': 'taylor'}, {'scheme': 'taylor', 'eta': 0.6}])
def test_more_steps_approach_one_picture(kwargs):
    """The distance to the result of 64 steps falls; with fresh noise it does not."""
    latents = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    path, fresh = BrownianPath([0]), torch.Generator().manual_seed(0)

    def net(x, sigma, class_labels=None):  # half N(0.8, 0.1), half N(−0.8, 0.1)
        return (0.1 * x + sigma**2 * 0.8 * torch.tanh(0.8 * x / (0.1 + sigma**2))) / (0.1 + sigma**2)

    def distances(noise):
        results = [ito_taylor_sampler(net, latents, randn_like=noise, num_steps=n, **kwargs) for n in (8, 16, 32, 64)]
        return [float((x - results[-1]).square().mean().sqrt()) for x in results[:-1]]

    same_path = distances(path)
    assert same_path[0] > 1.7 * same_path[1] > 3.4 * same_path[2]
    other_noise = distances(lambda x: torch.randn(x.shape, generator=fresh, dtype=x.dtype))
    assert other_noise[2] > 5 * same_path[2]


def test_generate_offers_the_path(tmp_path):
    """--noise=path: an image depends on its seed only, not on the batch; more steps, nearly the same picture."""

    def pictures(name, *options):
        arguments = [f'--outdir={tmp_path / name}', '--device=cpu', '--seeds=3-5', '--sigma_max=20', *options]
        result = click.testing.CliRunner().invoke(generate.main, arguments)
        assert result.exit_code == 0, result.output
        return np.stack([np.asarray(PIL.Image.open(tmp_path / name / f'{i:06d}.png')).astype(float) for i in (3, 4, 5)])

    path = ['--randn_like=ddb', '--scheme=rk', '--noise=path']
    first = pictures('a', *path, '--steps=8')
    assert np.abs(pictures('b', *path, '--steps=8', '--batch=1') - first).mean() < 0.1
    same, fresh = pictures('c', *path, '--steps=16'), pictures('d', *path[:2], '--steps=16')
    assert np.abs(same - first).mean() < 0.6 * np.abs(fresh - first).mean()
    refused = click.testing.CliRunner().invoke(generate.main, [f'--outdir={tmp_path / "e"}', '--noise=path'])
    assert refused.exit_code == 2
    assert 'is for the SDE samplers, such as --sampler=rk' in refused.output
