"""Reading networks: what is read equals what was written, and no file makes the reader run its code or fall over."""

import builtins
import copy
import hashlib
import io
import json
import os
import pickle
import pickletools
import random
import re
import struct
import subprocess
import sys
import time
import warnings

import attacks
import click.testing
import foreign_edm
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from attacks import Reduced, Stored, meta_of, named, text

from dnnlib import safe_pickle
from torch_utils import network_io, network_pickle, persistence
from torch_utils.network_io import NetworkFileError
from training import augment, fast, loss, networks

pytestmark = pytest.mark.usefixtures('one_thread')

SONG = {'model_type': 'SongUNet', 'model_channels': 8, 'channel_mult': [1, 2], 'num_blocks': 1, 'attn_resolutions': [4]}
SKIPS = SONG | {'embedding_type': 'fourier', 'encoder_type': 'residual', 'resample_filter': [1, 3, 3, 1]}
ADM = {'model_type': 'DhariwalUNet', 'model_channels': 64, 'channel_mult': [1], 'num_blocks': 1, 'attn_resolutions': []}
TINY = attacks.TINY
EDM_CLASSES = ['EDMPrecond', 'VPPrecond', 'VEPrecond', 'iDDPMPrecond']


def network(class_name='EDMPrecond', **kwargs):
    net = getattr(networks, class_name)(**{'img_resolution': 8, 'img_channels': 1, **(kwargs or TINY)})
    return foreign_edm.randomize(net, seed=0).eval().requires_grad_(False)


def load(content, path, **kwargs):
    path.write_bytes(content)
    return network_io.load_network(str(path), **kwargs)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'net.pkl'


@pytest.fixture
def marker(tmp_path):
    """Hostile files create this file if anything in them runs."""
    path = tmp_path / 'marker'
    yield path
    assert not path.exists()


def outputs(net, rules=fast.install):
    """Of a copy with the rules that every network gets which is read, so that equal weights give equal bits."""
    net = rules(copy.deepcopy(net))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn([2, net.img_channels, net.img_resolution, net.img_resolution], generator=generator)
    labels = torch.eye(net.label_dim)[:2] if net.label_dim else None
    return net(3 * x, torch.tensor([0.5, 3.0]), labels)


# ----------------------------------------------------------------------------
# What was written is read.


@pytest.mark.parametrize('class_name', EDM_CLASSES)
@pytest.mark.parametrize('unet', [SONG, SKIPS, ADM], ids=['ddpmpp', 'ncsnpp', 'adm'])
def test_round_trip(path, class_name, unet):
    net = network(class_name, **unet, label_dim=3)
    found = load(pickle.dumps({'ema': net}), path)
    assert type(found) is type(net)
    assert found.init_kwargs == net.init_kwargs
    assert list(found.state_dict()) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), net.state_dict().values(), strict=True))
    assert torch.equal(outputs(found), outputs(net))
    assert not found.training
    assert not any(param.requires_grad for param in found.parameters())


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('bare', [False, True])
def test_protocols(path, protocol, bare):
    net = network()
    content = pickle.dumps(net if bare else {'ema': net}, protocol=protocol)
    assert torch.equal(outputs(load(content, path)), outputs(net))


@pytest.mark.parametrize('slow_pickler', [False, True])
def test_training_snapshot(path, slow_pickler):
    """All that training stores beside the network, and the slow pickler's other choice of opcodes."""
    net = network(**SONG, augment_dim=9)
    snapshot = {
        'ema': net.train().requires_grad_(True),
        'loss_fn': loss.EDMLoss(),
        'augment_pipe': augment.AugmentPipe(p=0.1, xflip=1e8, aniso=1),
        'dataset_kwargs': {'class_name': 'training.dataset.ImageFolderDataset', 'path': 'x.zip', 'max_size': None},
    }
    stream = io.BytesIO()
    (pickle._Pickler if slow_pickler else pickle.Pickler)(stream).dump(snapshot)
    found = load(stream.getvalue(), path)
    assert torch.equal(outputs(found), outputs(net.eval()))
    assert not any(module.training for module in found.modules())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(path, dtype):
    net = network().to(dtype)
    found = load(pickle.dumps(net), path)
    assert all(param.dtype == torch.float32 for param in found.parameters())
    assert torch.equal(outputs(found), outputs(net.float()))


