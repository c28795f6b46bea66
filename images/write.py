"""Where a dataset goes: a zip archive or a folder of PNG files with `dataset.json`.

The writers are context managers that give a `Writer`. The dataset appears at the end, whole, or not at all.
"""

import contextlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import dnnlib
from dnnlib import settings
from images.convert import Kind, kind_of_png


class Writer(NamedTuple):
    put: Callable[[str, bytes], None]
    finished: Callable[[str], Kind | None]  # the image that an earlier run left under this name


NOWHERE = Writer(lambda name, data: None, lambda name: None)


def file_name(idx: int) -> str:
    """Of an image inside a dataset: 00001/img00001234.png, a folder for each thousand."""
    return f'{idx // 1000:05d}/img{idx:08d}.png'


@contextlib.contextmanager
def zip_writer(dest: str) -> Iterator[Writer]:
    """A stored zip archive. The same files give the same bytes."""
    path = os.path.realpath(dest)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with dnnlib.util.atomic_write(path) as file, zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
        yield Writer(lambda name, data: archive.writestr(dnnlib.util.zip_entry(name), data), lambda name: None)


@contextlib.contextmanager
def folder_writer(dest: str, options: dict[str, Any], resume: bool) -> Iterator[Writer]:
    """A folder, new or in place of an empty one.

    Until it is complete it lies in DEST.partial/images, with the options that it depends on beside it. A run that stops
    leaves that, and one with `resume` and the same options takes it up.

    Raises:
        OSError: DEST.partial is there, and this run does not or cannot continue it.
    """
    final = os.path.realpath(dest)
    partial = f'{final}.partial'
    images = os.path.join(partial, 'images')
    begin(partial, options, resume)
    os.makedirs(images, exist_ok=True)
    try:
        yield png_folder(images)
    except BaseException:
        if os.listdir(images):
            print(f'What is done so far is kept in {partial}; --resume continues it', file=sys.stderr)
        else:
            shutil.rmtree(partial)
        raise
    if os.path.isdir(final):
        os.rmdir(final)
    os.replace(images, final)
    shutil.rmtree(partial)


def begin(partial: str, options: dict[str, Any], resume: bool) -> None:
    """Put the options on record, or check that those of the run to be continued were the same."""
    record = os.path.join(partial, 'options.json')
    if not os.path.isdir(partial):
        os.makedirs(partial)
        settings.save(record, options)
    elif not resume:
        raise OSError(f'{partial} holds an unfinished run: continue it with --resume, or delete it')
    elif differing := difference(record, options):
        raise OSError(f'{partial} was begun with {differing}: use the same, or delete it')


def difference(record: str, options: dict[str, Any]) -> str:
    """The options of the earlier run that differ from these, as text; '' if none does."""
    try:
        before = settings.read(record)
    except (OSError, ValueError):
        return 'options that are not known'
    return ', '.join(f'{each.name}={each.before}' for each in settings.differences(before, options))


def png_folder(folder: str) -> Writer:
    def put(name: str, data: bytes) -> None:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(data)

    def finished(name: str) -> Kind | None:
        try:
            with open(os.path.join(folder, name), 'rb') as file:
                return kind_of_png(file.read())
        except FileNotFoundError:
            return None

    return Writer(put, finished)
