"""Does an independent classifier read the sampled digits as the class they were asked for?

A small CNN learns to read from the network's training set, the first 4,500 digits of the dataset, and is tested on the
last 500, which neither it nor the network ever sees. It then reads images that generate.py made, class by class, with
each of the samplers in `SETTINGS`. A network that drew one clean digit per class and nothing else would pass, so look
at the pictures too (--sheet).
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import PIL.Image
import torch
import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

import dnnlib
from images.pictures import tile
from training.dataset import ImageFolderDataset

ROOT = Path(__file__).resolve().parent.parent
SHIPPED_NETWORK = ROOT / 'ckpts' / 'edm-mnist-32x32-cond-vp.pkl'
NUM_DIGITS, NUM_HELD_OUT, NUM_CLASSES, SIDE = 5000, 500, 10, 32
MIN_HELD_OUT = 0.97  # below this the classifier is no judge
SHEET_TILES = 16


class Setting(NamedTuple):
    name: str
    steps: int
    options: tuple[str, ...]  # of generate.py

    @property
    def folder(self) -> str:
        return self.name.replace(' ', '-')


SETTINGS = [
    Setting('db', 18, ('--randn_like=db',)),
    Setting('ddb taylor', 40, ('--rho=7', '--randn_like=ddb', '--scheme=taylor')),
    Setting('ddb rk', 40, ('--rho=7', '--randn_like=ddb', '--scheme=rk')),
]
SHEET_SETTING = 'ddb taylor'


# Real digits.


class Digits(NamedTuple):
    images: torch.Tensor  # uint8 [N,1,32,32]
    labels: torch.Tensor  # int64 [N]


def load_digits(path: str | os.PathLike) -> tuple[Digits, Digits]:
    """The 4,500 training digits and the 500 held-out ones of dataset_tool.py's mnist-5k, in [0, 255].

    Raises IOError for anything else: a training set that lacks the last 500 would test the classifier on what it knows.
    """
    dataset = ImageFolderDataset(path, resolution=SIDE, use_labels=True)
    if (len(dataset), dataset.num_channels, dataset.label_dim) != (NUM_DIGITS, 1, NUM_CLASSES):
        raise OSError(f'{path}: not the {NUM_DIGITS} digits that dataset_tool.py --source=mnist-5k writes')
    images, onehots = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    digits = Digits(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(onehots)).argmax(1))
    return Digits(*(x[:-NUM_HELD_OUT] for x in digits)), Digits(*(x[-NUM_HELD_OUT:] for x in digits))


# The classifier.
#
# Measured inside the 4,500, on two folds of 3,600 to learn and 900 to test: this CNN 98.6 % and 99.6 %, the same digits
# shifted by 2 pixels 98.6 % and 99.4 %; two thirds of the width and 30 epochs, 98.4 % and 99.2 %. Deskewing with
# scikit-learn's RBF-SVM: 96.8 % on the first fold, the best of three settings. Hence the CNN, which needs torch only.


def make_classifier(width: int = 24) -> torch.nn.Sequential:
    """Logits [N,10] from images [N,1,32,32] in [0, 1]."""

    def block(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[torch.nn.Module]:
        conv = torch.nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
        return [conv, torch.nn.BatchNorm2d(out_channels), torch.nn.ReLU()]

    return torch.nn.Sequential(
        *(*block(1, width, 5, stride=2), *block(width, 2 * width, 3), torch.nn.MaxPool2d(2)),
        *(*block(2 * width, 4 * width, 3), torch.nn.MaxPool2d(2), torch.nn.Flatten()),
        *(torch.nn.Dropout(0.3), torch.nn.Linear(4 * width * 4 * 4, NUM_CLASSES)),
    )


def distort(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Each image [N,C,H,W] turned by up to 12°, sheared and scaled by up to 12 %, shifted by up to 2.5 of 32 pixels."""
    angle, scale, aspect, shear, dx, dy = torch.rand(6, len(images), generator=rng) * 2 - 1
    angle, scale, aspect = angle * np.pi / 15, torch.exp(0.12 * scale), torch.exp(0.06 * aspect)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    row_x = torch.stack([cos * aspect, 0.12 * shear * scale - sin, dx * 2.5 / 16], dim=1)
    row_y = torch.stack([sin, cos / aspect, dy * 2.5 / 16], dim=1)
    grid = torch.nn.functional.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