def test_positional_arguments_and_parameters_with_a_gap_in_memory(path):
    net = networks.EDMPrecond(8, 1, **TINY).eval()
    weight = net.model.map_layer0.weight
    net.model.map_layer0.weight = torch.nn.Parameter(torch.randn(*weight.shape[::-1], 2)[:, :, 1].t())
    assert torch.equal(outputs(load(pickle.dumps(net), path)), outputs(net))


def test_random_state_is_left_alone(path):
    content = pickle.dumps(network())
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    load(content, path)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_reading_is_silent(path, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        load(pickle.dumps(network()), path)
    assert caught == []
    assert capsys.readouterr() == ('', '')


# ----------------------------------------------------------------------------
# Files of others, and the trusting way.


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    """A snapshot from another checkout: (its path, what its network computes there, the file its source creates)."""
    folder = tmp_path_factory.mktemp('foreign')
    mark = folder / 'mark'
    kwargs = {'img_resolution': 8, 'img_channels': 1, 'label_dim': 3, 'augment_dim': 9, **SONG}
    results = foreign_edm.write_foreign_snapshot(
        folder / 'net.pkl',
        'EDMPrecond',
        kwargs,
        append_source=f'\nopen({str(mark)!r}, "w").close()\n',
        numpy_core='numpy.core.multiarray',
        attributes={'note': 'of another program'},
    )
    assert mark.exists()  # the source did run where the file was written
    mark.unlink()
    return folder / 'net.pkl', results, mark


def test_foreign_snapshot_is_read_without_its_code(foreign):
    path, results, mark = foreign
    net = network_io.load_network(str(path))
    assert not mark.exists()
    assert type(net) is networks.EDMPrecond
    found = net(results['x'], results['sigma'], results['class_labels'])
    assert torch.allclose(found, results['denoised'], rtol=1e-5, atol=1e-5)
    torch.func.jvp(lambda x: net(x, results['sigma']), (results['x'],), (results['x'],))


@pytest.mark.parametrize('numpy_core', ['numpy.core.multiarray', 'numpy._core.multiarray'])
def test_numpy_numbers_of_both_numpys(path, numpy_core):
    """numpy 1 and numpy 2 write the same numbers under different names."""
    content = pickle.dumps(network(**TINY, sigma_data=0.123), protocol=2)
    number = named(numpy_core, 'scalar') + named('numpy', 'dtype') + text('f8') + b'\x89\x88\x87R'
    number += b'(K\x03' + text('<') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
    number += b'C\x08' + struct.pack('<d', 0.25) + b'\x86R'
    changed = content.replace(pickle.BINFLOAT + struct.pack('>d', 0.123), number)
    assert type(pickle.loads(changed).init_kwargs['sigma_data']) is np.float64
    found = load(changed, path)
    assert (found.sigma_data, type(found.sigma_data)) == (0.25, float)


def test_unknown_source_is_named(foreign, capsys):
    path, *_ = foreign
    [source] = network_pickle.read(path.read_bytes()).sources
    network_io.load_network(str(path))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f'Warning: {path}: the source text of EDMPrecond (SHA-256 {network_io._digest(source)})')


def test_weights_and_outputs_are_those_of_the_original_classes(path):
    """Bit for bit: the file's own code, executed, against the network that is rebuilt."""
    for class_name in EDM_CLASSES:
        content = pickle.dumps(network(class_name, **SONG, label_dim=2))
        path.write_bytes(content.replace(b'import math\n', b'import math;', 1))  # else the text is that of our module
        original = network_io.load_network(str(path), trust_pickle=True)
        rebuilt = network_io.load_network(str(path))
        assert type(original) is not type(rebuilt)
        assert torch.equal(outputs(rebuilt, fast.remove), outputs(original))


def test_trusted_files_run_their_code_and_say_so(foreign, capsys):
    path, results, mark = foreign
    net = network_io.load_network(str(path), trust_pickle=True)
    assert mark.exists()
    mark.unlink()
    printed = capsys.readouterr()
    assert printed.out == ''
    assert f'--trust-pickle: running the Python code inside {path}\n(SHA-256 ' in printed.err
    assert printed.err.count(78 * '*') == 2
    assert type(net) is not networks.EDMPrecond
    assert net.note == 'of another program'
    assert not net.training
    assert not any(param.requires_grad for param in net.parameters())
    found = net(results['x'], results['sigma'], results['class_labels'])
    assert torch.allclose(found, results['denoised'], rtol=1e-5, atol=1e-5)


