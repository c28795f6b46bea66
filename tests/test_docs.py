"""What README and docs/ show is what the code does. Their commands are run by test_docs_commands.py."""

import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for `python tests/test_docs.py`

import pytest
from click.testing import CliRunner
from docs_commands import FENCE, INDENTED, INLINE, PAGES, ROOT

import dataset_tool
import example
import fid
import generate
import train
from benchmarks import gaussian_fd, solvers
from torch_utils import network_io

COMMANDS = {'generate': generate, 'example': example, 'fid': fid, 'dataset_tool': dataset_tool, 'train': train}
PACKAGES = ('.', 'dnnlib', 'images', 'metrics', 'torch_utils', 'training', 'benchmarks')
LINK = re.compile(r'\]\(([^)\s]+)\)')


def read(page: str) -> str:
    return (ROOT / page).read_text()


def help_text(name: str) -> str:
    pages = []
    for command in [[], *([command] for command in getattr(COMMANDS[name].main, 'commands', []))]:
        run = CliRunner().invoke(COMMANDS[name].main, [*command, '--help'], prog_name=f'{name}.py', terminal_width=120)
        assert run.exit_code == 0
        pages.append(run.output)
    return '\n'.join(pages)


@pytest.mark.parametrize('name', COMMANDS)
def test_saved_help_is_the_help_of_the_script(name):
    """Regenerate with `python tests/test_docs.py`."""
    assert read(f'docs/{name}-help.txt') == help_text(name)


# ----------------------------------------------------------------------------
# Links.


