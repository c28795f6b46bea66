"""train.py and the training loop on real digits: options, files of a run, exact resume."""

import copy
import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import dataset_tool
import dnnlib
import train
from torch_utils import network_io
from training import networks, run_options, run_state, training_loop

ROOT = pathlib.Path(train.__file__).parent
NETWORK = ['--cbase=8', '--cres=1,1', '--num-blocks=1']
SMALL = [*NETWORK, '--batch=32', '--augment=0', '--workers=0', '--tick=1', '--seed=1', '--device=cpu']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'digits.zip'
    run = CliRunner().invoke(dataset_tool.main, ['--source=mnist-5k', f'--dest={path}', '--max-images=40'])
    assert run.exit_code == 0, run.output
    return path


def train_command(data, outdir, *options):
    return [sys.executable, str(ROOT / 'train.py'), f'--outdir={outdir}', f'--data={data}', *SMALL, *options]


def run_training(data, outdir, *options):
    run = subprocess.run(train_command(data, outdir, '--nosubdir', *options), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def dry_run(data, *options):
    run = CliRunner().invoke(train.main, ['--outdir=nowhere', f'--data={data}', '--dry-run', *options])
    assert run.exit_code == 0, run.output
    text = run.output.split('Training config:\n')[1]
    config, _ = json.JSONDecoder().raw_decode(text)
    return config, run.output


def test_default_config_is_that_of_edm(data):
    config, _ = dry_run(data, '--cond=1', '--seed=7')
    assert config['network_kwargs'] == {
        'model_type': 'SongUNet',
        'embedding_type': 'positional',
        'encoder_type': 'standard',
        'decoder_type': 'standard',
        'channel_mult_noise': 1,
        'resample_filter': [1, 1],
        'model_channels': 128,
        'channel_mult': [2, 2, 2],
        'class_name': 'training.networks.EDMPrecond',
        'augment_dim': 9,
        'dropout': 0.13,
        'use_fp16': False,
    }
    assert config['augment_kwargs']['p'] == 0.12
    assert config['optimizer_kwargs'] == {
        'class_name': 'torch.optim.Adam',
        'lr': 1e-3,
        'betas': [0.9, 0.999],
        'eps': 1e-8,
    }
    expected = {'total_kimg': 200_000, 'ema_halflife_kimg': 500, 'batch_size': 512, 'seed': 7, 'kimg_per_tick': 50}
    assert {key: config[key] for key in expected} == expected
    assert config['dataset_kwargs']['resolution'] == 32
    assert config['dataset_kwargs']['max_size'] == 40


def test_noise_distribution(data):
    assert dry_run(data)[0]['loss_kwargs'] == {'class_name': 'training.loss.EDMLoss'}
    config, _ = dry_run(data, '--P_mean=0.5', '--P_std=0.1')
    assert config['loss_kwargs'] == {'class_name': 'training.loss.EDMLoss', 'P_mean': 0.5, 'P_std': 0.1}
    loss_fn = dnnlib.util.construct_class_by_name(**config['loss_kwargs'])
    torch.manual_seed(0)
    log_sigma = loss_fn.draw_sigma([10_000], 'cpu').log()
    assert log_sigma.mean().item() == pytest.approx(0.5, abs=0.005)
    assert log_sigma.std().item() == pytest.approx(0.1, abs=0.005)


def test_label_dropout_reaches_the_network(data):
    config, _ = dry_run(data, '--cond=1', '--label-dropout=0.25', *NETWORK)
    net = dnnlib.util.construct_class_by_name(
        **config['network_kwargs'], img_resolution=32, img_channels=1, label_dim=10
    )
    assert net.model.label_dropout == 0.25
    assert run_options.compare(dry_run(data, '--cond=1', *NETWORK)[0], config)[0] == []  # a run may go on with it


@pytest.mark.parametrize(
    ('options', 'name'),
    [
        ([], '00000-digits-uncond-ddpmpp-edm-gpus1-batch512-fp32'),
        (['--cond=1', '--batch=64', '--desc=try'], '00000-digits-cond-ddpmpp-edm-gpus1-batch64-fp32-try'),
        (['--arch=adm', '--precond=vp', '--fp16=1'], '00000-digits-uncond-adm-vp-gpus1-batch512-fp16'),
    ],
)
def test_run_directory_name(data, options, name):
    _, output = dry_run(data, *options)
    assert f'nowhere/{name}\n' in output
    assert not pathlib.Path('nowhere').exists()


def test_run_directories_are_numbered_on(tmp_path):
    for name in ('00000-a', '00012-b', 'notes'):
        (tmp_path / name).mkdir()
    opts = dnnlib.EasyDict(outdir=str(tmp_path), fp16=False, bf16=True, cond=False, arch='adm', precond='ve', batch=32)
    opts.desc = None
    assert pathlib.Path(train.run_dir_name(opts, 'x')).name == '00013-x-uncond-adm-ve-gpus1-batch32-bf16'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--data=missing.zip'], 'missing.zip'),
        (['--batch=32', '--batch-gpu=3'], 'does not split evenly'),
        (['--resume=missing.pt'], '--resume=missing.pt'),
        (['--resume=x.pt', '--transfer=y.pkl'], 'exclude each other'),
        (['--cres=1,b'], '1,2,2,2'),
        (['--device=tpu'], '--device'),
        (['--precond=vp', '--P_mean=0'], '--P_mean and --P_std belong to --precond=edm, and --precond=vp was given'),
        (['--label-dropout=0.1'], '--label-dropout needs labels: --cond=1'),
        (['--P_mean=nan'], 'not a finite number'),
        (['--P_std=0'], '--P_std'),
    ],
)
def test_bad_input_gets_one_line(data, tmp_path, options, message):
    run = CliRunner().invoke(train.main, [f'--outdir={tmp_path}/out', f'--data={data}', *SMALL, *options])
    assert run.exit_code != 0
    assert message in run.output
    assert 'Traceback' not in run.output


