"""generate.py: EDM's numbers, the command line with its errors, and images that depend on their seeds only."""

import copy
import inspect
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import click
import numpy as np
import PIL.Image
import pytest
import torch
from denoisers import reference_draws
from generate_here import run

import dnnlib
import generate
import sampler_2nd
from sampling import choose, draw, edm
from sampling.networks import set_precision
from training.networks import EDMPrecond, Linear

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / 'tests' / 'data' / 'edm_samplers.json').read_text())
SONG = {'model_type': 'SongUNet', 'model_channels': 8, 'channel_mult': [1, 2], 'num_blocks': 1, 'attn_resolutions': [4]}
DISCRETIZATIONS = ['vp', 've', 'iddpm', 'edm']


def run_ok(*args):
    outcome = run(*args)
    assert outcome.status == 0, outcome.err
    return outcome


def pictures(folder):
    """{name below `folder`: uint8 array}; nothing but PNG files may be there, and the record of how they were made."""
    found = sorted(path for path in Path(folder).rglob('*') if path.is_file() and path.name != 'generate.json')
    return {str(path.relative_to(folder)): np.asarray(PIL.Image.open(path)) for path in found}


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ----------------------------------------------------------------------------
# Command line: files.


def test_files_names_and_modes(network_files, tmp_path):
    run_ok(f'--outdir={tmp_path}/grey', f'--network={network_files}/grey.pkl', '--seeds=3,1000-1001', '--steps=1')
    grey = pictures(tmp_path / 'grey')
    assert list(grey) == ['000003.png', '001000.png', '001001.png']
    assert all(image.shape == (8, 8) and image.dtype == np.uint8 for image in grey.values())
    network = f'--network={network_files}/rgb.pkl'
    run_ok(f'--outdir={tmp_path}/rgb', network, '--seeds=3,999-1000,1234567', '--steps=1', '--subdirs')
    rgb = pictures(tmp_path / 'rgb')
    assert list(rgb) == ['000000/000003.png', '000000/000999.png', '001000/001000.png', '1234000/1234567.png']
    assert all(image.shape == (8, 8, 3) and image.std() > 5 for image in rgb.values())


def test_png_holds_the_sampled_numbers(network_files, digits, tmp_path):
    run_ok(f'--outdir={tmp_path}', f'--network={network_files}/digits.pkl', '--seeds=4', '--steps=3', '--S_churn=2')
    latent, class_idx, noises = reference_draws(4, [1, 8, 8], 3, 3)
    label, noise = torch.eye(3)[[class_idx]], iter(noises)
    x = edm.edm_sampler(digits, latent[None], label, lambda x: next(noise)[None], num_steps=3, S_churn=2)
    expected = np.trunc(np.clip(127.5 * x.numpy() + 128, 0, 255))[0, 0]
    assert len(np.unique(expected)) > 10
    assert np.array_equal(pictures(tmp_path)['000004.png'], expected)


def test_a_second_run_replaces_the_files(network_files, tmp_path):
    for _ in range(2):
        args = (f'--outdir={tmp_path}/new/deep', f'--network={network_files}/grey.pkl', '--seeds=0,0', '--steps=2')
        run_ok(*args)
    assert list(pictures(tmp_path)) == ['new/deep/000000.png']


def test_classes_make_different_images(network_files, tmp_path):
    for class_idx in range(3):
        outdir = f'--outdir={tmp_path}/{class_idx}'
        run_ok(outdir, f'--network={network_files}/digits.pkl', '--seeds=0', '--steps=4', f'--class={class_idx}')
    images = [pictures(tmp_path / str(class_idx))['000000.png'].astype(int) for class_idx in range(3)]
    assert all(abs(images[i] - images[j]).max() > 5 for i, j in [(0, 1), (0, 2), (1, 2)])


