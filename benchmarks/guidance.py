"""What does guidance cost in order? A guided denoiser is no posterior mean, so D drifts where the schemes say it rests.

docs/method.md, section "Guidance", derives what they leave out. Here both networks are exact denoisers of mixtures of
normals, so that nothing but guidance is measured. σ runs from 3 to 0.1 as in benchmarks/orders.py, and errors are
against a fine solution on the same Brownian path. `taylor + drift` and `rk + drift` put the missing drift back, each in
its own way. They show that the formula is right; `rk + drift` is the reference.
"""

import contextlib
import math
import os
import sys
from unittest import mock

import click
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

import sampler_2nd
from benchmarks import orders

GUIDANCE = (1, 1.5, 2, 3)
SCHEMES = {
    'heun': 0.0,
    'euler': 1.0,
    'taylor': 1.0,
    'rk': 1.0,
    'taylor + drift': 1.0,
    'rk + drift': 1.0,
}  # with their η
STEPS, SHOWN = (16, 32, 64, 128), 32
GAUSSIAN_STEPS = (32, 64, 128, 256)

# ----------------------------------------------------------------------------
# Pairs of networks.


def part(mixture, components, smear=0.0):
    """Some components of a mixture, each with `smear`² more variance."""
    chosen = list(components)
    covariances = (mixture.axes * (mixture.variances + smear**2)[:, None]) @ mixture.axes.mT
    weights = mixture.weights[chosen] / mixture.weights[chosen].sum()
    return orders.Mixture(*(each.tolist() for each in (weights, mixture.means[chosen], covariances[chosen])))


WHOLE = orders.PROBLEMS['mixture 2-D']
GAUSSIAN_STDS = (0.7, 1.2)
PAIRS = {
    # Autoguidance: gnet has seen the same data, out of focus.
    'smeared': (WHOLE, part(WHOLE, range(3), smear=0.5)),
    # Classifier-free guidance: a class of two components, and all three.
    'class': (part(WHOLE, [0, 1]), WHOLE),
    'gaussian': tuple(orders.Mixture([1.0], [[0.0]], [[[std**2]]]) for std in GAUSSIAN_STDS),
}

# ----------------------------------------------------------------------------
# Solutions.


def taylor_with_drift(net, gnet, guidance):
    """`taylor` for κ = 1 with what D drifts by under guidance: the tangent of each network gets 2κc (D_w − D_i) more.

    It evaluates both networks once more to know their D. The D of the last step would do.
    """

    def step(denoise, x, past, sigma, sigma_next, kappa, noise):
        h, a = math.log(sigma / sigma_next), 1 + kappa
        N, Z = sampler_2nd.noise_pair(noise(), noise(), kappa, sigma_next, h)
        Z = sampler_2nd.tangent_weight(kappa, h) * Z
        c = h + math.expm1(-a * h) / a
        D = denoise(x, sigma)
        each = [sampler_2nd.Denoiser(network) for network in (net, gnet)]
        products = [one.jvp(x, sigma, Z + 2 * kappa * c * (D - one(x, sigma)), 0)[1] for one in each]
        correction = products[1] + guidance * (products[0] - products[1])
        return math.exp(-a * h) * x - math.expm1(-a * h) * D + N + correction, D

    return step


def rk_with_drift(net, gnet, guidance):
    """`rk` with a node of its own for each network: (h/6)(D̂_w − D̂_i) further. It costs no evaluation.

    The D that it returns, and gets back in `past`, is that of both networks: [2, N, d].
    """

    def guided(D):
        return D[1] + guidance * (D[0] - D[1])

    def step(denoise, x, past, sigma, sigma_next, kappa, noise):
        z1, z2 = noise(), noise()
        each = [sampler_2nd.Denoiser(network) for network in (net, gnet)]
        D_hat = sampler_2nd.predict_D(past, sigma, kappa) if past else torch.stack([one(x, sigma) for one in each])
        tau, tau_next = sigma**-2, sigma_next**-2
        h = tau_next - tau
        tau_m = tau + h / 3
        dB, dZ_over_h = math.sqrt(h) * z1, math.sqrt(h) * (z1 / 2 + z2 / math.sqrt(12))
        nodes = tau * x + h / 3 * guided(D_hat) + h / 6 * (guided(D_hat) - D_hat) + dZ_over_h
        D = torch.stack([one(y / tau_m, tau_m**-0.5) for one, y in zip(each, nodes, strict=True)])
        return (tau * x + h * guided(D) + dB) / tau_next, D

    return step


@contextlib.contextmanager
def guided_problem(pair, guidance):
    """Within it, orders.py knows the guided `pair` as a problem of that name, and the corrected schemes by theirs."""
    net, gnet = PAIRS[pair]
    corrected = {
        'taylor + drift': orders.TAYLOR._replace(step=taylor_with_drift(net, gnet, guidance)),
        'rk + drift': orders.RK._replace(step=rk_with_drift(net, gnet, guidance)),
    }
    problems = {pair: sampler_2nd.Guided(net, gnet, guidance)}
    with mock.patch.dict(orders.PROBLEMS, problems), mock.patch.dict(orders.ABLATIONS, corrected):
        yield


