"""Results that outlive the process that computed them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dnnlib import plain_json


class ResultsFile:
    """Results by what they are of, a line of JSON each, so that a stopped comparison goes on where it was.

    Both sides are dicts of plain values; `translate` turns what an older version said of a result into today's words.
    A line is on the disk before its result is returned; a line that a kill has
    cut short is the last one, has no end, and is taken out again.
    """

    def __init__(self, path: str | os.PathLike, translate: Callable[[dict[str, Any]], dict[str, Any]] = dict):
        self._path, self._known = Path(path), {}
        if not self._path.exists():
            return
        lines = self._path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b'\n'):
            os.truncate(self._path, sum(map(len, lines[:-1])))
            del lines[-1]
        for number, line in enumerate(lines, start=1):
            try:
                of, result = plain_json.parse(line)
                self._known[_key(translate(of))] = result
            except (ValueError, TypeError, AttributeError):
                raise ValueError(f'{self._path}, line {number} is no result of a comparison; delete it') from None

    def __contains__(self, of: dict[str, Any]) -> bool:
        return _key(of) in self._known

    def get(self, of: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result for `of`, from the file or else from `compute()`."""
        if of not in self:
            self._known[_key(of)] = result = compute()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open('a') as file:
                file.write(json.dumps([of, result]) + '\n')
                file.flush()
                os.fsync(file.fileno())
        return self._known[_key(of)]


def _key(of: dict[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)
