"""training_options.json: what a run was asked to do, and what a run that goes on from its states does otherwise."""

import os
from collections.abc import Iterator
from typing import Any

from dnnlib import settings

NAME = 'training_options.json'

_OWN = ('run_dir', 'resume_', 'trust_pickle', 'ema_rampup_ratio')  # of each call; no setting of the run as a whole
_SECTIONS = ('network_kwargs', 'dataset_kwargs')
_FREE_OF_NETWORK = ('dropout', 'label_dropout', 'use_fp16')


def save(run_dir: str, config: dict[str, Any]) -> None:
    """Write the config to `run_dir`."""
    settings.save(os.path.join(run_dir, NAME), {**config, 'run_dir': run_dir})


def beside(state: str | None) -> dict[str, Any]:
    """The config of the run that wrote a state file; empty without a state, or if it is not there, or no config."""
    if state is None:
        return {}
    try:
        config = settings.read(os.path.join(os.path.dirname(state), NAME))
    except (OSError, ValueError):
        return {}
    whole = all(isinstance(config.get(name), dict) for name in _SECTIONS)
    return config if whole else {}


def compare(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs as 'name: old → new', in two lists: what a state does not allow, and the rest.

    A state belongs to its network, which the resolution of the images and the use of labels take part in.
    """
    fixed: list[str] = []
    free: list[str] = []
    for each in settings.differences(dict(_flat(before)), dict(_flat(now))):
        section, _, name = each.name.rpartition('.')
        of_network = section == 'network_kwargs' and name not in _FREE_OF_NETWORK
        of_images = section == 'dataset_kwargs' and name in ('resolution', 'use_labels')
        (fixed if of_network or of_images else free).append(str(each._replace(name=name)))
    return fixed, free


def _flat(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """('section.name', value), or ('name', value) for a plain entry."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from ((f'{name}.{inner}', item) for inner, item in value.items())
        elif not name.startswith(_OWN):
            yield name, value
