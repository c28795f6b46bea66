"""What does a network evaluation with its JVP cost, in plain forward passes?

    python benchmarks/cost.py

Every network runs in two ways: as generate.py runs it, and as straightforward eager PyTorch would (`plain`: channels
first, PyTorch's own forward-mode rules, attention by matrix products). The four take turns, so that a busy machine
slows them all; each ratio is the median over the rounds. The last column is the relative distance between the tangents
of the two ways. `--dtype=bf16` runs the same under autocast, `--device=cuda` on a GPU.
"""

import contextlib
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

from torch_utils import distributed, network_io
from training import networks

NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    'CIFAR-10 DDPM++, 64 channels': lambda: networks.EDMPrecond(
        32, 3, model_type='SongUNet', augment_dim=9, model_channels=64, channel_mult=[2, 2, 2], dropout=0.13
    ),
    'the shipped network': lambda: network_io.load_network('ckpts/edm-mnist-32x32-cond-vp.pkl'),
    'ADM, 64 channels': lambda: networks.EDMPrecond(32, 3, label_dim=10, model_channels=64),
}


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Networks built from plain PyTorch operations, as they would be without the rules of training/networks.py."""
    ours = networks._split_dual, networks._attention, networks._winograd_pays
    networks._split_dual = lambda x, *params: (x, None)
    networks._attention = lambda q, k, v: v @ networks.AttentionOp.apply(q, k).transpose(1, 2)
    networks._winograd_pays = lambda x, weight: False
    try:
        yield
    finally:
        networks._split_dual, networks._attention, networks._winograd_pays = ours


def randomize_zeros(net: torch.nn.Module) -> None:
    """Untrained networks end in layers of (nearly) zeros, which would hide every difference."""
    torch.manual_seed(0)
    for weight in net.parameters():
        if weight.abs().max() < 1e-3:
            torch.nn.init.normal_(weight, std=0.02)


def measure(net: Any, batch: int, rounds: int, dtype: torch.dtype) -> tuple[dict[str, list[float]], float]:
    """Seconds of each round by way, and the relative distance between the two tangents."""
    device = next(net.parameters()).device
    x, tangent = torch.randn([2, batch, net.img_channels, net.img_resolution, net.img_resolution], device=device)
    sigma = torch.linspace(0.1, 2, batch, device=device)
    classes = torch.arange(batch, device=device)
    labels = torch.eye(net.label_dim, device=device)[classes % net.label_dim] if net.label_dim else None

    def forward(net: Any) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return net(x, sigma, labels)

    def jvp(net: Any) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return torch.func.jvp(lambda x: net(x, sigma, labels), (x,), (tangent,))[1]

    ours = copy.deepcopy(net)
    if device.type == 'cpu':
        ours.to(memory_format=torch.channels_last)
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for way, call in [('forward', forward), ('jvp', jvp)]:
            for kind, arm, context in [('ours', ours, contextlib.nullcontext()), ('plain', net, plain())]:
                with context:
                    start = time.perf_counter()
                    call(arm)[0, 0, 0, 0].item()  # waits for a GPU
                    seconds.setdefault(f'{kind} {way}', []).append(time.perf_counter() - start)
    with plain():
        expected = jvp(net)
    distance = float((jvp(ours) - expected).norm() / expected.norm())
    return {way: values[1:] for way, values in seconds.items()}, distance  # the first round warms up


@click.command()
@click.option('--batch', type=click.IntRange(min=1), default=16, show_default=True)
@click.option('--rounds', type=click.IntRange(min=1), default=5, show_default=True)
@click.option('--dtype', type=click.Choice(['fp32', 'bf16']), default='fp32', show_default=True)
@click.option('--device', metavar='NAME', default='cpu', show_default=True)
@torch.no_grad()
def main(batch: int, rounds: int, dtype: str, device: str) -> None:
    try:
        selected = distributed.select_device(device)
    except ValueError as err:
        raise click.UsageError(str(err)) from None
    ratios = 'speed-up of forward | plain JVP / plain forward | JVP / plain forward | JVP / forward'
    print(f'| network | {ratios} | distance |')
    print('|---|---|---|---|---|---|')
    for name, make in NETWORKS.items():
        net = make().eval().requires_grad_(False)
        randomize_zeros(net)
        net.to(selected)
        seconds, distance = measure(net, batch, rounds, torch.bfloat16 if dtype == 'bf16' else torch.float32)

        def ratio(way: str, unit: str, seconds: dict[str, list[float]] = seconds) -> float:
            return statistics.median(a / b for a, b in zip(seconds[way], seconds[unit], strict=True))

        pairs = [('plain forward', 'ours forward'), ('plain jvp', 'plain forward')]
        pairs += [('ours jvp', 'plain forward'), ('ours jvp', 'ours forward')]
        print(f'| {name} | ' + ' | '.join(f'{ratio(*pair):.2f}' for pair in pairs) + f' | {distance:.1e} |')


if __name__ == '__main__':
    main()