@pytest.fixture
def sampler_arguments(monkeypatch):
    """Put recorders in the place of the samplers; a list of (name, keyword arguments)."""
    calls = []

    def recorder(name):
        def record(net, latents, labels, **kwargs):
            calls.append((name, kwargs))
            return torch.zeros(latents.shape)

        return record

    for name, row in choose.SAMPLERS.items():
        monkeypatch.setitem(choose.SAMPLERS, name, row._replace(function=recorder(name)))
    return calls


def options_of(calls):
    return [(name, {k: v for k, v in kwargs.items() if k not in ('randn_like', 'callback')}) for name, kwargs in calls]


@pytest.mark.parametrize('batch', [None, 1, 20])
def test_default_values(network_files, tmp_path, monkeypatch, sampler_arguments, batch):
    """All options have defaults but --outdir. `work_done` has nothing to count for a sampler without calls."""
    network = next(param for param in generate.main.params if param.name == 'network_pkl')
    monkeypatch.setattr(network, 'default', str(network_files / 'grey.pkl'))
    run_ok(f'--outdir={tmp_path}', *([] if batch is None else [f'--batch={batch}']))
    assert list(pictures(tmp_path)) == [f'{seed:06d}.png' for seed in range(64)]
    assert options_of(sampler_arguments) == [('heun', {'num_steps': 18})] * {None: 1, 1: 64, 20: 4}[batch]


@pytest.mark.parametrize('name', ['edm_sampler', 'ablation_sampler'])
def test_defaults_of_the_samplers_are_those_of_edm(name):
    defaults = {key: p.default for key, p in inspect.signature(getattr(edm, name)).parameters.items()}
    expected = {'class_labels': None, 'randn_like': torch.randn_like, 'num_steps': 18, 'rho': 7, 'callback': None}
    expected |= {'S_churn': 0, 'S_min': 0, 'S_max': math.inf, 'S_noise': 1}
    if name == 'edm_sampler':
        expected |= {'sigma_min': 0.002, 'sigma_max': 80, 'init': None, 'sigmas': None}
    else:
        expected |= {'sigma_min': None, 'sigma_max': None, 'solver': 'heun', 'discretization': 'edm', 'alpha': 1}
        expected |= {'schedule': 'linear', 'scaling': 'none', 'epsilon_s': 1e-3, 'C_1': 1e-3, 'C_2': 8e-3, 'M': 1000}
    del defaults['net'], defaults['latents']
    assert defaults == expected


def test_shipped_network_is_the_default():
    network = next(param for param in generate.main.params if param.name == 'network_pkl')
    assert network.default == str(ROOT / 'ckpts' / 'edm-mnist-32x32-cond-vp.pkl')


def test_names_of_version_0_1_are_still_here():
    names = 'edm_sampler ablation_sampler StackedRandomGenerator generate_images split_seeds to_uint8 parse_int_list'
    names += ' classes_of denoised_frames check_network set_precision work_done vp_curve Curve load_network Networks'
    assert all(callable(getattr(generate, name)) for name in names.split())
    assert generate.SHIPPED_NETWORK.is_file()
    assert generate.edm_sampler is edm.edm_sampler
    with pytest.raises(AttributeError, match='no_such_name'):
        _ = generate.no_such_name


COMMON = {'sigma_min': 0.01, 'sigma_max': 70.0, 'rho': 5.0, 'S_min': 0.1, 'S_max': 50.0, 'S_noise': 1.01}
COMMON_ARGS = [f'--{name}={value}' for name, value in COMMON.items()]


