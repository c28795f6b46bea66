"""Files published elsewhere, by name: what `--network=NAME` and `--ref=NAME` stand for.

EDM's networks and reference statistics (Karras et al. 2022) and EDM2's networks (Karras et al. 2024, arXiv 2312.02696
and 2406.02507) are under CC BY-NC-SA 4.0. In EDM's names, vp is the DDPM++ architecture, ve is NCSN++, adm that of
Dhariwal and Nichol 2021; the baselines are the earlier networks that the paper compares with, under VP, VE and iDDPM
preconditioning.

EDM2's files are named after data, size, thousands of training images and EMA length. A name such as
edm2-img512-s-guid-fid is a way of sampling: size, guidance by an unconditional (guid) or a worse network (autog), and
the measure that the EMA length was chosen for. It stands for the main network, `GUIDES` tells the guiding one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedFile:
    """sha256: of the file, in hexadecimal; None where nobody here has seen the file and could tell."""

    url: str
    sha256: str | None = None


_NVIDIA = 'https://nvlabs-fi-cdn.nvidia.com'
_EDM = f'{_NVIDIA}/edm'
_EDM2 = f'{_NVIDIA}/edm2/posthoc-reconstructions'
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
_REFERENCES = ['cifar10-32x32', 'ffhq-64x64', 'afhqv2-64x64', 'imagenet-64x64', 'imagenet-64x64-baseline']

# ----------------------------------------------------------------------------
# EDM2.

_KIMG = {
    'img512': {'xs': '2147483', 's': '2147483', 'm': '2147483', 'l': '1879048', 'xl': '1342177', 'xxl': '0939524'},
    'img64': {'s': '1073741', 'm': '2147483', 'l': '1073741', 'xl': '0671088'},
}
# What is sampled, and how → the EMA length of each size's network.
_STDS = {
    ('img512', 'fid'): {'xs': '0.135', 's': '0.130', 'm': '0.100', 'l': '0.085', 'xl': '0.085', 'xxl': '0.070'},
    ('img512', 'dino'): {'xs': '0.200', 's': '0.190', 'm': '0.155', 'l': '0.155', 'xl': '0.155', 'xxl': '0.150'},
    ('img64', 'fid'): {'s': '0.075', 'm': '0.060', 'l': '0.040', 'xl': '0.040'},
    ('img512', 'guid-fid'): {'xs': '0.045', 's': '0.025', 'm': '0.030', 'l': '0.015', 'xl': '0.020', 'xxl': '0.015'},
    ('img512', 'guid-dino'): {'xs': '0.150', 's': '0.085', 'm': '0.015', 'l': '0.035', 'xl': '0.030', 'xxl': '0.015'},
    ('img512', 'autog-fid'): {'s': '0.070', 'xxl': '0.075'},
    ('img512', 'autog-dino'): {'s': '0.120', 'xxl': '0.130'},
    ('img64', 'autog-fid'): {'s': '0.045'},
    ('img64', 'autog-dino'): {'s': '0.105'},
}
_EDM2_FILES = {
    **{
        f'edm2-{data}-{size}-{way}': f'edm2-{data}-{size}-{_KIMG[data][size]}-{std}'
        for (data, way), stds in _STDS.items()
        for size, std in stds.items()
    },
    'edm2-img512-s-uncond-autog-fid': 'edm2-img512-s-uncond-2147483-0.070',
    'edm2-img512-s-uncond-autog-dino': 'edm2-img512-s-uncond-2147483-0.090',
}
GUIDES = {
    **{
        f'edm2-img512-{size}-{way}': f'edm2-img512-xs-uncond-2147483-{std}'
        for way in ('guid-fid', 'guid-dino')
        for size, std in _STDS['img512', way].items()
    },
    'edm2-img512-s-autog-fid': 'edm2-img512-xs-0134217-0.125',
    'edm2-img512-s-autog-dino': 'edm2-img512-xs-0134217-0.165',
    'edm2-img512-xxl-autog-fid': 'edm2-img512-m-0268435-0.155',
    'edm2-img512-xxl-autog-dino': 'edm2-img512-m-0268435-0.205',
    'edm2-img512-s-uncond-autog-fid': 'edm2-img512-xs-uncond-0134217-0.110',
    'edm2-img512-s-uncond-autog-dino': 'edm2-img512-xs-uncond-0134217-0.125',
    'edm2-img64-s-autog-fid': 'edm2-img64-xs-0134217-0.110',
    'edm2-img64-s-autog-dino': 'edm2-img64-xs-0134217-0.175',
}

# ----------------------------------------------------------------------------
# All.

NETWORKS = [*_EDM_NETWORKS, *_BASELINES, *_EDM2_FILES]

PUBLISHED: dict[str, PublishedFile] = {
    **{name: PublishedFile(f'{_EDM}/pretrained/{name}.pkl') for name in _EDM_NETWORKS},
    **{name: PublishedFile(f'{_EDM}/pretrained/baseline/{name}.pkl') for name in _BASELINES},
    **{name: PublishedFile(f'{_EDM2}/{file}.pkl') for name, file in _EDM2_FILES.items()},
    **{file: PublishedFile(f'{_EDM2}/{file}.pkl') for file in [*_EDM2_FILES.values(), *GUIDES.values()]},
    **{f'fid-ref-{name}': PublishedFile(f'{_EDM}/fid-refs/{name}.npz') for name in _REFERENCES},
    'inception-2015-12-05': PublishedFile(f'{_NGC}/metrics/inception-2015-12-05.pkl'),
}
