"""Distances between sets of images: Fréchet distance (FID), KID, precision and recall, sliced Wasserstein."""

import json
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import click
import numpy as np
import torch

import dnnlib
from dnnlib import npz, plain_json, settings
from dnnlib.options import user_path
from images.image_files import ImageFiles, content_state, holds_images
from metrics import measure
from metrics.detectors import Detector, load_detector
from metrics.image_features import DEFAULT_WORKERS, features_of, open_reference, say
from metrics.measure import FeatureSet, Numbers
from metrics.statistics import INCEPTION, write_reference
from torch_utils import distributed as dist
from torch_utils.errors import one_line_errors
from training.dataset import choose_subset


def choose_images(files: ImageFiles, num: int, seed: int, ranges: int) -> list[np.ndarray]:
    """Positions of the images of each measurement.

    One: a random subset of `num` (EDM's choice for this seed) where there are more. Several: consecutive stretches of
    `num`, in the order of the names; the names of generate.py's images are their seeds.

    Raises:
        click.ClickException: there are too few images.
    """
    if len(files) < num * ranges:
        have = f'--images has {len(files)} images, --num={num}' + (f' times --ranges={ranges}' if ranges > 1 else '')
        raise click.ClickException(f'{have} asks for {num * ranges}; use --num={len(files) // ranges}, or make more')
    if ranges == 1:
        return [choose_subset(len(files), num, seed)]
    return [np.arange(i * num, (i + 1) * num) for i in range(ranges)]


def cached_features(path: str, note: dict[str, Any], detector: Detector, device: torch.device) -> FeatureSet:
    """The features in a file that an earlier run wrote."""
    before, features = read_features(path)
    differing = [
        f'{each.name} {each.before!r}' for each in settings.differences({key: before.get(key) for key in note}, note)
    ]
    if differing:
        raise click.ClickException(
            f'--features={path} was made with {", ".join(differing)}; delete it, or name another'
        )
    cached = FeatureSet(detector, device, keep=True)
    cached.restore(features)
    say(f'Using the features in {path}')
    return cached


def read_features(path: str) -> tuple[dict[str, Any], np.ndarray]:
    """The note and the features in a file that `keep_features` wrote."""
    with open(path, 'rb') as file:
        data = file.read()
    try:
        arrays = npz.read(data, ('note', 'features'))
        note, features = plain_json.parse(str(arrays['note'])), arrays['features']
        if not isinstance(note, dict) or features.ndim != 2 or features.dtype.kind != 'f' or len(features) < 2:
            raise ValueError('they are no features')
        if not np.isfinite(features).all():
            raise ValueError('they are not finite')
    except (ValueError, KeyError) as err:
        reason = dnnlib.util.one_line(err, 200)
        raise click.ClickException(f'--features={path} cannot be used: {reason}; delete it, or name another') from None
    return note, features


def show(results: list[Numbers], record: dict[str, Any], as_json: bool) -> None:
    """The smallest of several measurements, by its first number."""
    best = min(results, key=lambda numbers: next(iter(numbers.values())))
    if len(results) > 1:
        for numbers in results:
            say(', '.join(f'{name} {value:g}' for name, value in numbers.items()))
    if as_json:
        found = {**record, **best, **({'ranges': results} if len(results) > 1 else {})}
        dist.print0(json.dumps(settings.without_nan(found), allow_nan=False))
    elif len(best) == 1:
        dist.print0(f'{next(iter(best.values())):g}')
    else:
        dist.print0('\n'.join(f'{name} {value:g}' for name, value in best.items()))


# ----------------------------------------------------------------------------
# Command line.

batch_option = click.option(
    '--batch', help='Maximum batch size of a process', metavar='INT', type=click.IntRange(min=1), default=64
)
detector_option = click.option(
    '--detector',
    help=f'{INCEPTION} (FID), efficientnet-lite0 (offline), pixels, module:function, or Inception weights as a file',
    metavar='NAME|PATH|URL',
    type=user_path,
    show_default=f'that of --ref, else {INCEPTION}',
)
device_option = click.option('--device', help='cuda, mps or cpu', metavar='NAME', show_default='the first there is')
skip_option = click.option('--skip-broken', help='Leave out images that cannot be used', is_flag=True)
workers_option = click.option(
    '--workers',
    help='Processes that read images',
    metavar='INT',
    type=click.IntRange(min=0),
    default=DEFAULT_WORKERS,
    show_default='3, or the number of cores',
)


@click.group(context_settings={'show_default': True, 'max_content_width': 120})
def main() -> None:
    """Measure how far images are from real ones.

    \b
    # FID of 50,000 images against EDM's reference statistics of CIFAR-10
    python generate.py --outdir=fid-tmp --seeds=0-49999 --subdirs --network=…
    python fid.py calc --images=fid-tmp \\
        --ref=https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz

    \b
    # The protocol of the papers: the smallest FID of three sets, seeds 0-49999, 50000-99999, 100000-149999
    python fid.py calc --images=fid-tmp --ranges=3 --ref=…

    \b
    # Without any download: another detector, real images as the reference, several distances at once
    python fid.py calc --images=out --ref=datasets/mnist-32x32.zip --num=5000 \\
        --detector=efficientnet-lite0 --metrics=fid,kid,prdc

    \b
    # Reference statistics of a dataset
    python fid.py ref --data=datasets/my-dataset.zip --dest=fid-refs/my-dataset.npz
    """


