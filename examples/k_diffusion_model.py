"""A k-diffusion style model: `model(x, sigma, **extra)` returns the denoised images, with one sigma per image.

That is what the wrappers in k_diffusion.external give, and what most code written around k-diffusion hands on.
"""

import torch

from sampler_2nd import CountCalls, ito_taylor_sampler


class KDiffusionDenoiser(torch.nn.Module):
    """The model as `net(x, sigma, class_labels)`. A module: the sampler calls it in the dtype of its parameters."""

    def __init__(self, model, **extra):
        super().__init__()
        self.model, self.extra = model, extra
        for name in ('sigma_min', 'sigma_max'):  # the noise levels that it knows, if it says so
            if hasattr(model, name):
                setattr(self, name, float(getattr(model, name)))

    def forward(self, x, sigma, class_labels=None):
        return self.model(x, sigma.expand(len(x)), **self.extra)


class TwoClasses(torch.nn.Module):
    """Put your model here. This one is exact: the pixels are N(−0.5, 0.2²) in class 0 and N(0.5, 0.2²) in class 1."""

    def __init__(self):
        super().__init__()
        self.means = torch.nn.Parameter(torch.tensor([-0.5, 0.5]))

    def forward(self, x, sigma, class_cond):
        mean, sigma = self.means[class_cond].reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
        return mean + (x - mean) * 0.2**2 / (0.2**2 + sigma**2)


def main():
    torch.manual_seed(0)
    classes = torch.tensor([0, 0, 1, 1])
    net = CountCalls(KDiffusionDenoiser(TwoClasses(), class_cond=classes))
    images = ito_taylor_sampler(net, torch.randn(4, 3, 64, 64), num_steps=40, scheme='rk')
    for each in (0, 1):
        pixels = images[classes == each]
        print(f'class {each}: mean {pixels.mean():.2f}, std {pixels.std():.2f}')
    print(f'{net.calls} calls, {net.jvp_calls} with a JVP')


if __name__ == '__main__':
    main()
