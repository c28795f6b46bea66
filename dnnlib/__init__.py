"""Helpers that need nothing of PyTorch: attribute dictionaries, objects by name, downloads with a cache, log files."""

from . import util
from .util import EasyDict, make_cache_dir_path

__all__ = ['EasyDict', 'make_cache_dir_path', 'util']
