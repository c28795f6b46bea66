"""A second reader and writer of pickles that carry source code, format version 6, made from the format's description.

It shares no code with the project's own `torch_utils.persistence` and is as strict as the description allows: what
another implementation may assert is asserted here.
"""

import copy
import inspect
import pickle
import sys
import types
import uuid

from dnnlib import EasyDict

META_KEYS = ['type', 'version', 'module_src', 'class_name', 'state']

module_names = {}  # source text → name of the module that holds what it defines
hooks = []


def import_hook(hook):
    hooks.append(hook)


def is_persistent(obj):
    return '_orig_class_name' in vars(obj if isinstance(obj, type) else type(obj))


def persistent_class(cls):
    return cls if is_persistent(cls) else type(cls.__name__, (cls,), members(cls, text_of(cls.__module__)))


def text_of(module_name):
    for text, name in module_names.items():
        if name == module_name:
            return text
    text = inspect.getsource(sys.modules[module_name])
    module_names[text] = module_name
    return text


def members(cls, text):
    """The class body of the persistent version of `cls`."""

    def construct(self, *args, **kwargs):
        cls.__init__(self, *args, **kwargs)
        recorded = (args, kwargs) if getattr(self, '_record_init_args', True) else (None, None)
        self._init_args, self._init_kwargs = copy.deepcopy(recorded)
        assert hasattr(sys.modules[cls.__module__], cls.__name__)
        assert len(pickle.dumps(self)) > len(text)

    def reduce(self):
        state = self.__getstate__() if hasattr(self, '__getstate__') else vars(self)
        values = ['class', 6, text, cls.__name__, state]
        return _reconstruct_persistent_obj, (dict(zip(META_KEYS, values, strict=True)),), None

    return {
        '__doc__': cls.__doc__,
        '__module__': cls.__module__,
        '__init__': construct,
        '__reduce__': reduce,
        '_orig_module_src': text,
        '_orig_class_name': cls.__name__,
        'init_args': property(lambda self: copy.deepcopy(self._init_args)),
        'init_kwargs': property(lambda self: EasyDict(copy.deepcopy(self._init_kwargs))),
    }


def _reconstruct_persistent_obj(meta):
    assert type(meta) is dict
    assert list(meta) == META_KEYS
    assert type(meta['state']) is dict
    assert type(meta['version']) is int
    assert {type(meta[key]) for key in ('type', 'module_src', 'class_name')} == {str}
    meta = EasyDict(meta, state=EasyDict(meta['state']))
    for hook in hooks:
        meta = hook(meta)
        assert meta is not None
    assert meta.version == 6
    assert meta.type == 'class'
    assert {'_init_args', '_init_kwargs'} <= set(meta.state)
    cls = persistent_class(getattr(module_holding(meta.module_src), meta.class_name))
    obj = object.__new__(cls)
    if hasattr(cls, '__setstate__'):
        obj.__setstate__(meta.state)
    else:
        vars(obj).update(meta.state)
    return obj


def module_holding(text):
    if text not in module_names:
        module = types.ModuleType('_imported_module_' + uuid.uuid4().hex)
        module_names[text] = module.__name__
        sys.modules[module.__name__] = module
        exec(text, vars(module))
    return sys.modules[module_names[text]]
