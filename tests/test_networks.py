"""Networks and preconditioners: EDM's numbers, EDM's parameter names, and derivatives in forward mode."""

import collections
import json
import math
import pathlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training import networks

DATA = pathlib.Path(__file__).parent / 'data'
GOLDEN = json.loads((DATA / 'edm_networks.json').read_text())['cases']
CIFAR = {'img_resolution': 32, 'model_type': 'SongUNet', 'channel_mult': [2, 2, 2], 'augment_dim': 9}
FFHQ = CIFAR | {'img_resolution': 64, 'channel_mult': [1, 2, 2, 2]}
NCSNPP = {
    'embedding_type': 'fourier',
    'encoder_type': 'residual',
    'channel_mult_noise': 2,
    'resample_filter': [1, 3, 3, 1],
}
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


def noisy_network(class_name, img_resolution=8, **kwargs):
    """A small network in float64 whose every weight is random, so that no path is switched off by a zero init."""
    torch.manual_seed(0)
    net = getattr(networks, class_name)(img_resolution, img_channels=1, **kwargs).double().eval()
    with torch.no_grad():
        for param in net.parameters():
            param.add_(0.2 * torch.randn_like(param))
    return net


SONG = {'model_type': 'SongUNet', 'model_channels': 8, 'channel_mult': [1, 2], 'num_blocks': 1, 'attn_resolutions': [4]}
ADM = {
    'model_type': 'DhariwalUNet',
    'model_channels': 64,
    'channel_mult': [1],
    'num_blocks': 1,
    'attn_resolutions': [8],
}
SKIPS = SONG | {'encoder_type': 'skip', 'decoder_type': 'skip', 'resample_filter': [1, 3, 3, 1]}


every_network = pytest.mark.parametrize(
    ('class_name', 'kwargs'),
    [
        ('EDMPrecond', SONG | {'label_dim': 3}),
        ('EDMPrecond', SONG | NCSNPP),
        ('EDMPrecond', SKIPS),
        ('EDMPrecond', ADM | {'label_dim': 3}),
        ('VPPrecond', SONG),
        ('VEPrecond', SONG | NCSNPP),
        ('iDDPMPrecond', ADM),
    ],
)


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
    with torch.no_grad():
        out, jvp = torch.func.jvp(f, (primal,), (tangent,))

        def central(h):
            return (f(primal + h * tangent) - f(primal - h * tangent)) / (2 * h)

        reference = (4 * central(1e-5) - central(2e-5)) / 3
    assert out.dtype == jvp.dtype == torch.float64
    assert torch.equal(out, f(primal))
    assert float(reference.norm()) > 1e-3
    assert float((jvp - reference).norm() / reference.norm()) < 1e-6


def jvp_in_x_and_sigma(net):
    """JVP of a network in float32 along fixed tangents in x and sigma."""
    shape = [2, 2, 1, net.img_resolution, net.img_resolution]
    x, tangent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    labels = torch.eye(3)[[0, 2]] if net.label_dim else None
    sigma = torch.tensor([0.5, 2.0])
    return torch.func.jvp(lambda x, sigma: net(x, sigma, labels), (x, sigma), (tangent, torch.ones(2)))


def relative(a, b):
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def test_a_network_compiles_in_one_piece():
    net = noisy_network('EDMPrecond', label_dim=3, **SONG).float()
    found = torch._dynamo.explain(net)(torch.randn(2, 1, 8, 8), torch.tensor(0.5), torch.eye(3)[:2])
    assert found.graph_count == 1, found.break_reasons


