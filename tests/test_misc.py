import itertools
import json
import platform
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_utils import misc

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((Path(__file__).parent / 'data' / 'edm_infinite_sampler.json').read_text())


# ----------------------------------------------------------------------------
# keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc can be told')
def test_freed_memory_is_used_again():
    """Counted in pages of memory that are new to a process; 16 to 256 MB are 4,096 to 65,536 of them."""
    script = (
        'import resource, torch\n'
        'from torch_utils import misc\n'
        'def new_pages():\n'
        '    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        '    for size in (2**22, 2**24, 2**26):\n'
        '        torch.zeros(size)\n'
        '    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n'
        'new_pages()\n'
        'before = new_pages()\n'
        'assert misc.keep_freed_memory()\n'
        'print(before, *(new_pages() for _ in range(10)))\n'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True)
    before, *after = map(int, done.stdout.split())
    assert before > 50_000
    assert min(after) < 100  # it may take some rounds until all of it has found its place


@pytest.mark.parametrize(('platform_name', 'library'), [('darwin', SimpleNamespace(mallopt=None)), ('linux', object())])
def test_memory_is_left_alone_where_the_c_library_has_no_mallopt(monkeypatch, platform_name, library):
    monkeypatch.setattr(misc.sys, 'platform', platform_name)
    monkeypatch.setattr(misc.ctypes, 'CDLL', lambda name: library)
    assert not misc.keep_freed_memory()


# ----------------------------------------------------------------------------
# constant


def test_constant_is_made_once():
    first = misc.constant([1, 2, 3])
    assert misc.constant([1, 2, 3]) is first
    assert misc.constant(np.array([1, 2, 3])) is first
    assert first.dtype == torch.float32
    assert first.tolist() == [1, 2, 3]


def test_constant_tells_its_arguments_apart():
    tensors = [
        misc.constant([0.5, 1]),
        misc.constant([0.5, 2]),
        misc.constant([0.5, 1], dtype=torch.float64),
        misc.constant([[0.5, 1]]),
        misc.constant([0.5, 1], shape=[3, 2]),
        misc.constant([0.5, 1], device='meta'),
    ]
    assert len({id(t) for t in tensors}) == len(tensors)


def test_constant_broadcasts():
    tensor = misc.constant([1, 2], shape=(3, 2))
    assert tensor.tolist() == [[1, 2]] * 3
    assert tensor.is_contiguous()


def test_constant_in_channels_last():
    tensor = misc.constant(7, shape=(2, 3, 4, 5), memory_format=torch.channels_last)
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert (tensor == 7).all()


def test_constant_like_another_tensor():
    ref = torch.zeros(3, dtype=torch.float16, device='meta')
    found = misc.const_like(ref, [1, 2], shape=[3, 2])
    assert (found.dtype, found.device, found.shape) == (torch.float16, ref.device, (3, 2))
    assert misc.const_like(ref, 1, dtype=torch.int64, device='cpu') is misc.constant(1, dtype=torch.int64)


def test_constant_from_inference_mode_serves_autograd():
    with torch.inference_mode():
        tensor = misc.constant([2, 3, 5])
    x = torch.ones(3, requires_grad=True)
    (x * tensor).sum().backward()
    assert x.grad.tolist() == [2, 3, 5]


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated:DeprecationWarning')
def test_constant_from_a_transform_serves_later_calls():
    def f(x):
        return (x * misc.constant([7, 11])).sum()

    x = torch.ones(2)
    value, slope = torch.func.jvp(f, (x,), (x,))
    assert (value.item(), slope.item()) == (18, 18)
    assert f(x).item() == 18
    assert torch.func.grad(f)(x).tolist() == [7, 11]


# ----------------------------------------------------------------------------
# is_out_of_memory


