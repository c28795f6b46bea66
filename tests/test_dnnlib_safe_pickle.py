"""Plain values come back as written, by any protocol; nothing else is read, nothing runs, nothing takes long."""

import io
import pickle
import pickletools
import tracemalloc

import attacks
import audit
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from dnnlib import safe_pickle
from dnnlib.safe_pickle import SafePickleError

VECTORS = attacks.attacks()
NAMES = [(kind, name) for kind, vectors in VECTORS.items() for name in vectors]


def read(content):
    return safe_pickle.load_numpy(io.BytesIO(content))


@pytest.fixture(scope='module', autouse=True)
def _imported_on_first_use():
    read(pickle.dumps(np.ones(1)))


# ----------------------------------------------------------------------------
# What was written is read.

integers = st.integers(-(2**100), 2**100)  # longer ones are refused, and as keys those of more than 8 bytes
keys = st.integers(-(2**63), 2**63 - 1)
numbers = integers | st.floats(allow_nan=False) | st.booleans() | st.none()
plain = st.recursive(
    numbers | st.text(st.characters(codec='utf-8')) | st.binary() | st.sets(keys),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(max_size=9) | keys, inner),
    max_leaves=20,
)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(plain, st.integers(0, 5), st.booleans())
def test_plain_values(value, protocol, slow_pickler):
    stream = io.BytesIO()
    (pickle._Pickler if slow_pickler else pickle.Pickler)(stream, protocol).dump(value)
    found = read(stream.getvalue())
    assert found == value
    assert type(found) is type(value)


DTYPES = [f'{order}{code}' for order in '<>' for code in safe_pickle.NUMBERS if code != 'b1'] + ['?']


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        st.sampled_from(DTYPES), hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    ),
    st.integers(0, 5),
    st.booleans(),
)
def test_arrays(array, protocol, fortran):
    array = np.asfortranarray(array) if fortran else array
    found = read(pickle.dumps({'a': array, 'again': array}, protocol))
    np.testing.assert_array_equal(found['a'], array)
    assert found['a'].dtype == array.dtype.newbyteorder('=')
    assert found['a'].flags.writeable
    assert found['a'].flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize('core', ['core', '_core'])
def test_numpy_1_and_2(core):
    value = {'mu': np.arange(3.0), 'n': np.float32(0.5), 'mask': np.bool_(True)}
    content = pickle.dumps(value, 2)
    here = b'numpy._core.multiarray' if b'numpy._core.multiarray' in content else b'numpy.core.multiarray'
    found = read(content.replace(here, f'numpy.{core}.multiarray'.encode()))
    assert found['mu'].tolist() == [0, 1, 2]
    assert (found['n'], type(found['n']), found['mask']) == (0.5, float, True)


def test_statistics_of_edm2():
    rng = np.random.default_rng(0)
    sigma = np.cov(rng.standard_normal((9, 40)))
    found = read(pickle.dumps({'num_images': 40, 'fid': {'mu': rng.standard_normal(9), 'sigma': sigma}}))
    assert found['num_images'] == 40
    np.testing.assert_array_equal(found['fid']['sigma'], sigma)


def cifar_batch(protocol_2):
    """Two images of three bytes with the labels 1 and 2, as Python 2 and numpy 1 write them."""
    if protocol_2:
        return (
            b'\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85'
            b'U\x01b\x87Rq\x05(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ'
            b'\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06abc\xfeeftbU\x06labelsq\x08]q\t(K\x01K\x02eu.'
        )
    return (
        b"(dp1\nS'data'\np2\ncnumpy.core.multiarray\n_reconstruct\np3\n(cnumpy\nndarray\np4\n(I0\ntp5\nS'b'\np6\ntp7\nRp8\n"
        b"(I1\n(I2\nI3\ntp9\ncnumpy\ndtype\np10\n(S'u1'\np11\nI0\nI1\ntp12\nRp13\n(I3\nS'|'\np14\nNNNI-1\nI-1\nI0\ntp15\n"
        b"bI00\nS'abc\\xfeef'\np16\ntp17\nbsS'labels'\np18\n(lp19\nI1\naL2L\nas."
    )


@pytest.mark.parametrize('protocol_2', [True, False])
def test_batches_of_cifar(protocol_2):
    content = cifar_batch(protocol_2)
    assert pickle.loads(content, encoding='bytes').keys() == {b'data', b'labels'}
    found = read(content)
    assert found[b'data'].tolist() == [[97, 98, 99], [254, 101, 102]]
    assert found[b'data'].dtype == np.uint8
    assert found[b'labels'] == [1, 2]


