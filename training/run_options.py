"""training_options.json: what a run was asked to do, and what a run that goes on from its states does otherwise."""

import json
import os
from collections.abc import Iterator
from typing import Any

import dnnlib
from torch_utils import network_io

NAME = 'training_options.json'

_OWN = ('run_dir', 'resume_', 'trust_pickle', 'ema_rampup_ratio')  # of each call; no setting of the run as a whole
_SECTIONS = ('network_kwargs', 'dataset_kwargs')
_FREE_OF_NETWORK = ('dropout', 'label_dropout', 'use_fp16')


def save(run_dir: str, config: dict[str, Any]) -> None:
    """Write the config to `run_dir`."""
    with dnnlib.util.atomic_write(os.path.join(run_dir, NAME)) as file:
        file.write(json.dumps({**config, 'run_dir': run_dir}, indent=2).encode())


def beside(state: str | None) -> dict[str, Any]:
    """The config of the run that wrote a state file; empty without a state, or if it is not there, or no config."""
    if state is None:
        return {}
    try:
        with open(os.path.join(os.path.dirname(state), NAME), encoding='utf-8') as file:
            config = json.load(file)
    except (OSError, ValueError):
        return {}
    whole = isinstance(config, dict) and all(isinstance(config.get(name), dict) for name in _SECTIONS)
    return config if whole else {}


def compare(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs as 'name: old → new', in two lists: what a state does not allow, and the rest.

    A state belongs to its network, which the resolution of the images and the use of labels take part in.
    """
    old, new = (dict(_settings(json.loads(json.dumps(config)))) for config in (before, now))
    fixed: list[str] = []
    free: list[str] = []
    for section, name in [*old, *(key for key in new if key not in old)]:
        values = old.get((section, name)), new.get((section, name))
        if values[0] != values[1]:
            of_network = section == 'network_kwargs' and name not in _FREE_OF_NETWORK
            of_images = section == 'dataset_kwargs' and name in ('resolution', 'use_labels')
            (fixed if of_network or of_images else free).append(f'{name}: {_show(values[0])} → {_show(values[1])}')
    return fixed, free


def _settings(config: dict[str, Any]) -> Iterator[tuple[tuple[str, str], Any]]:
    """((section, name), value); the section of a plain entry is empty."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from (((name, inner), item) for inner, item in value.items())
        elif not name.startswith(_OWN):
            yield ('', name), value


def _show(value: Any) -> str:
    return 'none' if value is None else network_io.one_line(value, 100)
