"""`python -m torch_utils.doctor`: what a bug report should say of the machine, and whether what we need works on it."""

import os
import platform
from collections.abc import Callable
from importlib import metadata

import click
import torch

from dnnlib.util import one_line, print_any_text

PACKAGES = ('numpy', 'pillow', 'click', 'safetensors', 'scipy', 'matplotlib', 'diffusers', 'k-diffusion', 'torchsde')


@click.command()
def main() -> None:
    """Print versions, devices, and which of PyTorch's features work here."""
    for name, text in {**versions(), **devices(), **features()}.items():
        click.echo(f'{name:14s} {text}')


def versions() -> dict[str, str]:
    found = {'python': f'{platform.python_version()} on {platform.platform()}', 'torch': torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = 'not installed'
    return found


def devices() -> dict[str, str]:
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        'cpu': f'{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}',
        'cuda': ', '.join(cuda) or 'none',
        'mps': 'yes' if torch.backends.mps.is_available() else 'none',
    }


def features() -> dict[str, str]:
    return {'forward mode': _tried(forward_mode), 'float64': _tried(lambda: torch.ones((), dtype=torch.float64))}


def forward_mode() -> None:
    """A convolution, a normalization and a softmax have the derivatives that a small step has."""
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        return torch.nn.functional.group_norm(y, 2).flatten(2).softmax(dim=2)

    x, v = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    product = torch.func.jvp(layer, (x,), (v,))[1]
    torch.testing.assert_close(product, (layer(x + 1e-6 * v) - layer(x - 1e-6 * v)) / 2e-6, rtol=1e-6, atol=1e-8)


def _tried(check: Callable[[], object]) -> str:
    try:
        check()
    except Exception as err:  # whatever is wrong here is what the report is about
        return f'fails: {one_line(err, 200)}'
    return 'works'


if __name__ == '__main__':
    print_any_text()
    main()