def test_labels_are_asked_for_in_vain(tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    for i in range(2):
        training_png(folder / f'{i}.png')
    run = CliRunner().invoke(train.main, [f'--outdir={tmp_path}/out', f'--data={folder}', '--cond=1', '--dry-run'])
    assert run.exit_code != 0
    assert '--cond=1 needs labels' in run.output


def training_png(path):
    import PIL.Image

    PIL.Image.fromarray(np.zeros([8, 8], dtype=np.uint8)).save(path)


def test_files_of_a_run(data, tmp_path):
    output = run_training(
        data, tmp_path, '--cond=1', '--duration=0.002', '--snap=1', '--dump=1', '--precond=vp', '--lr-rampup=0.0005'
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        'training_options.json',
        'log.txt',
        'stats.jsonl',
        'network-snapshot-000000.pkl',
        'network-snapshot-000001.pkl',
        'network-snapshot-000002.pkl',
        'training-state-000001.pt',
        'training-state-000002.pt',
    }
    assert json.loads((tmp_path / 'training_options.json').read_text())['run_dir'] == str(tmp_path)
    assert 'tick 2     kimg 2.0 ' in (tmp_path / 'log.txt').read_text()
    assert 'tick 2     kimg 2.0 ' in output
    rows = [json.loads(line) for line in (tmp_path / 'stats.jsonl').read_text().splitlines()]
    assert list(rows[0]) == [
        'Loss/loss',
        'Progress/tick',
        'Progress/kimg',
        'Timing/total_sec',
        'Timing/sec_per_tick',
        'Timing/sec_per_kimg',
        'Timing/maintenance_sec',
        'Resources/cpu_mem_gb',
        'Resources/peak_gpu_mem_gb',
        'Resources/peak_gpu_mem_reserved_gb',
        'timestamp',
    ]
    assert rows[0]['Loss/loss']['num'] == 32 * 32 * 32
    assert rows[2]['Loss/loss']['mean'] < rows[0]['Loss/loss']['mean']
    net = network_io.load_network(str(tmp_path / 'network-snapshot-000002.pkl'))
    assert type(net).__name__ == 'VPPrecond'
    assert (net.label_dim, net.img_resolution, net.img_channels) == (10, 32, 1)
    state = torch.load(tmp_path / 'training-state-000002.pt', weights_only=True)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state['ema'].items())


