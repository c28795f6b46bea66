import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_utils import training_stats
from torch_utils.training_stats import Collector, report, report0

DEVICES = [
    'cpu',
    pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')),
    pytest.param('mps', marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason='needs MPS')),
]


@pytest.fixture(autouse=True)
def one_process():
    training_stats.init_multiprocessing(rank=0, sync_device=None)
    yield
    training_stats.init_multiprocessing(rank=0, sync_device=None)


def summary(collector, name):
    return collector.num(name), collector.mean(name), collector.std(name)


@pytest.mark.parametrize('device', DEVICES)
def test_mean_and_std_in_the_head(device):
    collector = Collector()
    report('a', torch.tensor([1.0], device=device))
    report('a', torch.tensor([[3.0]], device=device))
    collector.update()
    assert summary(collector, 'a') == (2, 2, 1)
    assert collector['a'] == 2


# Exact in float32 with their squares and sums, so that numpy's float64 result is the only right one.
exact = st.lists(st.lists(st.integers(-100, 100).map(lambda k: k / 4), max_size=6), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(exact)
def test_equals_numpy(reports):
    collector = Collector()
    for values in reports:
        report('a', values)
    collector.update()
    x = np.concatenate([np.asarray(values, dtype=np.float64) for values in reports])
    assert collector.num('a') == x.size
    if x.size:
        assert collector.mean('a') == pytest.approx(x.mean(), rel=1e-12, abs=1e-12)
        assert collector.std('a') == pytest.approx(x.std(), rel=1e-6, abs=1e-6)
    else:
        assert math.isnan(collector.mean('a'))


@pytest.mark.parametrize(
    ('value', 'count'),
    [
        (3, 1),
        (3.0, 1),
        (True, 1),
        (np.float32(3), 1),
        (np.broadcast_to(1.5, (2, 3)), 6),
        ([[1, 2], [3, 4]], 4),
        ([], 0),
        (torch.ones(2, requires_grad=True), 2),
    ],
    ids=repr,
)
def test_report_returns_its_value_as_it_is(value, count):
    collector = Collector()
    assert report('a', value) is value
    assert report0('a', value) is value
    collector.update()
    assert collector.num('a') == 2 * count


def test_reports_carry_no_graph():
    collector = Collector()
    x = torch.ones(2, requires_grad=True)
    report('a', x * 3)
    assert not any(t.requires_grad for t in collector._pending['a'].values())


def test_values_show_float32_rounding():
    collector = Collector()
    report('kimg', 0.128)
    collector.update()
    assert collector.mean('kimg') == 0.12800000607967377


def test_count_is_exact_beyond_float32():
    collector = Collector()
    n = 2**24 + 1
    report('a', torch.ones(1).expand(n))
    collector.update()
    assert collector.num('a') == n


def test_count_one_has_no_spread():
    collector = Collector()
    report('a', 0.1)
    collector.update()
    assert collector.std('a') == 0


def test_rounding_never_makes_the_variance_negative():
    collector = Collector()
    report('a', [0.1] * 1000)
    collector.update()
    assert collector.std('a') == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_non_finite_sum_is_nan_until_the_next_update(bad):
    collector = Collector()
    report('a', [1.0, bad])
    collector.update()
    num, mean, std = summary(collector, 'a')
    assert num == 2
    assert math.isnan(mean)
    assert math.isnan(std)

    report('a', [1.0, 3.0])
    collector.update()
    assert summary(collector, 'a') == (2, 2, 1)


@pytest.mark.parametrize('name', ['empty', 'unknown'])
def test_no_reports_is_nan(name):
    collector = Collector()
    report('empty', [])
    collector.update()
    num, mean, std = summary(collector, name)
    assert num == 0
    assert math.isnan(mean)
    assert math.isnan(std)


@pytest.mark.parametrize(('keep_previous', 'num'), [(True, 2), (False, 0)])
def test_keep_previous(keep_previous, num):
    collector = Collector(keep_previous=keep_previous)
    report('a', [1, 3])
    collector.update()
    collector.update()
    assert collector.num('a') == num
    assert collector.names() == ['a']
    assert math.isnan(collector.mean('a')) != keep_previous


def test_regex_matches_whole_names():
    collector = Collector(regex='Loss/.*')
    for name in ['Loss/loss', 'Progress/tick', 'My Loss/loss']:
        report(name, 1)
    collector.update()
    assert collector.names() == ['Loss/loss']


def test_nothing_shows_before_update():
    collector = Collector()
    report('a', 1)
    assert collector.names() == []
    assert collector.as_dict() == {}


def test_collectors_are_independent_and_begin_empty():
    early = Collector()
    report('a', [1, 3])
    late = Collector()
    report('a', 5)
    late.update()
    early.update()
    assert summary(late, 'a') == (1, 5, 0)
    assert early.num('a') == 3
    assert early.mean('a') == 3


def test_default_collector_sees_every_name():
    report('test_training_stats/default', [2, 4])
    training_stats.default_collector.update()
    assert training_stats.default_collector.mean('test_training_stats/default') == 3


def test_a_dropped_collector_is_freed():
    collector = Collector()
    watch = weakref.ref(collector)
    del collector
    gc.collect()
    assert watch() is None


def test_as_dict_keeps_the_order_of_first_reports():
    collector = Collector()
    for name, value in [('Loss/loss', [1, 3]), ('Progress/tick', 7), ('Loss/loss', [])]:
        report(name, value)
    collector.update()
    stats = collector.as_dict()
    assert stats['Loss/loss'].mean == 2
    assert json.dumps(stats) == (
        '{"Loss/loss": {"num": 2, "mean": 2.0, "std": 1.0}, "Progress/tick": {"num": 1, "mean": 7.0, "std": 0.0}}'
    )


def test_report0_counts_on_rank_0_only():
    collector = Collector()
    report0('a', 1)
    training_stats.init_multiprocessing(rank=1, sync_device=None)
    assert report0('a', 5) == 5
    report0('b', 5)
    collector.update()
    assert collector.names() == ['a', 'b']
    assert (collector.num('a'), collector.mean('a'), collector.num('b')) == (1, 1, 0)


def test_reports_from_inference_mode_add_up():
    collector = Collector()
    with torch.inference_mode():
        report('a', torch.tensor(1.0))
    report('a', torch.tensor(3.0))
    with torch.inference_mode():
        report('a', torch.tensor(5.0))
    collector.update()
    assert collector.mean('a') == 3