def test_trusted_files_get_a_forward_mode(foreign):
    path, results, mark = foreign
    net = network_io.load_network(str(path), trust_pickle=True)
    mark.unlink(missing_ok=True)
    own = network_io.load_network(str(path)).double()
    x, sigma, labels = (results[key].double() for key in ('x', 'sigma', 'class_labels'))
    for each in (net.double(), own):
        _, found = torch.func.jvp(lambda v, each=each: each(v, sigma, labels), (x,), (torch.ones_like(x),))
        step = 1e-5
        central = (each(x + step, sigma, labels) - each(x - step, sigma, labels)) / (2 * step)
        tolerance = 1e-6 if central.dtype == torch.float64 else 2e-2
        assert (found - central).norm() / central.norm() < tolerance


@pytest.mark.parametrize(
    ('data', 'words'),
    [
        (42, 'holds int, not a network'),
        ({'net': 1}, "no entry 'ema'.*'net'"),
        (torch.nn.Linear(1, 1), 'img_resolution'),
    ],
)
def test_trusted_files_without_a_network(path, data, words):
    with pytest.raises(NetworkFileError, match=words):
        load(pickle.dumps(data), path, trust_pickle=True)


@pytest.mark.parametrize('content', [b'', b'\x80\x04', b'garbage', b'\x80\x04cno.such.module\nname\n.'])
def test_trusted_files_that_do_not_unpickle(path, content):
    with pytest.raises(NetworkFileError, match='does not unpickle'):
        load(content, path, trust_pickle=True)


@pytest.mark.parametrize('url', ['http://127.0.0.1:9/net.pkl', 'hf://user/repo/net.pkl', 'edm-cifar10-32x32-cond-vp'])
def test_trust_in_a_server_needs_a_hash(url):
    with pytest.raises(NetworkFileError, match='#sha256='):
        network_io.load_network(url, trust_pickle=True)


# ----------------------------------------------------------------------------
# safetensors, inspection, conversion.


def tool(*args):
    return click.testing.CliRunner().invoke(network_io.main, [str(arg) for arg in args])


@pytest.mark.parametrize('class_name', EDM_CLASSES)
def test_safetensors_round_trip(tmp_path, class_name):
    net = network(class_name, **SKIPS, label_dim=3)
    path = tmp_path / 'net.safetensors'
    network_io.save_network(net, path)
    found = network_io.load_network(str(path), trust_pickle=True)  # there is nothing to trust
    assert type(found) is type(net)
    assert found.init_kwargs == net.init_kwargs
    assert torch.equal(outputs(found), outputs(net))
    with safetensors.safe_open(path, 'pt') as file:  # by any other reader
        assert json.loads(file.metadata()['network'])['class_name'] == class_name
        assert set(file.keys()) == set(net.state_dict())


def test_convert_there_and_back(tmp_path, path):
    net = network(**SONG, label_dim=3)
    load(pickle.dumps({'ema': net, 'loss_fn': loss.EDMLoss()}, 2), path)
    middle, last = tmp_path / 'net.safetensors', tmp_path / 'again.pkl'
    for src, dest in [(path, middle), (middle, last)]:
        result = tool('convert', src, dest)
        assert result.exit_code == 0, result.output
        assert result.output.startswith(f'Wrote {dest}: EDMPrecond, {dest.stat().st_size:,} bytes')
    assert torch.equal(outputs(network_io.load_network(str(last))), outputs(net))


def test_converted_pickles_load_in_another_checkout(tmp_path):
    """By plain unpickling, where nothing but EDM's `torch_utils` and `dnnlib` can be imported."""
    net = network(**SONG)
    network_io.save_network(net, tmp_path / 'net.safetensors')
    assert tool('convert', tmp_path / 'net.safetensors', tmp_path / 'new' / 'net.pkl').exit_code == 0
    found = foreign_edm.plain_output(tmp_path / 'new' / 'net.pkl', [1, 1, 8, 8])
    assert found == pytest.approx(net(torch.ones(1, 1, 8, 8), torch.tensor(2.0)).double().sum().item())


