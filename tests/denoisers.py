"""An exact denoiser, and the random numbers of a seed, for tests of the samplers."""

import math

import torch


class GaussianDenoiser:
    """The exact denoiser of Gaussian images with standard deviation ½, which writes down the noise levels it sees."""

    sigma_min, sigma_max = 0, math.inf

    def __init__(self, levels=None):
        self.levels = levels
        self.sigma_calls = []

    def __call__(self, x, sigma, class_labels=None):
        self.sigma_calls.append(float(sigma))
        return x * 0.25 / (0.25 + sigma**2)

    def round_sigma(self, sigma):
        if self.levels is None:
            return sigma
        return self.levels[(sigma.reshape(-1, 1) - self.levels).abs().argmin(1)].reshape(sigma.shape)


LATENTS = torch.tensor([0.3, -1.2, 0.8, 2.0]).reshape(1, 1, 2, 2)


def constant_noise(x):
    return torch.full_like(x, 0.5)


def reference_draws(seed, shape, label_dim, num_noises):
    """What EDM draws for a seed: latent, class where there are classes, and one normal in float64 per step."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(shape, generator=g, dtype=torch.float32)
    class_idx = int(torch.randint(label_dim, [], generator=g)) if label_dim else None
    return latent, class_idx, [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(num_noises)]
