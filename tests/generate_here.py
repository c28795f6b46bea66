"""generate.py in the process of a test."""

import contextlib
import io
from typing import NamedTuple

import pytest

import generate


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def run(*args):
    """generate.py in this process; anything but a clean exit passes through as an exception."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_info:
        generate.main([str(arg) for arg in args], prog_name='generate.py')
    return Outcome(exit_info.value.code, out.getvalue(), err.getvalue())