def test_convert_keeps_what_is_there(tmp_path, path):
    load(pickle.dumps(network()), path)
    (tmp_path / 'there.pkl').write_bytes(b'mine')
    for dest, words in [('there.pkl', 'exists already'), ('net.pt', r'ends in .pkl or .safetensors')]:
        result = tool('convert', path, tmp_path / dest)
        assert result.exit_code == 2
        assert words in result.output
    assert (tmp_path / 'there.pkl').read_bytes() == b'mine'
    assert not (tmp_path / 'net.pt').exists()


def test_paths_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    load(pickle.dumps(network()), tmp_path / 'net.pkl')
    assert tool('inspect', '~/net.pkl').exit_code == 0
    assert tool('convert', '~/net.pkl', '~/other/net.safetensors').exit_code == 0
    assert (tmp_path / 'other' / 'net.safetensors').exists()
    os.mkfifo(tmp_path / 'pipe')
    result = tool('inspect', '~/pipe')
    assert (result.exit_code, 'is a pipe or a device' in result.output) == (2, True)


def test_inspect_the_shipped_network():
    result = tool('inspect', foreign_edm.ROOT / 'ckpts' / 'edm-mnist-32x32-cond-vp.pkl')
    assert result.exit_code == 0, 'has the shipped network new source text? list it in KNOWN_SOURCES'
    rows = dict(line.split(maxsplit=1) for line in result.output.splitlines()[1:])
    assert rows['class'] == 'EDMPrecond (training.networks)'
    assert 'label_dim=10' in rows['arguments']
    assert rows['file'].startswith('pickle of protocol 4')
    assert rows['unusual'] == 'nothing'


def test_inspect_remarks(path):
    content = pickle.dumps({'ema': network(), 'surprise': 1}).replace(b'import math', b'IMPORT MATH', 1)
    load(content, path)
    result = tool('inspect', path)
    assert result.exit_code == 1
    assert "entries that snapshots do not have: 'surprise'" in result.output
    assert 'source text unknown, SHA-256' in result.output


def test_inspect_counts_the_broken_tensors_of_what_does_not_load(path):
    net = network()
    net.model.map_layer0.bias[0] = float('inf')
    path.write_bytes(pickle.dumps({'ema': net}))
    result = tool('inspect', path)
    assert result.exit_code == 2
    assert "1 tensors with infinite or undefined numbers, such as 'model.map_layer0.bias'" in result.output
    assert result.output.splitlines()[-1].startswith("refused     the weight 'model.map_layer0.bias' has numbers")


def test_inspect_lists_every_name_that_a_file_calls(path, marker):
    evil = [Reduced(os.system, f'touch {marker}'), Reduced(builtins.eval, '1')]
    path.write_bytes(pickle.dumps({'ema': network(), 'loss_fn': evil}))
    result = tool('inspect', path)
    assert result.exit_code == 2
    assert "it calls 'builtins.eval', 'posix.system'" in result.output.replace('nt.system', 'posix.system')


@pytest.mark.parametrize('content', [b'', b'hello', b'\x80\x04N.', b'\x80'])
def test_inspect_what_is_no_network(path, content):
    path.write_bytes(content)
    result = tool('inspect', path)
    assert result.exit_code == 2
    assert result.output.splitlines()[-1].startswith('refused')


def test_inspect_nothing(tmp_path):
    for name, problem in [
        ('absent.pkl', ': no such file'),
        ('', ' is a folder, not a network file; it has no network files'),
    ]:
        result = tool('inspect', tmp_path / name)
        assert (result.exit_code, result.output) == (2, f'Error: {tmp_path / name}{problem}\n')


# ----------------------------------------------------------------------------
# Networks that are not what they say.


def refused(content, path, words=None):
    with pytest.raises(NetworkFileError, match=words) as info:
        load(content, path)
    assert attacks.outcome(content, attacks.read_network)[0] == 'refused'
    message = str(info.value)
    assert message.startswith(f'{path}: ')
    assert '\n' not in message
    assert message.isprintable()
    assert len(message) < 700
    return message


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'version': 5}, 'version 6'),
        ({'version': None}, 'version 6'),
        ({'type': 'function'}, 'version 6'),
        ({'class_name': 'Precond2'}, "'Precond2'.*--trust-pickle"),
        ({'class_name': 'SongUNet'}, "'SongUNet'.*--trust-pickle"),
        ({'class_name': 'evil\nname \x1b[31m'}, r"'evil\\nname \\x1b\[31m'"),
        ({'class_name': 'VPPrecond'}, 'differs|sigma_data'),
        ({'state': None}, 'NoneType'),
        ({'state': {}}, 'arguments'),
        ({'state': {'_init_args': None, '_init_kwargs': None}}, 'arguments'),
    ],
)
def test_wrong_records(path, changes, words):
    refused(pickle.dumps({'ema': Stored(meta_of(network(**TINY, sigma_data=0.4)) | changes)}), path, words)


