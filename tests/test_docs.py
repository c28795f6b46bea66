"""What README and docs/ show is what the code does. Their commands are run by test_docs_commands.py."""

import math
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for `python tests/test_docs.py`

import pytest
import yaml
from click.testing import CliRunner
from docs_commands import FENCE, INDENTED, INLINE, PAGES, ROOT

import compare
import dataset_tool
import example
import fid
import generate
import train
import tune
from benchmarks import gaussian_fd, solvers
from torch_utils import network_io

COMMANDS = {
    'generate': generate,
    'example': example,
    'fid': fid,
    'dataset_tool': dataset_tool,
    'train': train,
    'compare': compare,
    'tune': tune,
}
PACKAGES = ('.', 'dnnlib', 'images', 'metrics', 'sampling', 'torch_utils', 'training', 'comparison', 'benchmarks')
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
# Lengths and order.


@pytest.mark.parametrize(
    ('page', 'lines'),
    [('README.md', 110), ('docs/choosing.md', 80), ('docs/method.md', 300), ('docs/benchmarks.md', 250)],
)
def test_pages_that_have_to_be_short_are(page, lines):
    assert len(read(page).splitlines()) <= lines


def test_a_stranger_finishes_the_readme():
    before, _, _ = read('README.md').partition('## Pages')
    assert len(before.split()) <= 700


def linked(text: str) -> list[str]:
    """The files that a text links to, each once, without folder and anchor."""
    return list(dict.fromkeys(link.partition('#')[0].removeprefix('docs/') for link in LINK.findall(text)))


def test_readme_and_index_list_the_same_pages_in_the_same_groups():
    _, _, pages = read('README.md').partition('## Pages')
    bullets = re.findall(r'^\* \*\*(.*?)\*\*: (.*?)(?=^\*|^## )', pages, re.MULTILINE | re.DOTALL)
    sections = re.findall(r'^## (.*?)\n(.*?)(?=^## |\Z)', read('docs/index.md'), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in bullets] == ['Use', 'Understand', 'Evidence', 'Reference']
    assert [(name, linked(text)) for name, text in bullets] == [(name, linked(text)) for name, text in sections]


# ----------------------------------------------------------------------------
# Links.


def anchors(text: str) -> set[str]:
    """Those of the headings: lower case, punctuation dropped, hyphens for spaces, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', FENCE.sub('', text), re.MULTILINE)
    plain = [re.sub(r'\[(.*?)\]\(.*?\)', r'\1', heading).strip().lower() for heading in headings]
    return {re.sub(r'[^\w\- ]', '', heading).replace(' ', '-') for heading in plain}


@pytest.mark.parametrize('page', [*PAGES, 'CHANGELOG.md', 'SECURITY.md'])
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


def tables(page: str) -> dict[str, dict[str, list[str]]]:
    """{head of the first column: {sampler: its cells}} of the tables of a page, the row of the heads included."""
    found = {}
    for table in TABLE.findall(read(page)):
        cells = [[cell.strip() for cell in row.strip('|').split('|')] for row in table.splitlines()]
        found[cells[0][0]] = {name: values for name, *values in cells}
    return found


@pytest.mark.parametrize(
    ('spectrum', 'rho', 'title', 'etas'),
    [('power', 7, 'power, rho = 7', [1]), ('digits', 3, 'digits, rho = 3, any eta', [0, 0.5, 1.2])],
)
def test_rows_of_the_notebook_are_what_the_command_prints(spectrum, rho, title, etas):
    samplers = {'heun': solvers.HEUN['heun'], **solvers.ours_with(etas, scheme_of=solvers.linear)}
    results = gaussian_fd.table(spectrum, rho, samplers, gaussian_fd.EVALUATIONS)
    page = tables('docs/notebook.md')[title]
    assert {name: page[name] for name in samplers} == {
        name: [f'{1e3 * value:.3g}' for value in values] for name, values in results.items()
    }


@pytest.mark.parametrize(
    ('title', 'full_title', 'measure'),
    [
        ('digits, rho = 7', 'digits, rho = 7', None),
        ('digits, rho = 7, any eta', 'digits, rho = 7, any eta', None),
        ('bandwidth 0.2, rho = 7', 'bandwidth 0.2, rho = 7', None),
        ('real digits, Fréchet distance', 'sampler', 0),
    ],
)
def test_tables_of_the_benchmarks_are_parts_of_those_of_the_notebook(title, full_title, measure):
    """`measure` numbers those of a cell such as '0.88 ± 0.06 / 0.0188 ± 0.0005 / 99.2% ± 0.2%'."""
    short, full = tables('docs/benchmarks.md')[title], tables('docs/notebook.md')[full_title]
    columns = [full[full_title].index(head) for head in short[title]]
    assert len(short) > 6
    for name in set(short) - {title, '---'}:
        cells = [full[name][column] for column in columns]
        assert short[name] == (cells if measure is None else [cell.split(' / ')[measure] for cell in cells])


def readme_row(start: str) -> dict[str, str]:
    """{tool: cell} of the row of the README's table that begins so."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in read('README.md').splitlines()]
    [tools] = [row[1:] for row in rows if row[1:2] == ['this project']]
    [cells] = [row[1:] for row in rows if row[0].startswith(start)]
    return dict(zip(tools, cells, strict=True))


