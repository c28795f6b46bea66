"""A folder in which the commands of the documentation find what they name, at a thousandth of its size.

Networks are small random ones of the published classes, image sizes and numbers of classes; raw images are laid out as
their publishers do. `build` makes all of it, and a test works in a copy.
"""

import io
import shutil
from pathlib import Path

import foreign_edm
import numpy as np
import PIL.Image
import torch
from click.testing import CliRunner
from docs_commands import ROOT
from image_files import png, write
from test_images_emoji import picture_packages
from test_images_sources import python_2_batch, write_cifar, write_idx, write_lmdb

import dataset_tool
from sampling.networks import SHIPPED_NETWORK
from torch_utils import network_io
from training import networks

SONG = {'model_type': 'SongUNet', 'model_channels': 4, 'channel_mult': [1, 1, 1], 'num_blocks': 1}
ADM = {'model_type': 'DhariwalUNet', 'model_channels': 4, 'channel_mult': [1, 1, 1], 'num_blocks': 1}

# file → (class, resolution, channels, classes, arguments)
PUBLISHED = {
    'edm-cifar10-32x32-cond-vp.pkl': (networks.EDMPrecond, 32, 3, 10, SONG),
    'edm-cifar10-32x32-uncond-vp.pkl': (networks.EDMPrecond, 32, 3, 0, SONG),
    'edm-ffhq-64x64-uncond-vp.pkl': (networks.EDMPrecond, 64, 3, 0, SONG),
    'edm-afhqv2-64x64-uncond-vp.pkl': (networks.EDMPrecond, 64, 3, 0, SONG),
    'edm-imagenet-64x64-cond-adm.pkl': (networks.EDMPrecond, 64, 3, 1000, ADM),
}
OWN = {
    'ckpts/edm-mnist-32x32-cond-vp.pkl': (networks.EDMPrecond, 32, 1, 10, SONG),
    'training-runs/digits/network-snapshot-000100.pkl': (networks.VEPrecond, 16, 1, 0, SONG),
    'training-runs/photos/network-snapshot-000500.pkl': (networks.EDMPrecond, 32, 3, 0, SONG),
    'my.pkl': (networks.EDMPrecond, 32, 3, 0, SONG),
}
REFERENCES = {
    'served/edm/fid-refs/cifar10-32x32.npz': 32,
    'served/edm/fid-refs/ffhq-64x64.npz': 64,
    'served/edm/fid-refs/afhqv2-64x64.npz': 64,
    'served/edm/fid-refs/imagenet-64x64.npz': 64,
    'fid-refs/my-dataset.npz': 32,
    'out/digits.npz': 32,
}

# Folders of images to measure: name → (resolution, mode).
IMAGES = {
    'fid-tmp': (32, 'RGB'),
    'imgSamples/000000': (64, 'RGB'),
    'Sampler1.2.0/cifar10_N40_rho3_2nd/000000': (32, 'RGB'),
    'Sampler1.2.0/ffhq_N84_rho3_2nd/000000': (64, 'RGB'),
    'out/ddb': (32, 'L'),
    'out/photos': (32, 'RGB'),
    'out/digits-16x16': (16, 'L'),
    'out/digits/rk': (32, 'L'),
}
NUM_IMAGES = 12

IMAGENET = 'downloads/imagenet/ILSVRC/Data/CLS-LOC/train'

# dataset → options of dataset_tool.py
DATASETS = {
    'mnist-32x32': '--source=digits --resolution=32x32 --max-images=20',
    'mnist-train': '--source=digits --resolution=32x32 --max-images=20',
    'digits-16x16': '--source=digits --resolution=16x16 --max-images=20',
    'cifar10-32x32': '--source=downloads/cifar10/cifar-10-python.tar.gz',
    'ffhq-64x64': '--source=downloads/ffhq/images1024x1024 --resolution=64x64',
    'afhqv2-64x64': '--source=downloads/afhqv2 --resolution=64x64',
    'imagenet-64x64': f'--source={IMAGENET} --resolution=64x64 --transform=center-crop',
    'emoji-32x32': '--source=emoji:downloads/node_modules --resolution=32x32',
    'photos-32x32': '--source=downloads/photos --resolution=32x32 --transform=center-crop',
    'my-dataset': '--source=downloads/photos --resolution=32x32 --transform=center-crop',
}


