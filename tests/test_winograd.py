"""training/winograd.py: convolutions with half the products are those of PyTorch, with all derivatives."""

import math

import torch
from small_networks import relative

from training import winograd


def convolution_case(batch=2, channels=128, out_channels=128, height=16, width=17, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(batch, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, channels, 3, 3, dtype=dtype) / math.sqrt(9 * channels)
    return x, weight, torch.randn(out_channels, dtype=dtype)


def test_convolution_by_winograd_and_its_gradients_are_those_of_pytorch():
    inputs = [tensor.requires_grad_() for tensor in convolution_case()]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.nn.functional.conv2d(*wide, padding=1)
    assert winograd._winograd_pays(*inputs[:2])
    y = winograd.conv3x3(*inputs)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative(y.detach(), expected.detach()) < 2e-6
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, inputs, dy)
    for gradient, reference in zip(found, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        assert relative(gradient, reference) < 3e-6


def test_second_derivatives_of_convolution_by_winograd(monkeypatch):
    monkeypatch.setattr(winograd, '_winograd_pays', lambda x, weight: True)
    inputs = [tensor.requires_grad_() for tensor in convolution_case(1, 2, 3, 8, 3, torch.float64)]
    assert torch.autograd.gradcheck(winograd.conv3x3, inputs)
    assert torch.autograd.gradgradcheck(winograd.conv3x3, inputs)


def test_convolution_by_winograd_under_torch_func():
    x, weight, bias = convolution_case()
    plain = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    tangent = torch.randn_like(x)
    for recording in (False, True):
        with torch.set_grad_enabled(recording):
            y, jvp = torch.func.jvp(lambda x: winograd.conv3x3(x, weight, bias), (x,), (tangent,))
        assert relative(y, plain) < 2e-6
        assert relative(jvp, torch.nn.functional.conv2d(tangent, weight, padding=1)) < 2e-6
    with torch.no_grad():
        single = torch.func.vmap(lambda x: winograd.conv3x3(x[None], weight, bias)[0])(x)
        assert relative(single, plain) < 2e-6


@torch.no_grad()
def test_convolution_by_winograd_where_it_pays_whatever_the_batch(monkeypatch):
    x, weight, bias = convolution_case(batch=18)
    monkeypatch.setattr(winograd, 'L3', 15 * x[0].numel())  # so the last three are a slice of their own
    y = winograd.conv3x3(x, weight, bias)
    assert relative(y, torch.nn.functional.conv2d(x, weight, bias, padding=1)) < 2e-6
    for i in (0, 14, 15, 17):
        assert torch.equal(winograd.conv3x3(x[i : i + 1], weight, bias), y[i : i + 1])
    narrow = weight[:64]
    with torch.autocast('cpu', torch.bfloat16):
        assert not winograd._winograd_pays(x, weight)
    for other, kernel in [(x.contiguous(), weight), (x[:, :, 1:], weight), (x[:, :, :8], weight), (x, narrow)]:
        assert not winograd._winograd_pays(other, kernel)
