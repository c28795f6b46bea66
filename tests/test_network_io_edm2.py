"""EDM2's network files: written, read without running what is in them, told from others, and known by name."""

import math
import os
import pickle
import sys

import click.testing
import foreign_edm
import golden_edm2
import numpy as np
import pytest
import torch
from attacks import Reduced, Stored, meta_of
from golden_edm2 import CASES, assert_matches, inputs

import sampler_2nd
from dnnlib import EasyDict, published
from torch_utils import network_io
from torch_utils.network_io import NetworkFileError
from training import loss, networks
from training.networks_edm2 import Precond

pytestmark = pytest.mark.usefixtures('one_thread')

EDM2_SOURCE = '7298880db4bf955d2941496cce3a554a970867b3eae4d22276cb1c293c131fa2'


@pytest.fixture
def net():
    return golden_edm2.network('pixel_cond').requires_grad_(False)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'net.pkl')


def inspect(path):
    """(exit status, {title: text})"""
    result = click.testing.CliRunner().invoke(network_io.main, ['inspect', path])
    return result.exit_code, dict(line.split(maxsplit=1) for line in result.output.splitlines()[1:])


@pytest.mark.parametrize('ending', network_io.ENDINGS)
@pytest.mark.parametrize('name', CASES)
def test_round_trip(tmp_path, name, ending, capsys):
    net, path = golden_edm2.network(name), str(tmp_path / f'net{ending}')
    network_io.save_network(net, path, dataset_kwargs={'path': 'digits.zip'}, loss_fn=loss.EDMLoss())
    found = network_io.load_network(path)
    assert capsys.readouterr() == ('', '')
    assert type(found) is Precond
    assert found.init_kwargs == CASES[name]['kwargs']
    assert list(found.state_dict()) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), net.state_dict().values(), strict=True))
    assert not found.training
    assert not any(param.requires_grad for param in found.parameters())
    assert_matches(found(*inputs(found)), CASES[name]['D'])


def test_weights_in_half_precision_become_float32(path, net):
    network_io.save_network(net, path)
    size = os.path.getsize(path)
    network_io.save_network(net.half(), path)
    assert os.path.getsize(path) < 0.75 * size
    found = network_io.load_network(path)
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32}
    assert_matches(found(*inputs(found)), CASES['pixel_cond']['D_after_rounding_all_weights_and_buffers_to_float16'])


def test_our_pickles_load_in_another_checkout(tmp_path, net):
    network_io.save_network(net, tmp_path / 'net.pkl')
    here = net(torch.ones(1, 3, 16, 16), torch.tensor(2.0)).double().sum().item()
    assert foreign_edm.plain_output(tmp_path / 'net.pkl', [1, 3, 16, 16]) == pytest.approx(here, rel=1e-5)


# ----------------------------------------------------------------------------
# Files of EDM2.


def array(values, core):
    """A numpy array of float32 as numpy 1 (`core`) or numpy 2 (`_core`) pickles it."""
    function, args, state = np.array(values, np.float32).__reduce__()
    return StoredArray(f'numpy.{core}.multiarray', function.__name__, args, state)


class StoredArray:
    def __init__(self, module, name, args, state):
        self.module, self.name, self.args, self.state = module, name, args, state


class EDM2Pickler(pickle._Pickler):
    """Writes numpy's function under the module where the given numpy has it."""

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, StoredArray):
            return super().save(obj, save_persistent_id)
        for each in (obj.module, obj.name):
            super().save(each)
        self.write(pickle.STACK_GLOBAL)
        super().save(obj.args)
        self.write(pickle.REDUCE)
        super().save(obj.state)
        self.write(pickle.BUILD)


