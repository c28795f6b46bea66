"""EDM2's network: its numbers, names and counts; unit variance in, unit variance out; derivatives in forward mode."""

import copy
import math

import pytest
import torch
from golden_edm2 import CASES, DATA, GOLDEN, assert_matches, fill, inputs, network, wave
from small_networks import assert_forward_mode

from training.networks_edm2 import (
    Block,
    MPConv,
    MPFourier,
    Precond,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    resample,
)

pytestmark = pytest.mark.usefixtures('one_thread')

PRIMITIVES = GOLDEN['primitives']
both_precisions = pytest.mark.parametrize('dtype', [torch.float32, torch.float64])


# ----------------------------------------------------------------------------
# EDM2's numbers.


@both_precisions
def test_functions(dtype):
    x, z = wave([2, 6, 4, 4]).to(dtype), wave([2, 4, 4, 4], amplitude=3).to(dtype)
    y = wave([2, 4, 4, 4], 1, 0.53, torch.cos).to(dtype)
    found = {
        'normalize_all_but_first': normalize(x),
        'normalize_dim1': normalize(x, dim=1),
        'normalize_tiny_dim1': normalize(1e-5 * x, dim=1),
        'mp_silu': mp_silu(x),
        'mp_sum_y_z_t0.3': mp_sum(y, z, t=0.3),
        'mp_sum_y_z_t0.5': mp_sum(y, z),
        'mp_cat_x_y_t0.5': mp_cat(x, y),
        'mp_cat_x_y_t0.3': mp_cat(x, y, t=0.3),
        **{f'resample_{mode}_{f}': resample(x, f, mode) for mode in ('down', 'up') for f in ([1, 1], [1, 3, 3, 1])},
    }
    for name, value in found.items():
        assert value.dtype == dtype
        assert_matches(value, PRIMITIVES[name])
    assert resample(x) is x


@both_precisions
def test_fourier_features(dtype):
    golden = PRIMITIVES['mpfourier']
    layer = fill(MPFourier(5)).to(dtype)
    assert layer.freqs.tolist() == pytest.approx(golden['freqs'], rel=1e-6)
    assert layer.phases.tolist() == pytest.approx(golden['phases'], rel=1e-6)
    assert_matches(layer(torch.tensor([-1.5, 0.25, 2.0], dtype=dtype)), golden['out'])


@both_precisions
def test_convolutions(dtype):
    linear = fill(MPConv(6, 5, [])).to(dtype)
    assert_matches(linear(wave([3, 6], 1, 0.3, torch.cos).to(dtype), gain=0.7), PRIMITIVES['mpconv_linear']['out'])
    conv = fill(MPConv(6, 5, [3, 3])).to(dtype)
    assert_matches(conv(wave([2, 6, 4, 4]).to(dtype)), PRIMITIVES['mpconv_3x3']['out'])
    assert_matches(conv.train()(wave([2, 6, 4, 4]).to(dtype)), PRIMITIVES['mpconv_3x3_train']['out'])
    assert_matches(conv.weight, PRIMITIVES['mpconv_3x3_train']['weight_after'])


BLOCKS = {
    'block_enc': {},
    'block_enc_skip_attn': {'out_channels': 12, 'attention': True, 'channels_per_head': 4},
    'block_enc_down': {'resample_mode': 'down'},
    'block_dec': {'flavor': 'dec'},
    'block_dec_skip_attn': {'flavor': 'dec', 'out_channels': 6, 'attention': True, 'channels_per_head': 3},
    'block_dec_up': {'flavor': 'dec', 'resample_mode': 'up'},
}


