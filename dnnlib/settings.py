"""Settings on record: a JSON file that says how something was made, so that nothing made in another way joins it.

Settings are a dict of plain values by option name. What a file gives back differs from what went in where JSON has no
word for it; `as_stored` makes the two comparable.
"""

import json
import math
import os
from typing import Any, NamedTuple

from . import plain_json
from .util import atomic_write, one_line

MAX_BYTES = 16 << 20  # of a record


def save(path: str | os.PathLike, record: dict[str, Any], replace: bool = True) -> None:
    """Write the record as indented JSON; the file appears whole or not at all; `replace`: see `atomic_write`."""
    with atomic_write(path, replace) as file:
        file.write((json.dumps(record, indent=2) + '\n').encode())


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The record in a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no JSON object.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f'{path} is not a file')  # reading a pipe would never end
    with open(path, 'rb') as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f'{path} is not a record: it has more than {MAX_BYTES} bytes')
    try:
        record = plain_json.parse(data)
    except ValueError as err:
        raise ValueError(f'{path} is not a record: {err}') from None
    if not isinstance(record, dict):
        raise ValueError(f'{path} is not a record: it holds no JSON object')
    return record


def as_stored(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they come back from a file, where infinity is a word and a tuple a list."""
    words = {name: str(value) if value in (math.inf, -math.inf) else value for name, value in settings.items()}
    return json.loads(json.dumps(words))


def without_nan(value: Any) -> Any:
    """The value, for JSON, which has no word for nan and infinity: they become None, also in its dicts and lists."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Difference(NamedTuple):
    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f'{self.name}: {_show(self.before)} → {_show(self.now)}'


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """The settings that are not the same, in the order of `before`, then of `now`; an absent one counts as None.

    `str` of a difference is 'steps: 18 → 40'.
    """
    before, now = as_stored(before), as_stored(now)
    pairs = [Difference(name, before.get(name), now.get(name)) for name in {**before, **now}]
    return [each for each in pairs if each.before != each.now]


def _show(value: Any) -> str:
    return 'none' if value is None else one_line(value, 100)
