"""Are the strokes of sampled digits whole? Counts digits that fall into pieces, next to real ones, where few do."""

import os
import sys
from pathlib import Path

import click
import numpy as np
import PIL.Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a checkout works uninstalled

from training.dataset import ImageFolderDataset

INK = 64  # a pixel brighter than this belongs to the digit
SPECK = 4  # pieces of fewer pixels are dust, not strokes


def is_broken(image: np.ndarray) -> bool:
    """Does the ink of a grayscale image [H, W] lie in more than one piece? Pixels touch at sides and corners."""
    try:
        from scipy import ndimage
    except ImportError:
        raise click.ClickException('counting pieces needs scipy: pip install -e ".[bench]"') from None
    pieces, count = ndimage.label(image > INK, structure=np.ones([3, 3]))
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    return int((sizes >= SPECK).sum()) > 1


def share_broken(images: list[np.ndarray]) -> float:
    return float(np.mean([is_broken(image) for image in images]))


def read_images(folder: Path) -> list[np.ndarray]:
    images = []
    for path in sorted(folder.rglob('*.png')):
        with PIL.Image.open(path) as image:
            images.append(np.asarray(image.convert('L')))
    return images


@click.command(context_settings={'show_default': True, 'max_content_width': 120})
@click.option('--data', help='Real digits', metavar='ZIP|DIR', default='datasets/mnist-32x32.zip')
@click.option('--images', help='Folder with a subfolder per sampler', metavar='DIR', default='out/digits-classifier')
def main(data: str, images: str) -> None:
    """Share of digits in more than one piece, for the images that digits_classifier.py left behind.

    \b
    python benchmarks/digits_classifier.py
    python benchmarks/broken_strokes.py
    """
    try:
        dataset = ImageFolderDataset(data)
        groups = {'real': [dataset[i][0][0] for i in range(len(dataset))]}
        groups |= {folder.name: read_images(folder) for folder in sorted(Path(images).iterdir()) if folder.is_dir()}
    except OSError as err:
        raise click.ClickException(str(err)) from None
    for name, group in groups.items():
        print(f'{name:<12}{len(group):>6} digits  {share_broken(group):6.1%} in more than one piece')


if __name__ == '__main__':
    main()
