"""The least that a module stored in a pickle may expect of `dnnlib`."""

from . import util
from .util import EasyDict

__all__ = ['EasyDict', 'util']
