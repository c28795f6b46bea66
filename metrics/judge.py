"""Distances of images to a reference, as the images come: what fid.py says of files, without the files."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from metrics import measure
from metrics.detectors import Detector
from metrics.image_features import Images, open_reference
from metrics.statistics import Reference


class Verdict(NamedTuple):
    """numbers: name → value; title: of the Fréchet distance among them; warnings: what a reader should know."""

    numbers: measure.Numbers
    title: str
    warnings: list[str]


class Judge:
    """`images = judge.start()`, then `images.add_pixels(…)` as often as needed, then `judge.finish(images)`.

    The reference is opened when it is first needed.

    Args:
        metrics: names of `measure.METRICS`.
        ref, detector: as for fid.py.
        real: the real images, where `ref` is a folder or zip archive of them.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        ref: str,
        detector: str | None,
        device: torch.device,
        real: Images | None = None,
    ):
        self.metrics, self._ref, self._detector, self._device, self._real = metrics, ref, detector, device, real

    @cached_property
    def _opened(self) -> tuple[Reference, Detector]:
        keep = measure.needs_features(self.metrics)
        reference, detector = open_reference(self._ref, self._detector, self._device, self._real, keep=keep)
        measure.check_comparable(detector, reference, self.metrics)
        return reference, detector

    def start(self) -> measure.FeatureSet:
        """An empty set of images.

        Raises:
            ValueError, OSError: there is something wrong with the reference or the detector.
        """
        return measure.FeatureSet(self._opened[1], self._device, keep=measure.needs_features(self.metrics))

    def finish(self, images: measure.FeatureSet) -> Verdict:
        """On every process, once all have added their images."""
        images.finish()
        reference, detector = self._opened
        numbers = measure.measure(images, reference, self.metrics)
        return Verdict(numbers, detector.title, measure.warnings(images, reference, self.metrics))
