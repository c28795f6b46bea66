"""What only a GPU can show. Left out where there is none.

Convolutions are exact in float32 here: PyTorch's default on NVIDIA GPUs, TF32, rounds their factors to 10 bits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import foreign_edm
import golden_edm2
import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from generate_here import run

import dataset_tool
import fid
import sampler_2nd
from sampling.networks import SHIPPED_NETWORK, open_network
from training import networks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')

ROOT = Path(__file__).parents[1]
SONG = {'model_type': 'SongUNet', 'model_channels': 64, 'channel_mult': [1, 2], 'num_blocks': 1}
PRECONDS = ['VPPrecond', 'VEPrecond', 'iDDPMPrecond', 'EDMPrecond']
SAMPLERS = {
    'db': ['--randn_like=db', '--steps=6', '--S_churn=10'],
    'taylor': ['--randn_like=ddb', '--steps=6', '--scheme=taylor'],
    'rk': ['--randn_like=ddb', '--steps=6', '--scheme=rk'],
    'path': ['--randn_like=ddb', '--steps=6', '--scheme=rk', '--noise=path'],
}


@pytest.fixture(autouse=True)
def full_float32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def make_net(precond, **kwargs):
    net = getattr(networks, precond)(32, 1, label_dim=10, **{**SONG, **kwargs})
    return foreign_edm.randomize(net, seed=0).eval().requires_grad_(False)


def evaluate(net, sigma, device):
    """D and its derivative along a direction in x and σ, on the CPU."""
    rng = torch.Generator().manual_seed(1)
    x, dx = (torch.randn([4, 1, 32, 32], generator=rng).to(device) for _ in range(2))
    labels = torch.eye(10, device=device)[[0, 3, 3, 9]]
    sigmas = torch.full([4], sigma, device=device)
    with torch.no_grad():
        D, dD = torch.func.jvp(lambda x, sigma: net(x, sigma, labels), (sigma * x, sigmas), (dx, 0.1 * sigmas))
    return D.cpu(), dD.cpu()


@pytest.mark.parametrize('precond', PRECONDS)
@pytest.mark.parametrize('sigma', [0.1, 3.0])
def test_networks_and_their_derivatives_are_those_of_the_cpu(precond, sigma):
    net = make_net(precond)
    for expected, found in zip(evaluate(net, sigma, 'cpu'), evaluate(net.cuda(), sigma, 'cuda'), strict=True):
        assert (found - expected).norm() < 1e-4 * expected.norm()


def test_adm_and_its_derivatives_are_those_of_the_cpu():
    net = make_net('EDMPrecond', model_type='DhariwalUNet', num_blocks=1)
    for expected, found in zip(evaluate(net, 0.5, 'cpu'), evaluate(net.cuda(), 0.5, 'cuda'), strict=True):
        assert (found - expected).norm() < 1e-4 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize('name', golden_edm2.CASES)
def test_networks_of_edm2_have_their_numbers_in_both_precisions(name):
    net = golden_edm2.network(name).cuda()
    args = [None if each is None else each.cuda() for each in golden_edm2.inputs(net)]
    expected = golden_edm2.CASES[name]['D']
    golden_edm2.assert_matches(net(*args, force_fp32=True).cpu(), expected, absolute=1e-5, relative=1e-4)
    golden_edm2.assert_matches(net(*args).cpu(), expected, absolute=3e-3, relative=3e-3)
    assert torch.equal(net(*args), net(*args, force_fp32=True)) is not net.use_fp16


@pytest.mark.parametrize('scheme', ['euler', 'taylor', 'rk'])
def test_the_solver_takes_the_path_of_the_cpu(scheme):
    """The same latents and the same Brownian paths: the same images, to float32 rounding."""
    net = open_network(str(SHIPPED_NETWORK), torch.device('cpu'))
    seeds = [0, 1, 2]
    latents = torch.randn([3, 1, 32, 32], generator=torch.Generator().manual_seed(0))
    labels = torch.eye(10)[seeds]

    def sample(net, device):
        path = sampler_2nd.BrownianPath(seeds)
        kwargs = {'randn_like': path, 'num_steps': 10, 'scheme': scheme}
        return sampler_2nd.ito_taylor_sampler(net, latents.to(device), labels.to(device), **kwargs).cpu()

    on_cpu, on_gpu = sample(net, 'cpu'), sample(net.cuda(), 'cuda')
    assert on_gpu.dtype == torch.float64
    assert (on_gpu - on_cpu).abs().max() < 0.01  # a grey level is 0.0078


def images(folder):
    paths = sorted(Path(folder).glob('*.png'))
    assert len(paths) == 8
    return np.stack([np.asarray(PIL.Image.open(path)) for path in paths]).astype(int)


def draw(outdir, *options):
    outcome = run(f'--outdir={outdir}', '--seeds=0-7', '--device=cuda', *options)
    assert outcome.status == 0, outcome.err
    assert 'on cuda:0' in outcome.out
    return images(outdir)


@pytest.mark.parametrize('name', SAMPLERS)
def test_images_do_not_depend_on_the_batch(name, tmp_path):
    together, again, apart = (
        draw(tmp_path / batch, f'--batch={batch[0]}', *SAMPLERS[name]) for batch in ('8', '8 again', '3')
    )
    assert np.array_equal(together, again)
    assert np.abs(apart - together).max() <= 1


@pytest.mark.parametrize(
    ('option', 'name', 'tolerance'),
    [
        *(('--dtype=fp16', name, 0.3) for name in ('db', 'taylor', 'rk')),
        *(('--dtype=bf16', name, 2.5) for name in ('db', 'taylor', 'rk')),
        *(('--compile', name, 0.1) for name in ('db', 'rk')),
    ],
)
@pytest.mark.filterwarnings('ignore')  # PyTorch's compiler gives advice
def test_other_ways_to_compute_make_nearly_the_same_images(option, name, tolerance, tmp_path):
    """`tolerance`: mean distance in grey levels."""
    usual = draw(tmp_path / 'usual', '--batch=8', *SAMPLERS[name])
    other = draw(tmp_path / 'other', '--batch=8', option, *SAMPLERS[name])
    assert np.abs(usual - other).mean() < tolerance


def test_a_network_of_its_own_half_precision():
    net = make_net('EDMPrecond', use_fp16=True).cuda()
    half, half_jvp = evaluate(net, 0.5, 'cuda')
    net.use_fp16 = False
    full, full_jvp = evaluate(net, 0.5, 'cuda')
    assert 0 < (half - full).norm() < 0.01 * full.norm()
    assert 0 < (half_jvp - full_jvp).norm() < 0.02 * full_jvp.norm()


# ----------------------------------------------------------------------------
# Training and metrics.


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'digits.zip'
    result = CliRunner().invoke(dataset_tool.main, ['--source=digits', f'--dest={path}', '--max-images=64'])
    assert result.exit_code == 0, result.output
    return path


def train_on_gpu(data, outdir, *options):
    command = [f'--outdir={outdir}', '--nosubdir', f'--data={data}', '--cbase=32', '--cres=1', '--num-blocks=1']
    command += ['--batch=64', '--lr-rampup=0.001', '--tick=1', '--dump=1', '--seed=0', *options]
    process = subprocess.run(
        [sys.executable, str(ROOT / 'train.py'), *command], cwd=ROOT, text=True, capture_output=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    lines = (Path(outdir) / 'stats.jsonl').read_text().splitlines()
    return process.stdout, [json.loads(line)['Loss/loss']['mean'] for line in lines]


@pytest.mark.parametrize('options', [[], ['--bf16=1'], ['--fp16=1', '--ls=100'], ['--augment=0.12', '--cond=1']])
def test_training_lowers_the_loss(options, data, tmp_path):
    output, losses = train_on_gpu(data, tmp_path, '--duration=0.008', '--samples=4', *options)
    assert '1 x cuda' in output
    assert losses[-1] < 0.6 * losses[0]
    state = torch.load(tmp_path / 'training-state-000008.pt', weights_only=True)
    assert all(value.isfinite().all() for value in state['ema'].values() if value.is_floating_point())


def test_training_goes_on_as_if_never_stopped(data, tmp_path):
    """The CUDA generator too is in the state."""
    _, losses = train_on_gpu(data, tmp_path / 'whole', '--duration=0.004')
    train_on_gpu(data, tmp_path / 'parts', '--duration=0.002')
    _, parts = train_on_gpu(data, tmp_path / 'parts', '--duration=0.004')
    assert parts[-1] == pytest.approx(losses[-1], rel=0.01)


def test_nccl_exchanges_what_a_run_exchanges(data, tmp_path):
    """A group of one process: nccl does not take two on one GPU."""
    code = f"""
