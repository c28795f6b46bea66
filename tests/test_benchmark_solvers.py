"""Short forms of the exact benchmarks. Peers that are not installed are left out, as the benchmarks do."""

import itertools
import math

import click.testing
import pytest
import torch

from benchmarks import gaussian_fd, kernel_density, mixture, orders, solvers
from comparison import peers

CI_EVALUATIONS = (16, 32, 64)
FEW = {  # peers for few evaluations, some of which are nearer than rk
    'er-sde-3', 'seeds-3', 'ipndm-3', 'ipndm-v-3', 'deis-3', 'dpm-solver-3', 'diffusers-unipc-3', 'diffusers-sa-solver',
}  # fmt: skip
NOISES = [(0, math.inf), (0.5, math.inf), (1, math.inf), (1, 5)]  # eta, S_max of rk


@pytest.fixture(scope='module')
def samplers():
    return solvers.rivals() | solvers.OURS


def other_rivals():
    return {name: each for name, each in solvers.rivals().items() if name not in FEW}


@pytest.mark.parametrize(('eta', 'S_max'), NOISES)
@pytest.mark.parametrize(('spectrum', 'rho'), [('power', 7), ('two-scale', 7), ('power', 3), ('two-scale', 3)])
def test_rk_has_a_smaller_exact_frechet_distance(spectrum, rho, eta, S_max):
    rivals = gaussian_fd.table(spectrum, rho, other_rivals(), CI_EVALUATIONS)
    [ours] = gaussian_fd.table(spectrum, rho, {'rk': rk_with(eta, S_max)}, CI_EVALUATIONS).values()
    for name, values in rivals.items():
        assert all(mine < theirs / 2 for mine, theirs in zip(ours, values, strict=True)), name


@pytest.mark.parametrize(
    ('spectrum', 'rho', 'nearer'),
    [
        ('power', 7, {'ipndm-3', 'deis-3', 'dpm-solver-3'}),
        ('two-scale', 7, {'ipndm-3', 'deis-3', 'dpm-solver-3'}),
        ('power', 3, {'ipndm-3', 'deis-3', 'dpm-solver-3', 'er-sde-3'}),
        ('two-scale', 3, {'ipndm-3', 'deis-3'}),
    ],
)
def test_rivals_that_have_a_smaller_exact_frechet_distance(spectrum, rho, nearer):
    """With 16 evaluations, than rk with all noise."""
    distances = gaussian_fd.table(spectrum, rho, solvers.rivals() | {'rk': rk_with(1, math.inf)}, [16])
    [ours] = distances.pop('rk')
    assert {name for name, [theirs] in distances.items() if theirs < ours} == nearer & distances.keys()


def rk_with(eta, S_max):
    [sampler] = [each for name, each in solvers.ours_with([eta], [S_max]).items() if name.startswith('rk')]
    return sampler


@pytest.mark.parametrize(
    ('scheme', 'factor', 'tolerance'),
    [
        *(('rk', *case) for case in [(2, 0.0005), (4, 0.01), (10, 0.03), (15, 0.04)]),
        *(('taylor', *case) for case in [(2, 0.002), (4, 0.02)]),
    ],
)
def test_long_steps_keep_the_variance_of_the_data(scheme, factor, tolerance):
    """In a step 1/σ² grows by `factor`. Gaussian data of any standard deviation keep it."""
    stds = torch.logspace(-1, 0.5, 9, dtype=torch.float64)
    count = int(2 * math.log(80 / 0.0005) / math.log(factor)) + 2
    sigmas = [*(80 * factor ** (-i / 2) for i in range(count)), 0.0]
    noise = peers.Columns(2 * count + 1, len(stds))

    def denoise(x, sigma):
        return x * (stds**2 / (stds**2 + torch.as_tensor(sigma).reshape(-1)[:1] ** 2))

    sampler = solvers.ours_with(scheme_of=solvers.linear)[scheme]
    x = sampler.run(denoise, noise.fresh() * sigmas[0], sigmas, noise)
    assert (x.square().sum(0) / stds**2 - 1).abs().max() < tolerance