@main.command()
@click.option(
    '--images',
    help='Images to measure; more than once: all of them',
    metavar='DIR|ZIP|NPZ',
    type=user_path,
    required=True,
    multiple=True,
)
@click.option(
    '--ref',
    help='Reference statistics, or the real images themselves',
    metavar='NPZ|URL|DIR|ZIP',
    type=user_path,
    required=True,
)
@click.option('--num', help='Number of images to use', metavar='INT', type=click.IntRange(min=2), default=50000)
@click.option('--seed', help='Which of them, where there are more', metavar='INT', type=int, default=0)
@click.option(
    '--ranges',
    help='Measure so many consecutive sets of --num images',
    metavar='INT',
    type=click.IntRange(min=1),
    default=1,
)
@click.option('--metrics', help=f'Some of {",".join(measure.METRICS)}', metavar='LIST', default='fid')
@click.option(
    '--features', help='Keep the features of the images here, or use those kept', metavar='NPZ', type=user_path
)
@click.option('--json', 'as_json', help='Print a record instead of the number', is_flag=True)
@click.option('--force', help='Compare with statistics of another detector or resize', is_flag=True)
@batch_option
@detector_option
@skip_option
@workers_option
@device_option
def calc(
    images, ref, num, seed, ranges, metrics, features, as_json, force, batch, detector, skip_broken, workers, device
):
    """Print a distance between images and real ones.

    The number alone goes to stdout (several metrics: a line each, name and value), all the rest to stderr.
    """
    with one_line_errors():
        device = dist.init(device)
        names = measure.parse_metrics(metrics)
        reading = {'batch': batch, 'skip_broken': skip_broken, 'workers': workers}
        if features and ranges > 1:
            raise click.UsageError('--features keeps one set of images, and so does not go with --ranges')
        keep = measure.needs_features(names) or features is not None
        kept = features is not None and os.path.exists(features)
        files = None if kept else ImageFiles(images)
        chosen = [] if files is None else choose_images(files, num, seed, ranges)  # before the reference takes its time
        real = ImageFiles([ref]) if holds_images(ref) else None
        reference, detector = open_reference(ref, detector, device, real, keep=keep, **reading)
        measure.check_comparable(detector, reference, names, force)
        note = {'detector': detector.name, 'weights_sha256': detector.weights_sha256, 'resize': detector.resize}
        note |= {'images': list(images), 'num': num, 'seed': seed}
        kept_note = note | (content_note(images) if features else {})
        if files is None:
            sets = [cached_features(features, kept_note, detector, device)]
        else:
            sets = [features_of(files, each, detector, device, keep, **reading) for each in chosen]
        if features and not kept and dist.get_rank() == 0:
            keep_features(features, kept_note, sets[0])
        for text in measure.warnings(sets[0], reference, names):
            say(f'Warning: {text}')
        results = [measure.measure(each, reference, names) for each in sets]
        say(f'{detector.title} of {sets[0].moments.n} images against {ref}, seed {seed}:')
    versions = {name: metadata.version(name) for name in ('torch', 'numpy', 'pillow')}
    record = {'title': detector.title, 'n': sets[0].moments.n, **note, 'ref': ref, 'versions': versions}
    show(results, record, as_json)
    dist.barrier()


def content_note(images: Sequence[str]) -> dict[str, str]:
    """What binds kept features to the images as they are; nothing once these are gone, and only the features left."""
    try:
        return {'content': content_state(images)}
    except OSError:
        return {}


def keep_features(path: str, note: dict[str, Any], features: FeatureSet) -> None:
    assert features.features is not None
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with dnnlib.util.atomic_write(path) as file:
        np.savez(file, features=features.features, note=np.array(json.dumps(note)))


@main.command()
@click.option('--data', help='Real images', metavar='DIR|ZIP', type=user_path, required=True)
@click.option('--dest', help='File to write', metavar='NPZ', type=user_path, required=True)
@click.option('--with-features', help='Store the features too, for all metrics but fid', is_flag=True)
@batch_option
@detector_option
@skip_option
@workers_option
@device_option
def ref(data, dest, with_features, batch, detector, skip_broken, workers, device):
    """Write the reference statistics of a dataset."""
    with one_line_errors():
        device = dist.init(device)
        loaded = load_detector(detector or INCEPTION, device)
        files = ImageFiles([data])
        reading = {'batch': batch, 'skip_broken': skip_broken, 'workers': workers}
        result = features_of(files, np.arange(len(files)), loaded, device, with_features, **reading)
        if dist.get_rank() == 0:
            write_reference(result.reference(), dest)
    say(f'Statistics of {len(files)} images in {dest}')
    dist.barrier()


if __name__ == '__main__':
    dnnlib.util.print_any_text()
    main()