@both_precisions
@pytest.mark.parametrize('name', BLOCKS)
def test_blocks(name, dtype):
    block = fill(Block(**{'in_channels': 8, 'out_channels': 8, 'emb_channels': 7, **BLOCKS[name]})).to(dtype)
    emb = (0.9 * torch.arange(14.0, dtype=torch.float64) + 0.2).sin().reshape(2, 7).to(dtype)
    assert list(block.state_dict()) == PRIMITIVES[name]['keys']
    assert_matches(block(wave([2, 8, 4, 4]).to(dtype), emb), PRIMITIVES[name]['out'])


@torch.no_grad()
@both_precisions
@pytest.mark.parametrize('name', CASES)
def test_networks(name, dtype):
    golden, net = CASES[name], network(name)
    assert sum(param.numel() for param in net.parameters()) == golden['n_params']
    assert len(list(net.parameters())) == golden['n_tensors']
    assert sum(buffer.numel() for buffer in net.buffers()) == golden['n_buffer_elements']
    x, sigma, labels = inputs(net.to(dtype))
    D, logvar = net(x, sigma, labels, return_logvar=True)
    assert D.dtype == logvar.dtype == dtype
    assert_matches(D, golden['D'])
    assert logvar.shape == (2, 1, 1, 1)
    assert logvar.flatten().tolist() == pytest.approx(golden['logvar'], rel=2e-6)
    assert_matches(net(x, 2.0, labels), golden['D_scalar_sigma_2'])
    if labels is not None:
        assert_matches(net(x, sigma), golden['D_no_labels'])
    _, _, c_in, c_noise = net.coefficients(sigma.to(dtype).reshape(-1, 1, 1, 1))
    F = net.unet(c_in * x.to(dtype), c_noise.flatten(), net._labels(labels, x.to(dtype)))
    assert_matches(F, golden['F'])


@torch.no_grad()
@pytest.mark.parametrize('name', CASES)
def test_weights_in_half_precision(name):
    net = network(name).half()
    assert_matches(net(*inputs(net)), CASES[name]['D_with_float16_parameters_left_unconverted'])
    net.float()
    assert_matches(net(*inputs(net)), CASES[name]['D_after_rounding_all_weights_and_buffers_to_float16'])


@torch.no_grad()
def test_the_image_path_in_half_precision():
    golden, net = CASES['pixel_cond']['float16_main_path_on_cpu'], network('pixel_cond')
    x, sigma, labels = inputs(net)
    c_skip, c_out, c_in, c_noise = net.coefficients(sigma.reshape(-1, 1, 1, 1))
    F = net.unet((c_in * x).half(), c_noise.flatten(), labels)
    assert F.dtype == torch.float16
    assert_matches(c_skip * x + c_out * F.float(), golden['D'], absolute=3e-4, relative=3e-3)


@torch.no_grad()
def test_what_each_layer_returns():
    golden, net = CASES['pixel_cond']['intermediate_outputs_of_unet_children'], network('pixel_cond')
    found = {}
    for name, layer in net.unet.named_modules():
        if name in golden:
            layer.register_forward_hook(lambda _module, _args, out, name=name: found.update({name: out}))
    net(*inputs(net))
    assert found.keys() == golden.keys()
    for name, out in found.items():
        assert_matches(out, golden[name], absolute=1e-5)


def test_derivatives_of_the_network():
    golden, net = CASES['pixel_cond'], network('pixel_cond').requires_grad_(False)
    x, sigma, labels = inputs(net)
    tangents = wave(x.shape, 1, 0.5, torch.cos), torch.tensor([1.0, -0.5])
    _, jvp = torch.func.jvp(lambda x, sigma: net(x, sigma, labels), (x, sigma), tangents)
    assert_matches(jvp, golden['jvp']['out'], absolute=1e-5)
    [vjp] = torch.autograd.grad(net(x.requires_grad_(), sigma, labels).sum(), x)
    assert_matches(vjp, golden['vjp_ones_wrt_x'], absolute=1e-5)


