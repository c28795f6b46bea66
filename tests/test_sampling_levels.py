"""sampling/levels.py and tune.py: noise levels that follow from a network's loss."""

import json
import math
import shutil
from functools import partial

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import generate
import sampler_2nd
import tune
from sampling import choose, levels

# The loss of the shipped network, measured with other code on real digits, and the levels that followed from it there.
DIGITS = levels.LossCurve(
    (80, 20.6, 9.1, 4.03, 2.34, 1.04, 0.458, 0.203, 0.0898, 0.0397, 0.0176, 0.00778, 0.00344, 0.002),
    (0.156, 0.152, 0.147, 0.101, 0.0569, 0.0211, 0.00712, 0.00237, 6.3e-4, 1.6e-4, 4.2e-5, 1.3e-5, 4.9e-6, 2.5e-6),
)
DIGITS_LEVELS = {
    6: [80, 3.12, 1.37, 0.565, 0.183, 0.0336],
    8: [80, 3.92, 2.05, 1.11, 0.565, 0.251, 0.0879, 0.0164],
    10: [80, 4.56, 2.63, 1.61, 0.976, 0.565, 0.300, 0.139, 0.0516, 0.00883],
}


class Gaussian(torch.nn.Module):
    """The denoiser of pixels N(0, s²)."""

    label_dim, img_channels, img_resolution, sigma_max = 0, 1, 8, 20.0

    def __init__(self, std=0.5):
        super().__init__()
        self.std = torch.nn.Parameter(torch.tensor(std), requires_grad=False)

    def forward(self, x, sigma, class_labels=None):
        return x * (self.std**2 / (self.std**2 + sigma**2))


@pytest.mark.parametrize('num_steps', DIGITS_LEVELS)
def test_levels_of_the_digits_network(num_steps):
    """The curve had 20 points there; 14 are on record."""
    assert DIGITS.levels(num_steps) == pytest.approx(DIGITS_LEVELS[num_steps], rel=0.1)


def test_equal_steps_of_the_fourth_root():
    """m = σ⁴: the levels are equal steps of σ."""
    sigmas = np.geomspace(8, 0.01, 2000)
    curve = levels.LossCurve(tuple(sigmas), tuple(sigmas**4))
    assert curve.levels(5) == pytest.approx([8, 6.4, 4.8, 3.2, 1.6], rel=1e-4)


def test_where_the_loss_is_flat_a_level_is_the_lowest_of_its_loss():
    curve = levels.LossCurve((80, 40, 20, 10, 5, 1), (1.0, 1.1, 1.0, 1.0, 0.5**4, 1e-8))
    assert curve.levels(2) == pytest.approx([80, 5])


def test_many_steps_end_where_the_curve_ends_and_fall():
    made = DIGITS.levels(200)
    assert made[-1] == pytest.approx(0.002)
    assert (np.diff(made) < 0).all()


def test_under_guidance_they_are_the_geometric_mean_with_the_usual_ones():
    usual = sampler_2nd.noise_levels(None, 8, **sampler_2nd.levels_for_steps(8))[:-1]
    wanted = [math.sqrt(a * b) for a, b in zip(DIGITS.levels(8), usual, strict=True)]
    assert DIGITS.levels(8, guided=True) == pytest.approx(wanted)


def test_under_guidance_no_level_is_above_those_of_the_network():
    low = levels.LossCurve((20, 1, 0.01), (1.0, 0.3, 1e-9))
    made = low.levels(6, guided=True)
    assert made[0] == pytest.approx(20)
    assert (np.diff(made) < 0).all()


def test_the_curve_of_a_gaussian_denoiser():
    """E|D − x₀|² = s²σ²/(s² + σ²), within four standard errors of 4,096 pixels."""
    images = 0.5 * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    curve = levels.measure_curve(Gaussian(), images)
    sigmas = np.array(curve.sigmas)
    assert sigmas[[0, -1]] == pytest.approx([20, 0.002])
    assert np.array(curve.losses) == pytest.approx(sigmas**2 / (4 * sigmas**2 + 1), rel=4 * math.sqrt(2 / 4096))


def test_without_images_the_network_makes_them():
    seen = []
    curve = levels.measure_curve(Gaussian(), progress=lambda: seen.append(1))
    sigmas = np.array(curve.sigmas)
    assert len(seen) == levels.NUM_LEVELS + levels.START_STEPS
    assert np.array(curve.losses) == pytest.approx(sigmas**2 / (4 * sigmas**2 + 1), rel=0.2)


def test_a_curve_is_read_as_it_was_saved(tmp_path):
    path = str(tmp_path / 'a.levels.json')
    DIGITS._replace(network='abc').save(path, made_from='real digits')
    assert levels.read_curve(path) == DIGITS._replace(network='abc')
    assert json.loads((tmp_path / 'a.levels.json').read_text())['made_from'] == 'real digits'


@pytest.mark.parametrize(
    'content',
    [
        '{}',
        '[1]',
        'no json',
        '{"sigma": [2, 1], "loss": [1]}',
        '{"sigma": [1, 2], "loss": [2, 1]}',
        '{"sigma": [2, 1], "loss": [2, -1]}',
        '{"sigma": [2, NaN], "loss": [2, 1]}',
        '{"sigma": [2], "loss": [2]}',
        '{"sigma": 7, "loss": [2]}',
        '{"sigma": ["a", "b"], "loss": [2, 1]}',
    ],
)
def test_what_is_no_curve_is_refused(content, tmp_path):
    path = tmp_path / 'x.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=r'x\.json is n'):
        levels.read_curve(str(path))


