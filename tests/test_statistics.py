"""Moments of features, and the files of reference statistics that others write."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import statistics
from metrics.statistics import Moments, Reference, ReferenceFileError, read_reference, write_reference


def moments_of(*batches):
    result = Moments(batches[0].shape[1])
    for batch in batches:
        result.add(batch)
    return result


def assert_same(a, b, rel=1e-12):
    assert a.n == b.n
    assert torch.allclose(a.mean, b.mean, rtol=rel, atol=1e-14)
    assert torch.allclose(a.scatter, b.scatter, rtol=rel, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 10**6))
def test_moments_do_not_depend_on_the_batches(sizes, seed):
    features = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed)).double()
    batches = features.split(sizes)
    joined = moments_of(*batches)
    assert_same(joined, moments_of(features))
    parts = [moments_of(batch) for batch in batches]
    right = Moments(3)
    for part in reversed(parts):
        part.merge(right)
        right = part
    assert_same(right, joined)


def test_moments_are_those_of_numpy_and_bear_a_large_mean():
    features = np.random.RandomState(0).randn(400, 5)
    far = moments_of(*torch.from_numpy(features + 1e6).split(64))
    assert np.allclose(far.covariance().numpy(), np.cov(features.T), rtol=1e-8)
    assert np.allclose(far.mean.numpy(), features.mean(0) + 1e6, rtol=1e-15)


def test_a_covariance_needs_two():
    with pytest.raises(ValueError, match='two images'):
        moments_of(torch.randn(1, 3)).covariance()


@pytest.fixture
def example():
    features = np.random.RandomState(1).randn(9, 3)
    return features.mean(0), np.cov(features.T), features


def test_our_files_come_back_and_begin_with_mu_and_sigma(tmp_path, example):
    mu, sigma, features = example
    written = Reference(mu, sigma, features.astype(np.float32), 'pixels', 'abc', 'none', 9)
    path = str(tmp_path / 'new' / 'ref.npz')
    write_reference(written, path)
    read = read_reference(path)
    for name in ('mu', 'sigma', 'features'):
        assert np.array_equal(getattr(read, name), getattr(written, name))
    assert (read.detector, read.weights_sha256, read.resize, read.num_images) == ('pixels', 'abc', 'none', 9)
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files[:2] == ['mu', 'sigma']
        assert archive['mu'].dtype == archive['sigma'].dtype == np.float64


def write_npz(path, **arrays):
    np.savez(path, **arrays)


@pytest.mark.parametrize('kind', ['edm', 'adm', 'edm2'])
def test_files_of_others(tmp_path, example, kind):
    """EDM, pytorch-fid and clean-fid: mu and sigma; ADM: more beside them; EDM2: a pickle."""
    mu, sigma, _ = example
    path = tmp_path / 'ref'
    if kind == 'edm2':
        record = {'num_images': 9, 'fid': {'mu': mu, 'sigma': sigma}, 'fd_dinov2': {'mu': mu, 'sigma': sigma}}
        path.write_bytes(pickle.dumps(record))
    else:
        more = {'mu_s': mu[:2], 'sigma_s': sigma[:2, :2], 'arr_0': np.zeros([2, 4, 4, 3], np.uint8)}
        with open(path, 'wb') as file:
            np.savez(file, mu=mu, sigma=sigma, **(more if kind == 'adm' else {}))
    reference = read_reference(str(path))
    assert np.array_equal(reference.mu, mu)
    assert np.array_equal(reference.sigma, sigma)
    assert reference.detector == statistics.INCEPTION
    assert reference.features is None


class Malice:
    def __reduce__(self):
        return print, ('this must not run',)


def npz(**arrays):
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


@pytest.mark.parametrize(
    ('data', 'problem'),
    [
        (b'', 'neither'),
        (b'<html>', 'neither'),
        (b'PK\x03\x04 cut off', 'zip'),
        (npz(mu=np.zeros(3)), "no 'sigma'"),
        (npz(mu=np.zeros(3), sigma=np.eye(4)), 'do not go together'),
        (npz(mu=np.full(3, np.nan), sigma=np.eye(3)), 'finite'),
        (npz(mu=np.zeros(3, int), sigma=np.eye(3)), 'finite numbers'),
        (npz(mu=np.array([Malice()] * 3), sigma=np.eye(3)), 'mu.npy: this is no array of numbers or text'),
        (npz(mu=np.zeros(3), sigma=np.eye(3), note=np.array('{')), 'Expecting'),
        (pickle.dumps({'fid': {'mu': Malice()}}), 'print'),
        (pickle.dumps({'fd_dinov2': {}}), 'fid'),
        (pickle.dumps([1]), 'holds no reference'),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, capsys, data, problem):
    path = tmp_path / 'ref.npz'
    path.write_bytes(data)
    with pytest.raises(ReferenceFileError, match=problem) as error:
        read_reference(str(path))
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)
    assert capsys.readouterr().out == ''


def test_the_note_is_json(tmp_path, example):
    mu, sigma, _ = example
    write_reference(Reference(mu, sigma, detector='pixels'), str(tmp_path / 'ref.npz'))
    with np.load(tmp_path / 'ref.npz') as archive:
        assert json.loads(str(archive['note']))['detector'] == 'pixels'