@pytest.mark.parametrize('allocate', [torch.empty, partial(np.empty, dtype=np.uint8), bytes])
def test_more_memory_than_there_is(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate(2**60)
    assert misc.is_out_of_memory(caught.value)


def test_out_of_memory_on_a_gpu():
    assert misc.is_out_of_memory(torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'))


@pytest.mark.parametrize('error', [RuntimeError('shapes differ'), OSError('out of memory'), ValueError('bad_alloc')])
def test_other_errors_are_not_for_lack_of_memory(error):
    assert not misc.is_out_of_memory(error)


# ----------------------------------------------------------------------------
# Small tools


def test_nan_to_num():
    x = torch.tensor([1, np.nan, np.inf, -np.inf])
    assert misc.nan_to_num(x, nan=0.0, posinf=1e5, neginf=-1e5).tolist() == [1, 0, 1e5, -1e5]
    misc.nan_to_num(x, posinf=2, neginf=-2, out=x)
    assert x.tolist() == [1, 0, 2, -2]


def test_symbolic_assert():
    misc.symbolic_assert(torch.tensor(True), 'fine')
    with pytest.raises(AssertionError, match='not fine'):
        misc.symbolic_assert(torch.tensor(False), 'not fine')


def test_suppress_tracer_warnings_is_selective_and_temporary():
    with misc.suppress_tracer_warnings():
        warnings.warn('tracing', torch.jit.TracerWarning, stacklevel=1)
        with pytest.raises(UserWarning):
            warnings.warn('other', UserWarning, stacklevel=1)
    with pytest.raises(torch.jit.TracerWarning):
        warnings.warn('tracing', torch.jit.TracerWarning, stacklevel=1)


@pytest.mark.parametrize('ref_shape', [[2, 3, 5], [None, 3, None], (2, None, 5)])
def test_assert_shape_accepts(ref_shape):
    misc.assert_shape(torch.zeros(2, 3, 5), ref_shape)


@pytest.mark.parametrize(
    ('ref_shape', 'message'),
    [
        ([2, 3], 'number of dimensions: got 3, expected 2'),
        ([2, 4, 5], 'dimension 1: got 3, expected 4'),
        ([None, None, 6], 'dimension 2: got 5, expected 6'),
    ],
)
def test_assert_shape_names_the_dimension(ref_shape, message):
    with pytest.raises(AssertionError, match=message):
        misc.assert_shape(torch.zeros(2, 3, 5), ref_shape)


def test_profiled_function_shows_in_traces():
    @misc.profiled_function
    def twice(x, *, plus=0):
        """Doc."""
        return 2 * x + plus

    with torch.autograd.profiler.profile() as profile:
        assert twice(3, plus=1) == 7
    assert 'twice' in {event.name for event in profile.function_events}
    assert (twice.__name__, twice.__doc__) == ('twice', 'Doc.')


# ----------------------------------------------------------------------------
# InfiniteSampler


def take(count, n, **kwargs):
    return list(itertools.islice(misc.InfiniteSampler(range(n), **kwargs), count))


def one_draw_per_image(n, seed, window_size):
    """The stream in its plainest form, to compare with."""
    rnd = np.random.RandomState(seed)
    order = np.arange(n)
    rnd.shuffle(order)
    window = round(n * window_size)
    for idx in itertools.count():
        i = idx % n
        yield order[i]
        if window >= 2:
            j = (i - rnd.randint(window)) % n
            order[i], order[j] = order[j], order[i]


@pytest.mark.parametrize(
    'case', GOLDEN, ids=lambda c: f'n{c["n"]}-seed{c["seed"]}-rank{c["rank"]}of{c["num_replicas"]}'
)
def test_sampler_golden(case):
    kwargs = {key: case[key] for key in ('seed', 'rank', 'num_replicas')}
    assert take(len(case['indices']), case['n'], **kwargs) == case['indices']


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0, 0.1, 0.5, 1]))
def test_sampler_equals_one_draw_per_image(n, seed, window_size):
    expected = list(itertools.islice(one_draw_per_image(n, seed, window_size), 3 * n + 2))
    assert take(3 * n + 2, n, seed=seed, window_size=window_size) == expected


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_sampler_from_a_position_is_the_tail(data):
    n = data.draw(st.integers(1, 30), 'n')
    num_replicas = data.draw(st.integers(1, 5), 'num_replicas')
    rank = data.draw(st.integers(0, num_replicas - 1), 'rank')
    start = data.draw(st.integers(0, 100), 'start')
    kwargs = {'seed': data.draw(st.integers(0, 99), 'seed'), 'shuffle': data.draw(st.booleans(), 'shuffle')}

    stream = take(start + 40 * num_replicas, n, **kwargs)
    expected = [index for k, index in enumerate(stream) if k >= start and k % num_replicas == rank]
    resumed = take(len(expected), n, rank=rank, num_replicas=num_replicas, start_idx=start, **kwargs)
    assert resumed == expected