def test_a_killed_run_goes_on_as_if_nothing_had_happened(data, tmp_path):
    """Weights bit for bit, with dropout, shuffling, augmentation and Adam's moments in play."""
    options = ['--cond=1', '--duration=0.003', '--dump=1', '--augment=0.5', '--dropout=0.3', '--lr-rampup=0.001']
    whole, halves = tmp_path / 'whole', tmp_path / 'halves'
    run_training(data, whole, *options)
    killed = subprocess.Popen(train_command(data, halves, '--nosubdir', *options), stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not list(halves.glob('training-state-*.pt')) and time.time() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (halves / 'training-state-000003.pt').exists()
    assert not list(halves.glob('network-snapshot-000003.pkl'))
    run_training(data, halves, *options, f'--resume={halves}')
    first, second = (torch.load(run / 'training-state-000003.pt', weights_only=True) for run in (whole, halves))
    for part in ('net', 'ema'):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())
    assert torch.equal(first['rng'][0]['cpu'], second['rng'][0]['cpu'])
    assert first['cur_tick'] == second['cur_tick']
    for index, moments in first['optimizer']['state'].items():
        assert torch.equal(moments['exp_avg_sq'], second['optimizer']['state'][index]['exp_avg_sq'])


def test_transfer_starts_from_the_weights_of_a_network(data, tmp_path):
    run_training(data, tmp_path / 'first', '--duration=0.001', '--format=safetensors')
    source = tmp_path / 'first' / 'network-snapshot-000001.safetensors'
    run_training(data, tmp_path / 'second', '--duration=0.00001', f'--transfer={source}')
    nets = [
        network_io.load_network(str(path)) for path in (source, tmp_path / 'second' / 'network-snapshot-000000.pkl')
    ]
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b), name  # the first step has learning rate 0


def test_ema_is_a_half_life_average():
    """After one half-life, half of the difference is left; in the first step, nothing."""
    net, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(net.weight, 1)
    torch.nn.init.constant_(ema.weight, 0)
    run = run_state.Run(net, ema, torch.optim.SGD(net.parameters()), cur_nimg=10**9)
    run.update_ema(batch_size=1000, halflife_kimg=1, rampup_ratio=None)
    assert ema.weight.item() == pytest.approx(0.5)
    run.cur_nimg = 0
    run.update_ema(batch_size=1000, halflife_kimg=1, rampup_ratio=0.05)
    assert ema.weight.item() == 1


def test_bf16_trains_a_float32_network(data, tmp_path):
    run_training(data, tmp_path, '--duration=0.001', '--bf16=1', '--lr-rampup=0.0005')
    rows = [json.loads(line) for line in (tmp_path / 'stats.jsonl').read_text().splitlines()]
    assert rows[-1]['Loss/loss']['mean'] < rows[0]['Loss/loss']['mean']
    net = network_io.load_network(str(tmp_path / 'network-snapshot-000001.pkl'))
    assert {param.dtype for param in net.parameters()} == {torch.float32}


def test_moments_of_a_state_take_the_order_of_the_weights(tmp_path):
    """A state from a GPU, or from an older version, has its elements in another order than a CPU run now."""

    def new_run(memory_format):
        torch.manual_seed(0)
        net = torch.nn.Conv2d(4, 3, 3).to(memory_format=memory_format)
        return run_state.Run(net, copy.deepcopy(net), torch.optim.Adam(net.parameters(), fused=True))

    def step(run):
        run.optimizer.zero_grad()
        run.net(torch.linspace(-1, 1, 100).reshape(1, 4, 5, 5)).square().sum().backward()
        run.optimizer.step()

    first, second = new_run(torch.contiguous_format), new_run(torch.channels_last)
    step(first)
    first.save(tmp_path / 'training-state-000000.pt')
    second.load(tmp_path / 'training-state-000000.pt')
    for run in (first, second):
        step(run)
    for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)
    assert second.optimizer.state[second.net.weight]['exp_avg'].stride() == second.net.weight.stride()


@pytest.mark.parametrize(('channels', 'last'), [(64, True), (32, False)])
def test_wide_networks_train_channels_last_on_a_cpu(channels, last):
    net = networks.SongUNet(16, 1, 1, model_channels=channels, channel_mult=[1, 2], num_blocks=1)
    net = training_loop.set_memory_format(net)
    kernel = net.enc['8x8_block0'].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) == last
