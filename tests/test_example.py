"""example.py: the reference picture, and a grid from any network."""

import pathlib

import foreign_edm
import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import example
from sampling import choose, draw, networks
from torch_utils import network_io

REFERENCE = pathlib.Path(example.__file__).parent / 'docs' / 'mnist-32x32.png'


def pixels(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_first_row_of_the_reference_picture():
    """The demo's random stream, network and settings, on the first 8 of its 64 images."""
    _, _, name, settings = example.EXAMPLES['mnist']
    sampler = choose.make(name, **settings)
    net = network_io.load_network(str(networks.SHIPPED_NETWORK))
    torch.manual_seed(0)
    latents = torch.randn([64, 1, 32, 32])[:8]
    labels = torch.eye(10)[torch.randint(10, size=[64])][:8]
    images = sampler(net, latents, labels, randn_like=lambda x: torch.randn([64, 1, 32, 32], dtype=x.dtype)[:8])
    row = example.tile(draw.to_uint8(images), columns=8)[:, :, 0]
    assert np.abs(row.astype(int) - pixels(REFERENCE)[:32]).max() <= 2


@pytest.mark.slow
def test_demo_reproduces_the_reference_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(example.main, ['--device=cpu'])
    assert run.exit_code == 0, run.output
    assert '40 steps: 40 network calls, 39 of them with a JVP' in run.output
    assert np.abs(pixels(tmp_path / 'mnist-32x32.png') - pixels(REFERENCE)).max() <= 2


def test_another_sampler_with_its_usual_steps(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(example, 'generate_image_grid', lambda *args, **kwargs: asked.append(kwargs))
    for options in (
        ['--sampler=rk'],
        ['--sampler=rk', '--steps=9'],
        ['--steps=5'],
        ['--dataset=imagenet', '--sampler=heun'],
    ):
        assert CliRunner().invoke(example.main, options).exit_code == 0
    assert [(each.get('scheme'), each['num_steps'], each.get('S_churn')) for each in asked] == [
        ('rk', 40, None),
        ('rk', 9, None),
        ('taylor', 5, None),
        (None, 256, 40),
    ]


def test_grid_from_a_colour_network_with_edms_sampler(tmp_path, capsys):
    song = {'model_type': 'SongUNet', 'model_channels': 8, 'channel_mult': [1], 'num_blocks': 1}
    kwargs = {'img_resolution': 8, 'img_channels': 3, **song}
    foreign_edm.write_foreign_snapshot(tmp_path / 'net.pkl', 'EDMPrecond', kwargs)
    dest = tmp_path / 'grid.png'
    example.generate_image_grid(str(tmp_path / 'net.pkl'), str(dest), gridw=3, gridh=2, num_steps=4, device='cpu')
    assert pixels(dest).shape == (16, 24, 3)
    assert '4 steps: 7 network calls, 0 of them with a JVP' in capsys.readouterr().out
    again = tmp_path / 'again.png'
    example.generate_image_grid(str(tmp_path / 'net.pkl'), str(again), gridw=3, gridh=2, num_steps=4, device='cpu')
    assert dest.read_bytes() == again.read_bytes()


def test_tiles_run_row_by_row():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    assert example.tile(images, columns=3)[:, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_failed_download_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    monkeypatch.setitem(example.EXAMPLES, 'cifar10', ('http://localhost:9/x.pkl', 'x.png', 'heun', {'num_steps': 18}))
    run = CliRunner().invoke(example.main, ['--dataset=cifar10', '--device=cpu'])
    assert run.exit_code == 1
    [line] = [line for line in run.output.splitlines() if line.startswith('Error:')]
    assert 'http://localhost:9/x.pkl' in line
    assert 'Traceback' not in run.output
    assert not list(tmp_path.rglob('*.pkl'))
