"""3×3 convolutions on a CPU with half the multiplications, for wide layers.

Winograd's F(4, 3) down the columns: four rows y of the result come from six rows d of the padded image and the three
rows g of the kernel by  y = Aᵀ[(G g) ∗ (Bᵀ d)],  where ∗ convolves along the row (Lavin & Gray 2016, arXiv
1509.09308, section 4). For four rows that is 6 convolutions with three taps in the place of 12. The error is about
1e-6 relative, twice that of PyTorch's own convolution. The last rows of Bᵀ and G have the other sign here, which
saves an operation. Of published networks it reaches those with 128 channels and more, such as EDM's for CIFAR-10.
"""

import math

import torch
from torch.autograd import forward_ad
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_weight

WIDE = 2**14  # input times output channels
L2, L3 = 2**19, 2**21  # numbers that fit into a processor's second and third cache: 2 and 8 MB in float32


def conv3x3(x, weight, bias):
    """3×3 convolution, padding 1. Tangents, which `Conv2d` keeps apart where it can, are left to PyTorch's rules."""
    if not _winograd_pays(x, weight) or have_tangents(x, weight, bias):
        return conv2d(x, weight, bias, padding=1)
    return (_Winograd.apply if torch.is_grad_enabled() else _winograd)(x, weight, bias)


def _winograd_pays(x, weight):
    """On a CPU, channels last, with many channels and pixels; whatever the batch, on which images must not depend."""
    if x.stride(1) != 1 or x.shape[2] % 4:
        return False
    many = weight.shape[0] * weight.shape[1] >= WIDE and x.shape[2] * x.shape[3] >= 2**8
    return many and runs_kernels_of_float32_on_cpu(x)  # half precision would lose too much in the sums


def _winograd(x, weight, bias):
    """A few images at a time, so that what lies between x and y stays in the cache."""
    g, (_, _, height, width) = _kernel_rows(weight), x.shape
    y = x.new_empty([x.shape[0], height, width, weight.shape[0]])
    size = max(L3 // math.prod(x.shape[1:]), 1)
    for x_part, y_part in zip(x.split(size), y.split(size), strict=True):
        d = _image_rows(x_part)
        # The second product enters all four rows with factor 1, so it brings the bias along.
        m = [conv2d(d[i], g[i], bias if i == 1 else None, padding=(0, 1)) for i in range(6)]
        _write_result_rows(y_part.view(-1, 4, width, weight.shape[0]), [each[:, :, 0].transpose(1, 2) for each in m])
    return y.permute(0, 3, 1, 2)


def _image_rows(x):
    """Bᵀ d: six times [N H/4, C, 1, W]. Rows as images, for which PyTorch takes the same kernel whatever N is.

    d are the four rows of a tile, the one above and the one below, which beyond the image are zero.
    """
    d1, d2, d3, d4 = x.permute(0, 2, 3, 1).unflatten(1, (-1, 4)).unbind(2)
    p, q = torch.sub(d4, d2, alpha=4), torch.sub(d3, d1, alpha=4)
    r, s = d4 - d2, d3 - d1
    first = p - d2
    first[:, 1:].add_(d4[:, :-1], alpha=4)
    rows = [first, p + q, p.sub_(q), torch.add(r, s, alpha=2), r.sub_(s, alpha=2), q.add_(d3, alpha=4)]
    rows[5][:, :-1].sub_(d1[:, 1:])
    return [_as_images(each) for each in rows]


def _as_images(rows):
    """[N, h, W, C] → [N h, C, 1, W], channels last."""
    return rows.flatten(0, 1).unsqueeze(1).permute(0, 3, 1, 2)


def _G(like):
    """The matrix G, in the dtype of `like`."""
    a, b, c = 1 / 6, 1 / 12, 1 / 24
    return like.new_tensor([[1 / 4, 0, 0], [-a, -a, -a], [-a, a, -a], [c, b, a], [c, -b, a], [0, 0, -1]])


def _kernel_rows(weight):
    """G g: six times [out, in, 1, 3]."""
    out_channels, channels, _, _ = weight.shape
    rows = _G(weight) @ weight.permute(2, 0, 3, 1).flatten(1)
    return [row.view(out_channels, 1, 3, channels).permute(0, 3, 1, 2) for row in rows]


def _write_result_rows(y, m):
    """Aᵀ m: four rows, into y: [N H/4, 4, W, out], of six: [N H/4, W, out] each."""
    p, q, r, s = m[1] + m[2], m[1].sub_(m[2]), m[3] + m[4], m[3].sub_(m[4])
    torch.add(m[0], p, out=y[:, 0]).add_(r)
    torch.add(q, s, alpha=2, out=y[:, 1])
    torch.add(p, r, alpha=4, out=y[:, 2])
    torch.add(m[5], q, out=y[:, 3]).add_(s, alpha=8)


class _Winograd(torch.autograd.Function):
    """`_winograd` with its gradient: dx is dy convolved with the kernel turned round, dg = Gᵀ[(A dy) ∗ (Bᵀ d)]."""

    @staticmethod
    def forward(x, weight, bias):
        return _winograd(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = conv3x3(dy, weight.flip(2, 3).transpose(0, 1), None) if ctx.needs_input_grad[0] else None
        dw = _winograd_weight_grad(x, weight, dy) if ctx.needs_input_grad[1] else None
        return dx, dw, dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None


def _winograd_weight_grad(x, weight, dy):
    y = dy.permute(0, 2, 3, 1).unflatten(1, (-1, 4)).unbind(2)
    p, q = y[0] + y[2], y[1] + y[3]
    r, s = torch.add(y[0], y[2], alpha=4), torch.add(y[1], y[3], alpha=4).mul_(2)
    m = [_as_images(rows) for rows in (y[0], p + q, p - q, r + s, r - s, y[3])]  # A dy
    d, shape = _image_rows(x), weight[:, :, :1].shape
    g = [conv2d_weight(d[i], shape, m[i], padding=(0, 1)) for i in range(6)]
    return torch.tensordot(torch.cat(g, dim=2), _G(weight), dims=[[2], [0]]).transpose(2, 3)


def have_tangents(*tensors):
    """A `Parameter` has none: what has one is a tensor in its place."""
    others = [each for each in tensors if torch.is_tensor(each) and type(each) is not torch.nn.Parameter]
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in others)


def is_batched(tensor):
    """Is it under `vmap`, perhaps inside other transforms of `torch.func`?"""
    functorch = torch._C._functorch
    while torch.is_tensor(tensor) and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def runs_kernels_of_float32_on_cpu(x):
    """Is x what it seems to be: no autocast, no `vmap` and no `torch.compile` between an operation and its kernel?"""
    if x.device.type != 'cpu' or x.dtype != torch.float32:
        return False
    return not (torch.is_autocast_enabled('cpu') or is_batched(x) or torch.compiler.is_compiling())
