"""Other people's samplers for few evaluations, written here from their papers: run(denoise, x, sigmas, noise) → images.

The call is that of comparison/peers.py. Multistep methods share one loop, `multistep`; each is one function, its step,
from x at level s to level t < s. It gets the `Node`s of this level and the last ones, the latest first, as many as the
order in force takes: 1, 2, 3, 3, … The last step, to level 0, is x = D(x; s) in all of them: N levels, N evaluations.

Without noise they solve dx/dσ = ε, with ε = (x − D)/σ.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Sampler = Callable[..., torch.Tensor]


class Node(NamedTuple):
    """What is known at a noise level."""

    sigma: float
    D: torch.Tensor
    eps: torch.Tensor


def evaluate(denoise: Sampler, x: torch.Tensor, sigma: float) -> Node:
    D = denoise(x, x.new_tensor(sigma))
    return Node(sigma, D, (x - D) / sigma)


def multistep(step: Sampler, lower_order_final: bool = False) -> Sampler:
    """The loop, of order 3: `step(x, nodes, t, noise)` is the state at level t.

    Args:
        lower_order_final: the last step between levels has order 1 and the one before it order 2.
    """

    def run(denoise: Sampler, x: torch.Tensor, sigmas: Sequence[float], noise: Any) -> torch.Tensor:
        nodes: list[Node] = []
        for i, (s, t) in enumerate(itertools.pairwise(sigmas[:-1])):
            nodes = [evaluate(denoise, x, s), *nodes[:2]]
            order = len(sigmas) - 2 - i if lower_order_final else 3
            x = step(x, nodes[:order], t, noise)
        return evaluate(denoise, x, sigmas[-2]).D

    return run


# ----------------------------------------------------------------------------
# Adams–Bashforth methods: ε is extrapolated by a polynomial through the nodes, and integrated over σ.


def ipndm_step(x: torch.Tensor, nodes: Sequence[Node], t: float, noise: Any) -> torch.Tensor:
    """iPNDM of Zhang & Chen 2022 (arXiv 2204.13902): the weights of equal steps in σ, whatever the steps.

    x' = x + (t − s)(23 ε₀ − 16 ε₁ + 5 ε₂)/12, before that (3 ε₀ − ε₁)/2 and ε₀.
    """
    weights = ([1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12])
    return x + (t - nodes[0].sigma) * combine(weights[len(nodes) - 1], nodes)


def ipndm_v_step(x: torch.Tensor, nodes: Sequence[Node], t: float, noise: Any) -> torch.Tensor:
    """iPNDM with the weights of the steps that there are: x' = x + ∫ P(σ) dσ, P the polynomial in σ through the ε_j.

    In the words of Zhang & Chen 2022 it is ρAB-DEIS, because their ρ is σ here.
    """
    h = t - nodes[0].sigma
    places = [(node.sigma - nodes[0].sigma) / h for node in nodes]
    return x + h * combine(fit(places, [1, 1 / 2, 1 / 3]), nodes)


def deis_step(x: torch.Tensor, nodes: Sequence[Node], t: float, noise: Any) -> torch.Tensor:
    """tAB-DEIS of Zhang & Chen 2022 (arXiv 2204.13902): x' = x + ∫ P(u) dσ, u = ln(σ/s).

    P is the polynomial through the ε_j in the time of the network, which is ln σ here, as in diffusers, and the time
    of a VP-SDE in the paper. I_k = ∫ u^k dσ = t ln(t/s)^k − k I_{k−1}.
    """
    s = nodes[0].sigma
    u = math.log(t / s)
    I_0 = t - s
    I_1 = t * u - I_0
    I_2 = t * u**2 - 2 * I_1
    places = [math.log(node.sigma / s) for node in nodes]
    return x + combine(fit(places, [I_0, I_1, I_2]), nodes)


def fit(places: Sequence[float], integrals: Sequence[float]) -> list[float]:
    """Weights c that are exact for 1, u, u²: Σ_j c_j u_j^k = integrals[k], for as many k as there are places."""
    powers = torch.tensor([[u**k for u in places] for k in range(len(places))], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.tensor(integrals[: len(places)], dtype=torch.float64)).tolist()


def combine(weights: Sequence[float], nodes: Sequence[Node]) -> torch.Tensor:
    """Σ_j c_j ε_j."""
    return torch.stack([c * node.eps for c, node in zip(weights, nodes, strict=True)]).sum(0)


# ----------------------------------------------------------------------------
# DPM-Solver.


def dpm_solver_step(x: torch.Tensor, nodes: Sequence[Node], t: float, noise: Any) -> torch.Tensor:
    """DPM-Solver of Lu et al. 2022 (arXiv 2206.00927), multistep with ε prediction, as its authors' code has it.

    With λ = −ln σ, h = ln(s/t), φ₁ = e^h − 1, φ₂ = φ₁/h − 1, φ₃ = φ₂/h − ½, and d₁, d₂ the divided differences of ε at
    the nodes, times h and h²:  x' = x − t (φ₁ ε₀ + φ₂ d₁ + φ₃ d₂); in order 2 φ₁/2 takes the place of φ₂.
    The Taylor expansion has ε″h² = 2 d₂. The code leaves the 2 out, and with it order 3: it converges with order 2.
    """
    h = math.log(nodes[0].sigma / t)
    phi_1 = math.expm1(h)
    phi_2 = phi_1 / h - 1
    phi_3 = phi_2 / h - 1 / 2
    change = phi_1 * nodes[0].eps
    if len(nodes) > 1:
        r_0, d_0 = slope(nodes[0], nodes[1], h)
    if len(nodes) == 2:
        change = change + phi_1 / 2 * d_0
    elif len(nodes) == 3:
        r_1, d_1 = slope(nodes[1], nodes[2], h)
        d_2 = (d_0 - d_1) / (r_0 + r_1)
        change = change + phi_2 * (d_0 + r_0 * d_2) + phi_3 * d_2
    return x - t * change


def slope(node: Node, before: Node, h: float) -> tuple[float, torch.Tensor]:
    """r, the distance of two nodes in λ in units of h, and the slope of ε between them."""
    r = math.log(before.sigma / node.sigma) / h
    return r, (node.eps - before.eps) / r


# ----------------------------------------------------------------------------
# With noise.


def phi(v: torch.Tensor) -> torch.Tensor:
    """The noise of ER-SDE-Solver's best results, φ(v) = v (exp(v^0.3) + 10). v is the ODE, v² the reverse SDE."""
    return v * (torch.exp(v**0.3) + 10)


