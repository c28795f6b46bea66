"""A comparison: every cell on every set of seeds, each once and for all, and what is known of them by now."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import pooch
import torch
from tqdm import tqdm

import dnnlib
from comparison import peers, report
from comparison.cells import Cell, Measured, count_work, sample_and_judge
from comparison.record import ResultsFile
from images import pictures
from images.tree import FileTree
from sampling import draw

OLD_NAMES = {'db': 'heun'}  # of samplers, in results of version 0.1


@dataclass
class Comparison:
    """A grid of cells, of which each has `sets` sets of `num` seeds: set k has the seeds k·num … (k + 1)·num − 1.

    Attributes:
        judge: a `metrics.judge.Judge`, or one with its methods.
        outdir: gets results.jsonl, pictures/ and report.html.
        identity: what all results are of: 'network' and 'ref', SHA-256 of their contents, and whatever else decides.
        shown: how many seeds have their images shown.
        class_idx: as for `sampling.draw.generate_images`.
    """

    net: Any
    judge: Any
    cells: Sequence[Cell]
    outdir: Path
    identity: dict[str, Any]
    num: int
    sets: int
    batch: int
    shown: int
    device: torch.device
    class_idx: Sequence[int] | None = None

    def __post_init__(self):
        self._results = ResultsFile(self.outdir / 'results.jsonl', in_words_of_today)

    def run(self, frame: report.Report) -> report.Report:
        """Measure all that is not on record, and write the report anew after each set; the last one."""
        if self.todo():
            self.judge.start()  # what is wrong with it is said before the work
        self.draw_strips()
        done = self.write_report(frame)
        for _ in self.measure_sets():
            done = self.write_report(frame)
        return done

    def draw_strips(self) -> None:
        """Save the first images of each cell, one above the other; every cell runs, so errors come at once."""
        missing = [cell for cell in self.cells if not self._strip(cell).exists()]
        for cell in tqdm(missing, desc='Pictures', unit='cell', disable=not missing):
            seeds, sampler = range(self.shown), cell.make()
            [(_, images)] = draw.generate_images(self.net, [seeds], sampler, self.device, self.class_idx)
            self._strip(cell).parent.mkdir(parents=True, exist_ok=True)
            pictures.save_png(pictures.tile(images, columns=1), self._strip(cell))

    def todo(self) -> dict[int, list[Cell]]:
        """set → the cells that are not on record."""
        missing = {k: [cell for cell in self.cells if self._of(cell, k) not in self._results] for k in range(self.sets)}
        return {k: cells for k, cells in missing.items() if cells}

    def measure_sets(self) -> Iterator[int]:
        """Measure what is to do; yields after each set."""
        todo = self.todo()
        total = self.num * sum(sum(count_work(cell)) for cells in todo.values() for cell in cells)
        with tqdm(total=total, unit='evaluation', unit_scale=True, disable=not total) as bar:
            for k, cells in todo.items():
                for cell in cells:
                    bar.set_description(f'Set {k + 1} of {self.sets}: {cell.sampler}, {cell.num_steps} steps')
                    self._results.get(self._of(cell, k), self._measurement(cell, k, bar))
                yield k

    def _measurement(self, cell: Cell, k: int, bar: tqdm) -> Callable[[], dict[str, Any]]:
        cost, seeds = sum(count_work(cell)), range(k * self.num, (k + 1) * self.num)

        def compute() -> dict[str, Any]:
            arguments = self.net, cell, seeds, self.batch, self.judge, self.device
            return sample_and_judge(*arguments, lambda images: bar.update(images * cost), self.class_idx)._asdict()

        return compute

    def known(self, cell: Cell) -> list[Measured]:
        """What is measured of a cell by now, set by set."""
        ofs = [self._of(cell, k) for k in range(self.sets)]
        return [Measured(**self._results.get(of, dict)) for of in ofs if of in self._results]

    def write_report(self, frame: report.Report) -> report.Report:
        """Fill the frame with what is known by now, and write OUTDIR/report.html."""
        known = [each for cell in self.cells for each in self.known(cell)]
        machines = report.unique(each.machine for each in known)
        warnings = report.unique(text for each in known for text in each.warnings)
        if len(machines) > 1:
            warnings.append('The seconds are of different machines or batches (below): compare evaluations only.')
        titles = report.unique(each.title for each in known)
        done = replace(frame, rows=self.rows(), warnings=warnings, fd_title=', '.join(titles))
        done.facts = {**frame.facts, 'Seconds': '; '.join(machines)}
        report.write(done, self.outdir / 'report.html')
        return done

    def rows(self) -> list[report.Row]:
        """A row for each cell."""
        values: dict[str, set[float]] = {}
        for name, value in (setting for cell in self.cells for setting in cell.settings):
            values.setdefault(name, set()).add(value)
        varied = {name for name, each in values.items() if len(each) > 1}
        named = [sampler for sampler, _ in {(cell.sampler, cell.levels) for cell in self.cells}]
        several = {name for name in named if named.count(name) > 1}
        return [self._row(cell, varied | {'levels'} if cell.sampler in several else varied) for cell in self.cells]

    def _row(self, cell: Cell, varied: set[str]) -> report.Row:
        sets = self.known(cell)
        calls, jvp_calls = (sets[0].calls, sets[0].jvp_calls) if sets else count_work(cell)
        return report.Row(
            label=cell.label(varied),
            group=cell.group,
            num_steps=cell.num_steps,
            calls=calls,
            jvp_calls=jvp_calls,
            numbers={name: [each.numbers[name] for each in sets] for name in (sets[0].numbers if sets else ())},
            seconds=[each.seconds for each in sets],
            strip=self._strip(cell).read_bytes(),
        )

    def facts(self) -> dict[str, str]:
        """What a reader needs besides the command."""
        net = self.net
        parameters = sum(each.numel() for each in net.parameters())
        size = f'{net.img_resolution}×{net.img_resolution}, {net.img_channels} channel{"s" * (net.img_channels > 1)}'
        classes = f'{net.label_dim} classes' if net.label_dim else 'no classes'
        packages = [peers.package_of(cell.sampler) for cell in self.cells if cell.sampler in peers.PEERS]
        used = report.unique(name for name in packages if name is not None)
        return {
            'Network': f'{type(net).__name__}, {parameters / 1e6:.2f} M parameters, {size}, {classes}',
            'Its SHA-256': self.identity['network'],
            'Reference’s SHA-256': self.identity['ref'],
            'Versions': ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ['torch', 'numpy', *used]),
            'Date': datetime.now().astimezone().isoformat(' ', 'minutes'),
        }

    def _of(self, cell: Cell, k: int) -> dict[str, Any]:
        return {**self.identity, **cell.identity(), 'first_seed': k * self.num}

    def _strip(self, cell: Cell) -> Path:
        of = {'network': self.identity['network'], **cell.identity(), 'shown': self.shown, 'class': self.class_idx}
        digest = hashlib.sha256(json.dumps(of, default=list).encode()).hexdigest()[:12]
        return self.outdir / 'pictures' / f'{cell.sampler}-{cell.num_steps}-{digest}.png'


def in_words_of_today(of: dict[str, Any]) -> dict[str, Any]:
    return {**of, 'sampler': OLD_NAMES.get(of.get('sampler', ''), of.get('sampler'))}


def content_hash(option: str, path: str) -> str:
    """The SHA-256 of a file (or downloaded URL), or of all images of a folder, which `option` names."""
    if not os.path.isdir(path):
        try:
            return pooch.file_hash(dnnlib.util.open_url(path, return_filename=True), 'sha256')
        except (OSError, ValueError) as err:
            raise click.ClickException(f'--{option}: {err}') from None
    tree, digest = FileTree(path), hashlib.sha256()
    for name in tree.image_names():
        digest.update(hashlib.sha256(tree.read(name)).digest())
    return digest.hexdigest()
