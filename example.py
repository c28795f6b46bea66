"""Minimal example: a grid of images from a network at its best settings. It has no sampler of its own."""

import time
from collections.abc import Callable
from typing import Any

import click
import torch
from tqdm import tqdm

from generate import SHIPPED_NETWORK, edm_sampler, load_network, to_uint8, work_done
from images.pictures import save_png, tile
from sampler_2nd import CountCalls, ito_taylor_sampler
from torch_utils import distributed as dist

EDM = 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained'
IMAGENET_CHURN = {'S_churn': 40, 'S_min': 0.05, 'S_max': 50, 'S_noise': 1.003}

# name → (network, picture, sampler, its settings): the settings with the best published FID.
EXAMPLES: dict[str, tuple[str, str, Callable[..., torch.Tensor], dict[str, Any]]] = {
    'mnist': (str(SHIPPED_NETWORK), 'mnist-32x32.png', ito_taylor_sampler, {'num_steps': 40}),
    'cifar10': (f'{EDM}/edm-cifar10-32x32-cond-vp.pkl', 'cifar10-32x32.png', edm_sampler, {'num_steps': 18}),
    'ffhq': (f'{EDM}/edm-ffhq-64x64-uncond-vp.pkl', 'ffhq-64x64.png', edm_sampler, {'num_steps': 40}),
    'afhqv2': (f'{EDM}/edm-afhqv2-64x64-uncond-vp.pkl', 'afhqv2-64x64.png', edm_sampler, {'num_steps': 40}),
    'imagenet': (
        f'{EDM}/edm-imagenet-64x64-cond-adm.pkl',
        'imagenet-64x64.png',
        edm_sampler,
        {'num_steps': 256, **IMAGENET_CHURN},
    ),
}


def generate_image_grid(
    network_pkl: str,
    dest_path: str,
    seed: int = 0,
    gridw: int = 8,
    gridh: int = 8,
    device: torch.device | str | None = None,
    sampler: Callable[..., torch.Tensor] = edm_sampler,
    num_steps: int = 18,
    **sampler_kwargs: Any,
) -> None:
    """Write a PNG of gridw × gridh images, row by row, all drawn from one random stream, and print what it cost.

    Args:
        network_pkl: path or URL.
        dest_path: the PNG file.
        seed: of the one stream: latents, then classes if the network has any, then the sampler's noise.
        device: 'cuda', 'mps' or 'cpu'; by default the first there is.
        sampler: `generate.edm_sampler`, `sampler_2nd.ito_taylor_sampler` or one like them.
        num_steps, sampler_kwargs: passed on to it.
    """
    device = dist.init(device)
    print(f'Loading network from {network_pkl} ...')
    net = CountCalls(load_network(network_pkl, device))

    start = time.perf_counter()
    torch.manual_seed(seed)
    count = gridw * gridh
    latents = torch.randn([count, net.img_channels, net.img_resolution, net.img_resolution], device=device)
    labels = None
    if net.label_dim:
        labels = torch.eye(net.label_dim, device=device)[torch.randint(net.label_dim, size=[count], device=device)]
    with tqdm(total=num_steps, desc=f'Sampling {count} images', unit='step') as bar:
        images = sampler(net, latents, labels, num_steps=num_steps, callback=lambda *_: bar.update(), **sampler_kwargs)
    save_png(tile(to_uint8(images), gridw), dest_path)
    print(f'{count} images in {time.perf_counter() - start:.1f} s on {device}')
    print(work_done(net, num_steps, num_batches=1))
    print(f'Saved {dest_path}')


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--dataset', help='Which network', type=click.Choice([*EXAMPLES, 'all']), default='mnist')
@click.option('--device', help='cuda, mps or cpu', metavar='NAME', show_default='the first there is')
def main(dataset: str, device: str | None) -> None:
    """Save an 8×8 grid of images in the current folder.

    \b
    python example.py                    # digits, from the network in this repository
    python example.py --dataset=cifar10  # downloads EDM's network (CC BY-NC-SA 4.0)
    """
    for name in EXAMPLES if dataset == 'all' else [dataset]:
        network, picture, sampler, settings = EXAMPLES[name]
        try:
            generate_image_grid(network, picture, device=device, sampler=sampler, **settings)
        except (OSError, ValueError) as err:
            raise click.ClickException(str(err)) from None


if __name__ == '__main__':
    main()