def anchors(text: str) -> set[str]:
    """Those of the headings: lower case, punctuation dropped, hyphens for spaces, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', FENCE.sub('', text), re.MULTILINE)
    plain = [re.sub(r'\[(.*?)\]\(.*?\)', r'\1', heading).strip().lower() for heading in headings]
    return {re.sub(r'[^\w\- ]', '', heading).replace(' ', '-') for heading in plain}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    """To files and headings that are there; of other sites the form of the address is all that is checked."""
    for link in LINK.findall(FENCE.sub('', read(page))):
        if '://' in link:
            assert re.fullmatch(r'https://[\w.-]+\.\w+(/[\w./~%+-]*)?(#[\w.-]+)?', link), f'{page}: {link}'
            continue
        path, _, anchor = link.partition('#')
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f'{page}: {link}: no such file'
        if anchor:
            assert anchor in anchors(target.read_text()), f'{page}: {link}: no such heading'


def test_all_pages_are_linked_from_the_readme():
    assert {f'docs/{name}' for name in re.findall(r'\(docs/([\w-]+\.md)', read('README.md'))} == set(PAGES[1:])


def test_anchors_are_made_as_on_github():
    text = (
        '# What is `new`?\n\n## 9. What was tried, with figures\n\n```\n# no heading\n```\n\n## [A link](x.md) – here\n'
    )
    assert anchors(text) == {'what-is-new', '9-what-was-tried-with-figures', 'a-link--here'}


# ----------------------------------------------------------------------------
# Numbers, options and messages.

TABLE = re.compile(r'(?:^\|.*\n)+', re.MULTILINE)
MEASURED = re.compile(r'\|[^|\n]*\d\.\d[^|\n]*\|')


@pytest.mark.parametrize('page', PAGES)
def test_tables_of_numbers_have_a_command_beside_them(page):
    """In the section, or that around it: a table with decimal fractions was measured."""
    sections = re.split(
        r'^(?=##? )', FENCE.sub(lambda block: block[0].replace('\n#', '\n '), read(page)), flags=re.MULTILINE
    )
    for section in sections:
        if any(MEASURED.search(table) for table in TABLE.findall(section)):
            assert re.search(r'python \S+\.py|\(docs/\w+\.md|\(\w+\.md', section), f'{page}: {section[:60]!r}'


def table_of_benchmarks(title: str) -> dict[str, list[str]]:
    """{sampler: its cells} of the table in docs/benchmarks.md with this head."""
    [rows] = [table for table in TABLE.findall(read('docs/benchmarks.md')) if table.startswith(f'| {title} |')]
    cells = [[cell.strip() for cell in row.strip('|').split('|')] for row in rows.splitlines()]
    return {name: values for name, *values in cells}


@pytest.mark.parametrize(
    ('spectrum', 'rho', 'title', 'etas'),
    [('power', 7, 'power, rho = 7', [1]), ('digits', 3, 'digits, rho = 3, any eta', [0, 0.5, 1.2])],
)
def test_rows_of_the_benchmarks_are_what_the_command_prints(spectrum, rho, title, etas):
    samplers = {'heun': solvers.HEUN['heun'], **solvers.ours_with(etas)}
    results = gaussian_fd.table(spectrum, rho, samplers, gaussian_fd.EVALUATIONS)
    page = table_of_benchmarks(title)
    assert {name: page[name] for name in samplers} == {
        name: [f'{1e3 * value:.3g}' for value in values] for name, values in results.items()
    }


def test_the_readme_quotes_the_best_of_each_at_32_evaluations():
    page = table_of_benchmarks('digits, rho = 7')
    column = page['digits, rho = 7'].index('32')
    owners = {'ddb': 'this project', 'EDM': 'EDM'}
    best: dict[str, float] = {}
    for name, values in page.items():
        if values[column][0].isdigit() and name != 'digits, rho = 7':
            owner = owners.get(name.split()[0], name.split()[0])
            best[owner] = min(best.get(owner, 1e9), float(values[column]))
    head = next(line for line in read('README.md').splitlines() if line.startswith('| | this project'))
    row = next(line for line in read('README.md').splitlines() if line.startswith('| exact Fréchet distance'))
    names, numbers = ([cell.strip() for cell in line.strip('|').split('|')][1:] for line in (head, row))
    assert {name: float(number) for name, number in zip(names, numbers, strict=True)} == pytest.approx(best, rel=0.01)


def options_of_programs() -> set[str]:
    texts = [(ROOT / 'docs' / f'{name}-help.txt').read_text() for name in COMMANDS]
    texts += [path.read_text() for path in (ROOT / 'benchmarks').glob('*.py')]
    return set(re.findall(r'(?<![\w-])--[A-Za-z][\w-]*', '\n'.join(texts)))


@pytest.mark.parametrize('page', PAGES)
def test_options_exist(page):
    """Each option that a page names is one of our programs, or of the tools named here."""
    of_others = {'--standalone', '--nproc_per_node', '--nnodes', '--rdzv_backend', '--rdzv_endpoint', '--rdzv_id'}
    of_others |= {'--no-deps', '--help'}
    code = '\n'.join(
        [body for _, body in FENCE.findall(read(page))] + INDENTED.findall(read(page)) + INLINE.findall(read(page))
    )
    named = set(re.findall(r'(?<![\w-])--[A-Za-z][\w-]*', code))
    assert named <= options_of_programs() | of_others


def test_error_messages_are_those_of_the_programs():
    """Of docs/troubleshooting.md: the messages before a colon, in pieces between `…`."""
    source = '\n'.join(path.read_text() for folder in PACKAGES for path in sorted((ROOT / folder).glob('*.py')))
    source = re.sub(r"""'\n\s*f?'|"\n\s*f?"|'\n\s*f?"|"\n\s*f?'""", '', source)
    source = re.sub(r'\{[^{}\n]*\}', '…', source.replace("\\'", "'")) + read('Makefile')
    of_others = ('torchrun: ', 'Address already', "No module named '")
    paragraphs = [
        text for text in read('docs/troubleshooting.md').split('\n\n') if re.match(r'`[^`]*`( and\s`[^`]*`)?: ', text)
    ]
    heads = [re.split(r'`: ', text.replace('\n', ' '))[0] + '`' for text in paragraphs]
    messages = [message for head in heads for message in INLINE.findall(head)]
    messages = [message for message in messages if not message.startswith(of_others)]
    assert len(messages) > 25
    for message in messages:
        for piece in message.split('…'):
            assert piece.strip() in source, f'no program says {piece!r}'


def test_python_in_the_readme_runs():
    [code] = re.findall(r'```python\n(.*?)```', read('README.md'), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    run = subprocess.run(
        [sys.executable, '-c', f'import torch\ntorch.manual_seed(0)\n{code}'], cwd=ROOT, text=True, capture_output=True
    )
    assert run.returncode == 0, run.stderr
    std, calls, jvp_calls = re.fullmatch(r'tensor\(([\d.]+), dtype=torch.float64\) (\d+) (\d+)\n', run.stdout).groups()
    assert float(std) == pytest.approx(1, abs=0.05)
    assert (calls, jvp_calls) == ('40', '39')


def test_the_printed_inspection_is_that_of_the_program(monkeypatch):
    monkeypatch.chdir(ROOT)
    [block] = [
        text for text in INDENTED.findall(read('docs/safety.md')) if '$ python -m torch_utils.network_io' in text
    ]
    command, _, printed = block.partition('\n')
    run = CliRunner().invoke(network_io.main.commands['inspect'], command.split()[-1:])
    assert run.output.split() == printed.split()  # the terminal decides where lines break


if __name__ == '__main__':
    for name in COMMANDS:
        (ROOT / 'docs' / f'{name}-help.txt').write_text(help_text(name))
