"""Pickles that carry source code: the decorator, the reader, and exchange with a checkout that is not this one."""

import ast
import collections
import copy
import io
import pathlib
import pickle
import pickletools
import sys
import types

import foreign_edm
import numpy as np
import pytest
import torch

import dnnlib
from torch_utils import persistence
from training import augment, loss, networks, networks_edm2

SONG = {
    'model_type': 'SongUNet',
    'img_resolution': 8,
    'img_channels': 3,
    'model_channels': 16,
    'channel_mult': [1, 2],
    'num_blocks': 1,
    'attn_resolutions': [4],
    'dropout': 0.1,
    'augment_dim': foreign_edm.AUGMENT_DIM,
}
NCSNPP = SONG | {
    'embedding_type': 'fourier',
    'encoder_type': 'residual',
    'channel_mult_noise': 2,
    'resample_filter': [1, 3, 3, 1],
}
ADM = SONG | {'model_type': 'DhariwalUNet', 'model_channels': 32}  # one attention head of 64 channels at 4×4
MORE = ('rotate_int', 'translate_int', 'brightness', 'contrast', 'lumaflip', 'hue', 'saturation')
AUGMENT_ALL = foreign_edm.AUGMENT | dict.fromkeys(MORE, 1)

CASES = {
    'vp-song': ('VPPrecond', SONG, 'VPLoss', foreign_edm.AUGMENT),
    'vp-adm': ('VPPrecond', ADM | {'label_dim': 4}, 'VPLoss', foreign_edm.AUGMENT),
    've-song': ('VEPrecond', NCSNPP | {'label_dim': 3}, 'VELoss', foreign_edm.AUGMENT),
    've-adm': ('VEPrecond', ADM, 'VELoss', foreign_edm.AUGMENT),
    'iddpm-song': ('iDDPMPrecond', SONG | {'label_dim': 3}, 'EDMLoss', foreign_edm.AUGMENT),
    'iddpm-adm': ('iDDPMPrecond', ADM, 'EDMLoss', foreign_edm.AUGMENT),
    'edm-song': ('EDMPrecond', SONG | {'label_dim': 3}, 'EDMLoss', foreign_edm.AUGMENT),
    'edm-song-skip': ('EDMPrecond', SONG | {'encoder_type': 'skip', 'decoder_type': 'skip'}, 'EDMLoss', None),
    'edm-song-all': ('EDMPrecond', NCSNPP | {'augment_dim': 19}, 'EDMLoss', AUGMENT_ALL),
    'edm-adm': ('EDMPrecond', ADM | {'label_dim': 3}, 'EDMLoss', foreign_edm.AUGMENT),
}

# All that a snapshot of ours may look up by name. No numpy: its scalars are stored under a name that changed with 2.0.
SNAPSHOT_GLOBALS = {
    'torch_utils.persistence._reconstruct_persistent_obj',
    'collections.OrderedDict',
    'torch._utils._rebuild_parameter',
    'torch._utils._rebuild_tensor_v2',
    'torch.storage._load_from_bytes',
    'torch.nn.modules.container.ModuleDict',
}

# What EDM's own `torch_utils` has, as far as a stored module may use it.
PERSISTENCE_NAMES = {'persistent_class', 'is_persistent', 'import_hook'}
MISC_NAMES = {
    'assert_shape',
    'check_ddp_consistency',
    'constant',
    'copy_params_and_buffers',
    'ddp_sync',
    'InfiniteSampler',
    'named_params_and_buffers',
    'nan_to_num',
    'params_and_buffers',
    'print_module_summary',
    'profiled_function',
    'suppress_tracer_warnings',
    'symbolic_assert',
}


def own_snapshot(class_name, kwargs, loss_name, augment_kwargs):
    net = foreign_edm.randomize(getattr(networks, class_name)(**kwargs), seed=3)
    return {
        'ema': net.eval().requires_grad_(False),
        'loss_fn': getattr(loss, loss_name)(),
        'augment_pipe': None if augment_kwargs is None else augment.AugmentPipe(**augment_kwargs),
        'dataset_kwargs': {'class_name': 'training.dataset.ImageFolderDataset', 'path': 'digits.zip', 'xflip': False},
    }