@pytest.mark.parametrize(
    ('args', 'sampler', 'expected'),
    [
        ([], 'heun', {}),
        (['--S_churn=40'], 'heun', {'S_churn': 40}),
        (['--sampler=heun', '--S_churn=40'], 'heun', {'S_churn': 40}),
        (['--randn_like=db', '--S_noise=-1', '--S_max=inf'], 'heun', {'S_noise': -1, 'S_max': math.inf}),
        (['--solver=euler'], 'ablation', {'solver': 'euler'}),
        (['--sampler=heun', '--solver=euler'], 'ablation', {'solver': 'euler'}),
        (['--sampler=ablation'], 'ablation', {}),
        (['--disc=vp', '--S_churn=3'], 'ablation', {'discretization': 'vp', 'S_churn': 3}),
        (['--schedule=ve'], 'ablation', {'schedule': 've'}),
        (['--scaling=none'], 'ablation', {'scaling': 'none'}),
        (['--sampler=taylor'], 'taylor', {}),
        (['--randn_like=ddb'], 'taylor', {}),
        (['--randn_like=ddb', '--scheme=taylor', '--eta=0.5'], 'taylor', {'eta': 0.5}),
        (['--randn_like=ddb', '--scheme=rk', '--eta=0', '--S_max=9'], 'rk', {'eta': 0, 'S_max': 9}),
        (['--sampler=rk', '--eta=0', '--S_max=9'], 'rk', {'eta': 0, 'S_max': 9}),
        (['--sampler=euler', '--eta=0'], 'euler', {'eta': 0}),
    ],
)
def test_options_reach_the_sampler(network_files, tmp_path, sampler_arguments, args, sampler, expected):
    common = (f'--outdir={tmp_path}', f'--network={network_files}/grey.pkl', '--seeds=0', '--steps=7')
    run_ok(*common, *COMMON_ARGS, *args)
    assert options_of(sampler_arguments) == [(sampler, {'num_steps': 7} | COMMON | expected)]
    assert list(pictures(tmp_path)) == ['000000.png']


@pytest.mark.parametrize(
    ('args', 'calls', 'jvp_calls'),
    [
        (['--steps=18'], 35, 0),
        (['--steps=18', '--S_churn=80', '--S_max=1', '--randn_like=db'], 35, 0),
        (['--steps=18', '--solver=euler'], 18, 0),
        (['--steps=1'], 1, 0),
        (['--steps=40', '--randn_like=ddb', '--rho=3'], 40, 39),
        (['--steps=40', '--randn_like=ddb', '--scheme=rk'], 40, 0),
        (['--steps=1', '--randn_like=ddb'], 1, 0),
    ],
)
def test_reported_work(network_files, tmp_path, args, calls, jvp_calls):
    """Two batches, so that a sum in the place of the cost per image would show."""
    common = (f'--outdir={tmp_path}', f'--network={network_files}/grey.pkl', '--seeds=0-1', '--batch=1')
    outcome = run_ok(*common, *args)
    assert f'{calls} network calls, {jvp_calls} of them with a JVP' in outcome.out
    assert f'Saved in {tmp_path}' in outcome.out


def test_ddb_images_are_those_of_the_second_order_sampler(network_files, digits, tmp_path):
    args = ['--randn_like=ddb', '--steps=6', '--eta=0.7', '--S_min=0.05', '--S_max=20', '--rho=3']
    run_ok(f'--outdir={tmp_path}', f'--network={network_files}/digits.pkl', '--seeds=8', *args)
    latent, class_idx, noises = reference_draws(8, [1, 8, 8], 3, 10)
    noise = iter(noises)
    x = sampler_2nd.ito_taylor_sampler(
        digits,
        latent[None],
        torch.eye(3)[[class_idx]],
        lambda x: next(noise)[None],
        num_steps=6,
        eta=0.7,
        S_min=0.05,
        S_max=20,
        rho=3,
    )
    assert next(noise, None) is None
    assert np.array_equal(pictures(tmp_path)['000008.png'], draw.to_uint8(x)[0, :, :, 0])


