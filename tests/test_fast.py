"""training/fast.py: the rules give the numbers of the definitions, and leave no trace in files."""

import copy
import math
import pickle

import pytest
import torch
from small_networks import (
    ADM,
    SONG,
    CountOps,
    every_network,
    jvp_in_x_and_sigma,
    noisy_network,
    relative,
)

from torch_utils import network_io
from training import fast, networks

pytestmark = pytest.mark.usefixtures('one_thread')


def fast_network(class_name, **kwargs):
    return fast.install(noisy_network(class_name, **kwargs))


@torch.no_grad()
@every_network
def test_the_rules_give_what_the_definitions_give(class_name, kwargs):
    """Images, and their derivative in x and sigma by PyTorch's own rules."""
    plain = noisy_network(class_name, **kwargs).float()
    found = jvp_in_x_and_sigma(fast_network(class_name, **kwargs).float())
    for a, b in zip(found, jvp_in_x_and_sigma(plain), strict=True):
        assert relative(a, b) < 3e-6


@every_network
def test_gradients_with_the_rules_are_those_of_the_definitions(class_name, kwargs):
    x, sigma = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0.5, 2.0]).double()
    gradients = []
    for net in (noisy_network(class_name, **kwargs), fast_network(class_name, **kwargs)):
        torch.manual_seed(1)
        loss = net(x, sigma, torch.eye(3, dtype=torch.float64)[[0, 2]] if net.label_dim else None).square().sum()
        gradients.append(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_files_are_those_of_the_definitions(tmp_path):
    """To the byte; what is read back has the rules, and so has a deep copy."""
    net = noisy_network('EDMPrecond', label_dim=3, **SONG).float()
    plain = pickle.dumps(net)
    fast.install(net)
    assert pickle.dumps(net) == plain
    assert repr(net) == repr(pickle.loads(plain))
    network_io.save_network(net, tmp_path / 'net.pkl')
    read = network_io.load_network(str(tmp_path / 'net.pkl'))
    for each in (net, copy.deepcopy(net), read):
        assert {type(layer) for layer in each.modules()} & set(fast.RULES) == set()
        assert isinstance(each.model, networks.SongUNet)
    assert type(pickle.loads(plain).model) is networks.SongUNet
    other = copy.deepcopy(net)
    other.model.map_layer0.weight.data.zero_()
    assert net.model.map_layer0.weight.abs().max() > 0


def test_other_layers_stay_as_they_are():
    class Mine(networks.Conv2d):
        pass

    mine = Mine(1, 1, 3)
    assert type(fast.install(mine)) is Mine
    assert type(fast.install(torch.nn.Linear(2, 2))) is torch.nn.Linear


@torch.no_grad()
def test_a_network_compiles_in_one_piece():
    net = fast_network('EDMPrecond', label_dim=3, **SONG).float()
    found = torch._dynamo.explain(net)(torch.randn(2, 1, 8, 8), torch.tensor(0.5), torch.eye(3)[:2])
    assert found.graph_count == 1, found.break_reasons


@torch.no_grad()
def test_a_network_changes_neither_its_inputs_nor_what_vmap_shares():
    """Its layers write results over inputs that nobody else needs."""
    net = fast_network('EDMPrecond', label_dim=3, **SONG).float()
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
    net = fast_network(class_name, **kwargs).float().requires_grad_(False)
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
        y = fast._dropout(x, p)
        kept = y != 0
        assert (~kept).double().mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / x.numel()))
        assert torch.allclose(y[kept], x[kept] / (1 - p), rtol=2**-16 / (1 - p))
        [slope] = torch.autograd.grad(y.sum(), x)
        assert torch.equal(slope * x, y)
        assert not torch.equal(kept, fast._dropout(x, p) != 0)
    assert torch.equal(fast._dropout(x, 0), x)
    assert not fast._dropout(x, 1).any()


