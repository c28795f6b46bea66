"""images/progress.py: what a terminal shows, and what a file holds."""

import io
import sys

import pytest

from sampling.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(stream):
    return [line.rstrip() for line in stream.getvalue().split('\r')]


def test_a_terminal_shows_the_bar_before_the_first_step(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    with progress_bar(total=8, todo=6, steps=3) as step_done:
        assert lines(sys.stderr)[-1].startswith('Sampling 8 images:  25%')
        for _ in range(3):
            step_done()
    assert lines(sys.stderr)[-1].startswith('Sampling 8 images: 100%')


def fail(steps_done):
    with progress_bar(total=8, todo=8, steps=4) as step_done:
        for _ in range(steps_done):
            step_done()
        raise ValueError('sigma_min')


@pytest.mark.parametrize(('steps_done', 'last'), [(0, ''), (1, 'Sampling 8 images:  25%')])
def test_only_an_error_before_the_first_step_takes_the_bar_away(monkeypatch, steps_done, last):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    with pytest.raises(ValueError, match='sigma_min'):
        fail(steps_done)
    assert lines(sys.stderr)[-1].split('|')[0] == last


def test_a_file_holds_no_bar_of_a_run_that_could_not_begin(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    with pytest.raises(ValueError, match='sigma_min'):
        fail(steps_done=0)
    assert sys.stderr.getvalue() == ''
