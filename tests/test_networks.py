"""Networks and preconditioners: EDM's numbers, EDM's parameter names, and derivatives in forward mode."""

import json
import math
import pathlib

import pytest
import torch
from small_networks import ADM, NCSNPP, SONG, assert_forward_mode, every_network, noisy_network

from training import networks

pytestmark = pytest.mark.usefixtures('one_thread')

DATA = pathlib.Path(__file__).parent / 'data'
GOLDEN = json.loads((DATA / 'edm_networks.json').read_text())['cases']
CIFAR = {'img_resolution': 32, 'model_type': 'SongUNet', 'channel_mult': [2, 2, 2], 'augment_dim': 9}
FFHQ = CIFAR | {'img_resolution': 64, 'channel_mult': [1, 2, 2, 2]}
PUBLISHED = {
    'cifar10-cond-ddpmpp': CIFAR | {'label_dim': 10},
    'cifar10-uncond-ddpmpp': CIFAR,
    'cifar10-cond-ncsnpp': CIFAR | NCSNPP | {'label_dim': 10},
    'cifar10-uncond-ncsnpp': CIFAR | NCSNPP,
    'ffhq64-uncond-ddpmpp': FFHQ,
    'ffhq64-uncond-ncsnpp': FFHQ | NCSNPP,
    'imagenet64-cond-adm': {'img_resolution': 64, 'label_dim': 1000, 'model_type': 'DhariwalUNet'},
}


def golden_network(case):
    """The network of a golden case, filled with the cosines that its numbers were computed with."""
    kwargs = {key: math.inf if value == 'inf' else value for key, value in case['kwargs'].items()}
    net = getattr(networks, case['class'])(**kwargs).eval()
    with torch.no_grad():
        for i, (name, param) in enumerate(net.named_parameters()):
            a = (0.7 * torch.arange(param.numel(), dtype=torch.float64) + 1.3 * i).cos().reshape(param.shape)
            is_gain = 'norm' in name and name.endswith('weight')
            param.copy_(1 + 0.1 * a if is_gain else {2: 0.5, 4: 0.3}.get(param.ndim, 0.1) * a)
        for name, buffer in net.named_buffers():
            if name.endswith('freqs'):
                buffer.copy_(3 * (0.7 * torch.arange(buffer.numel(), dtype=torch.float64)).cos())
    return net


def golden_inputs(net):
    shape = [2, net.img_channels, net.img_resolution, net.img_resolution]
    x = 2 * (0.37 * torch.arange(math.prod(shape), dtype=torch.float64)).sin().reshape(shape)
    labels = torch.eye(5)[[1, 3]] if net.label_dim else None
    return x.float(), torch.tensor([0.7, 3.0]), labels


def assert_matches(out, expected):
    out = out.double()
    scale = abs(expected['std'])
    for value, reference in [
        (out.mean(), expected['mean']),
        (out.std(), expected['std']),
        *zip(out.flatten()[:6], expected['first6'], strict=True),
        *zip(out.flatten()[-6:], expected.get('last6', []), strict=False),
    ]:
        assert abs(float(value) - reference) < 1e-4 * max(scale, abs(reference))


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_outputs(name):
    case = GOLDEN[name]
    net = golden_network(case)
    x, sigma, labels = golden_inputs(net)
    assert sum(p.numel() for p in net.parameters()) == case['n_params']
    expected_range = [case['sigma_min'], float(case['sigma_max'])]
    assert [net.sigma_min, net.sigma_max] == pytest.approx(expected_range, rel=1e-6)
    with torch.no_grad():
        assert_matches(net(x, sigma, labels), case['out'])
        if 'out_no_labels' in case:
            assert_matches(net(x, sigma), case['out_no_labels'])
        if 'out_aug' in case:
            augment = (0.1 * (0.9 * torch.arange(18.0)).sin()).reshape(2, 9)
            assert_matches(net(x, sigma, labels, augment_labels=augment), case['out_aug'])


def test_vp_sigma_and_its_inverse():
    case = GOLDEN['vp_ddpmpp']
    net = golden_network(case)
    assert net.sigma(torch.tensor([0.1, 0.5, 1])).tolist() == pytest.approx(case['sigma(t=0.1,0.5,1)'], rel=1e-6)
    inverse = net.sigma_inv(torch.tensor([0.1, 1, 100])).tolist()
    assert inverse == pytest.approx(case['sigma_inv(0.1,1,100)'], rel=1e-5)


