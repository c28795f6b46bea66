"""Turn raw images into a dataset: a zip archive or folder of square PNG images with labels in `dataset.json`."""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import click
import tqdm

import dnnlib
from dnnlib.options import Resolution, user_path
from images.convert import (
    TRANSFORMS,
    Converted,
    Kind,
    Raw,
    Transform,
    convert,
    in_order,
    num_cores,
    resize,
    validate_image,
)
from images.sources import SOURCES, Sample, Samples, image_files, open_source
from images.summary import Summary
from images.tree import DAMAGED, FileTree
from images.write import NOWHERE, Writer, file_name, folder_writer, zip_writer

# A source (images/sources.py) yields images, worker processes make a PNG of each (images/convert.py), a check compares
# it with the first one, and a writer (images/write.py) stores it, in the order of the source.

MAX_LISTED = 20  # broken images that are named one by one
tqdm.tqdm.monitor_interval = 0  # no thread, as processes may be forked


def write_dataset(
    samples: Samples,
    convert_image: Callable[[Raw], Converted],
    writer: Writer,
    workers: int,
    any_size: bool,
    skip_broken: bool,
) -> Summary:
    """Put the images one by one, then `dataset.json`. Labels are all or none: one missing makes them null.

    An image that is left out, because it is too small or broken, leaves a gap in the numbering.
    """
    count, items, notes = samples
    summary = Summary(notes=notes)
    workers = min(workers, 1 + count // 32)  # less is not worth the start of a process
    todo = (((idx, sample), read(sample, writer.finished(file_name(idx)))) for idx, sample in enumerate(items))
    with (
        contextlib.closing(in_order(convert_image, todo, workers)) as results,
        tqdm.tqdm(results, total=count, unit='img', smoothing=0.05) as progress,
    ):
        for (idx, sample), result in progress:
            problem = result.problem or (check(result.kind, summary.kind, any_size) if result.kind else '')
            summary.count(result, problem)
            if problem:
                line = dnnlib.util.printable(f'{sample.name}: {problem}')
                if writer is not NOWHERE and mixed(result.kind, summary.kind):  # not one image, the source is at fault
                    raise click.ClickException(line)
                if not skip_broken:
                    raise click.ClickException(f'{line}; --skip-broken leaves such images out')
                if summary.num_broken <= MAX_LISTED:
                    progress.write(f'Broken: {line}', file=sys.stderr)
            elif result.kind:
                if result.png:
                    writer.put(file_name(idx), result.png)
                summary.kind = summary.kind or result.kind
                summary.labels[idx] = sample.label
    if not summary.labels:
        raise click.ClickException(f'no image is left: {summary.num_small} too small, {summary.num_broken} broken')
    complete = all(label is not None for label in summary.labels.values())
    labels = [(file_name(idx), label) for idx, label in summary.labels.items()] if complete else None
    writer.put('dataset.json', json.dumps({'labels': labels}).encode())
    return summary


def read(sample: Sample, finished: Kind | None) -> Raw:
    """The raw image; what an earlier run made of it counts as converted, and so does one that cannot be read."""
    if finished:
        return Converted(finished)
    try:
        return sample.read()
    except DAMAGED as err:
        return Converted(problem=f'cannot be read: {dnnlib.util.one_line(err, 200)}')


def check(kind: Kind, first: Kind | None, any_size: bool) -> str:
    """What is wrong with an image: they are squares whose side is a power of two, all like the first."""
    if mixed(kind, first):
        return f'it is {kind}, but the first image is {first}; --channels=3 makes all RGB, --channels=1 all gray'
    if first and kind != first:
        return f'it is {kind}, but the first image is {first}; bring all to one size with --resolution=64x64'
    if kind.height != kind.width:
        return (
            f'it is {kind}, not square; use --resolution=64x64 with --transform=center-crop, or without it to stretch'
        )
    if kind.width & (kind.width - 1) and not any_size:
        return f'it is {kind}, its side is not a power of two; use --resolution=64x64, or --any-size to allow it'
    return ''


def mixed(kind: Kind | None, first: Kind | None) -> bool:
    """Whether one of two images is gray, the other in colour: which it is to be, the user has to say."""
    return kind is not None and first is not None and kind.mode != first.mode


def check_dest(dest: str, resume: bool) -> None:
    """Whether --dest can become a dataset: an archive if it ends in .zip, else a folder."""
    advice = 'give a new or empty folder, or a name that ends in .zip'
    problem = ''
    if not dest:
        problem = f' is an empty text; {advice}'
    elif dest.endswith('.zip') and os.path.isdir(dest):
        problem = ' is a folder; the name of a folder must not end in .zip'
    elif dest.endswith('.zip') and resume:
        problem = ' appears as a whole; only a folder can be continued with --resume'
    elif dest.endswith('.zip'):
        return
    elif os.path.exists(dest) and not os.path.isdir(dest):
        problem = f' is a file; {advice}'
    elif os.path.isdir(dest) and os.listdir(dest):
        problem = f' is not empty; {advice}'
    elif os.path.ismount(dest):
        problem = ' is a mount point; give a folder inside it'
    if problem:
        raise click.ClickException(f'--dest={dest}{problem}')


# Command line.


def choose_transform(transform: str, resolution: tuple[int, int] | None) -> Transform:
    if transform == 'none':
        return resize
    if resolution is None:
        raise click.ClickException(f'--transform={transform} needs --resolution, for example --resolution=64x64')
    if transform == 'center-crop-wide' and resolution[0] < resolution[1]:
        raise click.ClickException(f'--transform={transform} needs a --resolution not higher than wide, like 512x384')
    return TRANSFORMS[transform]


def check_resolution(width: int, height: int, transform: str, any_size: bool) -> None:
    """Whether results of this size can be a dataset; center-crop-wide makes squares of any height."""
    given = f'--resolution={width}x{height}'
    if width != height and transform != 'center-crop-wide':
        raise click.ClickException(f'{given} is not square; use --resolution={width}x{width}')
    if width & (width - 1) and not any_size:
        side = nearest_power_of_two(width)
        nearest = f'--resolution={side}x{round(height * side / width)}'
        raise click.ClickException(f'{given}: {width} is not a power of two; use {nearest}, or --any-size to allow it')


def nearest_power_of_two(n: int) -> int:
    below = 1 << (n.bit_length() - 1)
    return min(below, 2 * below, key=lambda power: abs(power - n))


def make(
    source: str,
    dest: str,
    max_images: int | None,
    transform: str,
    resolution: tuple[int, int] | None,
    channels: str | None,
    resume: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Make a dataset, or see whether one could be made."""
    chosen = choose_transform(transform, resolution)
    mode = CHANNELS[channels] if channels else None
    convert_image = functools.partial(convert, transform=chosen, size=resolution, mode=mode)
    if resolution:
        check_resolution(*resolution, transform, options['any_size'])
    if not dry_run:
        check_dest(dest, resume)
    samples = open_source(source, max_images)
    if dry_run:
        return look(samples, convert_image, **options)
    size = f'{resolution[0]}x{resolution[1]}' if resolution else 'as it is'
    record = {'source': source, 'images': samples.total, 'transform': transform, 'resolution': size}
    record |= {'channels': channels} if channels else {}
    replaces = os.path.exists(dest) and dest.endswith('.zip')
    with zip_writer(dest) if dest.endswith('.zip') else folder_writer(dest, record, resume) as writer:
        summary = write_dataset(samples, convert_image, writer, **options)
    click.echo(summary)
    if replaces:
        click.echo(f'Replaced {dest}')


def look(samples: Samples, convert_image: Callable[[Raw], Converted], skip_broken: bool, **options: Any) -> None:
    """Convert all images, write none."""
    summary = write_dataset(samples, convert_image, NOWHERE, skip_broken=True, **options)
    click.echo(summary)
    if summary.num_broken and not skip_broken:
        raise click.ClickException(f'{summary.num_broken} images are broken; --skip-broken would leave them out')


def validate(path: str, workers: int) -> None:
    """Read a whole dataset, as training does, and say what is wrong with it."""
    files = FileTree(path)
    names, labels = files.image_names(), files.labels()
    look(image_files(files, names, labels or {}), validate_image, skip_broken=False, workers=workers, any_size=True)
    absent = [name for name in labels or {} if name not in files.names]
    if absent:
        raise click.ClickException(
            f'dataset.json names {dnnlib.util.printable(absent[0])} and {len(absent) - 1} more that are absent'
        )
    click.echo(f'{path} is a good dataset')


CHANNELS = {'1': 'L', '3': 'RGB'}

HELP = f"""Turn raw images into a dataset for train.py and fid.py.

\b
The images become PNG files in a zip archive or folder, their labels dataset.json.
They must be alike, square, and a power of two on each side.

\b
Sources:
{chr(10).join(f'  {kind.text:<23} {kind.meaning}' for kind in SOURCES)}

\b
Transforms:
  none               stretch to --resolution, if given
  center-crop        square in the middle, resized
  center-crop-wide   wide strip in the middle, resized, with black bars above and below;
                     skips images that are too small

\b
Examples:
  # 5,000 real digits, classes in turns: images 0-4499 for training, 4500-4999 held out
  python dataset_tool.py --source=mnist-5k --dest=datasets/mnist-32x32.zip
\b
  # Only the training part: 450 digits of each class
  python dataset_tool.py --source=mnist-5k --dest=datasets/mnist-train-32x32.zip --max-images=4500
\b
  # CIFAR-10
  python dataset_tool.py --source=downloads/cifar10/cifar-10-python.tar.gz \\
      --dest=datasets/cifar10-32x32.zip
\b
  # ImageNet; a folder of photos that may hold broken ones
  python dataset_tool.py --source=downloads/imagenet/ILSVRC/Data/CLS-LOC/train \\
      --dest=datasets/imagenet-64x64.zip --resolution=64x64 --transform=center-crop
  python dataset_tool.py --source=downloads/photos --dest=datasets/photos-64x64.zip \\
      --resolution=64x64 --skip-broken
\b
  # What is in there? Is that dataset whole?
  python dataset_tool.py --source=downloads/photos --resolution=64x64 --dry-run
  python dataset_tool.py --validate=datasets/photos-64x64.zip
"""


@click.command(help=HELP, context_settings={'max_content_width': 120})
@click.option('--source', metavar='SOURCE', type=user_path, help='Where the raw images are (see above)')
@click.option(
    '--dest',
    metavar='FOLDER|ZIP',
    type=user_path,
    help='Dataset to write; a folder must be new or empty; a zip is replaced once the new one is complete',
)
@click.option('--max-images', metavar='INT', type=click.IntRange(min=1), help='Read so many images  [default: all]')
@click.option(
    '--transform',
    metavar='NAME',
    type=click.Choice(['none', *TRANSFORMS]),
    default='none',
    help='How to crop  [default: none]',
)
@click.option(
    '--resolution', metavar='WxH', type=Resolution(), help='Size of the result: 64x64, or 64  [default: as it is]'
)
@click.option(
    '--channels', type=click.Choice(list(CHANNELS)), help='All images gray (1) or RGB (3)  [default: as they are]'
)
@click.option('--any-size', is_flag=True, help='Allow sides that are not a power of two')
@click.option('--skip-broken', is_flag=True, help='Leave out images that cannot be used, and name them')
@click.option(
    '--workers',
    metavar='INT',
    type=click.IntRange(min=1),
    help='Processes; the result is the same for any number  [default: one per core]',
)
@click.option('--resume', is_flag=True, help='Continue an unfinished --dest folder (DEST.partial), if there is one')
@click.option('--dry-run', is_flag=True, help='Convert all images, but write nothing: show counts, sizes, problems')
@click.option(
    '--validate',
    'validate_path',
    metavar='ZIP|FOLDER',
    type=user_path,
    help='Read a whole dataset and report; takes no other option but --workers',
)
def main(source: str | None, dest: str | None, workers: int | None, validate_path: str | None, **options: Any) -> None:
    workers = workers or num_cores()
    try:
        if validate_path is not None:
            if source or dest:
                raise click.ClickException('--validate reads a finished dataset: leave out --source and --dest')
            validate(validate_path, workers)
        elif source is None:
            raise click.ClickException('--source is missing: where are the raw images?')
        elif dest is None and not options['dry_run']:
            raise click.ClickException('--dest is missing: the dataset to write, such as --dest=datasets/name.zip')
        else:
            make(source, dest or '', workers=workers, **options)
    except OSError as err:
        raise click.ClickException(dnnlib.util.printable(str(err))) from err
    except MemoryError as err:
        raise click.ClickException('out of memory; with fewer --workers, less is needed') from err
    except BrokenProcessPool as err:
        raise click.ClickException('a worker process was killed; with fewer --workers, less memory is needed') from err


if __name__ == '__main__':
    dnnlib.util.print_any_text()
    main()