def write_snapshot(path, net, source, core='core'):
    """A snapshot as EDM2's training writes it: float16, an encoder with arrays, EasyDicts; `source` as its text."""

    def persistent(class_name, state):
        fields = {'type': 'class', 'version': 6, 'module_src': source, 'class_name': class_name}
        return Stored({**fields, 'state': {**state, '_init_args': (), '_init_kwargs': EasyDict()}})

    scale, bias = array([0.11990407, 0.10822511], core), array([-0.69664264, -0.3517316], core)
    encoder = {'vae_name': 'stabilityai/sd-vae-ft-mse', 'scale': scale, 'bias': bias, 'batch_size': 8, '_vae': None}
    meta = meta_of(net.half())
    snapshot = EasyDict(
        encoder=persistent('StabilityVAEEncoder', encoder),
        dataset_kwargs=EasyDict(class_name='training.dataset.ImageFolderDataset', path='/data/x.zip', use_labels=True),
        loss_fn=persistent('EDM2Loss', {'P_mean': -0.4, 'P_std': 1.0, 'sigma_data': 0.5}),
        ema=Stored({**meta, 'module_src': source}),
    )
    with open(path, 'wb') as file:
        EDM2Pickler(file, protocol=4).dump(snapshot)


@pytest.mark.parametrize('core', ['core', '_core'])
def test_a_snapshot_of_edm2_is_read_without_its_code(path, net, core, tmp_path, monkeypatch, capsys):
    source = f'open({str(tmp_path / "mark")!r}, "w").close()\n'
    write_snapshot(path, net, source, core)
    before = set(sys.modules)
    found = network_io.load_network(path)
    assert set(sys.modules) == before
    assert_matches(found(*inputs(found)), CASES['pixel_cond']['D_after_rounding_all_weights_and_buffers_to_float16'])
    [warning] = capsys.readouterr().err.splitlines()
    digest = network_io._digest(source)
    assert f'the source text of Precond (SHA-256 {digest}) is unknown and is not run' in warning
    assert warning.endswith('the network does what training.networks_edm2.Precond does')
    monkeypatch.setitem(network_io.KNOWN_SOURCES, digest, 'another text of EDM2')
    network_io.load_network(path)
    assert capsys.readouterr() == ('', '')
    assert not (tmp_path / 'mark').exists()


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_arrays_beside_a_network(path, net, protocol):
    with open(path, 'wb') as file:
        pickle.dump({'encoder': {'scale': np.ones(4, np.float32)}, 'ema': net}, file, protocol)
    assert type(network_io.load_network(path)) is Precond


def test_the_published_text_is_known():
    assert network_io.origin(EDM2_SOURCE) == 'EDM2, training/networks_edm2.py'


def test_inspect(path, net):
    network_io.save_network(net, path)
    status, rows = inspect(path)
    assert (status, rows['unusual'], rows['class']) == (0, 'nothing', 'Precond (training.networks_edm2)')
    assert rows['source'].endswith('this checkout')
    assert '181,451 with buffers, in 63 tensors, float32' in rows['parameters']
    write_snapshot(path, net, 'text')
    status, rows = inspect(path)
    assert (status, rows['class']) == (1, 'Precond (training.networks_edm2)')
    assert rows['beside'] == 'it   encoder: StabilityVAEEncoder, dataset_kwargs: dict, loss_fn: EDM2Loss'
    assert 'float16' in rows['parameters']
    assert rows['unusual'].startswith('source text unknown')


def test_a_class_of_the_same_name_is_told_by_its_weights(path):
    """Another program's `Precond`, over another network or with another embedding."""
    edm = networks.EDMPrecond(8, 1, model_type='SongUNet', model_channels=8, channel_mult=[1], num_blocks=1)
    with open(path, 'wb') as file:
        pickle.dump(Stored({**meta_of(edm), 'class_name': 'Precond'}), file)
    with pytest.raises(NetworkFileError, match=r'this Precond differs from the built-in one, training.networks_edm2.P'):
        network_io.load_network(path)
    net = golden_edm2.network('pixel_cond')
    del net.logvar_fourier.phases
    network_io.save_network(net, path)
    with pytest.raises(NetworkFileError, match=r'Missing key.*logvar_fourier\.phases'):
        network_io.load_network(path)


