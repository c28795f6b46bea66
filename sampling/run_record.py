"""generate.json: how the images of a folder were made, so that images made in another way never get among them."""

import contextlib
import hashlib
import os
from typing import Any

import torch

from dnnlib import settings

NAME = 'generate.json'


def fingerprint(net: torch.nn.Module) -> str:
    """16 hexadecimal digits that stand for the class of a network, its arguments and its weights, in whatever file."""
    arguments = [getattr(net, name, None) for name in ('init_args', 'init_kwargs')]
    digest = hashlib.sha256(f'{type(net).__name__} {arguments}'.encode())
    for name, value in net.state_dict().items():
        digest.update(f'{name} {value.dtype} {list(value.shape)}'.encode())
        flat = value.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def path_in(outdir: str) -> str:
    return os.path.join(outdir, NAME)


def read(outdir: str) -> dict[str, Any] | None:
    """The settings on record; None without a record.

    Raises:
        ValueError: the file is something else.
    """
    path = path_in(outdir)
    try:
        return _in_words_of_today(dict(settings.read(path)['settings']))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} is not a record of generate.py; choose another --outdir, or delete it') from None


def _in_words_of_today(of: dict[str, Any]) -> dict[str, Any]:
    """Version 0.1 wrote `randn_like` and `scheme` where `sampler` is now."""
    randn_like = of.pop('randn_like', None)
    if randn_like is None:
        return of
    name = of.pop('scheme', 'taylor') if randn_like == 'ddb' else 'ablation' if 'solver' in of else 'heun'
    return {'sampler': name} | of


def save(outdir: str, of: dict[str, Any], note: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any] | None:
    """The settings on record, once these are, or those of another run that was quicker.

    `of`: the settings that the images depend on; `note`: what a reader may want to know besides; `before`: the
    settings that these may replace.
    """
    there, of = read(outdir), settings.as_stored(of)
    if there != of and there in (before, None):
        with contextlib.suppress(FileExistsError):
            settings.save(path_in(outdir), {'settings': of, **note}, replace=there is not None)
        there = read(outdir)
    return there


def remove(outdir: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path_in(outdir))


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """'--steps: 18 → 40, --rho: 7 → 3'; empty for the same settings. A name of several words is no option's."""
    found = settings.differences(before, now)
    return ', '.join(str(each) if ' ' in each.name else f'--{each}' for each in found)
