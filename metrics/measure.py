"""From images to features to numbers: what fid.py and `generate.py --metrics` share."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

import dnnlib
from metrics import distances
from metrics.detectors import NETWORKS, Detector, load_detector
from metrics.statistics import Moments, Reference, read_reference
from torch_utils import distributed as dist

Numbers = dict[str, float]


class FeatureSet:
    """The features of a set of images: their moments, and the vectors themselves if `keep`.

    Every process adds images of its own and then calls `finish`, after which each has those of all. The features stand
    in the order of their positions (numbers that the caller gives), whatever the batches and processes were.
    """

    def __init__(self, detector: Detector, device: torch.device, keep: bool = False):
        self.detector = detector
        self.moments = Moments(0)
        self.features: np.ndarray | None = None
        self._device = device
        self._kept: list[tuple[Sequence[int], np.ndarray]] | None = [] if keep else None

    def add(self, positions: Sequence[int], images: torch.Tensor) -> None:
        """images: uint8 [N, 1 or 3, H, W]; gray ones are repeated to three channels."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f'images are uint8 [N, 1 or 3, H, W], got {images.dtype} {list(images.shape)}')
        with torch.no_grad():
            features = self.detector.features(images.to(self._device).expand(-1, 3, -1, -1))
        features = features.detach().cpu().to(torch.float64)
        if not torch.isfinite(features).all():
            raise ValueError(f'{self.detector.name} returned numbers that are not finite')
        if self.moments.n == 0:
            self.moments = Moments(features.shape[1])
        self.moments.add(features)
        if self._kept is not None:
            self._kept.append((positions, features.numpy()))

    def add_pixels(self, positions: Sequence[int], pixels: np.ndarray) -> None:
        """pixels: uint8 [N, H, W, 1 or 3], as `generate_images` gives them."""
        self.add(positions, torch.from_numpy(pixels).permute(0, 3, 1, 2))

    def finish(self) -> None:
        """Join what all processes have added."""
        dim = max(dist.all_gather_object(len(self.moments.mean)))
        if self.moments.n == 0:
            self.moments = Moments(dim)
        self.moments.all_reduce()
        if self._kept is not None:
            kept = [batch for rank in dist.all_gather_object(self._kept) for batch in rank]
            order = np.argsort(np.concatenate([positions for positions, _ in kept]), kind='stable')
            self.features = np.concatenate([features for _, features in kept])[order]

    def restore(self, features: np.ndarray) -> None:
        """Take features computed earlier, [n, d], in place of `add` and `finish`."""
        self.features = features.astype(np.float64)
        self.moments = Moments(features.shape[1])
        self.moments.add(torch.from_numpy(self.features))

    def reference(self) -> Reference:
        """This set as what others are compared with."""
        note = {'weights_sha256': self.detector.weights_sha256, 'resize': self.detector.resize}
        mu, sigma = self.moments.mean.numpy(), self.moments.covariance().numpy()
        return Reference(mu, sigma, self.features, self.detector.name, num_images=self.moments.n, **note)


def fid(images: FeatureSet, reference: Reference) -> Numbers:
    mu, sigma = images.moments.mean.numpy(), images.moments.covariance().numpy()
    return {'fid': distances.frechet_distance(mu, sigma, reference.mu, reference.sigma).distance}


def kid(images: FeatureSet, reference: Reference) -> Numbers:
    value, error = distances.kernel_distance(*_features(images, reference))
    return {'kid': value, 'kid_error': error}


def prdc(images: FeatureSet, reference: Reference) -> Numbers:
    return distances.precision_recall(*_features(images, reference))._asdict()


def swd(images: FeatureSet, reference: Reference) -> Numbers:
    return {'swd': distances.sliced_wasserstein(*_features(images, reference))}


def _features(images: FeatureSet, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    assert images.features is not None
    assert reference.features is not None
    return images.features, reference.features


METRICS: dict[str, Callable[[FeatureSet, Reference], Numbers]] = {'fid': fid, 'kid': kid, 'prdc': prdc, 'swd': swd}


def parse_metrics(text: str) -> list[str]:
    """'fid,kid' → ['fid', 'kid']; ValueError for a name that is not in `METRICS`."""
    names = [name.strip() for name in text.split(',')]
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f'--metrics={text}: {unknown[0]!r} is none of {", ".join(METRICS)}')
    return names


def needs_features(metrics: Sequence[str]) -> bool:
    """Whether more than the moments is needed."""
    return any(name != 'fid' for name in metrics)


def open_statistics(ref: str, detector: str | None, device: torch.device) -> tuple[Reference, Detector]:
    """Reference statistics, and the detector to compare with: that of the reference unless another is named."""
    reference = read_reference(ref)
    if detector is None and reference.detector not in (*NETWORKS, 'pixels'):  # a file must not choose what is opened
        made_with = dnnlib.util.one_line(reference.detector, 100)
        raise ValueError(f'--ref={ref} was made with --detector={made_with}; repeat that option here')
    return reference, load_detector(detector or reference.detector, device)


def check_comparable(detector: Detector, reference: Reference, metrics: Sequence[str], force: bool = False) -> None:
    """Raise ValueError where numbers would mean nothing: other features here than in the reference, or none there."""
    theirs = {'detector': reference.detector, 'resize': reference.resize, 'weights_sha256': reference.weights_sha256}
    ours = {'detector': detector.name, 'resize': detector.resize, 'weights_sha256': detector.weights_sha256}
    for name, value in theirs.items():
        if value and value != ours[name] and not force:
            raise ValueError(
                f'--ref={reference.name} was made with {name} {value!r}, not {ours[name]!r}; make it again with '
                f'fid.py ref, choose --detector accordingly, or compare all the same with --force'
            )
    if needs_features(metrics) and reference.features is None:
        raise ValueError(
            f'--ref={reference.name} has no features, which all metrics but fid need; give the folder or zip of real '
            f'images as --ref, or add them with fid.py ref --with-features'
        )


def measure(images: FeatureSet, reference: Reference, metrics: Sequence[str]) -> Numbers:
    """All numbers of `metrics`, after `images.finish()`.

    Raises:
        ValueError: too few images, or features of another dimension than those of the reference.
    """
    numbers: Numbers = {}
    for name in metrics:
        numbers |= METRICS[name](images, reference)
    return numbers


def warnings(images: FeatureSet, reference: Reference, metrics: Sequence[str] = ('fid',)) -> list[str]:
    """What a reader of a Fréchet distance, if it is among the metrics, should know."""
    smallest, dim = min(images.moments.n, reference.num_images or images.moments.n), len(reference.mu)
    if 'fid' not in metrics or smallest > dim:
        return []
    instead = '' if 'kid' in metrics else ', or --metrics=kid, which is unbiased'
    return [
        f'{smallest} images are not more than the {dim} dimensions of the features: their covariance is singular and '
        f'the Fréchet distance biased upward; use more images{instead}'
    ]