def test_record_without_state(path):
    meta = meta_of(network())
    del meta['state']
    refused(pickle.dumps(Stored(meta)), path, 'state')


def remove_weight(net):
    del net.model.map_layer0.weight


def remove_module(net):
    del net.model.map_layer0


def extra_weight(net):
    net.model.register_parameter('extra', torch.nn.Parameter(torch.zeros(3)))


def extra_module(net):
    net.model.enc['extra'] = networks.Linear(2, 2)


def other_shape(net):
    net.model.map_layer0.weight = torch.nn.Parameter(torch.zeros(3, 3))


def complex_weight(net):
    weight = net.model.map_layer0.weight
    net.model.map_layer0._parameters['weight'] = torch.nn.Parameter(weight.to(torch.complex64))


def weight_of_text(net):
    net.model.map_layer0._parameters['weight'] = 'heavy'


def parameters_in_a_list(net):
    net.model._parameters = [1, 2]


def modules_that_are_numbers(net):
    net.model._modules['map_layer0'] = 7


def module_in_itself(net):
    net.model.enc['loop'] = net.model.enc


def module_in_two_places(net):
    net.model.map_layer1 = net.model.map_layer0


def two_modules_in_each_other(net):
    a, b = torch.nn.ModuleDict(), torch.nn.ModuleDict()
    a['b1'], a['b2'], b['a1'], b['a2'] = b, b, a, a
    net.model.enc['a'] = a


@pytest.mark.parametrize(
    ('spoil', 'words'),
    [
        (remove_weight, 'Missing key.*map_layer0.weight'),
        (remove_module, 'Missing key.*map_layer0'),
        (extra_weight, 'Unexpected key.*extra'),
        (extra_module, 'Unexpected key.*extra'),
        (other_shape, 'size mismatch for model.map_layer0.weight'),
        (complex_weight, 'ComplexFloatStorage'),
        (weight_of_text, 'found str'),
        (parameters_in_a_list, 'found list'),
        (modules_that_are_numbers, 'found int'),
        (module_in_itself, 'contains itself'),
        (module_in_two_places, 'several places'),
        (two_modules_in_each_other, 'contains itself'),
    ],
)
def test_spoiled_networks(path, spoil, words):
    net = network()
    spoil(net)
    refused(pickle.dumps({'ema': net}), path, words)


BAD_VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    float('nan'),
    '',
    'x',
    b'x',
    [],
    [0],
    [-1],
    {},
    {'x': 1},
    (),
    [[]],
    'SongUNet',
]
ARGUMENTS = ['img_resolution', 'img_channels', 'label_dim', 'sigma_data', 'model_type', 'model_channels', 'num_blocks']
ARGUMENTS += ['channel_mult', 'channel_mult_emb', 'attn_resolutions', 'dropout', 'use_fp16', 'class_name', 'shape', '']


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.dictionaries(st.sampled_from(ARGUMENTS), st.sampled_from(BAD_VALUES), min_size=1, max_size=2))
def test_any_arguments(tmp_path_factory, changes):
    meta = meta_of(network())
    meta['state']['_init_kwargs'] = dict(meta['state']['_init_kwargs']) | changes
    load_or_refuse(pickle.dumps(Stored(meta)), tmp_path_factory.getbasetemp() / 'arguments.pkl')


def load_or_refuse(content, path):
    try:
        net = load(content, path)
    except NetworkFileError:
        return
    assert type(net).__name__ in network_io.NETWORK_CLASSES


# ----------------------------------------------------------------------------
# Hostile pickles.


