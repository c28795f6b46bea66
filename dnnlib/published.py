"""Files published elsewhere, by name: what `--network=NAME` and `--ref=NAME` stand for.

EDM's networks and reference statistics (Karras et al. 2022) are under CC BY-NC-SA 4.0. In the names, vp is the DDPM++
architecture, ve is NCSN++, adm that of Dhariwal and Nichol 2021; the baselines are the earlier networks that the paper
compares with, under VP, VE and iDDPM preconditioning.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedFile:
    """sha256: of the file, in hexadecimal; None where nobody here has seen the file and could tell."""

    url: str
    sha256: str | None = None


_EDM = 'https://nvlabs-fi-cdn.nvidia.com/edm'
_NGC = 'https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/1/files'

_EDM_NETWORKS = [
    *(f'edm-{data}-{arch}' for data in ('cifar10-32x32-cond', 'cifar10-32x32-uncond') for arch in ('vp', 've')),
    *(f'edm-{data}-64x64-uncond-{arch}' for data in ('ffhq', 'afhqv2') for arch in ('vp', 've')),
    'edm-imagenet-64x64-cond-adm',
]
_BASELINES = [
    'baseline-cifar10-32x32-uncond-vp',
    'baseline-cifar10-32x32-uncond-ve',
    'baseline-imagenet-64x64-cond-adm',
]
NETWORKS = [*_EDM_NETWORKS, *_BASELINES]
_REFERENCES = ['cifar10-32x32', 'ffhq-64x64', 'afhqv2-64x64', 'imagenet-64x64', 'imagenet-64x64-baseline']

PUBLISHED: dict[str, PublishedFile] = {
    **{name: PublishedFile(f'{_EDM}/pretrained/{name}.pkl') for name in _EDM_NETWORKS},
    **{name: PublishedFile(f'{_EDM}/pretrained/baseline/{name}.pkl') for name in _BASELINES},
    **{f'fid-ref-{name}': PublishedFile(f'{_EDM}/fid-refs/{name}.npz') for name in _REFERENCES},
    'inception-2015-12-05': PublishedFile(f'{_NGC}/metrics/inception-2015-12-05.pkl'),
}
