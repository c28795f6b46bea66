"""torch_utils/doctor.py: it says what is there, and finds forward mode that gives wrong numbers."""

import platform

import torch
from click.testing import CliRunner

from torch_utils import doctor


def test_it_says_what_is_there():
    outcome = CliRunner().invoke(doctor.main)
    assert outcome.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in outcome.output.replace('forward mode', 'forward_mode').splitlines())
    assert lines['python'].startswith(platform.python_version())
    assert lines['torch'] == torch.__version__
    assert (lines['forward_mode'], lines['float64']) == ('works', 'works')


def test_a_derivative_that_is_zero_is_found(monkeypatch):
    monkeypatch.setattr(torch.func, 'jvp', lambda f, primals, tangents: (f(*primals), torch.zeros_like(f(*primals))))
    assert doctor.features()['forward mode'].startswith('fails: ')