import torch, generate, train
torch.cuda.set_device(0)
torch.distributed.init_process_group('nccl', init_method='tcp://localhost:29517', rank=0, world_size=1)
options = ['--seeds=0-3', '--steps=2', '--device=cuda']
generate.main(['--outdir={tmp_path}/images', *options], standalone_mode=False)
options = ['--cbase=32', '--cres=1', '--num-blocks=1', '--batch=64', '--duration=0.001', '--tick=1', '--workers=0']
train.main(['--outdir={tmp_path}/run', '--data={data}', '--samples=4', *options], standalone_mode=False)
torch.distributed.destroy_process_group()
"""
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True, env=env)
    assert process.returncode == 0, process.stdout + process.stderr
    assert len(list((tmp_path / 'images').glob('*.png'))) == 4
    assert len(list((tmp_path / 'run').rglob('network-snapshot-*.pkl'))) >= 1


@pytest.mark.parametrize('detector', ['pixels', 'efficientnet-lite0'])
def test_distances_are_those_of_the_cpu(detector, tmp_path):
    rng = np.random.RandomState(0)
    for name, low in [('real', 0), ('fake', 40)]:
        (tmp_path / name).mkdir()
        for i, image in enumerate(rng.randint(low, 256, [60, 16, 16, 3], dtype=np.uint8)):
            PIL.Image.fromarray(image).save(tmp_path / name / f'{i}.png')
    command = ['calc', f'--images={tmp_path}/fake', f'--ref={tmp_path}/real', '--num=60', '--workers=0']
    command += [f'--detector={detector}', '--metrics=fid,kid,prdc,swd', '--json']
    numbers = []
    for device in ('cpu', 'cuda'):
        result = CliRunner().invoke(fid.main, [*command, f'--device={device}'])
        assert result.exit_code == 0, result.output
        numbers.append(json.loads(result.stdout))
    for name in ('fid', 'kid', 'precision', 'coverage', 'swd'):
        assert numbers[1][name] == pytest.approx(numbers[0][name], rel=1e-3)
