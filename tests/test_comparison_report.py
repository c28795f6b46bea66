"""comparison/report.py: what counts as the best, how numbers are written, and the page."""

import math
import sys

import click
import pytest
from report_page import Page, check_self_contained

from comparison import report

# ----------------------------------------------------------------------------
# Statistics.


def row(label='rk', calls=8, jvp_calls=0, **numbers):
    sets = len(next(iter(numbers.values()), []))
    return report.Row(label, 8, calls, calls, jvp_calls, numbers, [0.5] * sets, b'')


def make_report(rows, **fields):
    plain = {'title': 't', 'group_name': 'evaluations', 'budgets': [8], 'num': 4, 'sets': 2, 'shown': 1}
    plain |= {'command': 'python compare.py', 'facts': {}, 'seconds_title': 'seconds'}
    return report.Report(**(plain | {'rows': rows} | fields))


def test_spread_by_hand():
    assert report.spread([1, 2, 6]) == (3, pytest.approx(math.sqrt(7)))  # ((−2)² + (−1)² + 3²)/2
    assert report.spread([2.5])[0] == 2.5
    assert math.isnan(report.spread([2.5])[1])


@pytest.mark.parametrize(
    ('mean', 'sd', 'text'),
    [
        (12.3456, 0.0567, '12.346 ± 0.057'),
        (206.4, 10.3, '206 ± 10'),
        (0.00215, 0.00004, '0.002150 ± 0.000040'),
        (3.14159, math.nan, '3.142'),
        (3.14159, 0, '3.142 ± 0'),
        (1234.5, 250.0, '1234 ± 250'),
    ],
)
def test_a_spread_is_shown_to_two_digits_of_its_sd(mean, sd, text):
    assert str(report.Spread(mean, sd)) == text


def test_overlapping_error_bars_are_not_told_apart():
    a, b, c = row(fid=[1, 2, 3]), row(fid=[3.4, 4.4, 5.4]), row(fid=[3, 4, 5])  # 2 ± 1, 4.4 ± 1, 4 ± 1
    assert report.best([b, a], 'fid') == [a]  # 4.4 − 2 > 1 + 1
    assert report.best([c, b, a], 'fid') == [a, c]  # 4 − 2 = 1 + 1: they touch
    assert report.best([row(fid=[9.0]), row(fid=[1.0])], 'fid') == [row(fid=[1.0]), row(fid=[9.0])]


def test_of_precision_and_the_like_the_larger_is_better():
    low, high = row(recall=[0.1, 0.2]), row(recall=[0.8, 0.9])
    assert report.best([low, high], 'recall') == [high]
    assert report.best([low, row()], 'recall') == [low]


def test_a_budget_pays_for_all_that_costs_no_more():
    cheap, jvp, dear = row('rk', 8, fid=[5, 5.1]), row('taylor', 8, 7, fid=[3, 3.1]), row('heun', 31, fid=[4, 4.1])
    page = make_report([cheap, jvp, dear], budgets=[8, 16, 32])
    assert [report.best(page.affordable(budget), 'fid') for budget in page.budgets] == [[cheap], [jvp], [jvp]]
    assert [page.is_best(each, 'fid') for each in page.rows] == [True, True, False]


def test_budgets_with_the_same_answer_are_one_line_and_equals_are_cut():
    pytest.importorskip('matplotlib')
    pytest.importorskip('jinja2')
    rows = [row(f's{i}', 8, fid=[1 + i / 100, 1.5 + i / 100]) for i in range(7)] + [row('late', 30, fid=[0.1, 0.2])]
    page = Page(report.page(make_report(rows, budgets=[8, 16, 32])))
    first = page.text.index('8 to 16')
    told = [text for text in page.text[first : page.text.index('32', first)] if text.strip()]
    assert told[1::2] == ['s0, 8 steps', 's1, 8 steps', 's2, 8 steps', 's3, 8 steps', 'and 3 more']
    assert page.text[page.text.index('32', first) + 1] == 'late, 30 steps'


# ----------------------------------------------------------------------------
# The page.


def test_a_mark_is_one_box():
    assert 'display: inline-block' in report.TEMPLATE.read_text().split('mark {')[1].split('}')[0]


HOSTILE = '<script>alert("1 & 2")</script>\'--><b>'


def test_what_users_write_is_text_on_the_page():
    pytest.importorskip('matplotlib')
    pytest.importorskip('jinja2')
    everywhere = {'title': HOSTILE, 'group_name': 'steps', 'fd_title': HOSTILE, 'command': HOSTILE}
    everywhere |= {'seconds_title': HOSTILE, 'warnings': [HOSTILE], 'facts': {HOSTILE: HOSTILE + 'x'}}
    rows = [row(HOSTILE, fid=[1.0, 2.0]), row(HOSTILE + '2', 4, fid=[1.0, 2.0])]
    page = check_self_contained(report.page(make_report(rows, **everywhere)))
    assert not page.named('script')
    assert not page.named('b')
    assert page.text.count(HOSTILE) >= 12
    assert {HOSTILE + 'x', f'{HOSTILE}2, 4 steps'} <= set(page.text)


def test_a_page_without_numbers_yet_says_so():
    pytest.importorskip('jinja2')
    page = check_self_contained(report.page(make_report([row()], sets=3)))
    assert any('In progress: 0 of 3' in text for text in page.text)


def test_a_missing_package_is_one_line_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    with pytest.raises(click.ClickException, match=r'the report needs jinja2: pip install -e "\.\[compare\]"'):
        report.need_packages('the report', 'compare', 'jinja2')
