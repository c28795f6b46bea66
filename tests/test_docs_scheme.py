"""The scheme that docs/contributing.md adds: the block of that page, and the orders of what it adds."""

import math
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

import sampler_2nd

STD, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80
STEPS = (32, 64, 128)


@pytest.fixture(autouse=True)
def added():
    page = Path(sampler_2nd.__file__).parent / 'docs' / 'contributing.md'
    [code] = re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
    with mock.patch.dict(sampler_2nd.SCHEMES):
        exec(code, {})
        yield


def denoiser(x, sigma, class_labels=None):
    """Of N(0, STD²)."""
    return x * (STD**2 / (STD**2 + sigma**2))


def order_of_the_ode(scheme):
    """The slope of the error at σ_min of the ODE, whose solution is x ∝ √(s² + σ²)."""
    latents = torch.ones(1, 1, dtype=torch.float64)
    shrink = math.sqrt((STD**2 + SIGMA_MIN**2) / (STD**2 + SIGMA_MAX**2)) * STD**2 / (STD**2 + SIGMA_MIN**2)
    errors = []
    for steps in STEPS:
        x = sampler_2nd.ito_taylor_sampler(denoiser, latents, num_steps=steps, eta=0, scheme=scheme)
        errors.append(abs(float(x) / SIGMA_MAX - shrink))
    return math.log(errors[0] / errors[-1]) / math.log(STEPS[-1] / STEPS[0])


def test_the_added_scheme_is_of_second_order_for_the_ode():
    assert order_of_the_ode('multistep') == pytest.approx(2, abs=0.2)
    assert order_of_the_ode('euler') == pytest.approx(1, abs=0.2)


def test_the_added_scheme_samples_the_data():
    """40,000 pixels: the standard deviation is known to 0.35 %, and 100 steps add less than that."""
    torch.manual_seed(0)
    net = sampler_2nd.CountCalls(denoiser)
    x = sampler_2nd.ito_taylor_sampler(net, torch.randn(1, 1, 200, 200), num_steps=100, scheme='multistep')
    assert float(x.std()) == pytest.approx(STD, rel=0.02)
    assert (net.calls, net.jvp_calls) == (100, 0)