# ----------------------------------------------------------------------------
# --levels


def test_values_of_the_option(tmp_path):
    option = levels.Levels()
    DIGITS.save(str(tmp_path / 'curve.json'))
    assert option.convert('auto', None, None) == 'auto'
    assert option.convert('80,3.9,5e-1', None, None) == [80, 3.9, 0.5]
    assert option.convert(str(tmp_path / 'curve.json'), None, None) == DIGITS
    for text, reason in [('1,2', 'fall'), ('nowhere.json', 'No such file'), ('80,-1', 'above 0')]:
        with pytest.raises(click.BadParameter, match=reason):
            option.convert(text, None, None)


def chosen(value, name='rk', network='none.pkl', guidance=None, **options):
    return levels.choose_levels(value, choose.make(name, **options), Gaussian(), network, guidance).keywords


def test_levels_of_a_run(tmp_path, capsys):
    network = str(tmp_path / 'net.pkl')
    plain = {'scheme': 'rk', 'num_steps': 8}
    assert chosen('auto', num_steps=8) == plain
    assert chosen('edm', num_steps=8) == plain | sampler_2nd.EDM_LEVELS
    assert chosen([80.0, 1.0], 'heun', num_steps=2) == {'num_steps': 2, 'sigmas': [80.0, 1.0]}
    assert chosen(DIGITS, num_steps=8)['sigmas'] == DIGITS.levels(8)
    assert chosen(DIGITS, num_steps=8, guidance=3)['sigmas'] == DIGITS.levels(8, guided=True)
    capsys.readouterr()

    curve = DIGITS._replace(network=levels.run_record.fingerprint(Gaussian()))
    curve.save(levels.beside(network))
    assert chosen('auto', network=network, num_steps=8)['sigmas'] == curve.levels(8)
    assert 'Noise levels from' in capsys.readouterr().out
    assert chosen('auto', network=network, num_steps=8, rho=3) == plain | {'rho': 3}
    assert chosen('auto', 'heun', network, num_steps=8) == {'num_steps': 8}
    curve._replace(network='other').save(levels.beside(network))
    assert chosen('auto', network=network, num_steps=8) == plain
    assert 'belongs to another network' in capsys.readouterr().out


def test_levels_that_contradict_other_options():
    with pytest.raises(click.UsageError, match=r'--levels and --rho exclude each other'):
        chosen('edm', num_steps=8, rho=3)
    with pytest.raises(click.UsageError, match='ablation'):
        chosen([80.0, 1.0], 'ablation', num_steps=2)
    with pytest.raises(click.UsageError, match=r'--levels has 2 levels.*--steps=2'):
        chosen([80.0, 1.0], num_steps=8)


def test_heun_on_given_levels_is_heun():
    net, latents = Gaussian(), torch.randn(2, 1, 8, 8)
    sigmas = sampler_2nd.noise_levels(net, 6, 0.01, 15, 5)
    by_name = choose.make('heun', num_steps=6, sigma_min=0.01, sigma_max=15, rho=5)(net, latents)
    assert torch.equal(partial(choose.make('heun'), sigmas=sigmas)(net, latents), by_name)


# ----------------------------------------------------------------------------
# Commands.


def test_tune_writes_what_generate_reads(network_files, tmp_path, one_thread):
    network = shutil.copy(network_files / 'digits.pkl', tmp_path / 'digits.pkl')
    tuned = CliRunner().invoke(tune.main, [f'--network={network}', '--device=cpu'])
    assert tuned.exit_code == 0, tuned.output
    curve = levels.read_curve(f'{network}.levels.json')
    assert f'--steps=6: {" ".join(f"{sigma:.3g}" for sigma in curve.levels(6))}' in tuned.stdout

    run = ['--sampler=rk', '--steps=6', '--seeds=0', '--device=cpu', f'--network={network}']
    made = CliRunner().invoke(generate.main, [*run, f'--outdir={tmp_path}/out'])
    assert made.exit_code == 0, made.output
    settings = json.loads((tmp_path / 'out' / 'generate.json').read_text())['settings']
    assert settings['levels'] == curve.levels(6)
    assert 'rho' not in settings
    again = CliRunner().invoke(generate.main, [*run, f'--outdir={tmp_path}/out', '--levels=edm'])
    assert again.exit_code == 1
    assert 'made with other settings' in again.output


def test_tune_asks_where_the_curve_of_a_remote_network_goes():
    result = CliRunner().invoke(tune.main, ['--network=https://example.com/a.pkl'])
    assert result.exit_code == 2
    assert 'say with --dest where' in result.output


def test_the_curve_of_the_shipped_network_is_shipped():
    network = str(tune.networks.SHIPPED_NETWORK)
    curve = levels.read_curve(levels.beside(network))
    net = tune.networks.open_network(network, torch.device('cpu'))
    assert curve.network == levels.run_record.fingerprint(net)
    for num_steps, wanted in DIGITS_LEVELS.items():
        assert curve.levels(num_steps) == pytest.approx(wanted, rel=0.2)