@torch.no_grad()
def test_a_jvp_needs_two_convolutions_for_one():
    net = fast_network('EDMPrecond', **SONG)
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
    net = fast_network('EDMPrecond', **SONG)
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
    net = fast_network('EDMPrecond', **ADM | {'label_dim': 3}).float()
    whole = jvp_in_x_and_sigma(net)
    monkeypatch.setattr(fast, 'L2', 1)
    sliced = jvp_in_x_and_sigma(net)
    assert max(relative(a, b) for a, b in zip(sliced, whole, strict=True)) < 1e-6


@torch.no_grad()
def test_matrix_products_by_convolution_are_those_of_pytorch_whatever_the_batch(monkeypatch):
    monkeypatch.setattr(fast, '_mkl_is_slow', lambda: True)
    torch.manual_seed(0)
    a, b = torch.randn(5, 256, 24), torch.randn(5, 24, 40)
    with CountOps() as ops:
        product = fast._bmm(a, b)
    assert ops.counts['aten.convolution'] == 1
    assert relative(product, a.double() @ b.double()) < 1e-6
    for i in range(5):
        assert torch.equal(fast._bmm(a[i : i + 1], b[i : i + 1]), product[i : i + 1])
    single = torch.func.vmap(lambda a, b: fast._bmm(a[None], b[None])[0])(a, b)
    assert relative(single, product) < 1e-6
    for other in (a[:, :255], a.double(), a.to('meta')):
        assert not fast._convolution_multiplies(other)
    with torch.autocast('cpu', torch.bfloat16):
        assert not fast._convolution_multiplies(a)


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
    monkeypatch.setattr(fast, 'open', lambda name: path.open(), raising=False)
    assert fast._mkl_is_slow.__wrapped__() is slow


@torch.no_grad()
@pytest.mark.parametrize('model', ['SongUNet', 'DhariwalUNet'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_wide_attention_and_its_tangent_are_those_of_float64(model, memory_format, monkeypatch):
    monkeypatch.setattr(fast, '_mkl_is_slow', lambda: True)
    options = {'model_channels': 128, 'channel_mult': [1], 'num_blocks': 1, 'attn_resolutions': [16]}
    net = fast_network('EDMPrecond', img_resolution=16, model_type=model, **options)
    wide = jvp_in_x_and_sigma(net)
    net = net.float().to(memory_format=memory_format)
    with CountOps() as ops:
        found = jvp_in_x_and_sigma(net)
    assert ops.counts['aten._softmax'] > 0
    assert max(relative(a, b) for a, b in zip(found, wide, strict=True)) < 1e-5


@pytest.mark.parametrize('taps', [[1, 1], [1, 3], [1, 3, 3, 1]])
@pytest.mark.parametrize('kernel', [1, 3])
def test_upsampling_and_convolution_in_one_are_the_two_steps(kernel, taps):
    torch.manual_seed(0)
    both = fast.install(networks.Conv2d(3, 5, kernel, up=True, resample_filter=taps, init_bias=1).double())
    upsample, convolve = networks.Conv2d(3, 3, 0, up=True, resample_filter=taps), networks.Conv2d(3, 5, kernel)
    convolve.load_state_dict({'weight': both.weight, 'bias': both.bias})
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    with CountOps() as ops:
        y = both(x)
    assert torch.allclose(y, convolve.double()(upsample.double()(x)), rtol=0, atol=1e-14)
    assert y.shape == (2, 5, 8, 12)
    assert ops.counts['aten.convolution'] == (1 if kernel == 3 and len(taps) == 2 else 2)


@torch.no_grad()
def test_wide_networks_give_the_same_in_channels_last():
    torch.manual_seed(0)
    net = networks.EDMPrecond(16, 3, model_channels=64, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[])
    fast.install(net.eval())
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
    last = fast._dropout(x, 0.5)
    torch.manual_seed(0)
    first = fast._dropout(x.permute(0, 2, 3, 1).contiguous(), 0.5)
    assert torch.equal(last.permute(0, 2, 3, 1), first)