@torch.no_grad()
def test_a_network_changes_neither_its_inputs_nor_what_vmap_shares():
    """Its layers write results over inputs that nobody else needs."""
    net = noisy_network('EDMPrecond', label_dim=3, **SONG).float()
    x, dx = torch.randn([2, 2, 1, 8, 8])
    labels, sigma = torch.eye(3)[:2], torch.tensor(0.5)
    given = [tensor.clone() for tensor in (x, dx, labels)]

    def along(v):
        return torch.func.jvp(lambda x: net(x, sigma, labels), (x,), (v,))[1]

    both = torch.func.vmap(along)(torch.stack([dx, 2 * dx]))
    assert relative(both[0], along(dx)) < 2e-6
    assert relative(both[1], 2 * along(dx)) < 2e-6
    for tensor, before in zip((x, dx, labels), given, strict=True):
        assert torch.equal(tensor, before)


@every_network
def test_the_rules_of_the_layers_agree_with_those_of_pytorch(class_name, kwargs):
    net = noisy_network(class_name, **kwargs).float().requires_grad_(False)
    own_out, own = jvp_in_x_and_sigma(net)  # gradients enabled: PyTorch's rules
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, jvp = jvp_in_x_and_sigma(net)
        assert relative(out, own_out) < 1e-6
        assert relative(jvp, own) < 3e-6
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        out, jvp = jvp_in_x_and_sigma(net)
    assert out.dtype == jvp.dtype == torch.float32
    assert 0 < relative(out, own_out) < 0.03
    assert relative(jvp, own) < 0.06


def test_dropout_zeroes_the_share_asked_for_and_scales_the_rest():
    torch.manual_seed(0)
    x = torch.rand(3, 5, 7, 1001).add(0.5).requires_grad_()
    for p in (0.1, 0.5, 0.999):
        y = networks._dropout(x, p)
        kept = y != 0
        assert (~kept).double().mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / x.numel()))
        assert torch.allclose(y[kept], x[kept] / (1 - p), rtol=2**-16 / (1 - p))
        [slope] = torch.autograd.grad(y.sum(), x)
        assert torch.equal(slope * x, y)
        assert not torch.equal(kept, networks._dropout(x, p) != 0)
    assert torch.equal(networks._dropout(x, 0), x)
    assert not networks._dropout(x, 1).any()


