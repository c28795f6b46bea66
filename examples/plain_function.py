"""A denoiser that is a plain function: clean images are N(0, 0.5²) in every pixel, so D(x; σ) is known.

It shows the callback, counting, and images that start from other images (img2img).
"""

import torch

from sampler_2nd import CountCalls, ito_taylor_sampler

STD = 0.5


def denoiser(x, sigma, class_labels=None):
    """E[clean image | x] for x = clean image + sigma · noise."""
    return x * STD**2 / (STD**2 + sigma**2)


def main():
    torch.manual_seed(0)
    latents = torch.randn(4, 3, 64, 64)

    def show(step, x, D, sigma):
        """After each step: the new state, the denoised images that the step used, and the level it started from."""
        if step % 15 == 14:
            print(f'step {step:2d}  sigma {sigma:6.3f}  std of x {x.std():6.3f}  of D {D.std():.3f}')

    net = CountCalls(denoiser)
    images = ito_taylor_sampler(net, latents, num_steps=60, callback=show)
    print(f'images: std {images.std():.2f}; {net.calls} calls, {net.jvp_calls} with a JVP')

    # A white image, forgotten down to sigma = 0.5: half of it is left, and half of the variance is new.
    white = torch.ones_like(latents)
    images = ito_taylor_sampler(denoiser, latents, num_steps=40, sigma_max=0.5, init=white)
    print(f'from white: mean {images.mean():.2f}, std {images.std():.2f}')


if __name__ == '__main__':
    main()
