"""What a run over raw images has seen and made, counted, and as text for its end."""

import collections
import dataclasses
import time

from images.convert import Converted, Kind
from images.sources import Label


@dataclasses.dataclass
class Summary:
    """Counts of one run; `str` of it is the text."""

    start: float = dataclasses.field(default_factory=time.monotonic)
    kind: Kind | None = None  # of the first image; all must be like it
    labels: dict[int, Label] = dataclasses.field(default_factory=dict)  # of the images that went in, by index
    notes: list[str] = dataclasses.field(default_factory=list)  # what the source has to tell
    num_read: int = 0
    num_resumed: int = 0
    num_small: int = 0
    num_broken: int = 0
    num_rotated: int = 0
    sizes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    modes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def count(self, result: Converted, problem: str) -> None:
        """Count one image; `problem` is what keeps it out, if anything does."""
        self.num_read += 1
        self.num_broken += bool(problem)
        self.num_small += not problem and result.kind is None
        self.num_resumed += not problem and result.kind is not None and not result.png
        self.num_rotated += result.rotated
        if result.raw:
            self.sizes[f'{result.raw.width}x{result.raw.height}'] += 1
            self.modes[result.raw.mode] += 1

    def __str__(self) -> str:
        seconds = time.monotonic() - self.start
        lines = {
            'read': f'{self.num_read} images in {seconds:.1f} s, {self.num_read / seconds:.0f} per second',
            'sizes': most_common(self.sizes),
            'modes': most_common(self.modes),
            'resumed': f'{self.num_resumed} were there already' if self.num_resumed else '',
            'rotated': f'{self.num_rotated} by EXIF, which is not applied' if self.num_rotated else '',
            'too small': f'{self.num_small} left out' if self.num_small else '',
            'broken': f'{self.num_broken} left out' if self.num_broken else '',
            'result': f'{len(self.labels)} images, {self.kind}',
            'labels': describe_labels(list(self.labels.values())),
        }
        told = [(name, text) for name, text in lines.items() if text] + [('note', text) for text in self.notes]
        return '\n'.join(f'{name:<10} {text}' for name, text in told)


def most_common(counter: collections.Counter[str], n: int = 4) -> str:
    parts = [f'{text} ({count})' for text, count in counter.most_common(n)]
    return ', '.join(parts + ([f'and {len(counter) - n} more'] if len(counter) > n else []))


def describe_labels(labels: list[Label]) -> str:
    missing = sum(label is None for label in labels)
    if missing:
        return 'none' if missing == len(labels) else f'none, as {missing} images have no label'
    if isinstance(labels[0], list):
        return f'vectors of length {len(labels[0])}'
    sizes = collections.Counter(labels).values()
    each = f'{min(sizes)} images each' if min(sizes) == max(sizes) else f'{min(sizes)} to {max(sizes)} images'
    largest = max(label for label in labels if isinstance(label, int))
    gaps = largest + 1 - len(sizes)
    empty = f'; label_dim {largest + 1}, of which {gaps} classes have no image' if gaps else ''
    return f'{len(sizes)} classes with {each}{empty}'
