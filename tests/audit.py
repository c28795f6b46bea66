"""An audit hook for tests of readers: while `watched()`, anything that smells of running code raises `CodeRan`."""

import contextlib
import gc
import sys

FORBIDDEN = (
    'import',
    'exec',
    'compile',
    'open',
    'os.',
    'shutil.',
    'subprocess.',
    'socket.',
    'ctypes.',
    'pickle.find_class',
    'marshal.',
    'code.__new__',
    'function.__new__',
    'object.__setattr__',
    'sys.',
)


class CodeRan(BaseException):
    """No Exception, so that nothing in a reader catches it."""


_hooked = False
_watching = False


def _hook(event, args):
    if _watching and event.startswith(FORBIDDEN):
        raise CodeRan(f'{event} {args!r:.200}')


@contextlib.contextmanager
def watched():
    """Hooks cannot be removed, so the one hook is switched on and off.

    Nothing is collected meanwhile: what other tests have left behind may open or remove files as it goes.
    """
    global _hooked, _watching
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    gc.disable()
    _watching = True
    try:
        yield
    finally:
        _watching = False
        gc.enable()