def convergence(pair, guidance, path, schemes=SCHEMES, steps=STEPS, fine=1024):
    """{scheme: (strong errors, weak errors)}, each an `orders.Convergence`; weak is the error of E|x|².

    The reference of the ODE is EDM's Heun, that of the SDE `rk + drift`, both with `fine` steps.
    """
    results, solutions = {}, {}
    with guided_problem(pair, guidance):
        for scheme in schemes:
            eta = SCHEMES[scheme]
            if eta not in solutions:
                best = 'rk + drift' if eta else 'heun'
                solutions[eta] = [orders.solve(best, pair, path, n, eta) for n in (fine, fine // 2)]
            solution, coarser = solutions[eta]
            states = [orders.solve(scheme, pair, path, n, eta) for n in steps]
            own_error = orders.rms(solution - coarser) / (2**1.5 - 1)
            strong = orders.fit(steps, [orders.rms(x - solution) for x in states], [own_error] * len(steps))
            gaps = [(x.square() - solution.square()).sum(-1) for x in states]
            noise = [float(gap.std()) / math.sqrt(len(gap)) for gap in gaps]
            results[scheme] = strong, orders.fit(steps, [abs(float(gap.mean())) for gap in gaps], noise)
    return results


# ----------------------------------------------------------------------------
# Gaussian data: weak errors without Monte Carlo noise.


def guided_variance(guidance):
    """Var x at σ = 0.1 of the guided SDE with κ = 1 between two Gaussian denoisers, from N(0, 3²) at σ = 3.

    From σ to σ' it multiplies x by g(σ) = Π ((s_i² + σ'²)/(s_i² + σ²))^{w_i}, and adds 2σ² g(σ)² |d ln σ| of variance.
    """
    high, low = orders.SIGMA_MAX, orders.SIGMA_MIN

    def growth(sigma):
        net, gnet = ((s**2 + low**2) / (s**2 + sigma**2) for s in GAUSSIAN_STDS)
        return net**guidance * gnet ** (1 - guidance)

    nodes, weights = np.polynomial.legendre.leggauss(80)
    half = math.log(high / low) / 2
    sigmas = low * np.exp(half * (1 + nodes))
    return float(high**2 * growth(high) ** 2 + half * weights @ (2 * sigmas**2 * growth(sigmas) ** 2))


def gaussian_errors(scheme, guidance, steps=GAUSSIAN_STEPS):
    """Error of the variance, in exact arithmetic: x has a row for each independent normal."""
    errors = []
    with guided_problem('gaussian', guidance):
        for n in steps:
            columns = torch.eye(2 * n + 1, dtype=torch.float64)[..., None]
            x = orders.solve(scheme, 'gaussian', PathOfColumns(columns), n, eta=1.0)
            errors.append(abs(float(x.square().sum()) - guided_variance(guidance)))
    return orders.fit(steps, errors, [1e-13] * len(steps))


class PathOfColumns:
    """Independent normals in the place of an `orders.Path`."""

    def __init__(self, columns):
        self.latents, self._draws = columns[0], columns[1:]

    def normals(self, steps, kappa, time_integral):
        return self._draws


# ----------------------------------------------------------------------------
# The tables.


def format_cell(result, index):
    return f'{result.slope:.2f} ({result.errors[index]:.1e})'.replace('nan', '–')


def print_table(title, rows):
    print('\n| ' + ' | '.join([title, *(f'w = {guidance:g}' for guidance in GUIDANCE)]) + ' |')
    print('|---' * (len(GUIDANCE) + 1) + '|')
    for name, cells in rows.items():
        print('| ' + ' | '.join([name, *cells]) + ' |', flush=True)


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--paths', help='Brownian paths', metavar='INT', type=click.IntRange(min=2), default=2000)
def main(paths: int) -> None:
    """Print orders under guidance: the fitted slope and, in brackets, the error with 32 steps.

    \b
    python benchmarks/guidance.py
    """
    names = [scheme for scheme, eta in SCHEMES.items() if eta]
    errors = {name: [gaussian_errors(name, guidance) for guidance in GUIDANCE] for name in names}
    rows = {name: [format_cell(each, GAUSSIAN_STEPS.index(SHOWN)) for each in errors[name]] for name in names}
    print_table('gaussian, weak', rows)
    path = orders.Path(paths, WHOLE.dim)
    for pair in ('smeared', 'class'):
        results = [convergence(pair, guidance, path) for guidance in GUIDANCE]
        for kind, title in enumerate(['strong', 'weak']):
            rows = {name: [format_cell(each[name][kind], STEPS.index(SHOWN)) for each in results] for name in SCHEMES}
            print_table(f'{pair}, {title}', rows)


if __name__ == '__main__':
    main()