class CountOps(TorchDispatchMode):
    """How often each operation of PyTorch runs: `counts['aten.convolution']`."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_jvp_needs_two_convolutions_for_one():
    net = noisy_network('EDMPrecond', **SONG)
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    with CountOps() as forward:
        net(x, sigma)
    with CountOps() as jvp:
        torch.func.jvp(lambda x: net(x, sigma), (x,), (x,))
    for op, factor in [('convolution', 2), ('native_group_norm', 1), ('silu', 1)]:
        assert jvp.counts[f'aten.{op}'] == factor * forward.counts[f'aten.{op}'] > 0
    fused = forward.counts['aten._scaled_dot_product_flash_attention_for_cpu']
    assert jvp.counts['aten._softmax'] == fused > 0


def test_second_derivatives_and_tangents_in_parameters_take_the_rules_of_pytorch():
    net = noisy_network('EDMPrecond', **SONG)
    x, sigma = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True), torch.ones(1).double()
    _, jvp = torch.func.jvp(lambda x: net(x, sigma), (x,), (torch.ones_like(x),))
    (gradient,) = torch.autograd.grad(jvp.sum(), x)
    h = 1e-4
    with torch.no_grad():
        plus, minus = (torch.func.jvp(lambda x: net(x, sigma), (x + s * h,), (x * 0 + 1,))[1].sum() for s in (1, -1))
        assert float((plus - minus) / (2 * h)) == pytest.approx(float(gradient.sum()), rel=1e-4)

        weights = dict(net.named_parameters())
        tangents = {name: torch.full_like(weight, 0.01) for name, weight in weights.items()}
        call = lambda weights: torch.func.functional_call(net, weights, (x, sigma))  # noqa: E731
        _, jvp = torch.func.jvp(call, (weights,), (tangents,))
        plus, minus = (call({name: w + s * h * tangents[name] for name, w in weights.items()}) for s in (1, -1))
        assert relative(jvp, (plus - minus) / (2 * h)) < 1e-6


@torch.no_grad()
def test_attention_in_slices_is_attention_over_the_whole_batch(monkeypatch):
    net = noisy_network('EDMPrecond', **ADM | {'label_dim': 3}).float()
    whole = jvp_in_x_and_sigma(net)
    monkeypatch.setattr(networks, '_L2', 1)
    sliced = jvp_in_x_and_sigma(net)
    assert max(relative(a, b) for a, b in zip(sliced, whole, strict=True)) < 1e-6


@torch.no_grad()
def test_matrix_products_by_convolution_are_those_of_pytorch_whatever_the_batch(monkeypatch):
    monkeypatch.setattr(networks, '_mkl_is_slow', lambda: True)
    torch.manual_seed(0)
    a, b = torch.randn(5, 256, 24), torch.randn(5, 24, 40)
    with CountOps() as ops:
        product = networks._bmm(a, b)
    assert ops.counts['aten.convolution'] == 1
    assert relative(product, a.double() @ b.double()) < 1e-6
    for i in range(5):
        assert torch.equal(networks._bmm(a[i : i + 1], b[i : i + 1]), product[i : i + 1])
    single = torch.func.vmap(lambda a, b: networks._bmm(a[None], b[None])[0])(a, b)
    assert relative(single, product) < 1e-6
    for other in (a[:, :255], a.double(), a.to('meta')):
        assert not networks._convolution_multiplies(other)
    with torch.autocast('cpu', torch.bfloat16):
        assert not networks._convolution_multiplies(a)


@pytest.mark.parametrize(
    ('capability', 'cpuinfo', 'slow'),
    [
        ('AVX512', 'vendor_id\t: AuthenticAMD', True),
        ('AVX2', 'vendor_id\t: AuthenticAMD', False),
        ('AVX512', 'vendor_id\t: GenuineIntel', False),
        ('AVX512', None, False),
    ],
)
def test_matrices_are_multiplied_by_convolutions_on_amd_with_avx512_only(
    capability, cpuinfo, slow, monkeypatch, tmp_path
):
    path = tmp_path / 'cpuinfo'
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda: True)
    monkeypatch.setattr(networks, 'open', lambda name: path.open(), raising=False)
    assert networks._mkl_is_slow.__wrapped__() is slow


@torch.no_grad()
@pytest.mark.parametrize('model', ['SongUNet', 'DhariwalUNet'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_wide_attention_and_its_tangent_are_those_of_float64(model, memory_format, monkeypatch):
    monkeypatch.setattr(networks, '_mkl_is_slow', lambda: True)
    options = {'model_channels': 128, 'channel_mult': [1], 'num_blocks': 1, 'attn_resolutions': [16]}
    net = noisy_network('EDMPrecond', img_resolution=16, model_type=model, **options)
    wide = jvp_in_x_and_sigma(net)
    net = net.float().to(memory_format=memory_format)
    with CountOps() as ops:
        found = jvp_in_x_and_sigma(net)
    assert ops.counts['aten._softmax'] > 0
    assert max(relative(a, b) for a, b in zip(found, wide, strict=True)) < 1e-5


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


@pytest.mark.parametrize('taps', [[1, 1], [1, 3], [1, 3, 3, 1]])
@pytest.mark.parametrize('kernel', [1, 3])
def test_upsampling_and_convolution_in_one_are_the_two_steps(kernel, taps):
    torch.manual_seed(0)
    both = networks.Conv2d(3, 5, kernel, up=True, resample_filter=taps, init_bias=1).double()
    upsample, convolve = networks.Conv2d(3, 3, 0, up=True, resample_filter=taps), networks.Conv2d(3, 5, kernel)
    convolve.load_state_dict({'weight': both.weight, 'bias': both.bias})
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    with CountOps() as ops:
        y = both(x)
    assert torch.allclose(y, convolve.double()(upsample.double()(x)), rtol=0, atol=1e-14)
    assert y.shape == (2, 5, 8, 12)
    assert ops.counts['aten.convolution'] == (1 if kernel == 3 and len(taps) == 2 else 2)


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


def convolution_case(batch=2, channels=128, out_channels=128, height=16, width=17, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(batch, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, channels, 3, 3, dtype=dtype) / math.sqrt(9 * channels)
    return x, weight, torch.randn(out_channels, dtype=dtype)


def test_convolution_by_winograd_and_its_gradients_are_those_of_pytorch():
    inputs = [tensor.requires_grad_() for tensor in convolution_case()]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.nn.functional.conv2d(*wide, padding=1)
    assert networks._winograd_pays(*inputs[:2])
    y = networks._conv3x3(*inputs)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative(y.detach(), expected.detach()) < 2e-6
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, inputs, dy)
    for gradient, reference in zip(found, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        assert relative(gradient, reference) < 3e-6


def test_second_derivatives_of_convolution_by_winograd(monkeypatch):
    monkeypatch.setattr(networks, '_winograd_pays', lambda x, weight: True)
    inputs = [tensor.requires_grad_() for tensor in convolution_case(1, 2, 3, 8, 3, torch.float64)]
    assert torch.autograd.gradcheck(networks._conv3x3, inputs)
    assert torch.autograd.gradgradcheck(networks._conv3x3, inputs)


def test_convolution_by_winograd_under_torch_func():
    x, weight, bias = convolution_case()
    plain = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    tangent = torch.randn_like(x)
    for recording in (False, True):
        with torch.set_grad_enabled(recording):
            y, jvp = torch.func.jvp(lambda x: networks._conv3x3(x, weight, bias), (x,), (tangent,))
        assert relative(y, plain) < 2e-6
        assert relative(jvp, torch.nn.functional.conv2d(tangent, weight, padding=1)) < 2e-6
    with torch.no_grad():
        single = torch.func.vmap(lambda x: networks._conv3x3(x[None], weight, bias)[0])(x)
        assert relative(single, plain) < 2e-6


@torch.no_grad()
def test_convolution_by_winograd_where_it_pays_whatever_the_batch(monkeypatch):
    x, weight, bias = convolution_case(batch=18)
    monkeypatch.setattr(networks, '_L3', 15 * x[0].numel())  # so the last three are a slice of their own
    y = networks._conv3x3(x, weight, bias)
    assert relative(y, torch.nn.functional.conv2d(x, weight, bias, padding=1)) < 2e-6
    for i in (0, 14, 15, 17):
        assert torch.equal(networks._conv3x3(x[i : i + 1], weight, bias), y[i : i + 1])
    narrow = weight[:64]
    with torch.autocast('cpu', torch.bfloat16):
        assert not networks._winograd_pays(x, weight)
    for other, kernel in [(x.contiguous(), weight), (x[:, :, 1:], weight), (x[:, :, :8], weight), (x, narrow)]:
        assert not networks._winograd_pays(other, kernel)


@torch.no_grad()
def test_wide_networks_give_the_same_in_channels_last():
    torch.manual_seed(0)
    net = networks.EDMPrecond(16, 3, model_channels=64, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[]).eval()
    for param in net.parameters():
        param.add_(0.05 * torch.randn_like(param))
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 2.0])
    with CountOps() as plain:
        expected = net(x, sigma), torch.func.jvp(lambda x: net(x, sigma), (x,), (x.flip(0),))[1]
    net = net.to(memory_format=torch.channels_last)
    with CountOps() as winograd:
        found = net(x, sigma), torch.func.jvp(lambda x: net(x, sigma), (x,), (x.flip(0),))[1]
    assert winograd.counts['aten.convolution'] > plain.counts['aten.convolution']
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-5


def test_dropout_masks_lie_as_their_image_does():
    x = torch.ones(2, 8, 5, 3).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    last = networks._dropout(x, 0.5)
    torch.manual_seed(0)
    first = networks._dropout(x.permute(0, 2, 3, 1).contiguous(), 0.5)
    assert torch.equal(last.permute(0, 2, 3, 1), first)
