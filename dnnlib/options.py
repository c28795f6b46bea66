"""Types of command-line options, for click: lists, sizes, paths, numbers to compute with."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import click

MOST_NUMBERS = 100_000_000  # of a range; that many are gigabytes as a list


def parse_int_list(text: str | Sequence[int]) -> list[int]:
    """'1,2,5-10' → [1, 2, 5, 6, 7, 8, 9, 10]. Ranges include both ends; the order is kept.

    Raises:
        ValueError: the text is not such a list.
    """
    if not isinstance(text, str):
        return list(text)
    numbers: list[int] = []
    for item in text.split(','):
        match = re.fullmatch(r'\s*(\d+)(?:-(\d+))?\s*', item, re.ASCII)
        if match is None:
            raise ValueError(f'{item!r} is neither a number nor a range such as 0-63')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f'the range {item.strip()!r} runs backwards')
        if last - first >= MOST_NUMBERS:
            raise ValueError(f'the range {item.strip()!r} has {last - first + 1:,} numbers, more than {MOST_NUMBERS:,}')
        numbers.extend(range(first, last + 1))
    return numbers


class IntList(click.ParamType):
    """1,2,5-10; `example` says in an error what the option takes."""

    name = 'list'

    def __init__(self, example: str):
        self.example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return parse_int_list(value)
        except ValueError as err:
            self.fail(f'{err}; {self.example}', param, ctx)


class ClassList(IntList):
    """One class is a number, several are a list."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, int):
            return value
        classes = super().convert(value, param, ctx)
        return classes[0] if len(classes) == 1 else classes


class PositiveInts(click.ParamType):
    """1,2,2,2"""

    name = 'list'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        if not re.fullmatch(r' *[1-9][0-9]{0,3} *(, *[1-9][0-9]{0,3} *)*', value):
            self.fail(f'{value!r} is not a list of positive integers such as 1,2,2,2', param, ctx)
        return [int(item) for item in value.split(',')]


class ListOf(click.ParamType):
    """Values of another type with commas between them; the same value twice counts once."""

    name = 'list'

    def __init__(self, each: click.ParamType):
        self._each = each

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return list(dict.fromkeys(self._each.convert(text.strip(), param, ctx) for text in value.split(',')))


class Resolution(click.ParamType):
    """64x64, 64,64 or 64 → (width, height)"""

    name = 'WxH'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r'([1-9]\d*)(?:[x,]([1-9]\d*))?', value, re.ASCII)
        if match is None:
            self.fail(f'{value!r} is not like 64x64, 64,64 or 64', param, ctx)
        return int(match[1]), int(match[2] or match[1])


class UserPath(click.ParamType):
    """A path, where ~ at the start is a home directory, also after `=`, where shells leave it; or a URL, or a name.

    A pipe or a device is no file that one could read twice, or replace.
    """

    name = 'path'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        path = os.path.expanduser(value)
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            self.fail(f'{path} is a pipe or a device, neither a file nor a folder', param, ctx)
        return path


class NewFile(UserPath):
    """The name of a file to be written: its ending is one of `endings`, and its folder is there or can be made.

    So it is known before hours of work that the file can be written after them.
    """

    name = 'file'

    def __init__(self, *endings: str):
        self._endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        path = super().convert(value, param, ctx)
        if not path.lower().endswith(self._endings):
            self.fail(f'{path}: the name ends in {" or ".join(self._endings)}', param, ctx)
        folder = os.path.dirname(path) or '.'
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as err:
            self.fail(f'{path}: cannot make the folder {folder}: {err.strerror}', param, ctx)
        return path


class FiniteRange(click.FloatRange):
    """A range without infinity, which every comparison lets pass, and without nan."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f'{value!r} is not a finite number', param, ctx)
        return number


user_path = UserPath()
at_least_one = click.IntRange(min=1)
positive = click.FloatRange(min=0, min_open=True)
non_negative = click.FloatRange(min=0)