def test_sampler_without_shuffle_counts():
    assert take(7, 3, shuffle=False) == [0, 1, 2, 0, 1, 2, 0]


def test_sampler_without_window_repeats_one_order():
    first, second = take(5, 5, window_size=0), take(10, 5, window_size=0)[5:]
    assert first == second
    assert sorted(first) == [0, 1, 2, 3, 4]


def test_sampler_starts_anew_with_each_iterator():
    sampler = misc.InfiniteSampler(range(10))
    assert list(itertools.islice(sampler, 15)) == list(itertools.islice(sampler, 15))


def test_sampler_serves_a_data_loader():
    data = torch.utils.data.TensorDataset(torch.arange(10))
    sampler = misc.InfiniteSampler(data)
    loader = torch.utils.data.DataLoader(data, sampler=sampler, batch_size=6)
    batches = [batch.tolist() for (batch,) in itertools.islice(loader, 5)]
    assert list(itertools.chain.from_iterable(batches)) == GOLDEN[0]['indices']


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'dataset': []}, 'empty'),
        ({'rank': 2, 'num_replicas': 2}, r'rank must be in \[0, num_replicas=2\), got 2'),
        ({'rank': -1}, 'rank'),
        ({'num_replicas': 0}, 'num_replicas=0'),
        ({'window_size': 1.5}, 'window_size'),
        ({'start_idx': -1}, 'start_idx'),
    ],
)
def test_sampler_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        misc.InfiniteSampler(**{'dataset': range(4), **kwargs})


# ----------------------------------------------------------------------------
# Parameters and buffers


class Net(torch.nn.Module):
    def __init__(self, width=3, dtype=torch.float32):
        super().__init__()
        self.first = torch.nn.Linear(2, width, dtype=dtype)
        self.norm = torch.nn.BatchNorm1d(width, dtype=dtype)
        self.skip = torch.nn.Identity()
        self.unused = torch.nn.Linear(1, 4)

    def forward(self, x):
        return self.skip(self.norm(self.first(x)))


NET_NAMES = [
    *('first.weight', 'first.bias', 'norm.weight', 'norm.bias', 'unused.weight', 'unused.bias'),
    *('norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked'),
]


def test_params_and_buffers():
    net = Net()
    named = misc.named_params_and_buffers(net)
    assert [name for name, _tensor in named] == NET_NAMES
    tensors = misc.params_and_buffers(net)
    assert all(a is b for a, (_name, b) in zip(tensors, named, strict=True))


def test_copy_keeps_dtype_and_requires_grad():
    src, dst = Net(), Net(dtype=torch.float64).requires_grad_(False)
    src.norm.running_mean.fill_(5)
    misc.copy_params_and_buffers(src, dst, require_all=True)
    assert dst.first.weight.dtype == torch.float64
    assert not dst.first.weight.requires_grad
    assert torch.equal(dst.first.weight.float(), src.first.weight)
    assert dst.norm.running_mean.tolist() == [5, 5, 5]

    misc.copy_params_and_buffers(dst, src)
    assert src.first.weight.requires_grad
    assert src.first.weight.grad_fn is None


def test_copy_ignores_missing_names_unless_told():
    src, dst = Net(), Net()
    del src.unused
    before = dst.unused.weight.clone()
    misc.copy_params_and_buffers(src, dst)
    assert torch.equal(dst.first.weight, src.first.weight)
    assert torch.equal(dst.unused.weight, before)
    with pytest.raises(KeyError, match=r'Net lacks unused.weight, unused.bias'):
        misc.copy_params_and_buffers(src, dst, require_all=True)
    misc.copy_params_and_buffers(dst, src, require_all=True)  # names that only the source has are no error


