"""The scripts in examples/ and the code in docs/in-your-code.md: what they print, and whether it is right."""

import contextlib
import importlib.util
import math
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import generate
from comparison import peers
from sampler_2nd import Denoiser, ito_taylor_sampler, noise_levels
from sampling import edm

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = pathlib.Path(generate.__file__).parent


def example(name):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'examples' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ('name', 'lines'),
    [
        (
            'plain_function',
            # The last step is x = D. From white: r = 0.5²/(0.5² + 0.5²) of it, with variance r²·0.5² + r·0.5² = 0.433².
            [
                'step 59  sigma  0.002  std of x  0.502  of D 0.502',
                'images: std 0.50; 60 calls, 59 with a JVP',
                'from white: mean 0.50, std 0.43',
            ],
        ),
        (
            'k_diffusion_model',
            ['class 0: mean -0.50, std 0.20', 'class 1: mean 0.50, std 0.20', '40 calls, 0 with a JVP'],
        ),
        ('diffusers_unet', ['images: std 0.50; 40 calls']),
    ],
)
def test_script_prints_the_exact_numbers(name, lines):
    if name == 'diffusers_unet':
        pytest.importorskip('diffusers')
    script = ROOT / 'examples' / f'{name}.py'
    assert len(script.read_text().splitlines()) <= 60
    run = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.splitlines()[-len(lines) :] == lines, run.stderr


# ----------------------------------------------------------------------------
# diffusers.


@contextlib.contextmanager
def contiguous_norms(module):
    """The remedy of docs/in-your-code.md for PyTorch's group norm, which has no forward mode after attention."""
    norms = [each for each in module.modules() if isinstance(each, torch.nn.GroupNorm)]
    hooks = [each.register_forward_pre_hook(lambda _, args: args[0].contiguous()) for each in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Its schedulers make arrays of tensors in a way that NumPy wants to end.
numpy_arrays = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')


@pytest.fixture(scope='module')
def diffusers():
    return pytest.importorskip('diffusers')


@pytest.fixture(scope='module')
def unet(diffusers):
    """A real one, small, with random weights and attention in it; its ε has no closed form."""
    torch.manual_seed(0)
    blocks = {'down_block_types': ('DownBlock2D',) * 2, 'up_block_types': ('UpBlock2D',) * 2}
    return diffusers.UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, **blocks).eval()


@pytest.fixture(scope='module')
def net(diffusers, unet):
    return example('diffusers_unet').EpsilonDenoiser(unet, diffusers.DDPMScheduler())


def diffusers_run(scheduler, unet, latents, steps):
    """What diffusers itself draws, on Karras' noise levels, which are EDM's."""
    betas = {'beta_start': 1e-4, 'beta_end': 0.02}  # those of DDPMScheduler; some schedulers default to others
    scheduler = scheduler(use_karras_sigmas=True, timestep_spacing='linspace', **betas)
    scheduler.set_timesteps(steps)
    x = latents * scheduler.sigmas[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x


@numpy_arrays
@pytest.mark.parametrize('schedule', ['linear', 'scaled_linear', 'squaredcos_cap_v2'])
def test_timesteps_are_those_of_diffusers(diffusers, unet, schedule):
    """EulerDiscreteScheduler has the noise level of every timestep, and finds the timestep of Karras' levels."""
    options = {'beta_schedule': schedule, 'timestep_spacing': 'linspace'}
    net = example('diffusers_unet').EpsilonDenoiser(unet, diffusers.DDPMScheduler(beta_schedule=schedule))
    euler = diffusers.EulerDiscreteScheduler(**options)
    euler.set_timesteps(1000)
    for i in range(0, 1000, 111):
        assert float(net.timestep(euler.sigmas[i])) == pytest.approx(float(euler.timesteps[i]), abs=2e-3)
    karras = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **options)
    karras.set_timesteps(50)
    found = [float(net.timestep(sigma)) for sigma in karras.sigmas[:-1]]
    assert found == pytest.approx(karras.timesteps.tolist(), abs=2e-3)
    assert (net.sigma_max, net.sigma_min) == pytest.approx(
        (float(karras.sigmas[0]), float(karras.sigmas[-2])), rel=1e-5
    )


def test_timestep_has_the_slope_of_its_interpolation(net):
    sigma, h = torch.tensor(3.3, dtype=torch.float64), 1e-6
    slope = torch.func.jvp(net.timestep, (sigma,), (torch.ones_like(sigma),))[1]
    assert float(slope) == pytest.approx(float(net.timestep(sigma + h) - net.timestep(sigma - h)) / (2 * h), rel=1e-6)


def test_exact_noise_makes_the_exact_denoiser(diffusers):
    """For data N(0, s²), x_t = √ᾱ x₀ + √(1−ᾱ) ε has E[ε | x_t] = √(1−ᾱ)/(ᾱ s² + 1 − ᾱ) x_t."""
    scheduler, s, seen = diffusers.DDPMScheduler(), 0.3, []
    alphas = scheduler.alphas_cumprod.double().numpy()

    def unet(x, t):
        seen.append(float(t))
        alpha = 1 / (1 + np.exp(-np.interp(float(t), np.arange(1000), np.log(alphas / (1 - alphas)))))
        return SimpleNamespace(sample=x * math.sqrt(1 - alpha) / (alpha * s**2 + 1 - alpha))

    net = example('diffusers_unet').EpsilonDenoiser(unet, scheduler)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for sigma in (0.011, 0.2, 1.0, 17.0, 150.0):
        D = net(sigma * x, torch.tensor(sigma, dtype=torch.float64))
        torch.testing.assert_close(D, sigma * x * s**2 / (s**2 + sigma**2), rtol=1e-6, atol=1e-6 * s**2)
    assert seen == sorted(seen)