def assert_identical(results, expected):
    """Equal to the bit, and neither trivial nor broken."""
    assert results.keys() == expected.keys()
    for name, value in results.items():
        if not isinstance(value, torch.Tensor):
            assert value == expected[name], name
            continue
        assert value.dtype == expected[name].dtype == torch.float32, name
        assert value.isfinite().all(), name
        assert name == 'piped_labels' or value.std() > 0.1, name
        assert torch.equal(value, expected[name]), name


class MetaReader(pickle.Unpickler):
    """Collects the meta dicts of a pickle, innermost first, and rebuilds none of its persistent objects."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data))
        self.metas = []

    def find_class(self, module, name):
        if name == '_reconstruct_persistent_obj':
            return self.metas.append
        return torch.nn.Module if name == 'ModuleDict' else super().find_class(module, name)


def metas_in(data):
    reader = MetaReader(data)
    reader.load()
    return reader.metas


def globals_in(data):
    """The dotted names that a pickle of protocol 4 or 5 looks up, found without loading it."""
    strings, memo, last, found = [], [], None, set()
    for opcode, arg, _position in pickletools.genops(data):
        if opcode.name == 'MEMOIZE':
            memo.append(last)
            continue
        if opcode.name == 'STACK_GLOBAL':
            found.add('.'.join(strings[-2:]))
        last = None
        if opcode.name.endswith('UNICODE'):
            last = arg
        elif opcode.name.endswith('BINGET'):
            last = memo[arg]
        if last is not None:
            strings.append(last)
    return found


# ---- Written here, read there


@pytest.fixture(scope='module')
def read_elsewhere(tmp_path_factory):
    """{case: (results here, results in the other checkout)}, all from one process there."""
    folder = tmp_path_factory.mktemp('snapshots')
    paths, inputs, expected = [], [], []
    for name, case in CASES.items():
        snapshot = own_snapshot(*case)
        paths.append(folder / f'{name}.pkl')
        paths[-1].write_bytes(pickle.dumps(snapshot))
        inputs.append(foreign_edm.make_inputs(snapshot['ema']))
        expected.append(foreign_edm.evaluate(snapshot, inputs[-1]))
    results = foreign_edm.read_there(paths, inputs)
    return dict(zip(CASES, zip(expected, results, strict=True), strict=True))


@pytest.mark.parametrize('case', CASES)
def test_our_snapshot_computes_the_same_in_a_checkout_without_our_code(read_elsewhere, case):
    expected, results = read_elsewhere[case]
    assert results['classes'] == [CASES[case][0], CASES[case][1]['model_type'], *results['classes'][2:]]
    assert results['frozen']
    assert_identical(results, expected)


@pytest.mark.parametrize('case', CASES)
def test_our_snapshot_looks_up_these_names_only(case):
    data = pickle.dumps(own_snapshot(*CASES[case]))
    assert globals_in(data) == SNAPSHOT_GLOBALS


def test_globals_in_finds_what_the_unpickler_looks_up():
    class Spy(pickle.Unpickler):
        def find_class(self, module, name):
            found.add(f'{module}.{name}')
            return super().find_class(module, name)

    found = set()
    data = pickle.dumps([own_snapshot(*CASES['edm-song']), np.float64(1), collections.Counter('a'), pathlib.Path])
    Spy(io.BytesIO(data)).load()
    assert globals_in(data) == found > SNAPSHOT_GLOBALS


def test_our_snapshot_is_of_the_default_protocol_and_stays_readable_with_python_38():
    (proto, version, _position), *_rest = pickletools.genops(pickle.dumps(own_snapshot(*CASES['edm-song'])))
    assert proto.name == 'PROTO'
    assert version == pickle.DEFAULT_PROTOCOL
    assert version in (4, 5)


def test_meta_dict():
    metas = metas_in(pickle.dumps(own_snapshot(*CASES['edm-song'])))
    sources = {module: pathlib.Path(module.__file__).read_text() for module in (networks, loss, augment)}
    assert len(metas) > 50
    for meta in metas:
        assert type(meta) is dict
        assert list(meta) == ['type', 'version', 'module_src', 'class_name', 'state']
        assert (meta['type'], meta['version']) == ('class', 6)
        assert type(meta['version']) is int
        assert meta['module_src'] in sources.values()
        assert type(meta['state']) is dict
        assert type(meta['state']['_init_args']) is tuple
        assert type(meta['state']['_init_kwargs']) is dict
    *_parts, net, loss_fn, augment_pipe = metas
    assert (net['class_name'], net['module_src']) == ('EDMPrecond', sources[networks])
    assert (loss_fn['class_name'], loss_fn['module_src']) == ('EDMLoss', sources[loss])
    assert (augment_pipe['class_name'], augment_pipe['module_src']) == ('AugmentPipe', sources[augment])
    assert net['state']['_init_args'] == ()
    assert net['state']['_init_kwargs'] == CASES['edm-song'][1]
    assert {'_parameters', '_buffers', '_modules', 'training', 'sigma_data'} <= net['state'].keys()


def foreign_dependencies(source):
    """Modules that `source` imports, and names that it uses of `torch_utils`, as (modules, {module: names})."""
    modules, names = set(), collections.defaultdict(set)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'a stored module belongs to no package, it cannot import relative to one'
            parts = {f'{node.module}.{alias.name}' for alias in node.names}
            modules |= parts if node.module == 'torch_utils' else {node.module}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names[node.value.id].add(node.attr)
    return modules, names


@pytest.mark.parametrize('module', [networks, networks_edm2, loss, augment])
def test_stored_module_stands_alone(module):
    source = pathlib.Path(module.__file__).read_text()
    modules, names = foreign_dependencies(source)
    for name in modules:
        top = name.partition('.')[0]
        allowed = {'torch_utils.persistence', 'torch_utils.misc', 'dnnlib', 'numpy', 'torch'}
        assert name in allowed or top in {'numpy', 'torch'} | sys.stdlib_module_names, name
    assert names['persistence'] <= PERSISTENCE_NAMES
    assert names['misc'] <= MISC_NAMES
    ast.parse(source, feature_version=(3, 8))  # the oldest Python of EDM's environment.yml


# ---- Written there, read here


@pytest.fixture
def no_hooks_left(monkeypatch):
    monkeypatch.setattr(persistence, '_import_hooks', [])


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    """(bytes of a snapshot written in the other checkout, what it computes there)"""
    path = tmp_path_factory.mktemp('foreign') / 'network-snapshot-000123.pkl'
    attributes = {'note': 'of no use', 'history': [1, 2.5, None, True], 'table': {'a': [1, 'b']}}
    kwargs = SONG | {'label_dim': 3, 'sigma_data': 0.6}
    results = foreign_edm.write_foreign_snapshot(path, 'EDMPrecond', kwargs, attributes=attributes)
    return path.read_bytes(), results


def split(results):
    """(inputs, results) of a foreign snapshot."""
    names = ('x', 'sigma', 'class_labels', 'augment_labels', 'images')
    return {name: results[name] for name in names}, {key: val for key, val in results.items() if key not in names}


def test_foreign_snapshot_computes_the_same_here(foreign):
    data, results = foreign
    snapshot = pickle.loads(data)
    inputs, expected = split(results)
    assert_identical(foreign_edm.evaluate(snapshot, inputs), expected)

    net, blocks = snapshot['ema'], blocks_of(snapshot['ema'])
    assert persistence.is_persistent(net)
    assert net.init_kwargs == SONG | {'label_dim': 3, 'sigma_data': 0.6}
    assert snapshot['loss_fn'].init_kwargs == {'P_std': 1.1}
    for obj in (net, *blocks):
        assert (obj.note, obj.history, obj.table) == ('of no use', [1, 2.5, None, True], {'a': [1, 'b']})
    assert {type(block.skip_scale) for block in blocks} == {np.float64}


def blocks_of(net):
    return [module for module in net.modules() if type(module).__name__ == 'UNetBlock']


def test_foreign_snapshot_runs_its_own_code_in_one_module_for_each_source(foreign):
    data, _results = foreign
    snapshot = pickle.loads(data)
    net = snapshot['ema']
    persistent = [module for module in net.modules() if persistence.is_persistent(module)]
    (name,) = {type(module).__module__ for module in persistent}
    assert name.startswith('_imported_module_')
    assert not isinstance(net, networks.EDMPrecond)
    assert issubclass(sys.modules[name].AttentionOp, torch.autograd.Function)
    names = {name, type(snapshot['loss_fn']).__module__, type(snapshot['augment_pipe']).__module__}
    assert len(names) == 3
    assert type(pickle.loads(data)['ema']) is type(net)


def test_foreign_attention_has_no_forward_mode(foreign):
    """The reason for reading networks by class name; tests of that rely on this file being the hard case."""
    data, results = foreign
    net, x = pickle.loads(data)['ema'], results['x']
    with pytest.raises(RuntimeError, match='jvp'):
        torch.func.jvp(lambda x: net(x, results['sigma']), (x,), (x,))


def test_foreign_snapshot_keeps_its_source_when_written_again(foreign, tmp_path):
    data, results = foreign
    inputs, expected = split(results)
    again = pickle.dumps(pickle.loads(data))
    codes = [[(meta['class_name'], meta['module_src']) for meta in metas_in(pickled)] for pickled in (data, again)]
    assert codes[0] == codes[1]
    path = tmp_path / 'again.pkl'
    path.write_bytes(again)
    (results_there,) = foreign_edm.read_there([path], [inputs])
    assert_identical(results_there, expected)


def test_import_hook_can_replace_the_code_of_a_whole_network(foreign, no_hooks_left):
    data, results = foreign

    @persistence.import_hook
    def plain_attention(meta):
        if 'class EDMPrecond' in meta.module_src:
            meta.module_src += f'\n\n{attention_source()}'
        return meta

    net, (x, sigma) = pickle.loads(data)['ema'], (results['x'], results['sigma'])
    torch.testing.assert_close(net(x, sigma, results['class_labels']), results['denoised'])
    _value, tangent = torch.func.jvp(lambda x: net(x, sigma), (x,), (x,))
    assert tangent.isfinite().all()


def attention_source():
    source = pathlib.Path(networks.__file__).read_text()
    (node,) = [node for node in ast.parse(source).body if getattr(node, 'name', None) == 'AttentionOp']
    return ast.get_source_segment(source, node)


def test_variations_of_foreign_snapshots(tmp_path):
    path = tmp_path / 'snapshot.pkl'
    kwargs = {key: ADM[key] for key in ADM if not key.startswith('img')}
    variation = {'attention_function': False, 'numpy_core': 'numpy.core.multiarray', 'augment_kwargs': None, 'seed': 5}
    results = foreign_edm.write_foreign_snapshot(
        path, 'VEPrecond', kwargs, args=[8, 3], append_source='\nMARK = 1\n', **variation
    )
    data = path.read_bytes()
    assert globals_in(data) == SNAPSHOT_GLOBALS | {'numpy.core.multiarray.scalar', 'numpy.dtype'}
    snapshot = pickle.loads(data)
    inputs, expected = split(results)
    assert_identical(foreign_edm.evaluate(snapshot, inputs), expected)
    assert snapshot['augment_pipe'] is None
    assert snapshot['ema'].init_args == (8, 3)
    assert sys.modules[type(snapshot['ema']).__module__].MARK == 1


# ---- The decorator


@persistence.persistent_class
class Thing:
    """A thing."""

    def __init__(self, items=(), **options):
        self.items, self.options = list(items), options


@persistence.persistent_class
class Derived(Thing):
    def __init__(self, count):
        super().__init__(range(count), derived=True)


@persistence.persistent_class
class Secretive:
    _record_init_args = False

    def __init__(self, action):
        self.value = action()


@persistence.persistent_class
class WithState:
    def __init__(self, value):
        self.value = value

    def __getstate__(self):
        return {'packed': [self.value], **{name: vars(self)[name] for name in ('_init_args', '_init_kwargs')}}

    def __setstate__(self, state):
        self.__dict__.update(state)
        (self.value,) = self.__dict__.pop('packed')


@persistence.persistent_class
class Network(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)


class Undecorated(Thing):
    pass


def meta_of(obj):
    _function, (meta,), *_rest = obj.__reduce__()
    return meta


def test_decorator_keeps_the_names_and_the_docstring():
    assert (Thing.__name__, Thing.__qualname__, Thing.__module__) == ('Thing', 'Thing', __name__)
    assert Thing.__doc__ == 'A thing.'
    assert isinstance(Derived(1), Thing)
    assert Thing._orig_class_name == 'Thing'
    assert Thing._orig_module_src == pathlib.Path(__file__).read_text()


def test_decorating_twice_changes_nothing():
    assert persistence.persistent_class(Thing) is Thing


def test_is_persistent():
    assert persistence.is_persistent(Thing)
    assert persistence.is_persistent(Thing())
    assert persistence.is_persistent(networks.EDMPrecond)
    for other in (Undecorated, Undecorated(), int, 1, None, torch.nn.Linear(1, 1), networks.Precond):
        assert not persistence.is_persistent(other)


def test_init_arguments_are_deep_copies():
    items, option = [1, 2], {'a': []}
    thing = Thing(items, option=option)
    items.append(3)
    option['a'].append('b')
    thing.init_args[0].append(4)
    thing.init_kwargs.option['a'].append('c')
    assert thing.init_args == ([1, 2],)
    assert thing.init_kwargs == {'option': {'a': []}}
    assert type(thing.init_kwargs) is dnnlib.EasyDict
    assert type(meta_of(thing)['state']['_init_kwargs']) is dict


def test_derived_class_records_its_own_arguments():
    thing = pickle.loads(pickle.dumps(Derived(2)))
    assert (thing.init_args, thing.init_kwargs) == ((2,), {})
    assert (thing.items, thing.options) == ([0, 1], {'derived': True})
    assert type(thing) is Derived


def test_init_arguments_need_not_be_recorded():
    thing = pickle.loads(pickle.dumps(Secretive(lambda: 5)))
    assert thing.value == 5
    assert thing.init_args is None
    assert thing.init_kwargs is None


def test_argument_that_cannot_be_pickled_fails_at_once():
    with pytest.raises((pickle.PicklingError, AttributeError), match='lambda'):
        Thing(action=lambda: None)


def test_undecorated_subclass_is_told_to_decorate():
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match='Undecorated derives from a persistent class; decorate it as well'):
            attempt(Undecorated())


def test_class_that_a_reader_would_not_find_fails_at_once():
    @persistence.persistent_class
    class Local:
        pass

    with pytest.raises(TypeError, match=r'<locals>.Local must be defined at the top level of test_persistence'):
        Local()


def test_own_state_methods_are_used():
    thing = WithState(7)
    assert meta_of(thing)['state'] == {'packed': [7], '_init_args': (7,), '_init_kwargs': {}}
    again = pickle.loads(pickle.dumps(thing))
    assert vars(again) == vars(thing)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(protocol):
    thing = pickle.loads(pickle.dumps(Thing([1], a=2), protocol))
    assert vars(thing) == vars(Thing([1], a=2))


def test_torch_save():
    net, file = Network(3), io.BytesIO()
    torch.save({'net': net}, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)['net']
    assert type(again) is Network
    assert torch.equal(again.linear.weight, net.linear.weight)


def test_deepcopy_shares_nothing_but_the_class():
    net = Network(3).requires_grad_(False)
    twin = copy.deepcopy(net)
    net.linear.weight.zero_()
    assert type(twin) is Network
    assert twin.linear.weight.any()
    assert not twin.linear.weight.requires_grad
    assert twin.init_args == (3,)


def test_shared_objects_stay_shared():
    inner = Thing()
    first, second = pickle.loads(pickle.dumps([Thing([inner]), Thing([inner])]))
    assert first.items[0] is second.items[0]


# ---- The reader


SOURCE = """
from torch_utils import persistence

