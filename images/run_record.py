"""generate.json: how the images of a folder were made, so that images made in another way never get among them."""

import contextlib
import hashlib
import json
import math
import os
from typing import Any

import torch

import dnnlib
from images import files
from torch_utils import network_io

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
        with open(path, encoding='utf-8') as file:
            return dict(json.load(file)['settings'])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} is not a record of generate.py; choose another --outdir, or delete it') from None


def save(outdir: str, settings: dict[str, Any], note: dict[str, Any]) -> None:
    """`settings` is what the images depend on; `note` is what a reader may want to know besides."""
    path = path_in(outdir)
    with files.explain_failed_write(path):
        os.makedirs(outdir, exist_ok=True)
        with dnnlib.util.atomic_write(path) as file:
            file.write((json.dumps({'settings': as_stored(settings), **note}, indent=2) + '\n').encode())


def remove(outdir: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path_in(outdir))


def as_stored(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they come back from the file, where infinity is a word and a tuple a list."""
    words = {name: str(value) if value in (math.inf, -math.inf) else value for name, value in settings.items()}
    return json.loads(json.dumps(words))


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """'--steps: 18 → 40, --rho: 7 → 3'; empty for the same settings. A name of several words is no option's."""
    now = as_stored(now)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    labels = [name if ' ' in name else f'--{name}' for name in names]
    pairs = [f'{_show(before.get(name))} → {_show(now.get(name))}' for name in names]
    return ', '.join(f'{label}: {pair}' for label, pair in zip(labels, pairs, strict=True))


def _show(value: Any) -> str:
    return 'none' if value is None else network_io.one_line(value, 60)