@pytest.mark.parametrize(
    ('network', 'line', 'expected'),
    [
        (
            'digits',
            '--seeds=0 --batch=1 --steps=18 --S_churn=80 --S_max=1 --randn_like=db',
            ['000000.png'],
        ),
        (
            'digits',
            '--batch=500 --seeds=999-1001 --steps=40 --randn_like=ddb --rho=3 --subdirs',
            ['000000/000999.png', '001000/001000.png', '001000/001001.png'],
        ),
        (
            'grey',
            '--batch=250 --seeds=0-1 --steps=84 --randn_like=ddb --rho=3 --subdirs',
            ['000000/000000.png', '000000/000001.png'],
        ),
        (
            'rgb',
            '--batch=100 --seeds=0-1 --steps=80 --rho=3 --subdirs --class=164 --S_max=5.0',
            ['000000/000000.png', '000000/000001.png'],
        ),
    ],
)
def test_documented_commands(network_files, tmp_path, network, line, expected):
    run_ok(f'--outdir={tmp_path}', f'--network={network_files}/{network}.pkl', *line.split())
    found = pictures(tmp_path)
    assert list(found) == expected
    assert all(image.std() > 5 for image in found.values())


# ----------------------------------------------------------------------------
# An image depends on its seed only.


@pytest.mark.parametrize('mode', [['--S_churn=20'], ['--randn_like=ddb'], ['--randn_like=ddb', '--scheme=rk']])
def test_an_image_does_not_depend_on_its_batch(network_files, tmp_path, mode):
    common = (f'--network={network_files}/digits.pkl', '--steps=8', *mode)
    for name, args in [
        ('alone', ['--seeds=5,6,7', '--batch=1']),
        ('three', ['--seeds=5-7']),
        ('order', ['--seeds=7,9,5,6,0']),
    ]:
        run_ok(f'--outdir={tmp_path}/{name}', *common, *args)
    alone, three, order = (pictures(tmp_path / name) for name in ('alone', 'three', 'order'))
    assert list(alone) == ['000005.png', '000006.png', '000007.png']
    for name, image in alone.items():
        for other in (three[name], order[name]):
            difference = abs(image.astype(int) - other)
            assert difference.max() <= 1
            assert (difference > 0).mean() <= 0.05