class TinyInception(torch.nn.Module):
    """In the place of detectors: means of each colour over 4×4 tiles."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return self.scale * torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


def build(root: Path) -> None:
    """Fill an empty folder. What a web server should have is in `served`."""
    for name, arguments in PUBLISHED.items():
        write_network(root / 'served' / 'edm' / 'pretrained' / name, *arguments)
        write_network(root / 'ckpts' / name, *arguments)
    for name, arguments in OWN.items():
        write_network(root / name, *arguments)
    write_raw_images(root / 'downloads')
    for name, options in DATASETS.items():
        options = options.replace('downloads/', f'{root}/downloads/').split()
        run(dataset_tool.main, *options, f'--dest={root}/datasets/{name}.zip', '--workers=1')
    (root / 'out' / 'digits').mkdir(parents=True)
    shutil.copy(root / 'datasets' / 'mnist-32x32.zip', root / 'out' / 'digits' / 'images.zip')
    for number, (folder, (side, mode)) in enumerate(IMAGES.items()):
        pictures = {f'{i:06d}.png': png(picture(100 * number + i, side, mode=mode)) for i in range(NUM_IMAGES)}
        write(root / folder, pictures)
    for name, side in REFERENCES.items():
        write_statistics(root / name, side)
    torch.save({'scale': torch.ones(1)}, root / 'served' / 'inception.pth')
    write(root / 'docs', {path.name: path.read_bytes() for path in (ROOT / 'docs').glob('*.jsonl')})
    shutil.copy(SHIPPED_NETWORK, root / 'served' / 'net.pkl')
    (root / 'shared').mkdir()
    (root / 'shared' / 'datasets').symlink_to('../datasets')


def run(command, *arguments):
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output


def picture(seed, width, height=None, mode='RGB'):
    """A smooth random one."""
    coarse = np.random.default_rng(seed).integers(0, 256, [4, 4, 3], dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height or width), PIL.Image.Resampling.BICUBIC).convert(mode)


def jpeg(image):
    data = io.BytesIO()
    image.save(data, format='jpeg')
    return data.getvalue()


def write_network(path, kind, resolution, channels, classes, arguments):
    net = foreign_edm.randomize(kind(resolution, channels, label_dim=classes, **arguments), seed=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    network_io.save_network(net.eval().requires_grad_(False), path)


def write_statistics(path, side):
    """Of TinyInception, without a note, as EDM writes them, but with features."""
    images = np.stack([np.asarray(picture(1000 + i, side)) for i in range(60)]).transpose(0, 3, 1, 2)
    features = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(images).double(), 4).flatten(1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, mu=features.mean(0), sigma=np.cov(features.T), features=features)


def write_raw_images(downloads):
    rng = np.random.default_rng(0)
    batches = [
        python_2_batch(data, [3, 1, 4, 9], [b'a.png'] * 4) for data in rng.integers(0, 256, [5, 4, 3072], 'uint8')
    ]
    (downloads / 'cifar10').mkdir(parents=True)
    write_cifar(downloads / 'cifar10', batches)
    write(downloads / 'ffhq/images1024x1024', {f'{i // 4:02d}000/{i:05d}.png': png(picture(i, 128)) for i in range(8)})
    animals = [
        f'{part}/{kind}/{i}.png' for part in ('train', 'test') for kind in ('cat', 'dog', 'wild') for i in (1, 2)
    ]
    write(downloads / 'afhqv2', {name: png(picture(i, 128)) for i, name in enumerate(animals)})
    photos = {
        f'{wnid}/{wnid}_{mode}.JPEG': jpeg(picture(i, 80 + 9 * i, 90, mode))
        for wnid in ('n01440764', 'n01443537', 'n01484850')
        for i, mode in enumerate(['RGB', 'L', 'CMYK'])
    }
    write(downloads.parent / IMAGENET, photos)
    write(downloads / 'photos', {f'{i}.jpg': jpeg(picture(i, 100 + 7 * i, 90)) for i in range(20)})
    picture_packages(downloads / 'node_modules')
    write_lmdb(downloads / 'lsun/church_outdoor_train_lmdb', [np.asarray(picture(i, 96, 80)) for i in range(6)], [])
    digits = rng.integers(0, 256, [20, 28, 28], dtype=np.uint8)
    write_idx(downloads / 'mnist/train-images-idx3-ubyte.gz', digits, [i % 10 for i in range(20)])