def hostile_calls(marker):
    create = f'open({str(marker)!r}, "w").close()'
    return {
        'os.system': Reduced(os.system, f'touch {marker}'),
        'eval': Reduced(builtins.eval, create),
        'exec': Reduced(builtins.exec, create),
        'open': Reduced(builtins.open, str(marker), 'w'),
        'getattr': Reduced(builtins.getattr, 'text', 'upper'),
        'subprocess': Reduced(subprocess.call, ['touch', str(marker)]),
        'import': Reduced(builtins.__import__, 'this'),
        'torch.load': Reduced(torch.load, str(marker)),
        'own reader': Reduced(network_io.load_network, str(marker)),
        'module_from_source': Reduced(persistence.module_from_source, create),
        'copyreg': Reduced(getattr(sys.modules['copyreg'], '_reconstructor'), dict, dict, {}),  # noqa: B009
        'numpy object': Reduced(np.frombuffer, b'12345678', 'O'),
    }


@pytest.mark.parametrize('place', ['whole', 'ema', 'other entry', 'weight', 'argument', 'attribute', 'class name'])
@pytest.mark.parametrize('call', list(hostile_calls('')))
def test_hostile_calls_anywhere(path, marker, call, place):
    evil = hostile_calls(marker)[call]
    net = network()
    meta = meta_of(net)
    if place == 'weight':
        meta['state']['_modules']['model']._parameters['w'] = evil
    elif place == 'argument':
        meta['state']['_init_kwargs'] = {'img_resolution': evil}
    elif place == 'attribute':
        meta['state']['note'] = evil
    elif place == 'class name':
        meta['class_name'] = evil
    data = {'whole': evil, 'ema': {'ema': evil}, 'other entry': {'ema': net, 'loss_fn': evil}}.get(place, Stored(meta))
    refused(pickle.dumps(data), path, 'wants to call .*--trust-pickle')


VECTORS = {**attacks.attacks(), 'networks': attacks.networks_of_lies()}
NAMES = [(kind, name) for kind, vectors in VECTORS.items() for name in vectors]


@pytest.mark.parametrize(('kind', 'name'), NAMES, ids=[f'{kind}: {name}' for kind, name in NAMES])
def test_attacks(kind, name):
    data = VECTORS[kind][name]
    result, seconds, memory = attacks.outcome(data, attacks.read_network)
    assert result == 'refused'
    assert seconds < 3
    assert memory <= attacks.most_memory(data)


def network_with_sources(count):
    """A sound network with so many parts more, without weights, each with a source text of its own."""
    meta, part = meta_of(networks.EDMPrecond(8, 1, **TINY)), meta_of(networks.Linear(1, 1))
    empty = part['state'] | {'_parameters': {}}
    parts = {f'part{i}': Stored(part | {'module_src': f'# {i}', 'state': empty}) for i in range(count)}
    state = meta['state'] | {'_modules': meta['state']['_modules'] | parts}
    return pickle.dumps({'ema': Stored(meta | {'state': state})}, 4)


def test_thousands_of_sources_are_one_warning(path, capsys):
    start = time.process_time()
    load(network_with_sources(5000), path)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r'\(SHA-256 [0-9a-f]{64}, .* and 4980 more\) is unknown', line)
    result = tool('inspect', path)
    assert (result.exit_code, result.output.count('source text unknown')) == (1, 20)
    assert '4980 more source texts unknown' in result.output
    assert time.process_time() - start < 4


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_a_storage_counts_once(path, dtype):
    """Numbers in a file, in its storage, and in float32: no more is charged for them, so large networks are read."""
    net = network(**SONG).to(dtype)
    content = pickle.dumps(net)
    budget = safe_pickle.Budget(len(content))
    before = budget.bytes
    tree = safe_pickle.read_pickle(content, network_pickle._table(budget), budget=budget)
    network_pickle._weights_and_sources(tree, budget)
    values = list(net.state_dict().values())
    numbers = sum(value.numel() for value in values) * (dtype.itemsize + 4)
    assert numbers <= before - budget.bytes <= numbers + 4000 * len(values)


def test_a_large_network_in_half_precision_is_read_in_the_stated_memory(path):
    net = network(**{**TINY, 'model_channels': 640}).half()
    content = pickle.dumps(net)
    assert len(content) > 50 << 20
    result, _, memory = attacks.outcome(content, attacks.read_network)
    assert result == 'read'
    assert memory <= attacks.most_memory(content)