def owner(sampler: str) -> str:
    """Of a sampler in the tables, as the README's table calls it."""
    word = re.split('[ ,-]', sampler)[0]
    owners = {'rk': 'this project', 'taylor': 'this project', 'heun': 'EDM', 'k': 'k-diffusion'}
    return {'deis-3': 'diffusers'}.get(sampler, owners.get(word, word))  # diffusers has DEIS; a test says so


@pytest.mark.parametrize(('start', 'stochastic'), [('exact distance', True), ('the same, without noise', False)])
def test_the_readme_quotes_the_best_exact_distance_of_each_at_16_evaluations(start, stochastic):
    page = tables('docs/benchmarks.md')['digits, rho = 7'] | tables('docs/benchmarks.md')['digits, rho = 7, any eta']
    heads = tables('docs/benchmarks.md')['digits, rho = 7']['digits, rho = 7']
    samplers = solvers.RIVALS | solvers.ours_with(etas=(0.0, 1.0))
    quoted = {tool: float(cell.replace(',', '')) for tool, cell in readme_row(start).items() if cell != '–'}
    best: dict[str, float] = {}
    for name in page.keys() & samplers.keys():
        if samplers[name].stochastic == stochastic and owner(name) in quoted:
            best[owner(name)] = min(best.get(owner(name), math.inf), float(page[name][heads.index('16')]))
    assert quoted == pytest.approx(best, rel=1e-9)


def test_the_readme_quotes_the_best_kid_of_each_at_16_evaluations():
    page = read('docs/compare.md')
    best: dict[str, float] = {}
    for line in re.findall(r'^\| [\w-]+ \| \d+ \| \d+ \| \d+ \|.*$', page, re.MULTILINE):
        name, _, evaluations, jvps, kid, *_ = (cell.strip(' *') for cell in line.strip('|').split('|'))
        if 14 < int(evaluations) + int(jvps) <= 16:
            best[owner(name)] = min(best.get(owner(name), math.inf), float(kid.split()[0]))
    quoted = {tool: float(cell) for tool, cell in readme_row('KID').items() if cell != '–'}
    assert quoted == pytest.approx({tool: float(f'{1e3 * kid:.2g}') for tool, kid in best.items()})


def options_of_programs() -> set[str]:
    texts = [(ROOT / 'docs' / f'{name}-help.txt').read_text() for name in COMMANDS]
    texts += [path.read_text() for path in (ROOT / 'benchmarks').glob('*.py')]
    return set(re.findall(r'(?<![\w-])--[A-Za-z][\w-]*', '\n'.join(texts)))