def test_exact_frechet_distance_of_heun_by_an_independent_route():
    """For the ODE the distance follows from one scalar recursion per direction: Heun in σ on dx/dσ = x σ/(s² + σ²)."""
    stds, sigmas = (
        torch.tensor([0.9, 0.2], dtype=torch.float64),
        gaussian_fd.sampler_2nd.noise_levels(None, 8, 0.002, 80, 7),
    )
    gain = torch.full_like(stds, 80.0)
    for s, s_next in itertools.pairwise(sigmas):
        slope = s / (stds**2 + s**2)
        slope_next = s_next / (stds**2 + s_next**2) * (1 + (s_next - s) * slope)
        gain = gain * (1 + (s_next - s) * ((slope + slope_next) / 2 if s_next else slope))
    expected = float((gain - stds).square().sum())
    assert gaussian_fd.frechet_distance(solvers.HEUN['heun'], stds, 15, 7) == pytest.approx(expected, rel=1e-9)


def test_names_tell_the_noise_of_our_schemes():
    names = [name for name in solvers.ours_with([1, 0.5], [math.inf, 5]) if name.startswith('rk')]
    assert names == ['rk', 'rk, S_max 5', 'rk, eta 0.5', 'rk, eta 0.5, S_max 5']
    assert 'taylor, eta 1.3, S_noise 0.9' in solvers.ours_with([1.3], S_noises=[0.9])


def test_samplers_stay_within_the_evaluations_they_are_charged_for(samplers):
    """A JVP counts as two here too. An evaluation that a peer repeats (torchsde does) counts once."""
    for name, sampler in samplers.items():
        calls = {}
        sigmas = gaussian_fd.sampler_2nd.noise_levels(None, sampler.levels(20), 0.002, 80, 7)
        noise = peers.Columns(100, 2)

        def denoise(x, sigma, calls=calls):
            primal, tangent = torch.autograd.forward_ad.unpack_dual(x)
            calls[float(torch.as_tensor(sigma).flatten()[0]), float(primal.sum())] = 1 if tangent is None else 2
            return x / (1 + torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)[:1] ** 2)

        sampler.run(denoise, noise.fresh() * 80, sigmas, noise)
        assert 18 <= sum(calls.values()) <= 20, name


@pytest.mark.skipif('torchsde-srk' not in peers.installed(), reason='needs torchsde')
def test_torchsde_takes_one_step_for_each_level():
    drawn = []

    class Noise:
        def fresh(self):
            drawn.append(1)
            return torch.zeros(1, 1, dtype=torch.float64)

    for levels in range(2, 40):
        drawn.clear()
        sigmas = gaussian_fd.sampler_2nd.noise_levels(None, levels, 0.002, 80, 7)
        x = torch.ones(1, 1, dtype=torch.float64)
        peers.torchsde_srk(lambda x, sigma: 0 * x, x, [float(sigma) for sigma in sigmas], Noise())
        assert len(drawn) == 2 * (levels - 1), levels


def test_columns_are_brownian_motion():
    """Whatever the order of the questions, increments over parts add up, and have the length of their time."""
    noise = peers.Columns(10, 1)
    late, whole, early = noise(3.0, 1.0), noise(0.0, 4.0), noise(2.0, 1.0)
    assert [float(v.square().sum()) for v in (late, whole, early)] == pytest.approx([1, 1, 1])
    assert float((late * whole).sum()) == pytest.approx(-math.sqrt(2 / 4))
    assert float((late * early).sum()) == pytest.approx(math.sqrt(1 / 2))


def test_mixture_short_form(samplers):
    path = orders.Path(200, 1)
    solution = mixture.solve('rk', path, 'mixture', 512)
    strong = {
        name: mixture.errors(name, path, 'mixture', solution, 34)[0] for name in mixture.ON_A_PATH if name in samplers
    }
    assert min(strong, key=strong.get) == 'rk'
    assert strong['rk'] < 0.006