@pytest.mark.parametrize('reader', ['read', 'build'])
def test_a_lack_of_memory_is_not_damage(path, monkeypatch, reader):
    def fail(*args, **kwargs):
        raise MemoryError

    if reader == 'read':
        monkeypatch.setattr(network_pickle.torch, 'frombuffer', fail)
    else:
        monkeypatch.setattr(torch.nn.Module, 'load_state_dict', fail)
    with pytest.raises(MemoryError):
        load(pickle.dumps(network()), path)
    for arguments in (['inspect', path], ['convert', path, path.with_suffix('.safetensors')]):
        result = tool(*arguments)
        assert result.exit_code == 2
        assert result.output.endswith('Error: out of memory: MemoryError\n')


@pytest.mark.parametrize('name', ['newlines and escapes', 'look-alike letters'])
def test_messages_are_safe_to_print(path, name):
    refused(VECTORS['names'][name], path, 'wants to call')


def stored_tensor(storage, offset, size, stride):
    return Reduced(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})


def network_with_weight(make):
    """A network whose bias of map_layer0 is stored as `make(storage of that bias)`."""
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        storage = net.model.map_layer0.bias.detach().clone().storage()
    net.model.map_layer0._parameters['bias'] = make(storage)
    return pickle.dumps(net)


@pytest.mark.parametrize(
    ('offset', 'size', 'stride'),
    [
        (0, (17,), (1,)),
        (1, (16,), (1,)),
        (0, (16,), (2,)),
        (-1, (16,), (1,)),
        (15, (16,), (-1,)),
        (0, (-16,), (1,)),
        (0, (10**12,), (0,)),
        (0, (10**6, 10**6, 10**6), (0, 0, 0)),
        (0, (2**63,), (1,)),
        (2**70, (1,), (1,)),
        (0, (16,), (1, 1)),
        (0, (16,), ()),
        (0, (16.0,), (1,)),
        (0, (True,), (1,)),
        (0, None, (1,)),
        (None, (16,), (1,)),
        (0, (1,), (1,)),
    ],
)
def test_views_outside_their_storage(path, offset, size, stride):
    content = network_with_weight(lambda storage: stored_tensor(storage, offset, size, stride))
    refused(content, path)


def test_a_view_inside_its_storage(path):
    found = load(network_with_weight(lambda storage: stored_tensor(storage, 0, (16,), (1,))), path)
    assert torch.equal(outputs(found), outputs(network()))


@pytest.mark.parametrize('storage', [None, 'text', b'bytes', 3, torch.zeros(16), [0.0] * 16])
def test_tensors_without_a_storage(path, storage):
    refused(network_with_weight(lambda _: stored_tensor(storage, 0, (16,), (1,))), path)


@pytest.mark.parametrize('new_format', [False, True])
@pytest.mark.parametrize('protocol', [2, 4])
def test_hostile_pickle_inside_a_storage(path, marker, new_format, protocol):
    for evil in hostile_calls(marker).values():
        stream = io.BytesIO()
        torch.save({'x': evil}, stream, pickle_protocol=protocol, _use_new_zipfile_serialization=new_format)
        for inner in (stream.getvalue(), pickle.dumps(evil, protocol=protocol)):
            storage = Reduced(torch.storage._load_from_bytes, inner)
            content = network_with_weight(lambda _, storage=storage: stored_tensor(storage, 0, (16,), (1,)))
            message = refused(content, path, 'damaged or hides code')
            assert 'weights_only' not in message


def test_a_tensor_instead_of_a_storage(path):
    stream = io.BytesIO()
    torch.save(torch.zeros(16), stream, _use_new_zipfile_serialization=False)
    storage = Reduced(torch.storage._load_from_bytes, stream.getvalue())
    refused(network_with_weight(lambda _: storage), path, 'damaged or hides code')


def test_embedded_source_does_not_run(path, marker):
    source = f'open({str(marker)!r}, "w").close()\n'
    net = network()
    content = pickle.dumps(Stored(meta_of(net) | {'module_src': source}))
    assert source.encode() in content
    assert torch.equal(outputs(load(content, path)), outputs(net))
    before = set(sys.modules)
    load(content, path)
    assert set(sys.modules) == before


# ----------------------------------------------------------------------------
# Damaged files.


