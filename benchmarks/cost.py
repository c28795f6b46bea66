"""What does a network evaluation with its JVP cost, in plain forward passes?

    python benchmarks/cost.py

Every network runs in two ways: as generate.py runs it, and as straightforward eager PyTorch would (`plain`: channels
first, PyTorch's own forward-mode rules, attention by matrix products, a new tensor for every result, memory as the C
library keeps it). Forward passes and JVPs of each have processes of their own, since a sampler makes either these or
those, and the memory that a JVP takes would be there for the forward pass too. `direct` is ours with direct
convolutions in the place of Winograd's. They take turns, so that a busy machine slows them all; a turn begins with a
call that is not timed, as a sampler calls its network again and again. A ratio is the median over the rounds, of
several sets of processes, since how much new memory costs one of them is a matter of luck. The last column is the
relative distance between the two tangents. `--dtype=bf16` runs the same under autocast, `--device=cuda` on a GPU.
"""

import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import click
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

from sampling.networks import SHIPPED_NETWORK, prepare_for_cpu
from torch_utils import distributed, network_io
from training import fast, networks, winograd

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16}
WAYS = 'ours forward', 'direct forward', 'plain forward', 'ours jvp', 'plain jvp'

NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    'CIFAR-10 DDPM++, 64 channels': lambda: networks.EDMPrecond(
        32, 3, model_type='SongUNet', augment_dim=9, model_channels=64, channel_mult=[2, 2, 2], dropout=0.13
    ),
    'the shipped network': lambda: network_io.load_network(str(SHIPPED_NETWORK)),
    'ADM, 64 channels': lambda: networks.EDMPrecond(32, 3, label_dim=10, model_channels=64),
}


def randomize_zeros(net: torch.nn.Module) -> None:
    """Untrained networks end in layers of (nearly) zeros, which would hide every difference."""
    torch.manual_seed(0)
    for weight in net.parameters():
        if weight.abs().max() < 1e-3:
            torch.nn.init.normal_(weight, std=0.02)


class Arm:
    """One way ('ours forward', 'plain jvp', …) to run a network, in a process of its own, as memory is a process's."""

    def __init__(self, way: str, name: str, batch: int, dtype: torch.dtype, device: str) -> None:
        spawn = multiprocessing.get_context('spawn')
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, way, name, batch, dtype, device), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self) -> tuple[float, torch.Tensor]:
        """Seconds that a call took, and its result."""
        self._pipe.send('go')
        seconds, result = self._pipe.recv()
        return seconds, torch.from_numpy(result)

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


@torch.no_grad()
def serve(pipe: Connection, way: str, name: str, batch: int, dtype: torch.dtype, device: str) -> None:
    """The process of an `Arm`: answer until the other end of the pipe is closed."""
    call = prepare(way, name, batch, dtype, device)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        timed(call)  # finds the processor's caches full of the other arms' numbers
        seconds, result = timed(call)
        pipe.send((seconds, result.float().cpu().numpy()))


def timed(call: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Seconds that `call()` takes, and what it returns."""
    start = time.perf_counter()
    result = call()
    result[0, 0, 0, 0].item()  # waits for a GPU
    return time.perf_counter() - start, result


def prepare(way: str, name: str, batch: int, dtype: torch.dtype, device: str) -> Callable[[], torch.Tensor]:
    """What to time: denoised images, or their tangent. Equal for 'ours' and 'plain' but for rounding."""
    torch.manual_seed(0)
    net: Any = NETWORKS[name]().eval().requires_grad_(False)
    randomize_zeros(net)
    (fast.remove if way.startswith('plain') else fast.install)(net.to(device))
    if not way.startswith('plain') and device == 'cpu':
        prepare_for_cpu(net)
    if way.startswith('direct'):
        winograd.WIDE = math.inf  # no layer is wide enough for it
    x, tangent = torch.randn([2, batch, net.img_channels, net.img_resolution, net.img_resolution]).to(device)
    sigma = torch.linspace(0.1, 2, batch, device=device)
    classes = torch.arange(batch, device=device)
    labels = torch.eye(net.label_dim, device=device)[classes % net.label_dim] if net.label_dim else None

    def forward(x: torch.Tensor = x) -> torch.Tensor:
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            return net(x, sigma, labels)

    return forward if way.endswith('forward') else lambda: torch.func.jvp(forward, (x,), (tangent,))[1]


def time_ways(
    name: str, batch: int, rounds: int, sets: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, list[float]], float]:
    """Seconds of each round by way, and the relative distance between the two tangents."""
    seconds: dict[str, list[float]] = {}
    results: dict[str, torch.Tensor] = {}
    for _ in range(sets):
        arms = {way: Arm(way, name, batch, dtype, device) for way in WAYS}
        for i in range(rounds + 1):
            for way, arm in arms.items():
                taken, results[way] = arm()
                if i > 0:  # the first round warms up
                    seconds.setdefault(way, []).append(taken)
        for arm in arms.values():
            arm.close()
    tangent = results['plain jvp']
    return seconds, float((results['ours jvp'] - tangent).norm() / tangent.norm())


@click.command()
@click.option('--batch', type=click.IntRange(min=1), default=16, show_default=True)
@click.option('--rounds', type=click.IntRange(min=1), default=5, show_default=True)
@click.option('--sets', help='Of processes', type=click.IntRange(min=1), default=3, show_default=True)
@click.option('--dtype', type=click.Choice(list(DTYPES)), default='fp32', show_default=True)
@click.option('--device', metavar='NAME', default='cpu', show_default=True)
def main(batch: int, rounds: int, sets: int, dtype: str, device: str) -> None:
    try:
        distributed.select_device(device)
    except ValueError as err:
        raise click.UsageError(str(err)) from None
    ratios = 'speed-up of forward | by Winograd alone | plain JVP / plain forward | JVP / plain forward | JVP / forward'
    print(f'| network | {ratios} | distance |')
    print('|---|---|---|---|---|---|---|')
    for name in NETWORKS:
        seconds, distance = time_ways(name, batch, rounds, sets, DTYPES[dtype], device)

        def ratio(way: str, unit: str, seconds: dict[str, list[float]] = seconds) -> float:
            return statistics.median(a / b for a, b in zip(seconds[way], seconds[unit], strict=True))

        columns = [
            ('plain forward', 'ours forward'),
            ('direct forward', 'ours forward'),
            ('plain jvp', 'plain forward'),
        ]
        columns += [('ours jvp', 'plain forward'), ('ours jvp', 'ours forward')]
        print(f'| {name} | ' + ' | '.join(f'{ratio(*pair):.2f}' for pair in columns) + f' | {distance:.1e} |')


if __name__ == '__main__':
    main()
