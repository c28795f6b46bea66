"""A diffusers UNet2DModel that predicts the noise ε on a DDPM schedule, as most of diffusers' pixel models do.

Such a network sees x / √(1 + σ²) and the timestep t with σ(t)² = (1 − ᾱ_t)/ᾱ_t; the denoised images are x − σ ε.
"""

from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler

from sampler_2nd import CountCalls, ito_taylor_sampler


class EpsilonDenoiser(torch.nn.Module):
    """D(x; σ) of an ε-prediction network and its scheduler. Between timesteps, t is linear in ln σ."""

    def __init__(self, unet, scheduler):
        super().__init__()
        prediction = scheduler.config.prediction_type
        if prediction != 'epsilon':
            raise ValueError(f'the scheduler has prediction_type={prediction!r}; this is for networks of "epsilon"')
        self.unet = unet
        alphas = scheduler.alphas_cumprod.double()
        self.register_buffer('log_sigmas', ((1 - alphas) / alphas).log() / 2)
        self.sigma_min, self.sigma_max = (float(self.log_sigmas[i].exp()) for i in (0, -1))

    def timestep(self, sigma):
        log_sigma = sigma.double().log()
        above = torch.searchsorted(self.log_sigmas, log_sigma.detach()).clamp(1, len(self.log_sigmas) - 1)
        low, high = self.log_sigmas[above - 1], self.log_sigmas[above]
        return above - 1 + (log_sigma - low) / (high - low)

    def forward(self, x, sigma, class_labels=None):
        t = self.timestep(sigma).to(x.dtype)
        return x - sigma * self.unet(x / (1 + sigma**2).sqrt(), t).sample


class ExactUNet(torch.nn.Module):
    """Put UNet2DModel.from_pretrained('google/ddpm-cifar10-32') here. This one is exact: the pixels are N(0, 0.5²)."""

    def __init__(self, scheduler):
        super().__init__()
        self.alphas = torch.nn.Parameter(scheduler.alphas_cumprod)

    def forward(self, x, t):
        alpha = self.alphas[t.round().long()]
        return SimpleNamespace(sample=x * (1 - alpha).sqrt() / (alpha * 0.5**2 + 1 - alpha))


def main():
    torch.manual_seed(0)
    scheduler = DDPMScheduler()
    net = CountCalls(EpsilonDenoiser(ExactUNet(scheduler), scheduler))
    images = ito_taylor_sampler(net, torch.randn(4, 3, 64, 64), num_steps=40, scheme='rk')
    print(f'images: std {images.std():.2f}; {net.calls} calls')


if __name__ == '__main__':
    main()
