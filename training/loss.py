"""Denoising losses: E over σ and n of  weight(σ)·(D(y + n; σ) − y)², n ~ N(0, σ²), returned element by element.

`loss(net, images, labels, augment_pipe)` with images [N, C, H, W] in [−1, 1] returns a tensor of the same shape. The
classes are stored inside snapshots together with this file's text, so it imports torch and persistence only.

Source: Karras et al. 2022 (arXiv 2206.00364), table 1, rows "Noise distribution" and "Loss weighting".
"""

import torch

from torch_utils import persistence


class Loss:
    """What the three losses share; a subclass has `draw_sigma(shape, device)`, and its own weight if not 1/σ²."""

    def weight(self, sigma):
        return 1 / sigma**2

    def __call__(self, net, images, labels, augment_pipe=None):
        sigma = self.draw_sigma([images.shape[0], 1, 1, 1], images.device)
        y, augment_labels = (images, None) if augment_pipe is None else augment_pipe(images)
        D = net(y + sigma * torch.randn_like(y), sigma, labels, augment_labels=augment_labels)
        return self.weight(sigma) * (D - y) ** 2


@persistence.persistent_class
class VPLoss(Loss):
    """σ = σ_VP(t) with t uniform on [ε_t, 1], σ_VP(t)² = exp(½β_d t² + β_min t) − 1; weight 1/σ²."""

    def __init__(self, beta_d=19.9, beta_min=0.1, epsilon_t=1e-5):
        self.beta_d, self.beta_min, self.epsilon_t = beta_d, beta_min, epsilon_t

    def draw_sigma(self, shape, device):
        t = 1 + torch.rand(shape, device=device) * (self.epsilon_t - 1)
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()


@persistence.persistent_class
class VELoss(Loss):
    """ln σ uniform on [ln σ_min, ln σ_max]; weight 1/σ²."""

    def __init__(self, sigma_min=0.02, sigma_max=100):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def draw_sigma(self, shape, device):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** torch.rand(shape, device=device)


@persistence.persistent_class
class EDMLoss(Loss):
    """ln σ ~ N(P_mean, P_std²); weight (σ² + σ_data²)/(σ σ_data)²."""

    def __init__(self, P_mean=-1.2, P_std=1.2, sigma_data=0.5):
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def draw_sigma(self, shape, device):
        return (self.P_mean + self.P_std * torch.randn(shape, device=device)).exp()

    def weight(self, sigma):
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