@pytest.mark.parametrize('page', PAGES)
def test_options_exist(page):
    """Each option that a page names is one of our programs, or of the tools named here."""
    of_others = {'--standalone', '--nproc_per_node', '--nnodes', '--rdzv_backend', '--rdzv_endpoint', '--rdzv_id'}
    of_others |= {'--no-deps', '--help', '--prefix'}
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
    assert len(code.splitlines()) <= 12
    run = subprocess.run(
        [sys.executable, '-c', f'import torch\ntorch.manual_seed(0)\n{code}'], cwd=ROOT, text=True, capture_output=True
    )
    assert run.returncode == 0, run.stderr
    [std] = re.fullmatch(r'tensor\(([\d.]+), dtype=torch.float64\)\n', run.stdout).groups()
    assert float(std) == pytest.approx(1, abs=0.05)


def test_the_readme_recommends_one_command_and_the_same_in_python():
    readme = read('README.md')
    commands = re.findall(r'python generate\.py .*', readme)
    dials = {tuple(re.findall(r'--(sampler|steps|S_max)=(\w+)', command)) for command in commands}
    [recommended] = dials
    names = {'sampler': 'scheme', 'steps': 'num_steps'}
    for name, value in recommended:
        assert re.search(rf"\b{names.get(name, name)}='?{value}\b", readme)
    assert f'python generate.py --outdir=out {" ".join(f"--{name}={value}" for name, value in recommended)}\n' in (
        read('docs/choosing.md')
    )


def test_the_printed_inspection_is_that_of_the_program(monkeypatch):
    monkeypatch.chdir(ROOT)
    [block] = [
        text for text in INDENTED.findall(read('docs/safety.md')) if '$ python -m torch_utils.network_io' in text
    ]
    command, _, printed = block.partition('\n')
    run = CliRunner().invoke(network_io.main.commands['inspect'], command.split()[-1:])
    assert run.output.split() == printed.split()  # the terminal decides where lines break


# ----------------------------------------------------------------------------
# Habits.


def test_github_runs_what_a_change_has_to_pass_on_the_oldest_and_the_newest_python():
    [job] = yaml.safe_load(read('.github/workflows/ci.yml'))['jobs'].values()
    named = re.findall(r'Python :: (3\.\d+)', read('pyproject.toml'))
    assert job['strategy']['matrix']['python'] == [named[0], named[-1]]
    [step] = [step for step in job['steps'] if 'run' in step]
    assert step['run'] == '.ci/run'
    assert step['env'] == {'PYTHON': 'python'}
    assert re.search(r'^PYTHON \?=', read('Makefile'), re.MULTILINE)


def test_before_a_commit_runs_the_lint_of_the_makefile():
    [hook] = yaml.safe_load(read('.pre-commit-config.yaml'))['repos'][0]['hooks']
    assert hook['entry'] == 'make lint'
    assert re.search(r'^lint:', read('Makefile'), re.MULTILINE)


def test_a_bug_report_asks_what_the_doctor_says():
    for form in (ROOT / '.github' / 'ISSUE_TEMPLATE').glob('[!c]*.yml'):
        fields = {field['id']: field for field in yaml.safe_load(form.read_text())['body']}
        assert '`python -m torch_utils.doctor`' in fields['doctor']['attributes']['label']


def test_citation_and_changelog_know_this_version():
    version = re.search(r'^version = "(.*)"', read('pyproject.toml'), re.MULTILINE)[1]
    assert yaml.safe_load(read('CITATION.cff'))['version'] == version
    assert re.findall(r'^## \[(.*?)\]', read('CHANGELOG.md'), re.MULTILINE)[:2] == ['Unreleased', version]


if __name__ == '__main__':
    for name in COMMANDS:
        (ROOT / 'docs' / f'{name}-help.txt').write_text(help_text(name))