@pytest.mark.parametrize('kwargs', [{'num_blocks': 30000}, {'model_channels': 30000}, {'channel_mult': 64 * [1]}])
def test_arguments_out_of_proportion(path, net, kwargs):
    meta = meta_of(net)
    meta['state']['_init_kwargs'] = {**meta['state']['_init_kwargs'], **kwargs}
    with open(path, 'wb') as file:
        pickle.dump(Stored(meta), file)
    with pytest.raises(NetworkFileError, match='ask for more weights than the file has'):
        network_io.load_network(path)


def test_arrays_do_not_hide_calls(path, net, tmp_path):
    evil = Reduced(os.system, f'touch {tmp_path / "mark"}')
    with open(path, 'wb') as file:
        pickle.dump({'encoder': evil, 'ema': net}, file)
    with pytest.raises(NetworkFileError, match='wants to call'):
        network_io.load_network(path)
    assert not (tmp_path / 'mark').exists()


def test_a_network_without_a_range_has_all_noise_levels(net):
    assert not any(hasattr(net, name) for name in ('sigma_min', 'sigma_max', 'round_sigma'))
    levels = sampler_2nd.noise_levels(net, 3, sigma_min=1e-6, sigma_max=1e6, rho=7)
    assert levels == pytest.approx([1e6, ((1e6 ** (1 / 7) + 1e-6 ** (1 / 7)) / 2) ** 7, 1e-6, 0])
    assert math.isfinite(float(net(torch.ones(1, 3, 16, 16), 1e-6).sum()))


# ----------------------------------------------------------------------------
# Names.

ROOT = 'https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions'


@pytest.mark.parametrize(
    ('name', 'file', 'guide'),
    [
        ('edm2-img512-xs-fid', 'edm2-img512-xs-2147483-0.135', None),
        ('edm2-img512-xxl-fid', 'edm2-img512-xxl-0939524-0.070', None),
        ('edm2-img512-l-dino', 'edm2-img512-l-1879048-0.155', None),
        ('edm2-img64-xl-fid', 'edm2-img64-xl-0671088-0.040', None),
        ('edm2-img512-m-guid-dino', 'edm2-img512-m-2147483-0.015', 'edm2-img512-xs-uncond-2147483-0.015'),
        ('edm2-img512-xl-guid-fid', 'edm2-img512-xl-1342177-0.020', 'edm2-img512-xs-uncond-2147483-0.020'),
        ('edm2-img512-xxl-autog-dino', 'edm2-img512-xxl-0939524-0.130', 'edm2-img512-m-0268435-0.205'),
        ('edm2-img512-s-uncond-autog-fid', 'edm2-img512-s-uncond-2147483-0.070', 'edm2-img512-xs-uncond-0134217-0.110'),
        ('edm2-img64-s-autog-fid', 'edm2-img64-s-1073741-0.045', 'edm2-img64-xs-0134217-0.110'),
    ],
)
def test_published_names(name, file, guide):
    assert name in published.NETWORKS
    assert published.PUBLISHED[name] == published.PUBLISHED[file] == published.PublishedFile(f'{ROOT}/{file}.pkl')
    assert published.GUIDES.get(name) == guide
    assert guide is None or published.PUBLISHED[guide].url == f'{ROOT}/{guide}.pkl'


def test_networks_open_by_every_published_name(path, net, monkeypatch):
    network_io.save_network(net, path)
    names = [name for name in published.PUBLISHED if name.startswith('edm2-')]
    assert len(names) == 87
    for name in names:
        assert published.PUBLISHED[name].url.startswith(ROOT)
        monkeypatch.setitem(published.PUBLISHED, name, published.PublishedFile(f'file://{path}'))
        assert type(network_io.load_network(name)) is Precond


def test_a_misspelt_name_is_helped():
    with pytest.raises(FileNotFoundError, match='known names are edm2-img512-xxl-fid, '):
        network_io.load_network('edm2-img512-xxl-fdi')