def torchrun(*args):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [*command, str(ROOT / 'generate.py'), *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    return done.stdout


@pytest.mark.parametrize('seeds', ['0-4', '0-1'])
def test_two_processes_make_the_same_bytes(network_files, tmp_path, seeds):
    """Three batches for two ranks; then one batch, which leaves a rank without work."""
    args = [f'--network={network_files}/digits.pkl', f'--seeds={seeds}', '--batch=2', '--steps=4', '--S_churn=9']
    args.append('--device=cpu')
    run_ok(f'--outdir={tmp_path}/one', *args)
    printed = torchrun(f'--outdir={tmp_path}/two', *args)
    assert printed.count('7 network calls') == 1
    assert len(file_bytes(tmp_path / 'one')) == {'0-4': 5, '0-1': 2}[seeds] + 1  # generate.json
    assert file_bytes(tmp_path / 'one') == file_bytes(tmp_path / 'two')


def test_script_runs_from_anywhere(network_files, tmp_path):
    args = ['--outdir=out', f'--network={network_files}/grey.pkl', '--seeds=0', '--steps=1', '--device=cpu']
    command = [sys.executable, '-W', 'error', str(ROOT / 'generate.py'), *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(pictures(tmp_path)) == ['out/000000.png']


# ----------------------------------------------------------------------------
# Errors: one line that says what is wrong, no images, another exit status than 0.


def assert_refused(outcome, outdir, *words):
    assert outcome.status not in (0, None)
    assert 'Sampling' not in outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith('Error: ')]
    assert len(lines) == 1, outcome.err
    assert outcome.err.rstrip().endswith(lines[0])
    assert 'Traceback' not in outcome.err
    for word in words:
        assert word in lines[0]
    assert not os.path.isdir(outdir) or not os.listdir(outdir)


@pytest.mark.parametrize(
    ('args', 'words'),
    [
        (['--class=3'], ['--class=3', '0 to 2']),
        (['--class=-1'], ['--class']),
        (['--class=one'], ['--class', "'one'", '0-9']),
        (['--class=0-3'], ['--class=3', '0 to 2']),
        (['--class=2-1'], ['--class', '2-1', 'backwards']),
        (['--class='], ['--class', "''"]),
        (['--network={files}/grey.pkl', '--class=0,1'], ['--class', 'unconditional']),
        (['--guidance=2'], ['--guidance=2', '--gnet']),
        (['--gnet={files}/grey.pkl'], ['--gnet', '--guidance']),
        (['--gnet={files}/grey.pkl', '--guidance=nan'], ['--guidance=nan']),
        (['--gnet={files}/grey.pkl', '--guidance=two'], ['--guidance', "'two'"]),
        (['--gnet={files}/none.pkl', '--guidance=2'], ['--gnet={files}/none.pkl: no such file; {files} has ']),
        (['--gnet={files}/rgb.pkl', '--guidance=2'], ['--gnet', 'rgb.pkl', 'img_channels=3', 'img_channels=1']),
        (['--format=jpg'], ['--format', 'npz', 'zip']),
        (['--format=npz', f'--seeds={2**63}'], ['--seeds', '2^63']),
        (['--format=zip', '--subdirs'], ['--subdirs', '--format=zip']),
        (['--grid=grid.gif'], ['--grid', 'grid.gif: the name ends in .png']),
        (['--trajectory=strip.jpg'], ['--trajectory', 'strip.jpg: the name ends in .png or .gif']),
        (['--grid={files}/rgb.pkl/grid.png'], ['--grid', '{files}/rgb.pkl/grid.png: cannot make the folder']),
        (['--network={files}/grey.pkl', '--class=0'], ['--class=0', 'unconditional']),
        (['--seeds=a'], ['--seeds', "'a'"]),
        (['--seeds=5-3'], ['--seeds', "'5-3'"]),
        (['--seeds='], ['--seeds', "''"]),
        (['--seeds=1,,2'], ['--seeds', "''"]),
        (['--seeds=-1'], ['--seeds', "'-1'"]),
        (['--steps=0'], ['--steps']),
        (['--batch=0'], ['--batch']),
        (['--rho=0'], ['--rho']),
        (['--rho=nan'], ['--rho']),
        (['--rho=inf'], ['--rho']),
        (['--S_noise=nan'], ['--S_noise']),
        (['--S_noise=-inf'], ['--S_noise']),
        (['--S_churn=-1'], ['--S_churn']),
        (['--sigma_max=inf'], ['sigma_max=inf']),
        (['--solver=heun', '--sigma_max=inf'], ['sigma_max=inf']),
        (['--disc=iddpm', '--sigma_min=1', '--sigma_max=1.00001'], ['sigma_min=1.0', 'improved DDPM']),
        (['--S_min=2', '--S_max=1'], ['--S_min=2', '--S_max=1']),
        (['--sigma_min=2', '--sigma_max=1'], ['sigma_max=1.0', 'sigma_min=2.0']),
        (['--sigma_min=100'], ['sigma_min=100']),
        (['--solver=euler', '--sigma_min=100'], ['sigma_min=100']),
        (['--randn_like=ddb', '--sigma_min=100'], ['sigma_min=100']),
        (['--randn_like=dddb'], ['--randn_like', 'dddb']),
        (['--randn_like=ddb', '--S_churn=1'], ['--S_churn', '--eta']),
        (['--randn_like=ddb', '--S_churn=0'], ['--S_churn', '--eta']),
        (['--randn_like=ddb', '--solver=heun'], ['--solver is for ablation', '--sampler=taylor']),
        (['--sampler=rk', '--disc=edm'], ['--disc is for ablation', '--sampler=rk']),
        (['--sampler=euler', '--schedule=linear'], ['--schedule is for ablation', '--sampler=euler']),
        (['--randn_like=ddb', '--scaling=none'], ['--scaling is for ablation']),
        (['--randn_like=ddb', '--eta=-1'], ['--eta']),
        (['--randn_like=ddb', '--eta=inf'], ['--eta']),
        (['--sampler=rk', '--eta=1.8'], ["scheme='rk' needs an eta from 0 to below 1.732, and this is 1.8"]),
        (['--scheme=taylor'], ['--scheme=taylor belongs to --randn_like=ddb; --sampler=taylor says both']),
        (['--sampler=rk', '--scheme=rk'], ['--scheme=rk is another spelling of --sampler']),
        (['--sampler=heun', '--randn_like=db'], ['--randn_like=db is another spelling of --sampler']),
        (['--sampler=db'], ['--sampler', 'heun', 'taylor', 'rk']),
        (['--randn_like=ddb', '--compile'], ['--compile does nothing for --sampler=taylor', '--sampler=rk']),
        (['--dtype=fp8'], ['--dtype', 'fp16']),
        (['--eta=1'], ['--eta is for rk, taylor, euler', '--sampler=heun', '--S_churn']),
        (['--device=tpu'], ['--device', 'tpu']),
        (['--network={files}/none.pkl'], ['--network={files}/none.pkl: no such file; {files} has ']),
        (['--network={files}'], ['--network={files} is a folder, not a network file; it has ']),
        (['--network=ftp://host/net.pkl'], ['--network', 'ftp://host/net.pkl']),
    ],
)
def test_bad_input(network_files, tmp_path, args, words):
    outdir = tmp_path / 'out'
    args = [arg.format(files=network_files) for arg in args]
    outcome = run(f'--outdir={outdir}', f'--network={network_files}/digits.pkl', '--seeds=0-2', '--steps=4', *args)
    assert_refused(outcome, outdir, *(word.format(files=network_files) for word in words))


@pytest.mark.parametrize(
    ('args', 'words'),
    [
        (['--rho=1e-3'], ['too extreme for float64']),
        (['--sigma_max=1e39'], ['seed 0', 'not finite after step 1 of 4']),
        (['--sigma_max=1e200'], ['too extreme for float64']),
        (['--sigma_min=1e-320'], ['seed 0', 'not finite']),
        (['--sampler=rk', '--noise=path', '--sigma_min=1e-320'], ['too extreme for float64']),
        (['--sampler=rk', '--S_noise=1e39'], ['seed 0', 'not finite after step 1 of 4']),
        (['--sampler=taylor', '--eta=30'], ['seed 0', 'not finite after step 1 of 4']),
        (['--disc=vp', '--sigma_min=1e-200'], ['too extreme for float64']),
    ],
)
def test_extreme_settings_are_one_line_and_leave_no_image(network_files, tmp_path, args, words):
    outcome = run(
        f'--outdir={tmp_path}/out', f'--network={network_files}/digits.pkl', '--seeds=0-2', '--steps=4', *args
    )
    assert outcome.status == 1
    error = outcome.err.splitlines()[-1]
    assert error.startswith('Error: ')
    assert all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


def test_outdir_is_required():
    outcome = run('--seeds=0')
    assert outcome.status == 2
    assert 'Error: --outdir is missing' in outcome.err


def test_cuda_where_there_is_none(network_files, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    outcome = run(f'--outdir={tmp_path}', f'--network={network_files}/digits.pkl', '--device=cuda')
    assert_refused(outcome, tmp_path, '--device=cuda', 'no CUDA device', '--device=cpu')


class Unknown(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'', ['neither a pickle nor']),
        (b'\x89PNG\r\n\x1a\n and so on', ['neither a pickle nor']),
        (b'PK\x03\x04', ['neither a pickle nor']),
        (pickle.dumps(['some', 'list']), ['holds list, not a network']),
        (pickle.dumps({'net': 1, 'state': 2}), ["'ema'", "'net', 'state'"]),
        (pickle.dumps({}), ["'ema'", 'none']),
        (pickle.dumps({'ema': Unknown()}), ['Unknown', '--trust-pickle']),
        (pickle.dumps({'ema': torch.nn.Linear(2, 2)}), ['torch.nn.modules.linear.Linear', '--trust-pickle']),
        (pickle.dumps({'ema': Linear(2, 2)}), ["'Linear'", 'EDMPrecond', '--trust-pickle']),
    ],
    ids=['empty', 'png', 'zip', 'list', 'no ema', 'nothing', 'unknown class', 'a layer of torch', 'a layer of ours'],
)
def test_files_that_hold_no_known_network(tmp_path, content, words):
    path = tmp_path / 'net.pkl'
    path.write_bytes(content)
    outcome = run(f'--outdir={tmp_path}/out', f'--network={path}', '--seeds=0')
    assert_refused(outcome, tmp_path / 'out', '--network', str(path), *words)