def test_command_prints_a_table():
    result = click.testing.CliRunner().invoke(gaussian_fd.main, ['--spectrum=two-scale', '--rho=7'])
    assert result.exit_code == 0, result.output
    assert '| rk |' in result.output


@pytest.mark.skipif('k-diffusion-heun' not in peers.installed(), reason='needs k-diffusion')
def test_heun_is_the_same_in_k_diffusion_and_here():
    stds = torch.tensor([0.5, 0.1], dtype=torch.float64)
    one, other = (
        gaussian_fd.frechet_distance(solvers.RIVALS[name], stds, 31, 7) for name in ('heun', 'k-diffusion-heun')
    )
    assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.skipif('diffusers-EDM-dpm-2M-SDE' not in peers.installed(), reason='needs diffusers')
def test_peer_defect_diffusers_third_order_sde_does_not_run():
    """Its documentation offers solver_order=3 with sde-dpmsolver++; that update does not exist."""
    diffusers = peers.needs('diffusers')
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(algorithm_type='sde-dpmsolver++', solver_order=3)
    scheduler.set_timesteps(8)
    x = torch.randn(1, 1, 2, 2) * 80
    for timestep in scheduler.timesteps[:2]:
        x = scheduler.step(torch.zeros_like(x), timestep, x).prev_sample
    with pytest.raises(UnboundLocalError):
        scheduler.step(torch.zeros_like(x), scheduler.timesteps[2], x)


def distances_to_digits(samplers):
    """From a kernel density, whose exact denoiser is anything but linear. 2,000 samples: the data's own is 0.09."""
    density = kernel_density.KernelDensity(torch.tensor(gaussian_fd.small_digits()), 0.2)
    return {name: kernel_density.distance(density, each, 12, 7, 2000, seed=0) for name, each in samplers.items()}


@pytest.mark.parametrize(('eta', 'S_max'), NOISES)
def test_rk_is_nearer_to_a_kernel_density_of_digits(eta, S_max):
    rivals = {name: each for name, each in other_rivals().items() if each.stochastic == (eta > 0)}
    distances = distances_to_digits({'rk': rk_with(eta, S_max), **rivals})
    ours = distances.pop('rk')
    assert all(ours < theirs / 2 for theirs in distances.values()), (ours, distances)


def test_rivals_that_are_nearer_to_a_kernel_density_of_digits():
    """By a quarter and more, than rk with all noise."""
    few = {name: each for name, each in solvers.rivals().items() if name in FEW}
    distances = distances_to_digits({'rk': rk_with(1, math.inf), **few})
    ours = distances.pop('rk')
    nearer = {'er-sde-3', 'ipndm-3', 'deis-3', 'dpm-solver-3'}
    assert {name for name, theirs in distances.items() if theirs < 0.75 * ours} == nearer & distances.keys()


def test_denoiser_of_a_kernel_density_is_that_of_tweedies_formula():
    """D = x + σ² ∇ log p(x; σ), with the gradient by autograd."""
    torch.manual_seed(0)
    density, sigma = kernel_density.KernelDensity(torch.randn(5, 3), 0.3), 0.7
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    squares = (x[:, None] - density.points).square().sum(-1)
    log_density = torch.logsumexp(-squares / (2 * (0.3**2 + sigma**2)), 1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    assert torch.allclose(density.denoise(x.detach(), sigma), x.detach() + sigma**2 * score, atol=1e-6)


def test_distance_to_a_kernel_density():
    """Shifted by δ and spread by a factor f: |δ|² + (f − 1)² tr C, up to sampling noise."""
    density = kernel_density.KernelDensity(torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]]), 0.4)
    x = density.sample(200_000, seed=0)
    assert density.frechet_distance(x) < 1e-4
    moved = density.mean + 1.5 * (x - density.mean) + torch.tensor([0.3, -0.4])
    expected = 0.25 + 0.25 * float(density.covariance.trace())
    assert density.frechet_distance(moved) == pytest.approx(expected, rel=0.01)