def fit_classifier(
    digits: Digits, epochs: int = 20, batch: int = 50, width: int = 24, seed: int = 0
) -> torch.nn.Sequential:
    """The CNN, fitted to randomly distorted digits. The seed decides everything; PyTorch's own random state is kept."""
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rng = torch.Generator().manual_seed(seed)
        model = make_classifier(width)
        loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=0.05)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
        num_steps = epochs * (len(digits.labels) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=num_steps)
        for _ in tqdm.trange(epochs, desc='Fitting the classifier', unit='epoch', leave=False):
            # The last, incomplete batch is left out: the next epoch has another order.
            for idx in torch.randperm(len(digits.labels), generator=rng).split(batch)[: num_steps // epochs]:
                logits = model(distort(digits.images[idx] / 255, rng))
                optimizer.zero_grad()
                loss_fn(logits, digits.labels[idx]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def read_digits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The class that the classifier sees in each uint8 image [N,1,32,32]: int64 [N]."""
    return torch.cat([model(part / 255).argmax(1) for part in images.split(500)])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The order of sums, so their rounding, depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Sampled digits. The images of a class lie in a folder with a record of what made them, which is written last: a class
# with the right record is complete and is not sampled again, so a benchmark that was killed goes on.


class Job(NamedTuple):
    """One run of generate.py: `num` images of one class."""

    setting: Setting
    digit: int
    num: int
    network: str
    outdir: str

    @property
    def folder(self) -> Path:
        return Path(self.outdir, self.setting.folder, str(self.digit))

    @property
    def record(self) -> Path:
        return self.folder / 'made-by.json'

    @property
    def paths(self) -> list[Path]:
        seeds = range(self.digit * self.num, (self.digit + 1) * self.num)
        return [self.folder / f'{seed:06d}.png' for seed in seeds]

    @property
    def options(self) -> list[str]:
        """What decides the images, the network apart."""
        seeds = f'--seeds={self.digit * self.num}-{(self.digit + 1) * self.num - 1}'
        return [f'--class={self.digit}', seeds, '--batch=100', f'--steps={self.setting.steps}', *self.setting.options]

    @property
    def command(self) -> list[str]:
        files = [f'--network={self.network}', f'--outdir={self.folder}']
        return [sys.executable, str(ROOT / 'generate.py'), *files, *self.options]


def make_images(job: Job, network_id: str) -> float:
    """Run the job unless its images are there, made from this network; the seconds that it took, now or back then.

    Raises click.ClickException with the message of generate.py if that fails.
    """
    seconds = seconds_on_record(job, network_id)
    if seconds is not None:
        return seconds
    for path in (job.record, *job.paths):  # made in another way
        path.unlink(missing_ok=True)
    start = time.perf_counter()
    result = subprocess.run(job.command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    missing = next((path for path in job.paths if not path.is_file()), None)
    if result.returncode or missing:
        message = result.stderr.strip() or f'{missing} is missing'
        raise click.ClickException(f'{" ".join(job.command)}\nfailed (exit status {result.returncode}): {message}')
    record = {'network': network_id, 'options': job.options, 'seconds': seconds}
    with dnnlib.util.atomic_write(job.record) as file:
        file.write(json.dumps(record).encode())
    return seconds


def seconds_on_record(job: Job, network_id: str) -> float | None:
    """How long this very job took when it was run; None if it was not, or not to the end."""
    if not all(path.is_file() for path in (job.record, *job.paths)):
        return None
    record = json.loads(job.record.read_bytes())
    same = (record['network'], record['options']) == (network_id, job.options)
    return float(record['seconds']) if same else None


def identify(network: str) -> str:
    """A hash of the network file, so that a new one under an old name is noticed; a URL stands for itself."""
    return network if '://' in network else hashlib.sha256(Path(network).read_bytes()).hexdigest()


def load_images(paths: list[Path]) -> torch.Tensor:
    """Grayscale 32×32 files as uint8 [N,1,32,32]; IOError for any other image."""

    def load(path: Path) -> np.ndarray:
        with PIL.Image.open(path) as image:
            if (image.mode, image.size) != ('L', (SIDE, SIDE)):
                raise OSError(f'{path} is {image.size[0]}x{image.size[1]} {image.mode}, not a 32x32 grayscale digit')
            return np.array(image)

    return torch.from_numpy(np.stack([load(path) for path in paths]))[:, None]


# Results.


class Result(NamedTuple):
    setting: Setting
    right: torch.Tensor  # bool [10,num]: read as the class asked for?
    seconds: float

    @property
    def share(self) -> float:
        return self.right.double().mean().item()


def judge(model: torch.nn.Module, jobs: list[Job], seconds: float) -> Result:
    """Read the images of one setting; its jobs are in the order of the classes."""
    seen = torch.stack([read_digits(model, load_images(job.paths)) for job in jobs])
    return Result(jobs[0].setting, seen == torch.arange(len(jobs))[:, None], seconds)


def wilson_interval(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Bounds of a binomial probability from `hits` of `n`: where a normal test at ±z does not reject (Wilson, 1927).

    (p̂ + z²/2n ± z·√(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n), with p̂ = hits/n; z = 1.96 for 95 %. Right near p̂ = 1, where
    the more familiar p̂ ± z·√(p̂(1−p̂)/n) has no width.
    """
    p = hits / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


def format_share(right: torch.Tensor) -> str:
    hits, n = int(right.sum()), right.numel()
    low, high = wilson_interval(hits, n)
    return f'{hits / n:.1%} ({low:.1%} to {high:.1%})'


def format_table(results: list[Result]) -> str:
    rows = [f'| {r.setting.name} | {r.setting.steps} | {format_share(r.right)} | {r.seconds:.0f} |' for r in results]
    return '\n'.join(['| setting | steps | read as asked (95% interval) | seconds |', '|---|---|---|---|', *rows])


def format_details(rows: dict[str, torch.Tensor]) -> str:
    """Shares by class; each row is bool [10,n]."""
    head = '| by class | ' + ' | '.join(map(str, range(NUM_CLASSES))) + ' |'
    body = [
        f'| {name} | ' + ' | '.join(f'{x:.0%}' for x in right.double().mean(1)) + ' |' for name, right in rows.items()
    ]
    return '\n'.join([head, '|---' * (NUM_CLASSES + 1) + '|', *body])


def by_class(right: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N] for equally many images of each class → [10, N/10]."""
    return right[labels.argsort(stable=True)].reshape(NUM_CLASSES, -1)


def contact_sheet(images: torch.Tensor, tiles: int = SHEET_TILES) -> np.ndarray:
    """uint8 [K,n,1,S,S], images by class → [tiles·S, tiles·S]: the first of class 0, then of class 1, …, row by row.

    The tiles are divided evenly among the classes, up to one; n ≥ ceil(tiles²/K).
    """
    num_classes = len(images)
    digit = torch.arange(tiles * tiles) * num_classes // (tiles * tiles)
    nth = torch.cat([torch.arange(int(n)) for n in digit.bincount()])
    return tile(images[digit, nth].permute(0, 2, 3, 1).numpy(), tiles)[:, :, 0]


def write_sheet(path: str, jobs: list[Job]) -> None:
    sheet = PIL.Image.fromarray(contact_sheet(torch.stack([load_images(job.paths) for job in jobs])))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with dnnlib.util.atomic_write(path) as file:
        sheet.save(file, format='png', optimize=True)


# Command line.


def plan(network: str, outdir: str, num: int) -> dict[str, list[Job]]:
    """The jobs of each setting, in the order of the classes."""
    return {s.name: [Job(s, digit, num, network, outdir) for digit in range(NUM_CLASSES)] for s in SETTINGS}


def sample(jobs: dict[str, list[Job]], network_id: str) -> dict[str, float]:
    """Run all jobs that have not been run; seconds by setting."""
    seconds = dict.fromkeys(jobs, 0.0)
    todo = [(name, job) for name, group in jobs.items() for job in group]
    for name, job in (bar := tqdm.tqdm(todo, unit='class', leave=False)):
        bar.set_description(f'Sampling {name}')
        seconds[name] += make_images(job, network_id)
    return seconds


def fit_judge(data: str) -> tuple[torch.nn.Sequential, torch.Tensor]:
    """The classifier, and which of the held-out digits it reads right: bool [10,50]. Prints how many and the time."""
    train, held_out = load_digits(data)
    start = time.perf_counter()
    model = fit_classifier(train)
    seconds = time.perf_counter() - start
    right = by_class(read_digits(model, held_out.images) == held_out.labels, held_out.labels)
    click.echo(f'Held-out real digits: {format_share(right)} read right; classifier fitted in {seconds:.0f} s')
    if right.double().mean() < MIN_HELD_OUT:
        raise click.ClickException(f'less than {MIN_HELD_OUT:.0%}: this classifier is no judge of sampled digits')
    return model, right


def check_shares(results: list[Result], min_share: float) -> None:
    for r in results:
        if r.share < min_share:
            raise click.ClickException(f'{r.setting.name}: {r.share:.1%} is below --min-share={min_share}')


HELP = """Does an independent classifier read the sampled digits as the class they were asked for?

\b
A small CNN, fitted on the real training digits in about a minute, reads images that generate.py samples with
db (18 steps), ddb taylor and ddb rk (40 steps, rho 7). They stay in OUTDIR/SETTING/CLASS and are used again if
they are of the same network and options, so the same command continues a killed run.

\b
Examples:
  # The shipped network; exit status 1 if a setting is below 96 %
  python dataset_tool.py --source=mnist-5k --dest=datasets/mnist-32x32.zip
  python benchmarks/digits_classifier.py --min-share=0.96
\b
  # Another network, with shares by class and a picture
  python benchmarks/digits_classifier.py --network=training-runs/network-snapshot-002000.pkl \\
      --outdir=out/snapshot-002000 --num=26 --detail --sheet=out/sheet.png
"""


@click.command(help=HELP, context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--network', metavar='PATH|URL', help='Network pickle  [default: the shipped one]')
@click.option('--data', metavar='ZIP|DIR', default='datasets/mnist-32x32.zip', help="Dataset tool's mnist-5k")
@click.option('--outdir', metavar='DIR', default='out/digits-classifier', help='Where the sampled images are kept')
@click.option('--num', metavar='INT', type=click.IntRange(min=1), default=100, help='Images of each class')
@click.option('--sheet', metavar='FILE.png', help='Also write 16x16 of the ddb taylor images')
@click.option('--detail', is_flag=True, help='Also print the shares by class')
@click.option('--min-share', metavar='FLOAT', type=click.FloatRange(0, 1), help='Fail if a setting is below')
def main(
    network: str | None, data: str, outdir: str, num: int, sheet: str | None, detail: bool, min_share: float | None
) -> None:
    network = network or str(SHIPPED_NETWORK)
    sheet_num = -(-(SHEET_TILES**2) // NUM_CLASSES)
    if sheet and num < sheet_num:
        raise click.UsageError(f'--sheet needs {sheet_num} images of each class; give --num={sheet_num} or more')
    try:
        network_id = identify(network)
        model, held_out = fit_judge(data)
        jobs = plan(network, outdir, num)
        seconds = sample(jobs, network_id)
        results = [judge(model, group, seconds[name]) for name, group in jobs.items()]
        click.echo(format_table(results))
        if detail:
            click.echo('\n' + format_details({'held-out': held_out, **{r.setting.name: r.right for r in results}}))
        if sheet:
            write_sheet(sheet, jobs[SHEET_SETTING])
    except OSError as err:
        raise click.ClickException(str(err)) from err
    if min_share is not None:
        check_shares(results, min_share)


if __name__ == '__main__':
    main()
