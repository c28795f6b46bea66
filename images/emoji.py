"""Emoji, a small and free set of pictures in colour: nine classes, three artists, about 5,500 pictures on white.

They come as packages of the npm registry, one for each artist, beside each other in a folder. The package named first
in `PACKAGES` also tells what there is: `emoji.json` has the code points, the Unicode group and the skin tones of each.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from dnnlib import plain_json

PACKAGES = {  # and where in each the picture of an emoji is, by its code points
    'emoji-datasource-google': 'img/google/64/{}.png',
    'emoji-datasource-twitter': 'img/twitter/64/{}.png',
    '@lobehub/fluent-emoji-3d': 'assets/{}.webp',
}
GROUPS = [  # of Unicode; the label is the index
    'Smileys & Emotion',
    'People & Body',
    'Animals & Nature',
    'Food & Drink',
    'Travel & Places',
    'Activities',
    'Objects',
    'Symbols',
    'Flags',
]
TONES = ['1F3FB', '1F3FC', '1F3FD', '1F3FE', '1F3FF']
CODE_POINTS = re.compile(r'[0-9A-F]+(-[0-9A-F]+)*')
HELD_OUT = 10  # one emoji of so many


class Emoji(NamedTuple):
    code: str  # code points, such as 1F44B-1F3FB
    toned: list[str]  # the same in the other skin tones
    label: int


class Picture(NamedTuple):
    name: str
    read: Callable[[], np.ndarray]  # uint8 [S, S, 3]
    label: int


def pictures(folder: str, held_out: bool) -> list[Picture]:
    """The pictures in the packages below `folder`: of a tenth of the emoji if `held_out`, else of the other nine.

    A hash of its code points decides for an emoji, whoever drew it, so that training sees no version of what is held
    out. Each artist's picture of it comes once, in a skin tone that another hash chooses. A file with the content of an
    earlier one (the flags of France and of Saint Martin, say) is passed over, on whichever side that one is.

    Raises:
        OSError: a package is missing, or its table is damaged.
    """
    found, seen = [], set()
    table = read_table(folder)
    for package, pattern in PACKAGES.items():
        for emoji in table:
            names = [pattern.format(code.lower()) for code in [emoji.code, *emoji.toned]]
            paths = list(filter(os.path.isfile, (os.path.join(folder, package, name) for name in names)))
            if not paths:  # the artist left this emoji out
                continue
            path = paths[number(package + emoji.code) % len(paths)]
            with open(path, 'rb') as file:
                content = hashlib.sha256(file.read()).digest()
            if content not in seen and is_held_out(emoji) == held_out:
                name = os.path.relpath(path, folder).replace(os.sep, '/')
                found.append(Picture(name, functools.partial(on_white, path), emoji.label))
            seen.add(content)
    return found


def read_table(folder: str) -> list[Emoji]:
    """All emoji that belong to a group, in the order of the table."""
    missing = [package for package in PACKAGES if not os.path.isdir(os.path.join(folder, package))]
    if missing:
        raise OSError(
            f'{folder} has no {missing[0]}; npm install {" ".join(PACKAGES)} makes node_modules, which has all'
        )
    path = os.path.join(folder, next(iter(PACKAGES)), 'emoji.json')
    try:
        with open(path, 'rb') as file:
            entries = plain_json.parse(file.read())
        return [read_entry(entry) for entry in entries if entry['category'] in GROUPS]
    except (ValueError, LookupError, TypeError, AttributeError) as err:
        raise OSError(f'{path} is damaged: {err!r}') from err


def read_entry(entry: dict[str, Any]) -> Emoji:
    tones = entry.get('skin_variations', {})
    codes = [entry['unified'], *(tones[tone]['unified'] for tone in TONES if tone in tones)]
    for code in codes:
        if not CODE_POINTS.fullmatch(code):  # it becomes the name of a file
            raise ValueError(f'{code!r} are no code points')
    return Emoji(codes[0], codes[1:], GROUPS.index(entry['category']))


def is_held_out(emoji: Emoji) -> bool:
    return number(emoji.code) % HELD_OUT == 0


def number(text: str) -> int:
    """The same on every machine, and as good as random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big')


def on_white(path: str) -> np.ndarray:
    """A picture with transparent parts on a white square, in the middle: uint8 [S, S, 3]."""
    with PIL.Image.open(path, formats=['PNG', 'WEBP']) as image:
        picture = image.convert('RGBA')
    side = max(picture.size)
    square = PIL.Image.new('RGBA', (side, side), 'white')
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.convert('RGB'))