def test_parts_used_twice_stay_one_object():
    part = [1, 2]
    found = read(pickle.dumps({'a': part, 'b': (part, part)}))
    assert found['a'] is found['b'][0] is found['b'][1]


# ----------------------------------------------------------------------------
# What wants more than to be data is refused.


@pytest.mark.parametrize(('kind', 'name'), NAMES, ids=[f'{kind}: {name}' for kind, name in NAMES])
def test_attacks(kind, name):
    data = VECTORS[kind][name]
    result, seconds, memory = attacks.outcome(data, attacks.read_numpy)
    assert result == 'refused'
    assert seconds < 3
    assert memory <= attacks.most_memory(data)


@pytest.mark.parametrize('start', [b'X\x04\0\0\x02\xf0\x9f\x98\x80', b'V\\U0001f600'], ids=['UTF-8', 'protocol 0'])
def test_wide_text(start):
    """One emoji makes four bytes of each letter."""
    content = start + b'x' * (2 << 24) + (b'.' if start[:1] == b'X' else b'\n.')
    result, _, memory = attacks.outcome(content, attacks.read_numpy)
    assert result == 'read'
    assert memory <= attacks.most_memory(content)
    assert attacks.outcome(b'](' + content[:-1] + content[:-1] * 2 + b'e.', attacks.read_numpy).result == 'refused'


@pytest.mark.parametrize('number', [2**63, -(2**63) - 1, 2**100])
def test_long_integers_are_no_keys(number):
    for value in ({number: 1}, {number}):
        for protocol in (0, 2, 4):
            with pytest.raises(SafePickleError, match='a key that is an integer of more than 8 bytes'):
                read(pickle.dumps(value, protocol))
    assert read(pickle.dumps([number])) == [number]


def test_names_have_a_largest_length():
    for module, name, count in [
        ('m', 'n' * 1000, 1001),
        ('m' * 500, 'n' * 501, 1001),
        ('m' * 30_000_000, 'n', 30_000_001),
    ]:
        with pytest.raises(SafePickleError, match=f'a name of {count} signs'):
            read(b'c' + f'{module}\n{name}\n.'.encode())


def test_a_lack_of_memory_is_not_damage(monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setitem(safe_pickle.NUMPY_TABLE, ('numpy', 'dtype'), fail)
    with pytest.raises(MemoryError):
        read(pickle.dumps(np.zeros(3)))


def test_the_audit_hook_notices_what_it_should():
    for evil in (b'\x80\x04cos\ngetpid\n)R.', b'\x80\x04cbuiltins\neval\nX\x01\x00\x00\x001\x85R.'):
        with pytest.raises(audit.CodeRan), audit.watched():
            pickle.loads(evil)


@pytest.mark.parametrize('value', [1j, object, np.array([object()]), np.array(['text']), range(3), frozenset({1}), len])
@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_other_types_are_refused(value, protocol):
    with pytest.raises(SafePickleError) as info:
        read(pickle.dumps(value, protocol))
    assert str(info.value).isprintable()


def test_the_most_expensive_values():
    """A set for each byte: less than 500 bytes of memory for it, with what keeps track of it."""
    content = b'\x80\x04](' + b'\x8f' * 20_000 + b'e.'
    tracemalloc.start()
    read(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500 * len(content)


def test_arrays_cost_a_small_multiple_of_the_file():
    content = pickle.dumps(np.zeros(10**6))
    tracemalloc.start()
    read(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(content)


# ----------------------------------------------------------------------------
# Damaged files.


def read_or_refuse(content):
    try:
        with audit.watched():
            read(content)
    except SafePickleError:
        pass


SOUND = [pickle.dumps({'a': np.arange(3), 'b': [1.5, 'x', (b'y', {2})]}, protocol) for protocol in range(6)]


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.sampled_from([*SOUND, cifar_batch(True)]), st.data())
def test_changed_bytes(content, data):
    changed = bytearray(content)
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        changed[position] = data.draw(st.integers(0, 255))
    read_or_refuse(bytes(changed))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.sampled_from(SOUND), st.data())
def test_cut_files(content, data):
    with pytest.raises(SafePickleError):
        read(content[: data.draw(st.integers(0, len(content) - 1))])


OPCODES = [each.code.encode('latin1') for each in pickletools.opcodes]
soup = st.lists(st.sampled_from(OPCODES) | st.binary(min_size=1, max_size=4), max_size=40).map(b''.join)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.sampled_from([b'', b'\x80\x04', attacks.ARRAY, attacks.DTYPE]), soup)
def test_soup_of_opcodes(start, body):
    read_or_refuse(start + body + b'.')