@pytest.fixture(scope='module')
def small_file(tmp_path_factory):
    """(content, positions that are structure: not inside source text or numbers, path to write damaged copies to)"""
    net = network()
    content = pickle.dumps({'ema': Stored(meta_of(net) | {'module_src': ''})})
    structure = []
    for opcode, argument, position in pickletools.genops(content):
        length = 2 if isinstance(argument, (str, bytes)) and len(argument) > 40 else 1 + len(str(argument or ''))
        structure.extend(range(position, min(position + length, len(content))))
        assert opcode
    return content, structure, tmp_path_factory.mktemp('damaged') / 'net.pkl'


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(data=st.data())
def test_truncated_files(small_file, data):
    content, structure, path = small_file
    length = data.draw(st.integers(0, len(content) - 1) | st.sampled_from(structure))
    refused(content[:length], path, 'not a pickle|not a readable|damaged|found')


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(data=st.data())
def test_changed_bytes(small_file, data):
    content, structure, path = small_file
    changed = bytearray(content)
    positions = st.sampled_from(structure) | st.integers(0, len(content) - 1)
    for position in data.draw(st.lists(positions, min_size=1, max_size=3)):
        changed[position] = data.draw(st.integers(0, 255))
    load_or_refuse(bytes(changed), path)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.binary(max_size=200))
def test_noise(small_file, noise):
    refused(b'\x80\x04' + noise, small_file[2])


def error_of_opening(path):
    with pytest.raises(OSError, match=re.escape(str(path))) as caught:
        network_io.load_network(str(path))
    return str(caught.value).removeprefix(str(path))


def test_a_missing_file_and_what_is_in_its_folder(tmp_path):
    assert error_of_opening(tmp_path / 'none.pkl') == ': no such file'
    assert error_of_opening(tmp_path / 'x' / 'none.pkl') == f': no such file; there is no folder {tmp_path / "x"}'
    assert error_of_opening(tmp_path) == ' is a folder, not a network file; it has no network files'
    for age, name in enumerate(['c.pkl', 'b.safetensors', 'state.pt', '.tmp.pkl', 'a.pkl', 'd.pkl']):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (10**9, 10**9 - age))
    there = 'c.pkl, b.safetensors, a.pkl and 1 older'
    assert error_of_opening(tmp_path / 'none.pkl') == f': no such file; {tmp_path} has {there}'
    assert error_of_opening(tmp_path) == f' is a folder, not a network file; it has {there}'
    assert error_of_opening(f'file://{tmp_path}/none.pkl') == f': no such file; {tmp_path} has {there}'


def test_a_missing_name_and_those_that_are_known():
    known = 'known names such as edm-cifar10-32x32-cond-vp are in dnnlib/published.py'
    assert error_of_opening('my-network') == f': no such file; {known}'
    similar = 'edm-ffhq-64x64-uncond-vp, edm-ffhq-64x64-uncond-ve, edm-afhqv2-64x64-uncond-vp'
    assert error_of_opening('edm-ffhq-64x64-uncond') == f': no such file; known names are {similar}'


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_a_weight_that_is_not_finite_is_named(path, value):
    net = network()
    net.model.map_layer1.bias[3] = value
    with pytest.raises(NetworkFileError, match=r"weight 'model\.map_layer1\.bias' has numbers that are not finite"):
        load(pickle.dumps({'ema': net}), path)


def test_the_bytes_that_run_are_those_with_the_hash(path, monkeypatch):
    """Another file may take the place of the one that was downloaded and checked."""
    good, evil = pickle.dumps({'ema': network()}), pickle.dumps(Reduced(os.getpid))
    path.write_bytes(evil)
    pinned = f'{path}#sha256={hashlib.sha256(good).hexdigest()}'
    monkeypatch.setattr(network_io, 'read_bytes', lambda name: path.read_bytes())
    with pytest.raises(NetworkFileError, match=f'its SHA-256 is {hashlib.sha256(evil).hexdigest()}, not '):
        network_io.load_network(pinned, trust_pickle=True)
    path.write_bytes(good)
    assert isinstance(network_io.load_network(pinned, trust_pickle=True), networks.EDMPrecond)


def test_edms_own_source_texts_are_known():
    assert network_io.origin('5db27dcd96674b95c72d5e6491b879cdc35e24039ada3411b4b46a28ed1fe284').startswith('EDM,')
    assert network_io.origin('2294828d5f59f5fd008f7141e6b8af2095918f2ce019f280a933e4779b5c3cef').startswith('EDM,')