def test_copy_refuses_other_shapes_and_writes_nothing():
    src, dst = Net(width=1), Net(width=3)
    before = {name: tensor.clone() for name, tensor in misc.named_params_and_buffers(dst)}
    with pytest.raises(ValueError, match=r'first.weight: cannot copy shape \[1, 2\] to shape \[3, 2\]'):
        misc.copy_params_and_buffers(src, dst)
    assert all(torch.equal(before[name], tensor) for name, tensor in misc.named_params_and_buffers(dst))


@pytest.mark.parametrize('sync', [False, True])
def test_ddp_sync_leaves_plain_modules_alone(sync):
    net = torch.nn.Linear(1, 1)
    with misc.ddp_sync(net, sync):
        net(torch.ones(2, 1)).sum().backward()
    assert net.weight.grad.item() == 2


def test_check_ddp_consistency_of_one_process():
    misc.check_ddp_consistency(Net())


# ----------------------------------------------------------------------------
# print_module_summary


def table_rows(text):
    """First cell → the other cells, cells being two spaces apart."""
    rows = [[cell.strip() for cell in line.split('  ') if cell.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_summary_table(capsys):
    net = Net().eval()
    x = torch.ones(4, 2)
    out = misc.print_module_summary(net, [x])
    assert torch.equal(out, net(x))
    assert table_rows(capsys.readouterr().out) == {
        'Net': ['Parameters', 'Buffers', 'Output shape', 'Datatype'],
        '-' * 6: ['-' * 10, '-' * 7, '-' * 12, '-' * 8],
        'first': ['9', '-', '[4, 3]', 'float32'],
        'norm': ['6', '7', '[4, 3]', 'float32'],
        'unused': ['8', '-', '-', '-'],
        'Total': ['23', '7', '-', '-'],
    }


def test_summary_leaves_no_hooks_even_on_error(capsys):
    net = Net()
    with pytest.raises(RuntimeError):
        misc.print_module_summary(net, [torch.ones(4, 5)])
    assert not any(sub._forward_hooks for sub in net.modules())


@pytest.mark.parametrize('max_nesting', [0, 1, 2])
def test_summary_counts_everything_at_any_nesting(capsys, max_nesting):
    net = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 2)), torch.nn.Linear(2, 3))
    misc.print_module_summary(net, [torch.ones(1, 1)], max_nesting=max_nesting)
    rows = table_rows(capsys.readouterr().out)
    counted = [int(cells[0]) for name, cells in rows.items() if name != 'Total' and cells[0].isdigit()]
    assert sum(counted) == 2 + 4 + 9
    assert rows['Total'][0] == '15'
    assert ('0.1' in rows) == (max_nesting == 2)


def test_summary_counts_shared_tensors_once(capsys):
    layer = torch.nn.Linear(2, 2)
    tied = torch.nn.Linear(2, 2)
    tied.weight = layer.weight
    misc.print_module_summary(torch.nn.Sequential(layer, tied), [torch.ones(1, 2)])
    rows = table_rows(capsys.readouterr().out)
    assert (rows['0'][0], rows['1'][0], rows['Total'][0]) == ('6', '2', '8')


def test_summary_shows_redundant_modules_on_request(capsys):
    misc.print_module_summary(Net().eval(), [torch.ones(4, 2)], skip_redundant=False)
    rows = table_rows(capsys.readouterr().out)
    assert rows['skip'] == rows['<top-level>'] == ['-', '-', '[4, 3]', 'float32']


def test_summary_shows_each_output(capsys):
    class Split(torch.nn.Module):
        def forward(self, x):
            return {'half': x.half(), 'rest': (x[:1], 'text')}

    misc.print_module_summary(Split(), [torch.ones(4, 2)])
    rows = table_rows(capsys.readouterr().out)
    assert rows['<top-level>'] == ['-', '-', '[4, 2]', 'float16']
    assert rows['<top-level>:1'] == ['-', '-', '[1, 2]', 'float32']
