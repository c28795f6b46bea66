"""JSON out of files of others, within bounds: `json.loads` makes much of a short text, and raises odd errors."""

import json
from typing import Any

from .text import one_line

MAX_DIGITS = 20  # of an integer; more than 64 bits have


def parse(data: bytes | str) -> Any:
    """The value; memory stays below 20 times the size.

    Raises:
        ValueError: it is no JSON in UTF-8; or integers are longer than `MAX_DIGITS`, or values nested too deeply, or
            brackets too many for the size. The message is one line.
    """
    try:
        text = data if isinstance(data, str) else data.removeprefix(b'\xef\xbb\xbf').decode()
        lists, dicts = text.count('['), text.count('{')
        if lists > 1000 + len(text) / 8 or dicts > 1000 + len(text) / 32:
            raise ValueError(f'{lists + dicts} brackets in {len(text)} signs')
        return json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as err:
        raise ValueError(f'it is no JSON that is read here ({one_line(err, 100)})') from None


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f'an integer of {len(text)} digits')
    return int(text)
