"""The images of a run in their folder: what is there already, what may be added, how a run starts anew."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import dnnlib
from images import archives, files
from sampling import run_record
from torch_utils import distributed as dist

ARCHIVES = {'npz': archives.NpzArchive, 'zip': archives.ZipArchive}
FORMATS = ('png', *ARCHIVES)


class Output:
    """The images of a run, in `outdir`; a run with the same settings adds what is missing.

    `with Output(…) as output:`, and in there first `check`; `add` takes batches of images as they come, and `start` and
    `close` end it: all on every rank. `assemble`, on rank 0, once all ranks are through. Nothing is written or deleted
    before there is an image to write, so a run that fails early leaves all as it was.

    Attributes:
        path: the folder, or the archive in it.
        finished: seeds whose images an earlier run left.

    Args:
        settings: what the images depend on; note: what else goes into generate.json.
        overwrite: delete what is there, and start anew.
    """

    def __init__(
        self,
        outdir: str,
        settings: dict[str, Any],
        note: dict[str, Any],
        image_format: str = 'png',
        subdirs: bool = False,
        overwrite: bool = False,
    ):
        self.outdir = outdir
        self.path = outdir if image_format == 'png' else os.path.join(outdir, f'images.{image_format}')
        self.finished: set[int] = set()
        self._settings = settings
        self._note = note
        self._overwrite = overwrite
        self._started = False
        self._written: set[int] = set()
        self._stale: list[str] = []  # files to delete before the first image is written
        self._record: dict[str, Any] | None = None  # that was there before, and may be replaced
        self._until_exit = contextlib.ExitStack()
        self._archive = ARCHIVES[image_format](self.path) if image_format in ARCHIVES else None
        self._images: files.PngFolder | archives.Archive = self._archive or files.PngFolder(outdir, subdirs)
        self._background = files.Background(self._write)

    def __enter__(self) -> 'Output':
        return self

    def __exit__(self, *_exc: object) -> None:
        self._until_exit.close()

    def check(self, seeds: Sequence[int]) -> None:
        """Find the images that are there.

        Raises:
            ValueError: the folder holds images that were made in another way, or that --overwrite would not replace.
        """
        self.finished, self._record = dist.on_rank0(lambda: (self._look(seeds), self._record))

    def _look(self, seeds: Sequence[int]) -> set[int]:
        if not os.path.isdir(self.outdir):
            return set()
        found = list(files.own_files(self.outdir))
        there = {path for path in found if path == files.final_path(path)}
        mine = self._images.paths(seeds) | {run_record.path_in(self.outdir)}
        before = self._record = run_record.read(self.outdir)
        if self._overwrite:
            self._stale = found
            if before is None:
                self._check_strangers(there - mine)
            return set()
        self._stale = [path for path in set(found) - there if files.final_path(path) in mine]
        if not there:
            return set()
        self._check_settings(before, there)
        return self._images.finished(seeds)

    def _check_settings(self, before: dict[str, Any] | None, there: set[str]) -> None:
        ways_out = 'choose another --outdir, or --overwrite, which deletes them'
        if before is None:
            raise ValueError(
                f'{self.outdir} holds images, such as {os.path.relpath(min(there), self.outdir)}, but no '
                f'{run_record.NAME} that says how they were made; {ways_out}'
            )
        changes = run_record.differences(before, self._settings)
        if changes:
            raise ValueError(f'{self.outdir} holds images made with other settings ({changes}); {ways_out}')

    def _check_strangers(self, strangers: set[str]) -> None:
        if strangers:
            raise ValueError(
                f'--overwrite: {self.outdir} has no {run_record.NAME}, and holds {len(strangers)} images that this '
                f'command would not write, such as {os.path.relpath(min(strangers), self.outdir)}; delete them, if '
                'that is meant, or choose another --outdir'
            )

    def read(self, seeds: Sequence[int]) -> np.ndarray:
        """Finished images, uint8 [N, H, W, C]."""
        return np.stack([self._images.read(seed) for seed in seeds])

    def add(self, seeds: Sequence[int], images: np.ndarray) -> np.ndarray:
        """Write those that are not there yet, in the background; returns the images as the files have them."""
        self.start()
        missing = {}
        for row, seed in enumerate(seeds):
            if seed in self.finished:
                images[row] = self._images.read(seed)  # drawn in another batch, it may differ by rounding
            elif seed not in self._written:
                missing[seed] = images[row]
        self._written |= missing.keys()
        self._background.add(list(missing), list(missing.values()))
        return images

    def start(self) -> None:
        """Make way for the first image. Every rank has to come here."""
        if self._started:
            return
        self._started = True
        if self._overwrite or self._archive is not None:
            dist.on_rank0(self._make_way)  # no rank writes what another one would delete
        elif dist.get_rank() == 0:
            self._make_way()
        with dnnlib.util.explain_failed_write(self.outdir):
            os.makedirs(self.outdir, exist_ok=True)
        there = run_record.save(self.outdir, self._settings, self._note, None if self._overwrite else self._record)
        changes = run_record.differences(there or {}, self._settings)
        if changes:
            raise ValueError(
                f'another run has begun to write into {self.outdir}, with other settings ({changes}); choose another '
                '--outdir'
            )

    def _make_way(self) -> None:
        with dnnlib.util.explain_failed_write(self.outdir):
            os.makedirs(self.outdir, exist_ok=True)
            alone = self._until_exit.enter_context(dnnlib.util.in_use(self.outdir))
            if alone:
                files.delete(self._stale)
        if not alone and (self._overwrite or self._archive is not None):
            raise ValueError(f'another run is writing into {self.outdir}; wait for its end, or choose another --outdir')
        if self._overwrite:
            run_record.remove(self.outdir)

    def _write(self, seed: int, image: np.ndarray) -> None:
        if not os.path.isfile(run_record.path_in(self.outdir)):
            raise self._gone(run_record.NAME)
        self._images.write(seed, image)

    def _gone(self, what: str) -> OSError:
        return OSError(f'{self.outdir} has lost {what} while this run was writing into it; give another --outdir')

    def close(self) -> None:
        """Wait until all is on disk."""
        self._background.close()

    def assemble(self, seeds: Sequence[int], classes: Callable[[], Sequence[int] | None]) -> None:
        """Make the archive, where one was asked for, of all images and of what `classes()` says of them.

        Raises:
            OSError: images that were written are no longer there.
        """
        lost = len(set(seeds) - self._images.finished(seeds)) if os.path.isdir(self.outdir) else len(seeds)
        if lost:
            raise self._gone(f'{lost} images')
        if self._archive is not None:
            self._archive.assemble(seeds, classes())


class FirstImages:
    """The images of the first seeds, wherever they were drawn."""

    def __init__(self, seeds: Sequence[int], count: int):
        self.seeds = list(seeds[:count])
        self._images: dict[int, np.ndarray] = {}

    def add(self, seeds: Sequence[int], images: np.ndarray) -> None:
        wanted = set(self.seeds)
        self._images |= {seed: image for seed, image in zip(seeds, images, strict=True) if seed in wanted}

    def finish(self) -> np.ndarray:
        """[N, H, W, C], on every process, once all have added their images."""
        for part in dist.all_gather_object(self._images):
            self._images |= part
        return np.stack([self._images[seed] for seed in self.seeds])