@numpy_arrays
def test_for_the_ode_our_euler_and_heun_are_those_of_diffusers(diffusers, unet, net, monkeypatch):
    monkeypatch.setattr(net, 'round_sigma', lambda sigma: sigma, raising=False)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    ends = {'num_steps': 12, 'sigma_max': net.sigma_max}
    for ours, theirs in [
        (ito_taylor_sampler(net, latents, scheme='euler', eta=0, **ends), diffusers.EulerDiscreteScheduler),
        (edm.edm_sampler(net, latents, **ends), diffusers.HeunDiscreteScheduler),
    ]:
        assert distance(ours, diffusers_run(theirs, unet, latents, 12)) < 1e-5


@numpy_arrays
def test_taylor_for_the_ode_meets_diffusers_heun_as_the_square_of_the_steps(diffusers, unet, net):
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = diffusers_run(diffusers.HeunDiscreteScheduler, unet, latents, 100)
    with contiguous_norms(unet):
        gaps = [
            distance(ito_taylor_sampler(net, latents, num_steps=n, sigma_max=net.sigma_max, eta=0), theirs)
            for n in (8, 16, 32)
        ]
    assert [gaps[0] / gaps[1], gaps[1] / gaps[2]] == pytest.approx([4, 4], rel=0.3)
    assert gaps[2] < 0.04


def distance(one, other):
    return float((one - other.double()).norm() / other.double().norm())


def test_a_unet_without_the_remedy_is_refused_with_the_layer_named(net):
    with pytest.raises(ValueError, match=r'layer unet\..*GroupNorm.*rk'):
        ito_taylor_sampler(net, torch.randn(2, 1, 8, 8), num_steps=3)
    assert ito_taylor_sampler(net, torch.randn(2, 1, 8, 8), num_steps=3, scheme='rk').isfinite().all()


# ----------------------------------------------------------------------------
# k-diffusion.


def test_a_k_diffusion_model_gets_what_k_diffusion_would_give_it():
    seen = []

    class Model(torch.nn.Module):
        sigma_min, sigma_max = torch.tensor(0.5), torch.tensor(20.0)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x, sigma, **extra):
            seen.append((x.dtype, sigma, extra))
            return x * (self.weight / (2 + sigma**2)).reshape(-1, 1)

    net = example('k_diffusion_model').KDiffusionDenoiser(Model(), cond='words')
    x = torch.randn(3, 4, dtype=torch.float64)
    D = Denoiser(net)(x, 1.5)
    torch.testing.assert_close(D, x * 2 / (2 + 1.5**2), rtol=1e-6, atol=0)
    levels = []
    ito_taylor_sampler(net, x, num_steps=4, eta=0, callback=lambda i, x, D, sigma: levels.append(sigma))
    assert (levels[0], levels[-1]) == pytest.approx((20, 0.5))
    for dtype, sigma, extra in seen:
        assert (dtype, tuple(sigma.shape), extra) == (torch.float32, (3,), {'cond': 'words'})


@pytest.mark.skipif('k-diffusion-heun' not in peers.installed(), reason='needs k-diffusion')
def test_k_diffusions_own_wrapper_and_sampler_agree(diffusers, unet, net):
    """DiscreteEpsDDPMDenoiser is k-diffusion's way from ε on a DDPM schedule to D."""
    sampling = peers.k_diffusion_sampling()
    wrapper = importlib.import_module('k_diffusion.external').DiscreteEpsDDPMDenoiser

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x, t):
            return self.unet(x, t).sample

    model = wrapper(Plain(), diffusers.DDPMScheduler().alphas_cumprod, quantize=False)
    ours = example('k_diffusion_model').KDiffusionDenoiser(model)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for sigma in (0.02, 0.7, 30.0):
            torch.testing.assert_close(
                ours(sigma * x, torch.tensor(sigma)), net(sigma * x, torch.tensor(sigma)), rtol=1e-4, atol=1e-4
            )
        sigmas = torch.tensor(noise_levels(ours, 10, 0, math.inf, 7))
        theirs = sampling.sample_euler(model, x * sigmas[0], sigmas, disable=True)
    found = ito_taylor_sampler(ours, x, num_steps=10, sigma_max=ours.sigma_max, scheme='euler', eta=0)
    assert distance(found, theirs) < 1e-5


# ----------------------------------------------------------------------------
# The page.


def test_code_of_the_page_prints_what_the_page_says():
    """Its Python blocks, run one after the other, print its text blocks."""
    pytest.importorskip('diffusers')
    page = (ROOT / 'docs' / 'in-your-code.md').read_text()
    code, printed = ('\n'.join(re.findall(rf'```{kind}\n(.*?)```', page, re.DOTALL)) for kind in ('python', 'text'))
    script = f'import sys\nsys.path[:0] = [".", "examples"]\n{code}'
    run = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == printed.split()