def test_initial_weights_are_drawn_in_the_order_of_edm2():
    torch.manual_seed(0)
    net = Precond(**CASES['pixel_cond']['kwargs'])
    golden = GOLDEN['networks']['init_manual_seed0_pixel_cond']
    total = sum(float(param.detach().double().sum()) for param in net.parameters())
    assert total == pytest.approx(golden['sum_all_parameters'], rel=1e-6)
    for key, tensor in {
        'emb_fourier.freqs_first3': net.unet.emb_fourier.freqs,
        'emb_fourier.phases_first3': net.unet.emb_fourier.phases,
        'enc_conv_first3': net.unet.enc['16x16_conv'].weight,
        'logvar_linear_first3': net.logvar_linear.weight,
    }.items():
        assert tensor.flatten()[:3].tolist() == pytest.approx(golden[key], rel=1e-6)


# ----------------------------------------------------------------------------
# Names and counts.

KEYS = {
    'img64_channels64': {'img_resolution': 64, 'img_channels': 3, 'label_dim': 1000, 'model_channels': 64},
    'pixel_cond': CASES['pixel_cond']['kwargs'],
    'odd_uncond': CASES['odd_uncond']['kwargs'],
}


@pytest.mark.parametrize('name', KEYS)
def test_names_shapes_and_order_of_the_weights(name):
    with torch.device('meta'):
        net = Precond(**KEYS[name])
    params = dict(net.named_parameters())
    found = [f'{"P" if key in params else "B"} {key} {list(value.shape)}' for key, value in net.state_dict().items()]
    lines = (DATA / 'edm2_keys' / f'{name}.txt').read_text().splitlines()
    assert found == [line for line in lines if not line.startswith('#')]
    assert [f'P {key} {list(value.shape)}' for key, value in params.items()] == [key for key in found if key[0] == 'P']


@pytest.mark.parametrize(
    ('size', 'model_channels', 'latents', 'pixels', 'unconditional'),
    [
        ('xxs', 64, 31_309_029, 31_307_877, 31_053_029),
        ('xs', 128, 124_713_253, 124_710_949, 124_201_253),
        ('s', 192, 280_212_837, 280_209_381, 279_444_837),
        ('m', 256, 497_807_781, 497_803_173, 496_783_781),
        ('l', 320, 777_498_085, 777_492_325, 776_218_085),
        ('xl', 384, 1_119_283_749, 1_119_276_837, 1_117_747_749),
        ('xxl', 448, 1_523_164_773, 1_523_156_709, 1_521_372_773),
    ],
)
def test_parameters_of_the_published_sizes(size, model_channels, latents, pixels, unconditional):
    for count, img_channels, label_dim in [(latents, 4, 1000), (pixels, 3, 1000), (unconditional, 4, 0)]:
        with torch.device('meta'):
            net = Precond(64, img_channels, label_dim, model_channels=model_channels)
        assert sum(param.numel() for param in net.parameters()) == count
        assert len(list(net.parameters())) == (199 if label_dim else 198)
        assert sum(buffer.numel() for buffer in net.buffers()) == 256 + 2 * model_channels


def test_arguments_that_no_block_has():
    with pytest.raises(ValueError, match="flavor='mid' is not one of enc, dec"):
        Block(8, 8, 8, flavor='mid')
    with pytest.raises(ValueError, match="resample_mode='left' is not one of keep, up, down"):
        Block(8, 8, 8, resample_mode='left')


# ----------------------------------------------------------------------------
# Unit variance in, unit variance out.

EPS = 1e-4


def rms(x, **kwargs):
    return x.square().mean(**kwargs).sqrt()


