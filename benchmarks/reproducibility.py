"""How much does an image depend on what else is in its batch, on threads, and on the number of processes?

Generates the same seeds in several ways with generate.py and counts the pixels that differ from the first way.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import PIL.Image

GENERATE = str(Path(__file__).resolve().parent.parent / 'generate.py')
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']

# name → (arguments of python before generate.py, batch size, threads of a process)
WAYS: dict[str, tuple[list[str], int, int]] = {
    'one process, batch 8, 1 thread': ([], 8, 1),
    'two processes, batch 8, 1 thread each': (TORCHRUN, 8, 1),
    'one process, batch 32, 1 thread': ([], 32, 1),
    'one process, batch 8, 2 threads': ([], 8, 2),
}
RUNS = {
    'heun, 18 steps': ['--sampler=heun', '--steps=18'],
    'taylor, 10 steps': ['--sampler=taylor', '--steps=10'],
    'rk, 20 steps': ['--sampler=rk', '--steps=20'],
}


def generate(outdir: Path, options: list[str], way: tuple[list[str], int, int]) -> np.ndarray:
    """The images of one way, uint8 [N, …], in the order of the seeds."""
    launcher, batch, threads = way
    command = [sys.executable, *launcher, GENERATE, f'--outdir={outdir}', f'--batch={batch}', '--device=cpu', *options]
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise click.ClickException(f'{" ".join(command)}\n{run.stderr}')
    images = []
    for path in sorted(outdir.glob('*.png')):
        with PIL.Image.open(path) as image:
            images.append(np.asarray(image))
    return np.stack(images).astype(int)


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network', help='Network pickle', metavar='PATH|URL', show_default='the shipped MNIST network')
@click.option('--seeds', help='Random seeds', metavar='LIST', default='0-15')
def main(network: str | None, seeds: str) -> None:
    """Compare ways to generate the same images.

    \b
    python benchmarks/reproducibility.py
    """
    shared = [f'--seeds={seeds}', *([f'--network={network}'] if network else [])]
    with tempfile.TemporaryDirectory() as temp:
        for sampler, options in RUNS.items():
            print(sampler)
            reference = None
            for i, (name, way) in enumerate(WAYS.items()):
                images = generate(Path(temp, f'{sampler}-{i}'), [*shared, *options], way)
                reference = images if reference is None else reference
                difference = np.abs(images - reference)
                share = (difference > 0).mean()
                print(f'  {name:<40} largest difference {difference.max()} grey levels, in {share:.4%} of the pixels')


if __name__ == '__main__':
    main()
