"""Does a run of generate.py that is killed again and again end with the files of one that is not?

The same seeds are generated twice: by one process, undisturbed; and by two processes, all of which are killed with
`kill -9` when a random number of images is there, and started again by the same command. The last kill changes the
number of processes to one, which ends the run. Then all files are compared by their SHA-256.
"""

import hashlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

GENERATE = str(Path(__file__).resolve().parent.parent / 'generate.py')
POLL_SEC = 0.05
MAX_DELAY_SEC = 0.5  # from the image that a kill waits for to the kill, at most


def start(command: list[str], processes: int) -> list[subprocess.Popen]:
    """The ranks of a run, one thread each, without a launcher that would end them in its own way."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    group = {'WORLD_SIZE': str(processes), 'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(port)}
    ranks = []
    for rank in range(processes):
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', **group, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
        quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
        ranks.append(subprocess.Popen(command, env=environment, **quiet))
    return ranks


def count_images(folder: Path) -> int:
    return sum(name.endswith('.png') and name[0] != '.' for name in os.listdir(folder)) if folder.is_dir() else 0


def run_until(command: list[str], processes: int, folder: Path, images: int, delay: float) -> bool:
    """Run, and kill all processes `delay` seconds after so many images are there. False: the run ended before."""
    ranks = start(command, processes)
    try:
        while count_images(folder) < images and any(rank.poll() is None for rank in ranks):
            time.sleep(POLL_SEC)
        time.sleep(delay)
        return any(rank.poll() is None for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.wait()


def run_to_the_end(command: list[str]) -> float:
    """The seconds that it took; click.ClickException if it failed."""
    began = time.perf_counter()
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f'{" ".join(command)}\n{done.stderr}')
    return time.perf_counter() - began


def hashes(folder: Path) -> dict[str, str]:
    """{file below the folder: SHA-256}"""
    found = sorted(path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--num', help='Images', metavar='INT', type=click.IntRange(min=2), default=10000)
@click.option('--steps', help='Time steps', metavar='INT', type=click.IntRange(min=1), default=2)
@click.option('--kills', help='How often the run is killed', metavar='INT', type=click.IntRange(min=1), default=3)
@click.option('--seed', help='Decides when', metavar='INT', type=int, default=0)
@click.option('--batch', help='As for generate.py', metavar='INT', type=click.IntRange(min=1), default=64)
@click.option('--network', help='As for generate.py', metavar='NAME|PATH|URL', show_default='the shipped MNIST network')
def main(num: int, steps: int, kills: int, seed: int, batch: int, network: str | None) -> None:
    """Kill a run, continue it, and compare it with an undisturbed one.

    \b
    python benchmarks/killed_run.py
    python benchmarks/killed_run.py --num=64 --steps=1 --kills=2 --batch=8
    """
    rng = random.Random(seed)
    options = [f'--seeds=0-{num - 1}', f'--steps={steps}', f'--batch={batch}', '--device=cpu']
    options += [f'--network={network}'] if network else []
    with tempfile.TemporaryDirectory() as temp:
        undisturbed, killed = Path(temp, 'undisturbed'), Path(temp, 'killed')
        command = [sys.executable, GENERATE, *options, f'--outdir={killed}']
        for number, images in enumerate(sorted(rng.sample(range(1, num), kills))):
            processes = 2 if number < kills - 1 or kills == 1 else 1
            hit = run_until(command, processes, killed, images, rng.uniform(0, MAX_DELAY_SEC))
            what = 'killed' if hit else 'ended before the kill'
            plural = 'processes' if processes > 1 else 'process'
            there = count_images(killed)
            print(f'run {number + 1}, {processes} {plural}: {what}, {there} images are there', flush=True)
        left_over = len(list(killed.glob('.tmp_*')))
        print(f'half-written files under other names: {left_over}', flush=True)
        seconds = run_to_the_end(command)
        print(f'run {kills + 1}, 1 process: to the end in {seconds:.0f} s, {count_images(killed)} images', flush=True)
        seconds = run_to_the_end([*command[:-1], f'--outdir={undisturbed}'])
        print(f'undisturbed, 1 process: {seconds:.0f} s, {count_images(undisturbed)} images', flush=True)
        ours, theirs = hashes(killed), hashes(undisturbed)
    different = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    if different or len(theirs) != num + 1:
        raise click.ClickException(f'{len(different)} of {len(theirs)} files differ, such as {different[:3]}')
    print(f'{len(theirs)} files, all with the same SHA-256')


if __name__ == '__main__':
    main()
