"""Mean and covariance of features, and the files that hold them."""

import io
import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import dnnlib
from dnnlib import npz, plain_json, safe_pickle
from torch_utils import distributed as dist

INCEPTION = 'inception-2015-12-05'  # what files without a note of their detector were made with


class Moments:
    """Number, mean and scatter matrix S = Σ (f − mean)(f − mean)ᵀ of feature vectors, in float64.

    Kept centred, by the pairwise update of Chan, Golub & LeVeque 1979, so features with a large mean lose nothing, and
    sums over batches, files or processes are joined by `merge`.
    """

    def __init__(self, dim: int):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: torch.Tensor) -> None:
        """features: [N, dim]"""
        features = features.detach().cpu().to(torch.float64)
        batch = Moments(features.shape[1])
        batch.n = len(features)
        if batch.n:
            batch.mean = features.mean(dim=0)
            centred = features - batch.mean
            batch.scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: 'Moments') -> None:
        """Join the vectors that `other` has seen."""
        total = self.n + other.n
        if other.n == 0:
            return
        delta = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(delta, delta) * (self.n * other.n / total)
        self.mean += delta * (other.n / total)
        self.n = total

    def all_reduce(self) -> None:
        """Join the vectors of all processes; to be called on each, and each has the result."""
        if dist.get_world_size() == 1:
            return
        counts = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        means = torch.zeros(dist.get_world_size(), len(self.mean), dtype=torch.float64)
        counts[dist.get_rank()], means[dist.get_rank()] = self.n, self.mean
        counts, means = dist.all_reduce(counts), dist.all_reduce(means)
        mean = (counts @ means) / counts.sum().clamp(min=1)
        delta = self.mean - mean
        self.scatter = dist.all_reduce(self.scatter + torch.outer(delta, delta) * self.n)
        self.n, self.mean = int(counts.sum()), mean

    def covariance(self) -> torch.Tensor:
        """S/(n − 1); ValueError for fewer than two vectors."""
        if self.n < 2:
            raise ValueError(f'a covariance needs two images or more, got {self.n}')
        return self.scatter / (self.n - 1)


@dataclass
class Reference:
    """What images are compared with.

    Attributes:
        mu, sigma: mean [d] and covariance [d, d] of the features, float64.
        features: [n, d], or None where only the moments are known.
        detector, resize: how the features were made; Inception's where the file does not say.
        num_images: 0 where the file does not say.
    """

    mu: np.ndarray
    sigma: np.ndarray
    features: np.ndarray | None = None
    detector: str = INCEPTION
    weights_sha256: str = ''
    resize: str = ''
    num_images: int = 0
    name: str = field(default='', compare=False)


class ReferenceFileError(ValueError):
    """The file holds no usable reference statistics; the message is one line."""


def write_reference(reference: Reference, path: str) -> None:
    """An .npz with `mu` and `sigma` first, as EDM and others read it, then `features` (if any) and a note in JSON."""
    arrays = {'mu': reference.mu, 'sigma': reference.sigma}
    if reference.features is not None:
        arrays['features'] = reference.features.astype(np.float32)
    note = {name: getattr(reference, name) for name in _NOTE} | {'torch': torch.__version__}
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with dnnlib.util.atomic_write(path) as file:
        np.savez(file, **arrays, note=np.array(json.dumps(note)))  # type: ignore[arg-type]


_NOTE = ('detector', 'weights_sha256', 'resize', 'num_images')


def read_reference(path_or_url: str) -> Reference:
    """Reference statistics of this project, EDM, pytorch-fid, clean-fid and ADM (.npz), or EDM2 (pickle; none runs).

    Raises:
        ReferenceFileError: the file is none of these.
        OSError: it cannot be opened or downloaded.
    """
    with dnnlib.util.open_url(path_or_url) as file:
        data = file.read()
    try:
        entries = npz.read(data, ('mu', 'sigma', 'features', 'note')) if data[:2] == b'PK' else _read_edm2(data)
        reference = Reference(mu=_array(entries, 'mu'), sigma=_array(entries, 'sigma'), name=path_or_url)
        dim = reference.mu.size
        if reference.mu.shape != (dim,) or reference.sigma.shape != (dim, dim):
            raise ValueError(f'mu {reference.mu.shape} and sigma {reference.sigma.shape} do not go together')
        if 'features' in entries:
            reference.features = _array(entries, 'features')
        for key, value in plain_json.parse(str(entries.get('note', '{}'))).items():
            if key in _NOTE:
                setattr(reference, key, _noted(key, value))
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ReferenceFileError(
            f'{dnnlib.util.label(path_or_url)} holds no reference statistics: {dnnlib.util.one_line(err, 200)}'
        ) from err
    return reference


def _noted(key: str, value: Any) -> Any:
    if type(value) is not type(getattr(Reference, key)) or len(str(value)) > 1000:
        raise ValueError(f'{key} in its note is {dnnlib.util.one_line(repr(value), 100)}')
    return value


def _read_edm2(data: bytes) -> dict[str, Any]:
    """EDM2's pickle: {'num_images': …, 'fid': {'mu': …, 'sigma': …}, 'fd_dinov2': …}."""
    if data[:1] != b'\x80':
        raise ValueError('it is neither an .npz file nor a pickle')
    return safe_pickle.load_numpy(io.BytesIO(data))['fid']


def _array(entries: dict[str, Any], key: str) -> np.ndarray:
    if key not in entries:
        raise ValueError(f'there is no {key!r} in it')
    array = np.asarray(entries[key])
    if array.dtype.kind != 'f' or not np.isfinite(array).all():
        raise ValueError(f'{key} is not an array of finite numbers')
    return array.astype(np.float64)
