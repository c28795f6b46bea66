"""Minimal example: a grid of images from a network at its best settings. It has no sampler of its own."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from tqdm import tqdm

import dnnlib
from dnnlib.options import at_least_one
from images.pictures import save_png, tile
from sampler_2nd import CountCalls
from sampling import choose, levels
from sampling.draw import to_uint8
from sampling.edm import edm_sampler
from sampling.networks import SHIPPED_NETWORK, open_network, work_done
from torch_utils import distributed as dist

EDM = 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained'
IMAGENET_CHURN = {'S_churn': 40, 'S_min': 0.05, 'S_max': 50, 'S_noise': 1.003}

# name → (network, picture, sampler, its settings): the settings with the best published FID.
EXAMPLES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    'mnist': (str(SHIPPED_NETWORK), 'mnist-32x32.png', 'taylor', {'num_steps': 40}),
    'cifar10': (f'{EDM}/edm-cifar10-32x32-cond-vp.pkl', 'cifar10-32x32.png', 'heun', {'num_steps': 18}),
    'ffhq': (f'{EDM}/edm-ffhq-64x64-uncond-vp.pkl', 'ffhq-64x64.png', 'heun', {'num_steps': 40}),
    'afhqv2': (f'{EDM}/edm-afhqv2-64x64-uncond-vp.pkl', 'afhqv2-64x64.png', 'heun', {'num_steps': 40}),
    'imagenet': (
        f'{EDM}/edm-imagenet-64x64-cond-adm.pkl',
        'imagenet-64x64.png',
        'heun',
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
        sampler: `sampling.edm.edm_sampler`, `sampler_2nd.ito_taylor_sampler` or one like them.
        num_steps, sampler_kwargs: passed on to it.
    """
    device = dist.init(device)
    print(f'Loading network from {network_pkl} ...')
    net = CountCalls(open_network(network_pkl, device))
    chosen = levels.choose_levels('auto', partial(sampler, num_steps=num_steps, **sampler_kwargs), net.net, network_pkl)

    start = time.perf_counter()
    torch.manual_seed(seed)
    count = gridw * gridh
    latents = torch.randn([count, net.img_channels, net.img_resolution, net.img_resolution], device=device)
    labels = None
    if net.label_dim:
        labels = torch.eye(net.label_dim, device=device)[torch.randint(net.label_dim, size=[count], device=device)]
    with tqdm(total=num_steps, desc=f'Sampling {count} images', unit='step') as bar:
        images = chosen(net, latents, labels, callback=lambda *_: bar.update())
    save_png(tile(to_uint8(images), gridw), dest_path)
    print(f'{count} images in {time.perf_counter() - start:.1f} s on {device}')
    print(work_done(net, num_steps, num_batches=1))
    print(f'Saved {dest_path}')


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--dataset', help='Which network', type=click.Choice([*EXAMPLES, 'all']), default='mnist')
@click.option('--sampler', help='Which sampler', type=click.Choice(list(choose.samplers())), show_default='by network')
@click.option('--steps', help='Time steps', metavar='INT', type=at_least_one, show_default='by network')
@click.option('--device', help='cuda, mps or cpu', metavar='NAME', show_default='the first there is')
def main(dataset: str, sampler: str | None, steps: int | None, device: str | None) -> None:
    """Save an 8×8 grid of images in the current folder.

    \b
    python example.py                    # digits, from the network in this repository
    python example.py --sampler=rk --steps=16
    python example.py --dataset=cifar10  # downloads EDM's network (CC BY-NC-SA 4.0)
    """
    for name in EXAMPLES if dataset == 'all' else [dataset]:
        network, picture, best, settings = EXAMPLES[name]
        if sampler not in (None, best):
            settings = {'num_steps': choose.samplers()[sampler].num_steps}
        chosen = choose.make(sampler or best, **{**settings, 'num_steps': steps or settings['num_steps']})
        try:
            generate_image_grid(network, picture, device=device, sampler=chosen.func, **chosen.keywords)
        except (OSError, ValueError) as err:
            raise click.ClickException(str(err)) from None


if __name__ == '__main__':
    dnnlib.util.print_any_text()
    main()
