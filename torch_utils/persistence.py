"""Objects whose pickles carry their own source code: format version 6, as in StyleGAN3, EDM and EDM2.

`@persistent_class` is the way in: it remembers the source text of the module that defines the class. Pickling an
instance stores that text, the class name and the instance's state; reading it back (`_reconstruct_persistent_obj`,
the name that such pickles look for) executes the text and fills a new instance. Objects stored with the same text
share one module, and a text equal to that of a module already imported is not executed again.

Reading a pickle this way runs whatever code is in it. `torch_utils.network_io` reads network files without doing so.
"""

import copy
import inspect
import pickle
import sys
import types
import uuid
from collections.abc import Callable
from typing import Any

import dnnlib

FORMAT_VERSION = 6

_persistent_classes: set[type] = set()
_source_of_module: dict[types.ModuleType, str] = {}
_module_of_source: dict[str, types.ModuleType] = {}
_import_hooks: list[Callable[[dnnlib.EasyDict], dnnlib.EasyDict]] = []


def persistent_class(orig_class: type) -> type:
    """Class decorator: instances pickle together with the source of the module that defines `orig_class`.

    The module has to come from a file. Each instance records its constructor's arguments, available as copies in
    `init_args` (tuple) and `init_kwargs` (EasyDict); both are None where the class sets `_record_init_args = False`.
    A class that is persistent already is returned as it is.
    """
    if is_persistent(orig_class):
        return orig_class
    module = sys.modules[orig_class.__module__]
    source = _source_text(module)

    class Persistent(orig_class):
        _orig_module_src = source
        _orig_class_name = orig_class.__name__

        def __init__(self, *args, **kwargs):
            if not hasattr(module, orig_class.__name__):  # fail here, not when someone reads the pickle
                raise TypeError(f'{orig_class.__qualname__} must be defined at the top level of {module.__name__}')
            super().__init__(*args, **kwargs)
            record = getattr(self, '_record_init_args', True)
            self._init_args = copy.deepcopy(args) if record else None
            self._init_kwargs = copy.deepcopy(kwargs) if record else None
            pickle.dumps((self._init_args, self._init_kwargs))  # fail here, not hours later when a snapshot is due

        @property
        def init_args(self):
            return copy.deepcopy(self._init_args)

        @property
        def init_kwargs(self):
            return None if self._init_kwargs is None else dnnlib.EasyDict(copy.deepcopy(self._init_kwargs))

        def __reduce__(self):
            if type(self) not in _persistent_classes:
                raise TypeError(f'{type(self).__name__} derives from a persistent class; decorate it as well')
            meta = {
                'type': 'class',
                'version': FORMAT_VERSION,
                'module_src': self._orig_module_src,
                'class_name': self._orig_class_name,
                'state': _pickle_state(self),
            }
            return _reconstruct_persistent_obj, (meta,), None

    for name in ('__name__', '__qualname__', '__module__', '__doc__'):
        setattr(Persistent, name, getattr(orig_class, name))
    _persistent_classes.add(Persistent)
    return Persistent


def stored_as_its_base(derived: type) -> type:
    """Class decorator: instances of `derived` pickle as those of the persistent class that it derives from.

    For a class that computes the same in another way, and has no state of its own.
    """
    if derived.__base__ not in _persistent_classes:
        raise TypeError(f'{derived.__name__} does not derive from a persistent class')
    _persistent_classes.add(derived)
    return derived


def is_persistent(obj: Any) -> bool:
    """True if `obj` is a persistent class or an instance of one."""
    return (obj if isinstance(obj, type) else type(obj)) in _persistent_classes


def import_hook(hook: Callable[[dnnlib.EasyDict], dnnlib.EasyDict]) -> Callable[[dnnlib.EasyDict], dnnlib.EasyDict]:
    """Register `hook(meta) -> meta`, run on each object's meta dict before it is rebuilt, in order of registration.

    `meta` has the keys type, version, module_src, class_name and state. A hook that edits `module_src` has to edit it
    for all objects of that module, or else their isinstance tests against one another fail.
    """
    _import_hooks.append(hook)
    return hook


def module_from_source(source: str) -> types.ModuleType:
    """The module with exactly this source text: one that is imported already, or a new one that runs the text."""
    module = _module_of_source.get(source)
    if module is None:
        module = types.ModuleType(f'_imported_module_{uuid.uuid4().hex}')
        sys.modules[module.__name__] = module
        _register(module, source)
        try:
            exec(source, module.__dict__)
        except BaseException:  # forget the half-made module, so that the next attempt starts afresh
            del sys.modules[module.__name__], _module_of_source[source], _source_of_module[module]
            raise
    return module


def _reconstruct_persistent_obj(meta: dict) -> Any:
    meta = dnnlib.EasyDict(meta)
    meta.state = dnnlib.EasyDict(meta.state)
    for hook in _import_hooks:
        meta = hook(meta)
        if meta is None:
            raise pickle.UnpicklingError('an import hook returned None instead of the meta dict')
    if meta.version != FORMAT_VERSION or meta.type != 'class':
        raise pickle.UnpicklingError(
            f'persistent object of type {meta.type!r}, version {meta.version!r}; '
            f"this code reads type 'class', version {FORMAT_VERSION}"
        )
    cls = persistent_class(getattr(module_from_source(meta.module_src), meta.class_name))
    obj: Any = cls.__new__(cls)  # type: ignore[call-overload]
    if hasattr(obj, '__setstate__'):
        obj.__setstate__(meta.state)
    else:
        obj.__dict__.update(meta.state)
    return obj


def _pickle_state(obj: Any) -> dict:
    """What plain pickle would store. Python < 3.11 has no default `__getstate__`; the default returns None if empty."""
    get_state = getattr(obj, '__getstate__', None)
    state = get_state() if get_state is not None else obj.__dict__
    return {} if state is None else state


def _source_text(module: types.ModuleType) -> str:
    if module not in _source_of_module:
        _register(module, inspect.getsource(module))
    return _source_of_module[module]


def _register(module: types.ModuleType, source: str) -> None:
    _source_of_module[module] = source
    _module_of_source.setdefault(source, module)
