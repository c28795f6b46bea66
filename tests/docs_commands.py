"""The commands that stand in README.md and docs/: found in code blocks and in `code` between backticks."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = ['README.md', *sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md'))]

FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r'(?:^ {4}.*\n?)+', re.MULTILINE)
INLINE = re.compile(r'(?<!`)`((?:[^`\n]|\n(?!\s*\n))+)`(?!`)')
PROGRAM = re.compile(r'(?:[A-Z_]+=\S+ )*(?:python3?|torchrun|make|pip|conda|git|cd|tensorboard|\.venv/bin/\S+) ')


class Command(NamedTuple):
    page: str  # where it stands first
    text: str  # on one line


def code(page: str) -> list[str]:
    """The texts of a page that may hold commands, in order of kind: fenced blocks, indented ones, code in prose."""
    text = (ROOT / page).read_text()
    blocks = [body for language, body in FENCE.findall(text) if language in ('', 'sh', 'bash', 'console')]
    text = FENCE.sub('', text)
    blocks += [re.sub('^ {4}', '', block, flags=re.MULTILINE) for block in INDENTED.findall(text)]
    return blocks + [' '.join(span.split()) for span in INLINE.findall(INDENTED.sub('', text))]


def commands() -> list[Command]:
    """Each command once."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in code(page):
            for line in re.sub(r'\\\n\s*', '', block).splitlines():
                line = re.sub(r'\s+#.*', '', line.removeprefix('$ ')).strip()
                for part in line.split(' && '):
                    if PROGRAM.match(part):
                        found.setdefault(part, page)
    return [Command(page, text) for text, page in found.items()]