@persistence.persistent_class
class Box:
    def who(self):
        return __name__, isinstance(self, Box)

class Plain:
    pass
"""


def meta(source=SOURCE, class_name='Box', **changes):
    """The meta dict of a `class_name` with the attribute x = 1."""
    state = {'x': 1, '_init_args': (), '_init_kwargs': {}}
    return {'type': 'class', 'version': 6, 'module_src': source, 'class_name': class_name, 'state': state} | changes


def rebuild(*args, **changes):
    return persistence._reconstruct_persistent_obj(meta(*args, **changes))


def test_reader_fills_an_instance_of_the_stored_class():
    box = rebuild()
    assert vars(box) == {'x': 1, '_init_args': (), '_init_kwargs': {}}
    assert box.who() == (type(box).__module__, True)
    assert meta_of(box) == meta()


def test_reader_makes_a_plain_class_persistent():
    plain = rebuild(class_name='Plain')
    assert persistence.is_persistent(plain)
    assert meta_of(plain) == meta(class_name='Plain')


def test_equal_sources_share_a_module_and_different_ones_do_not():
    assert type(rebuild()) is type(rebuild())
    assert type(rebuild()).__module__ != type(rebuild(SOURCE + '\n')).__module__
    assert sys.modules[type(rebuild()).__module__] is persistence.module_from_source(SOURCE)


def test_source_of_a_live_module_is_not_executed_again():
    assert type(rebuild(Thing._orig_module_src, 'Thing')) is Thing
    assert persistence.module_from_source(networks.EDMPrecond._orig_module_src) is networks
    assert type(pickle.loads(pickle.dumps(augment.AugmentPipe()))) is augment.AugmentPipe


def test_reader_starts_afresh_after_a_source_that_failed(monkeypatch):
    source = SOURCE + 'import module_installed_later\n'
    modules = set(sys.modules)
    with pytest.raises(ModuleNotFoundError, match='module_installed_later'):
        rebuild(source)
    assert set(sys.modules) == modules
    monkeypatch.setitem(sys.modules, 'module_installed_later', types.ModuleType('module_installed_later'))
    assert rebuild(source).x == 1


@pytest.mark.parametrize(('key', 'value'), [('version', 5), ('version', 7), ('version', None), ('type', 'function')])
def test_reader_refuses_other_formats(key, value):
    with pytest.raises(pickle.UnpicklingError, match=rf"{key} {value!r}.*this code reads type 'class', version 6"):
        rebuild(**{key: value})


def test_import_hooks_run_in_order_before_the_checks(no_hooks_left):
    seen = []

    @persistence.import_hook
    def first(meta):
        seen.append(('first', meta.version, meta.state.x))
        meta.version = 6
        return meta

    @persistence.import_hook
    def second(meta):
        seen.append(('second', meta.version, meta.state.x))
        meta.state.x = 2
        return meta

    original = meta(version=5)
    assert persistence._reconstruct_persistent_obj(original).x == 2
    assert seen == [('first', 5, 1), ('second', 6, 1)]
    assert original == meta(version=5)


def test_import_hook_has_to_return_the_meta_dict(no_hooks_left):
    persistence.import_hook(lambda meta: None)
    with pytest.raises(pickle.UnpicklingError, match='hook returned None'):
        rebuild()