def test_normalization_gives_rows_the_size_r_over_r_plus_eps():
    rows = torch.randn(5, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([1e-6, 1e-4, 1, 3, 1e4], dtype=torch.float64)
    rows *= (sizes / rms(rows, dim=(1, 2)))[:, None, None]
    assert torch.allclose(rms(normalize(rows), dim=(1, 2)), sizes / (sizes + EPS))
    assert torch.equal(normalize(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_silu_of_a_normal_variable_has_unit_size():
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
    assert float(torch.trapezoid(density * mp_silu(z) ** 2, z)) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize('t', [0, 0.3, 0.5, 1])
def test_sums_and_concatenations_of_unit_size(t):
    angle = 2 * math.pi * torch.arange(12, dtype=torch.float64) / 12
    a, b = math.sqrt(2) * angle.cos(), math.sqrt(2) * angle.sin()  # orthogonal
    assert float(rms(mp_sum(a, b, t))) == pytest.approx(1)
    together = mp_cat(a[None], b[None].repeat(1, 3), t=t)  # of other sizes, 12 and 36
    assert float(rms(together)) == pytest.approx(1)
    assert float(together[:, :12].norm()) * t == pytest.approx(float(together[:, 12:].norm()) * (1 - t))


def test_fourier_features_have_unit_size_on_average_over_the_phase():
    layer = MPFourier(8).double()
    layer.phases.copy_(2 * math.pi * torch.arange(8) / 8)
    layer.freqs.fill_(1.7)
    assert torch.allclose(rms(layer(torch.tensor([-3.0, 0.1]).double()), dim=1), torch.ones(2).double())


@pytest.mark.parametrize('kernel', [[], [1, 1], [3, 3]])
def test_weights_in_use_are_unit_vectors_whatever_is_stored(kernel):
    torch.manual_seed(0)
    conv = MPConv(6, 4, kernel).double().eval()
    stored = conv.weight.detach().clone()
    sizes = rms(stored.flatten(1), dim=1)
    assert torch.allclose(conv.scaled_weight(0.7).flatten(1).norm(dim=1), 0.7 * sizes / (sizes + EPS))
    x = torch.randn([3, 6, *(len(kernel) * [5])], dtype=torch.float64)
    before = conv(x)
    assert torch.equal(conv.weight, stored)
    conv.weight.data *= 1000
    assert torch.allclose(conv(x), before, rtol=3e-4, atol=0)


def test_filters_keep_a_constant_and_invert_each_other():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(resample(resample(x, [1, 1], 'up'), [1, 1], 'down'), x)
    for mode in ('up', 'down'):
        inside = resample(torch.full([1, 2, 8, 8], 3.0), [1, 3, 3, 1], mode)[:, :, 1:-1, 1:-1]
        assert torch.allclose(inside, torch.tensor(3.0))


def test_attention_over_equal_pixels_is_their_value():
    torch.manual_seed(0)
    block = Block(8, 8, 4, attention=True, channels_per_head=4).double().eval()
    x = torch.randn(2, 8, 1, 1, dtype=torch.float64).expand(-1, -1, 3, 3)
    value = normalize(block.attn_qkv(x).reshape(2, 2, 4, 3, 3, 3), dim=2)[:, :, :, 2]
    assert torch.allclose(block._attend(x), block.attn_proj(value.reshape(x.shape)))


@torch.no_grad()
def test_a_block_bounds_what_it_returns():
    block = fill(Block(8, 8, 7, clip_act=0.5))
    free = fill(Block(8, 8, 7, clip_act=None))
    x, emb = wave([2, 8, 4, 4]), torch.ones(1, 7)
    assert float(free(x, emb).abs().max()) > 1
    assert torch.equal(block(x, emb), free(x, emb).clamp(-0.5, 0.5))


@torch.no_grad()
def test_a_network_begins_as_its_preconditioning():
    torch.manual_seed(0)
    net = Precond(**CASES['pixel_cond']['kwargs'], sigma_data=0.7).eval()
    x, sigma, labels = inputs(net)
    c_skip = 0.7**2 / (sigma**2 + 0.7**2)
    assert torch.allclose(net(x, sigma, labels), c_skip.reshape(-1, 1, 1, 1) * x)


# ----------------------------------------------------------------------------
# Training mode.


def test_training_forces_every_weight_to_unit_size():
    net = network('pixel_cond')
    before = copy.deepcopy(net.state_dict())
    net(*inputs(net))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    net.train()(*inputs(net), return_logvar=True)
    for name, value in net.state_dict().items():
        if name.endswith('weight'):
            size = rms(before[name].double().flatten(1), dim=1)
            assert torch.allclose(rms(value.double().flatten(1), dim=1), size / (size + EPS))
        else:
            assert torch.equal(before[name], value)
    for name, golden in GOLDEN['loss']['small_net_training_mode_seed0']['weight_after'].items():
        assert_matches(net.state_dict()[name], golden)


def test_gradients_are_orthogonal_to_the_weights():
    net = network('pixel_cond').double().train()
    D, logvar = net(*inputs(net), return_logvar=True)
    (D.square().sum() + logvar.sum()).backward()
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            row, slope = weight.detach().flatten(1), weight.grad.flatten(1)
            along, across = (row * slope).sum(dim=1).abs(), row.norm(dim=1) * slope.norm(dim=1)
            assert float((along / across.clamp(min=1e-30)).max()) < 2 * EPS, name


def test_dropout_is_for_training_only():
    net = fill(Precond(**CASES['pixel_cond']['kwargs'], dropout=0.5))
    x, sigma, labels = inputs(net)
    assert_matches(net(x, sigma, labels), CASES['pixel_cond']['D'])
    net.train()
    assert not torch.equal(net(x, sigma, labels), net(x, sigma, labels))


# ----------------------------------------------------------------------------
# Derivatives in forward mode.


@torch.no_grad()
@pytest.mark.parametrize('wrt', ['x', 'sigma'])
@pytest.mark.parametrize('name', CASES)
def test_forward_mode_agrees_with_a_central_difference(name, wrt):
    net = network(name).double()
    x, sigma, labels = inputs(net)
    x, sigma = x.double(), sigma.double()
    if wrt == 'x':
        primal, tangent, f = x, wave(x.shape, 1, 0.5, torch.cos).double(), lambda value: net(value, sigma, labels)
    else:
        primal, tangent, f = sigma, torch.tensor([1.0, -0.7]).double(), lambda value: net(x, value, labels)
    assert_forward_mode(f, primal, tangent, within=1e-7)


def test_the_derivative_of_the_normalization_at_zero():
    zero, tangent = torch.zeros(2, 3), torch.ones(2, 3)
    _, jvp = torch.func.jvp(normalize, (zero,), (tangent,))
    assert torch.allclose(jvp, tangent / EPS)


@torch.no_grad()
def test_many_tangents_at_once_are_those_one_by_one():
    net = network('clipped').double()
    x, sigma, labels = inputs(net)
    tangents = torch.stack([wave(x.shape), wave(x.shape, 1, 0.5, torch.cos)]).double()

    def along(v):
        return torch.func.jvp(lambda x: net(x, sigma, labels), (x.double(),), (v,))[1]

    assert torch.allclose(torch.func.vmap(along)(tangents), torch.stack([along(v) for v in tangents]))


def test_second_derivatives():
    net = network('pixel_cond').double().requires_grad_(False)
    x, sigma, labels = inputs(net)
    x, h = x.double().requires_grad_(), 1e-4

    def slope(x):
        return torch.func.jvp(lambda x: net(x, sigma, labels), (x,), (torch.ones_like(x),))[1].sum()

    (gradient,) = torch.autograd.grad(slope(x), x)
    with torch.no_grad():
        reference = (slope(x + h) - slope(x - h)) / (2 * h)
    assert float(gradient.sum()) == pytest.approx(float(reference), rel=1e-5)


@torch.no_grad()
def test_a_network_compiles_in_one_piece():
    net = network('pixel_cond')
    found = torch._dynamo.explain(net)(*inputs(net))
    assert found.graph_count == 1, found.break_reasons
