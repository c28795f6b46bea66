"""Seeds → images: random numbers of its own for each seed, latents, classes, batches, pixels.

`generate_images` is the way in: it runs any sampler, batch by batch. An image does not depend on what else is in its
batch, nor on how many processes share the work.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import sampler_2nd

STREAMS = 2**32  # seeds are taken modulo this number, as EDM does it
IMAGE_VERSION = 3  # one more whenever the same settings make other images


class StackedRandomGenerator:
    """One random generator per image of a batch: row i of every draw depends on seeds[i] only."""

    def __init__(self, device: torch.device | str, seeds: Sequence[int]):
        self._device = device
        self._generators = [torch.Generator(device).manual_seed(int(seed) % STREAMS) for seed in seeds]

    def randn(self, size: Sequence[int], **kwargs: Any) -> torch.Tensor:
        return self._stack(torch.randn, size, **kwargs)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        return self.randn(x.shape, dtype=x.dtype, layout=x.layout)

    def randint(self, *args: Any, size: Sequence[int], **kwargs: Any) -> torch.Tensor:
        return self._stack(partial(torch.randint, *args), size, **kwargs)

    def _stack(self, draw: Callable[..., torch.Tensor], size: Sequence[int], **kwargs: Any) -> torch.Tensor:
        if size[0] != len(self._generators):
            raise ValueError(f'{size[0]} rows asked of {len(self._generators)} generators')
        if not self._generators:
            return draw(size, device=self._device, **kwargs)
        return torch.stack([draw(size[1:], generator=g, device=g.device, **kwargs) for g in self._generators])


def repeated_streams(seeds: Sequence[int]) -> list[tuple[int, int]]:
    """Two different seeds with the same random numbers, if there are any: they are taken modulo `STREAMS`."""
    first: dict[int, int] = {}
    for seed in seeds if max(seeds) >= STREAMS else ():
        other = first.setdefault(seed % STREAMS, seed)
        if other != seed:
            return [(other, seed)]
    return []


def split_seeds(seeds: Sequence[int], max_batch_size: int) -> list[list[int]]:
    """The fewest batches of at most `max_batch_size`, nearly equal, in order: the same for any number of processes."""
    num_batches = max(math.ceil(len(seeds) / max_batch_size), 1)
    return [[seeds[i] for i in part] for part in np.array_split(np.arange(len(seeds)), num_batches)]


def generate_images(
    net: Any,
    batches: Sequence[Sequence[int]],
    sampler: Callable[..., torch.Tensor],
    device: torch.device,
    class_idx: int | Sequence[int] | None = None,
    noise: str = 'fresh',
    vectors: np.ndarray | None = None,
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """Yield (seeds, images) for each batch of seeds; images are uint8 [N, R, R, C].

    Each seed draws, from a generator of its own on `device`: the latent, then a class (if the network knows classes,
    and even if `class_idx` overrides it), then what `sampler(net, latents, labels, randn_like=…)` asks for. With
    `noise` 'path' the sampler's noise is a `sampler_2nd.BrownianPath` of the seeds instead. Of several classes in
    `class_idx`, seed k has number k mod their count. `vectors`, float [M, label_dim], are the labels of a network that
    was trained on vectors instead of classes: seed k has row k mod M.
    """
    for seeds in batches:
        rnd = StackedRandomGenerator(device, seeds)
        latents, classes = draw_start(net, rnd, seeds, class_idx)
        labels = None if classes is None else torch.eye(net.label_dim, device=device)[classes]
        if vectors is not None:
            rows = [seed % len(vectors) for seed in seeds]
            labels = torch.tensor(vectors[rows], dtype=torch.float32, device=device)
        randn_like = sampler_2nd.BrownianPath(seeds) if noise == 'path' else rnd.randn_like
        try:
            images = sampler(net, latents, labels, randn_like=randn_like)
        except sampler_2nd.NotFiniteError as err:
            raise ValueError(f'seed {seeds[err.row]}: {err}') from None
        yield seeds, to_uint8(images)


def draw_start(
    net: Any, rnd: StackedRandomGenerator, seeds: Sequence[int], class_idx: int | Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The latents of a batch and its classes, int64 [N]; None for a network without classes."""
    latents = rnd.randn([len(seeds), net.img_channels, net.img_resolution, net.img_resolution])
    if not net.label_dim:
        return latents, None
    drawn = rnd.randint(net.label_dim, size=[len(seeds)])
    if class_idx is None:
        return latents, drawn
    choice = [class_idx] if isinstance(class_idx, int) else class_idx
    return latents, torch.tensor([choice[seed % len(choice)] for seed in seeds], device=drawn.device)


def classes_of(
    net: Any, batches: Sequence[Sequence[int]], device: torch.device, class_idx: int | Sequence[int] | None
) -> list[int] | None:
    """The class of each seed, drawn as `generate_images` draws it; None without a network or its classes."""
    if net is None or not net.label_dim:
        return None
    starts = (draw_start(net, StackedRandomGenerator(device, seeds), seeds, class_idx) for seeds in batches)
    return [int(label) for _, classes in starts if classes is not None for label in classes]


def denoised_frames(
    net: Any, seeds: Sequence[int], sampler: Callable[..., torch.Tensor], device: torch.device, **kwargs: Any
) -> np.ndarray:
    """D after each step, as `generate_images(…, **kwargs)` goes through them: uint8 [steps, N, R, R, C].

    The last one is the images.
    """
    frames: list[np.ndarray] = []
    watched = partial(sampler, callback=lambda step, x, D, sigma: frames.append(to_uint8(D)))
    list(generate_images(net, [seeds], watched, device, **kwargs))
    return np.stack(frames)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[−1, 1] → 0…255 as EDM does it: 127.5 x + 128, clipped, truncated. [N, C, H, W] → [N, H, W, C]."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