@pytest.mark.parametrize('content', [['some', 'list'], {'ema': torch.nn.Linear(2, 2)}, {'net': 1}])
def test_trusted_files_that_hold_no_network(tmp_path, content):
    path = tmp_path / 'net.pkl'
    path.write_bytes(pickle.dumps(content))
    outcome = run(f'--outdir={tmp_path}/out', f'--network={path}', '--seeds=0', '--trust-pickle')
    assert_refused(outcome, tmp_path / 'out', '--network', str(path))


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(dnnlib.downloads, '_cache_root', None)
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr('pooch.core.time.sleep', lambda seconds: None)


@pytest.fixture
def server(network_files):
    """A web server that has digits.pkl and nothing else; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == '/digits.pkl'
            body = (network_files / 'digits.pkl').read_bytes() if found else b'not here'
            self.send_response(200 if found else 404)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with HTTPServer(('127.0.0.1', 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()
        thread.join()


def test_network_from_a_url(server, own_cache, tmp_path):
    run_ok(f'--outdir={tmp_path}/out', f'--network={server}/digits.pkl', '--seeds=0', '--steps=1')
    assert list(pictures(tmp_path / 'out')) == ['000000.png']


def test_url_that_the_server_does_not_know(server, own_cache, tmp_path):
    outcome = run(f'--outdir={tmp_path}/out', f'--network={server}/none.pkl', '--seeds=0')
    assert_refused(outcome, tmp_path / 'out', '--network', f'{server}/none.pkl', '404')


def test_unreachable_url(own_cache, tmp_path):
    with HTTPServer(('127.0.0.1', 0), BaseHTTPRequestHandler) as httpd:
        url = f'http://127.0.0.1:{httpd.server_port}/net.pkl'
    outcome = run(f'--outdir={tmp_path}/out', f'--network={url}', '--seeds=0')
    assert_refused(outcome, tmp_path / 'out', '--network', url, 'attempt 10 of 10')


@pytest.mark.parametrize('outdir', ['file', 'file/below', 'x' * 300])
def test_unwritable_outdir(network_files, tmp_path, outdir):
    (tmp_path / 'file').write_text('in the way')
    outcome = run(f'--outdir={tmp_path}/{outdir}', f'--network={network_files}/grey.pkl', '--seeds=0', '--steps=1')
    assert_refused(outcome, tmp_path / outdir, str(tmp_path / 'file' if 'file' in outdir else tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ['file']
    assert (tmp_path / 'file').read_text() == 'in the way'


def test_a_failed_write_leaves_nothing_behind(network_files, tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(dnnlib.util.os, 'fsync', full_disk)
    outcome = run(f'--outdir={tmp_path}', f'--network={network_files}/grey.pkl', '--seeds=0', '--steps=1')
    assert_refused(outcome, tmp_path, 'No space left')


# ----------------------------------------------------------------------------
# How the network is run.

# It imports a module of PyTorch that warns of itself.
torch_compile = pytest.mark.filterwarnings('ignore:`torch.jit.script_method` is deprecated:DeprecationWarning')

MODES = [['--S_churn=20'], ['--randn_like=ddb'], ['--randn_like=ddb', '--scheme=rk']]


def grey_levels(folder, *args):
    run_ok(f'--outdir={folder}', '--seeds=0-7', '--steps=10', '--rho=3', *args)
    return np.stack(list(pictures(folder).values())).astype(int)


@pytest.mark.parametrize('mode', MODES)
def test_lower_precision_moves_the_images_little(network_files, tmp_path, mode):
    """By at most 2 of 255 grey levels in float16 and 8 in bfloat16, which has three bits less (seen here: 1 and 3)."""
    common = (f'--network={network_files}/digits.pkl', *mode)
    default = grey_levels(tmp_path / 'default', *common)
    assert default.std() > 5
    assert np.array_equal(grey_levels(tmp_path / 'fp32', *common, '--dtype=fp32'), default)
    for dtype, largest in [('fp16', 2), ('bf16', 8)]:
        change = abs(grey_levels(tmp_path / dtype, *common, f'--dtype={dtype}') - default)
        assert 0 < change.max() <= largest


@pytest.mark.parametrize(
    ('dtype', 'expected'), [('fp32', torch.float32), ('fp16', torch.float16), ('bf16', torch.bfloat16)]
)
def test_precision_overrides_that_of_the_file(capsys, dtype, expected):
    net = EDMPrecond(8, 1, use_fp16=True, **SONG).requires_grad_(False)
    seen = []
    net.model.map_layer0.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    set_precision(net, torch.device('cpu'), dtype)
    assert net(torch.zeros(1, 1, 8, 8), torch.ones(1)).dtype == torch.float32
    assert (net.use_fp16, seen) == (False, [expected])
    assert ('Warning' in capsys.readouterr().out) == (dtype != 'fp32')


def test_a_device_without_the_precision(digits):
    with pytest.raises(click.ClickException, match=r'--dtype=fp16: .*meta'):
        set_precision(digits, torch.device('meta'), 'fp16')


class WithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 1 * x


class ForeignLayer(torch.nn.Module):
    def forward(self, x):
        return WithoutForwardMode.apply(x)


def test_a_foreign_layer_without_a_forward_mode_is_named(network_files, digits, tmp_path, monkeypatch):
    net = copy.deepcopy(digits)
    net.model.enc['4x4_block0'].norm2 = ForeignLayer()
    monkeypatch.setattr('sampling.networks.open_network', lambda *args: net)
    args = (f'--outdir={tmp_path}', '--seeds=0', '--steps=3', '--randn_like=ddb')
    assert_refused(run(*args), tmp_path, 'model.enc.4x4_block0.norm2', 'ForeignLayer', '--sampler=rk')
    run_ok(*args, '--scheme=rk')


@torch_compile
def test_compile_without_a_compiler(network_files, tmp_path, monkeypatch):
    monkeypatch.setattr('torch._inductor.config.cpp.cxx', (None, '/nowhere/g++'))
    outcome = run(f'--outdir={tmp_path}', f'--network={network_files}/grey.pkl', '--seeds=0', '--steps=2', '--compile')
    assert_refused(outcome, tmp_path, '--compile', 'compiler', '/nowhere/g++')


@torch_compile
@pytest.mark.slow
@pytest.mark.parametrize('mode', MODES[::2])
def test_a_compiled_network_makes_the_same_images(network_files, tmp_path, mode):
    """To one grey level, where rounding goes the other way."""
    common = (f'--network={network_files}/digits.pkl', *mode)
    eager = grey_levels(tmp_path / 'eager', *common)
    assert eager.std() > 5
    assert abs(grey_levels(tmp_path / 'compiled', *common, '--compile') - eager).max() <= 1


@torch_compile
@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_network_keeps_its_tangents(digits):
    """PyTorch runs it uncompiled then, so that its JVP is the same to the bit and --compile is refused for taylor."""
    net, labels = copy.deepcopy(digits), torch.eye(3)
    net.compile()
    x, dx = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    compiled = net(x, torch.ones(()), labels)  # a JVP as the first call would keep PyTorch from ever compiling it
    eager, own = (torch.func.jvp(lambda x, f=f: f(x, torch.ones(()), labels), (x,), (dx,)) for f in (digits, net))
    assert float(eager[1].norm()) > 1
    assert all(torch.equal(*pair) for pair in zip(eager, own, strict=True))
    assert torch.allclose(compiled, eager[0], atol=1e-5)