def er_sde_step(x: torch.Tensor, nodes: Sequence[Node], t: float, noise: Any) -> torch.Tensor:
    """ER-SDE-Solver-3 of Cui et al. 2023 (arXiv 2309.06169), for VE.

        x' = r x + (1 − r) D + (t − s + J₀) D′ + ((t − s)²/2 + J₁) D″ + √(t² − r² s²) z,    r = φ(t)/φ(s)
        J_k = φ(t) ∫ (σ − s)^k / φ(σ) dσ from t to s, by 200 rectangles of the height at their lower ends

    D′ is the difference quotient of D, D″ that of D′ over half of the way back to the level before the last.
    """
    s, D = nodes[0].sigma, nodes[0].D
    width = (s - t) / 200
    sigma = t + width * torch.arange(200, dtype=torch.float64)
    phi_t, phi_s = phi(torch.tensor([t, s], dtype=torch.float64)).tolist()
    r = phi_t / phi_s
    x = r * x + (1 - r) * D
    if len(nodes) > 1:
        J_0 = float((phi_t / phi(sigma)).sum() * width)
        D_prime = (D - nodes[1].D) / (s - nodes[1].sigma)
        x = x + (t - s + J_0) * D_prime
    if len(nodes) > 2:
        J_1 = float((phi_t / phi(sigma) * (sigma - s)).sum() * width)
        D_prime_before = (nodes[1].D - nodes[2].D) / (nodes[1].sigma - nodes[2].sigma)
        x = x + ((t - s) ** 2 / 2 + J_1) * (D_prime - D_prime_before) / ((s - nodes[2].sigma) / 2)
    return x + math.sqrt(t**2 - (r * s) ** 2) * noise.fresh()


def seeds_3(denoise: Sampler, x: torch.Tensor, sigmas: Sequence[float], noise: Any) -> torch.Tensor:
    """SEEDS-3 of Gonzalez et al. 2023 (arXiv 2305.14267), data prediction: three evaluations a step, one in the last.

    A step has stages at the levels s e^{−ch}, h = ln(s/t), for c = ⅓, ⅔ and 1; b is the c of the stage before:

        x_c = e^{−2ch} x + (1 − e^{−2ch}) D₀ + (c/b) (1 − (1 − e^{−2ch})/(2ch)) (D_b − D₀) + n_c
        n_c = e^{−2(c−b)h} n_b + s e^{−ch} √(1 − e^{−2(c−b)h}) z_c
    """
    for s, t in itertools.pairwise(sigmas[:-1]):
        h = math.log(s / t)
        D_0 = D_b = evaluate(denoise, x, s).D
        start, n, b = x, torch.zeros_like(x), 0.0
        for c in (1 / 3, 2 / 3, 1.0):
            level, gone, kept = s * math.exp(-c * h), -math.expm1(-2 * c * h), math.exp(-2 * (c - b) * h)
            n = kept * n + level * math.sqrt(1 - kept) * noise.fresh()
            x = (1 - gone) * start + gone * D_0 + n
            if b > 0:
                x = x + c / b * (1 - gone / (2 * c * h)) * (D_b - D_0)
            if c < 1:
                D_b = evaluate(denoise, x, level).D
            b = c
    return evaluate(denoise, x, sigmas[-2]).D


# ----------------------------------------------------------------------------
# The list.

ipndm_3 = multistep(ipndm_step)
ipndm_v_3 = multistep(ipndm_v_step)
deis_3 = multistep(deis_step)
dpm_solver_3 = multistep(dpm_solver_step, lower_order_final=True)
er_sde_3 = multistep(er_sde_step)