def test_iddpm_rounds_to_its_own_noise_levels():
    case = GOLDEN['iddpm_adm']
    net = golden_network(case)
    sigma = torch.tensor([0.01, 0.5, 1, 5, 79], dtype=torch.float64)
    assert net.round_sigma(sigma).tolist() == pytest.approx(case['round_sigma_of_[0.01,0.5,1,5,79]'], rel=1e-6)
    assert net.round_sigma(sigma).dtype == torch.float64
    assert net.round_sigma(sigma, return_index=True).tolist() == case['index']
    assert net.u[[0, 1, 2, -3, -2, -1]].tolist() == pytest.approx(case['u_first3_last3'], rel=1e-5)


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameter_names_shapes_and_order_are_those_of_the_published_networks(name):
    expected = (DATA / 'edm_keys' / f'{name}.txt').read_text().splitlines()[1:]
    with torch.device('meta'):
        net = networks.EDMPrecond(img_channels=3, **{'img_resolution': 32, **PUBLISHED[name]})
    found = [f'P {key} {list(value.shape)}' for key, value in net.named_parameters()]
    found += [f'B {key} {list(value.shape)}' for key, value in net.named_buffers()]
    assert found == expected


@pytest.mark.parametrize('wrt', ['x', 'sigma'])
@every_network
def test_forward_mode_agrees_with_a_central_difference(class_name, kwargs, wrt):
    net = noisy_network(class_name, **kwargs)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    sigma = net.round_sigma(torch.tensor([0.5, 2.0], dtype=torch.float64))  # iDDPM: the middle of a constant piece
    labels = torch.eye(3, dtype=torch.float64)[[0, 2]] if net.label_dim else None
    if wrt == 'x':
        primal, tangent, f = x, torch.randn_like(x), lambda value: net(value, sigma, labels)
    else:
        primal, tangent, f = sigma, torch.tensor([1.0, -0.7]).double(), lambda value: net(x, value, labels)
    assert_forward_mode(f, primal, tangent, within=1e-6)


def test_iddpm_noise_conditioning_has_zero_derivative():
    net = noisy_network('iDDPMPrecond', **ADM)
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    _, tangents = torch.func.jvp(lambda s: net.coefficients(s)[1:], (sigma,), (torch.ones_like(sigma),))
    assert torch.equal(tangents[2], torch.zeros_like(sigma))
    assert torch.equal(tangents[0], -torch.ones_like(sigma))


def test_networks_compute_in_float32_whatever_they_are_given():
    net = golden_network(GOLDEN['edm_ddpmpp_cond_aug'])
    x, sigma, labels = golden_inputs(net)
    assert torch.equal(net(x.double(), sigma.double(), labels.double()), net(x, sigma, labels))


def test_attention_weights_against_a_plain_formula():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 8, 5).double()
    logits = torch.einsum('ncq,nck->nqk', q, k) / math.sqrt(8)
    expected = logits.exp() / logits.exp().sum(2, keepdim=True)
    assert torch.allclose(networks.AttentionOp.apply(q, k), expected, atol=1e-14)


def test_resampling_keeps_the_mean_and_box_filter_averages():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    down = networks.Conv2d(1, 1, kernel=0, down=True)
    up = networks.Conv2d(1, 1, kernel=0, up=True)
    assert down(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_fused_resampling_equals_the_two_steps_inside_the_image():
    torch.manual_seed(0)
    for direction in ('up', 'down'):
        options = {direction: True, 'kernel': 3, 'resample_filter': [1, 3, 3, 1]}
        plain, fused = (networks.Conv2d(2, 3, fused_resample=flag, init_bias=1, **options).double() for flag in (0, 1))
        fused.load_state_dict(plain.state_dict())
        x = torch.randn(1, 2, 16, 16, dtype=torch.float64)
        assert plain(x).shape == fused(x).shape
        if direction == 'up':
            assert torch.allclose(plain(x)[..., 4:-4, 4:-4], fused(x)[..., 4:-4, 4:-4], atol=1e-12)


@pytest.mark.parametrize(
    ('mode', 'variance'),
    [('xavier_uniform', 2 / 5), ('xavier_normal', 2 / 5), ('kaiming_uniform', 1 / 2), ('kaiming_normal', 1 / 2)],
)
def test_weight_init_variance(mode, variance):
    torch.manual_seed(0)
    w = networks.weight_init([200_000], mode, fan_in=2, fan_out=3)
    assert float(w.var()) == pytest.approx(variance, rel=0.02)
    if mode.endswith('uniform'):
        assert float(w.abs().max()) <= math.sqrt(3 * variance)


def test_label_dropout_only_in_training():
    torch.manual_seed(0)
    net = networks.EDMPrecond(8, 1, label_dim=3, label_dropout=1.0, dropout=0, **SONG)
    x, labels = torch.randn(2, 1, 8, 8), torch.eye(3)[:2]
    assert torch.equal(net.train()(x, 1.0, labels), net.eval()(x, 1.0))
    with torch.no_grad():
        net.model.dec['8x8_aux_conv'].weight.normal_()
    assert not torch.equal(net.eval()(x, 1.0, labels), net.eval()(x, 1.0))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match='encoder_type'):
        networks.SongUNet(8, 1, 1, encoder_type='none')
    with pytest.raises(ValueError, match='model_type'):
        networks.EDMPrecond(8, 1, model_type='UNet')
    with pytest.raises(ValueError, match='xavier_uniform'):
        networks.weight_init([2], 'he_normal', 1, 1)
    with pytest.raises(ValueError, match='too few'):
        networks.GroupNorm(2)
