"""Denoising U-Nets (DDPM++, NCSN++, ADM) and the preconditioners that turn them into denoisers D(x; σ).

Every class is stored inside network pickles together with this file's text, so the file stands alone: it imports
torch and `torch_utils.persistence` only. Forward-mode derivatives (`torch.func.jvp`) pass through in x and in σ; where
PyTorch's own rules are slow, the layers have theirs (see `_split_dual`; benchmarks/cost.py tells what that saves).
`net.double()` makes a network compute in float64.

Read it from the bottom: `Precond.forward` is D(x; σ) = c_skip x + c_out F(c_in x; c_noise), F is `SongUNet` or
`DhariwalUNet`, both chains of `UNetBlock`s.

Architectures: Ho et al. 2020 (arXiv 2006.11239), Song et al. 2021 (2011.13456), Dhariwal & Nichol 2021 (2105.05233);
preconditioning: Karras et al. 2022 (2206.00364), table 1.
"""

import functools
import math

import torch
from torch.autograd import forward_ad
from torch.nn.functional import (
    conv2d,
    conv_transpose2d,
    dropout,
    group_norm,
    linear,
    pad,
    scaled_dot_product_attention,
    silu,
)
from torch.nn.grad import conv2d_weight

from torch_utils import persistence


def weight_init(shape, mode, fan_in, fan_out):
    """Random weights with variance 2/(fan_in + fan_out) ('xavier_…') or 1/fan_in ('kaiming_…').

    `mode` ends in '_uniform' or '_normal', the law they are drawn from.
    """
    family, _, law = mode.partition('_')
    if family not in ('xavier', 'kaiming') or law not in ('uniform', 'normal'):
        raise ValueError(
            f'init mode {mode!r} is none of xavier_uniform, xavier_normal, kaiming_uniform, kaiming_normal'
        )
    variance = 2 / (fan_in + fan_out) if family == 'xavier' else 1 / fan_in
    if law == 'uniform':
        return math.sqrt(3 * variance) * (2 * torch.rand(*shape) - 1)
    return math.sqrt(variance) * torch.randn(*shape)


def _split_dual(x, *params):
    """(x, its tangent) for a layer's forward-mode rule, which returns `forward_ad.make_dual(y, tangent of y)`.

    The tangent is None, and x as it was, where the rule must stand back: outside forward mode; where gradients are
    enabled, as the rules use kernels without derivatives (call `torch.func.jvp` under `torch.no_grad()`); and where a
    parameter has a tangent. Then PyTorch's own rules apply.
    """
    if torch.is_grad_enabled():
        return x, None
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is None or _have_tangents(*params):
        return x, None
    return primal, tangent


def _have_tangents(*tensors):
    """A `Parameter` has none: what has one is a tensor in its place."""
    others = [each for each in tensors if torch.is_tensor(each) and type(each) is not torch.nn.Parameter]
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in others)


def _may_overwrite(*tensors):
    """May a result take the place of an input that nobody else needs? It saves the memory traffic of a new tensor.

    Not where gradients are recorded, nor under `vmap`, where one tensor stands for many. `torch.compile` plans memory
    by itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not any(map(_is_batched, tensors))


def _is_batched(tensor):
    """Is it under `vmap`, perhaps inside other transforms of `torch.func`?"""
    functorch = torch._C._functorch
    while torch.is_tensor(tensor) and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _runs_kernels_of_float32_on_cpu(x):
    """Is x what it seems to be: no autocast, no `vmap` and no `torch.compile` between an operation and its kernel?"""
    if x.device.type != 'cpu' or x.dtype != torch.float32:
        return False
    return not (torch.is_autocast_enabled('cpu') or _is_batched(x) or torch.compiler.is_compiling())


def _silu(x):
    """x/(1 + e^−x), in x's place where it may: for tensors that nobody else needs. So do `_scale` and `_add`.

    The Jacobian is diagonal, so the kernel of the backward pass gives the forward-mode product too.
    """
    x, dx = _split_dual(x)
    may = _may_overwrite(x, dx)
    if dx is None:
        return silu(x, inplace=may)
    dy = torch.ops.aten.silu_backward(dx, x, **({'grad_input': dx} if may else {}))
    return forward_ad.make_dual(silu(x, inplace=may), dy)


def _scale(x, factor):
    """x · factor, in x's place, without the product with a zero tangent that PyTorch's rule computes for a constant."""
    x, dx = _split_dual(x, factor)
    y = _multiply(x, factor)
    return y if dx is None else forward_ad.make_dual(y, _multiply(dx, factor))


def _multiply(x, factor):
    return x.mul_(factor) if _may_overwrite(x, factor) else x * factor


def _add(x, y):
    """x + y, in x's place, without the sum with a zero tangent."""
    x, dx = _split_dual(x)
    if dx is None:
        return x.add_(y) if _may_overwrite(x, y) else x + y
    y, dy = _split_dual(y)
    return forward_ad.make_dual(_add(x, y), dx if dy is None else _add(dx, dy))


def _dropout(x, p):
    """Elements become zero with probability p, else x/(1 − p).

    On a CPU PyTorch draws 64 random bits for each, which takes a tenth of a training step. 16 do: p is met to 2^−17.
    """
    if x.device.type != 'cpu' or not 0 < p < 1:
        return dropout(x, p)
    dropped = round(p * 2**16)  # of all 2^16 numbers
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()] >= dropped - 2**15
    last = x.is_contiguous(memory_format=torch.channels_last)
    kept = kept.as_strided(x.shape, x.stride()) if last else kept.view(x.shape)  # in x's order
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


# ----------------------------------------------------------------------------
# 3×3 convolutions on a CPU, with half the multiplications.
#
# Winograd's F(4, 3) down the columns: four rows y of the result come from six rows d of the padded image and the three
# rows g of the kernel by  y = Aᵀ[(G g) ∗ (Bᵀ d)],  where ∗ convolves along the row (Lavin & Gray 2016, arXiv
# 1509.09308, section 4). For four rows that is 6 convolutions with three taps in the place of 12. The error is about
# 1e-6 relative, twice that of PyTorch's own convolution. The last rows of Bᵀ and G have the other sign here, which
# saves an operation. benchmarks/cost.py tells what the whole saves.


WIDE = 2**14  # input times output channels
_L2, _L3 = 2**19, 2**21  # numbers that fit into a processor's second and third cache: 2 and 8 MB in float32


def _conv3x3(x, weight, bias):
    """3×3 convolution, padding 1. Tangents, which `Conv2d` keeps apart where it can, are left to PyTorch's rules."""
    if not _winograd_pays(x, weight) or _have_tangents(x, weight, bias):
        return conv2d(x, weight, bias, padding=1)
    return (_Winograd.apply if torch.is_grad_enabled() else _winograd)(x, weight, bias)


def _winograd_pays(x, weight):
    """On a CPU, channels last, with many channels and pixels; whatever the batch, on which images must not depend."""
    if x.stride(1) != 1 or x.shape[2] % 4:
        return False
    many = weight.shape[0] * weight.shape[1] >= WIDE and x.shape[2] * x.shape[3] >= 2**8
    return many and _runs_kernels_of_float32_on_cpu(x)  # half precision would lose too much in the sums


def _winograd(x, weight, bias):
    """A few images at a time, so that what lies between x and y stays in the cache."""
    g, (_, _, height, width) = _kernel_rows(weight), x.shape
    y = x.new_empty([x.shape[0], height, width, weight.shape[0]])
    size = max(_L3 // math.prod(x.shape[1:]), 1)
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
        dx = _conv3x3(dy, weight.flip(2, 3).transpose(0, 1), None) if ctx.needs_input_grad[0] else None
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


# ----------------------------------------------------------------------------
# Layers.


@persistence.persistent_class
class Linear(torch.nn.Module):
    """y = x Wᵀ + b, in x's dtype."""

    def __init__(self, in_features, out_features, bias=True, init_mode='kaiming_normal', init_weight=1, init_bias=0):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        fans = {'mode': init_mode, 'fan_in': in_features, 'fan_out': out_features}
        self.weight = torch.nn.Parameter(init_weight * weight_init([out_features, in_features], **fans))
        self.bias = torch.nn.Parameter(init_bias * weight_init([out_features], **fans)) if bias else None

    def forward(self, x):
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


@persistence.persistent_class
class Conv2d(torch.nn.Module):
    """k×k convolution, optionally with 2× up- or downsampling by a separable filter; `kernel=0` only resamples.

    The filter f is normalized: outer(f, f)/(Σf)². `fused_resample` merges the paddings of the two steps into one.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel,
        bias=True,
        up=False,
        down=False,
        resample_filter=(1, 1),
        fused_resample=False,
        init_mode='kaiming_normal',
        init_weight=1,
        init_bias=0,
    ):
        if up and down:
            raise ValueError('a convolution can go up or down, not both')
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused_resample = up, down, fused_resample
        fans = {'mode': init_mode, 'fan_in': in_channels * kernel**2, 'fan_out': out_channels * kernel**2}
        shape = [out_channels, in_channels, kernel, kernel]
        self.weight = torch.nn.Parameter(init_weight * weight_init(shape, **fans)) if kernel else None
        self.bias = torch.nn.Parameter(init_bias * weight_init([out_channels], **fans)) if kernel and bias else None
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        kernel_2d = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
        self.register_buffer('resample_filter', kernel_2d if up or down else None)

    def forward(self, x):
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        x, dx = _split_dual(x, *(param for param in (weight, bias) if param is not None))
        y = self._convolve(x, weight, bias)
        return y if dx is None else forward_ad.make_dual(y, self._convolve(dx, weight, None))

    def _convolve(self, x, weight, bias):
        f = None if self.resample_filter is None else self.resample_filter.to(x.dtype)
        f_pad = 0 if f is None else (f.shape[-1] - 1) // 2
        w_pad = 0 if weight is None else weight.shape[-1] // 2
        if weight is None:
            return _resample(x, f, self.up, f_pad)
        if f is None:
            return _convolve_same(x, weight, bias)
        if not self.fused_resample:
            if self.up and x.device.type == 'cpu':
                return _upsample_and_convolve(x, f, f_pad, weight, bias)
            return _convolve_same(_resample(x, f, self.up, f_pad), weight, bias)
        if self.up:
            return conv2d(_resample(x, f, True, max(f_pad - w_pad, 0)), weight, bias, padding=max(w_pad - f_pad, 0))
        # The filter sums to one and sees no padding, so the bias may as well come before it.
        return _resample(conv2d(x, weight, bias, padding=w_pad + f_pad), f, False, 0)


def _convolve_same(x, weight, bias):
    """Convolution that keeps height and width."""
    padding = weight.shape[-1] // 2
    return _conv3x3(x, weight, bias) if padding == 1 else conv2d(x, weight, bias, padding=padding)


def _upsample_and_convolve(x, f, f_pad, weight, bias):
    """2× upsampling by the filter f, then `_convolve_same`, with less arithmetic."""
    if weight.shape[-1] == 1:  # commutes with the filter
        y = _resample(conv2d(x, weight), f, True, f_pad)
        return y if bias is None else _add(y, bias[:, None, None])
    if weight.shape[-1] == 3 and f.shape[-1] == 2:  # In one: 16 products per pixel of x instead of 36.
        outer = torch.stack([pad(2 * f[0, 0].sum(0), (2 - i, i)) for i in range(3)])
        kernel = torch.einsum('oiab,ak,bl->iokl', weight, outer, outer)
        return conv_transpose2d(x, kernel, bias, stride=2, padding=1)
    return _convolve_same(_resample(x, f, True, f_pad), weight, bias)


def _resample(x, f, up, padding):
    """Depthwise 2× up- or downsampling; ×4 on the way up makes good for the zeros in between."""
    channels = x.shape[1]
    if up:
        return conv_transpose2d(x, (4 * f).expand(channels, -1, -1, -1), stride=2, padding=padding, groups=channels)
    return conv2d(x, f.expand(channels, -1, -1, -1), stride=2, padding=padding, groups=channels)


@persistence.persistent_class
class GroupNorm(torch.nn.Module):
    """Group normalization over min(num_groups, num_channels // min_channels_per_group) groups, in x's dtype."""

    def __init__(self, num_channels, num_groups=32, min_channels_per_group=4, eps=1e-5):
        super().__init__()
        if num_channels < min_channels_per_group:
            raise ValueError(f'{num_channels} channels are too few for groups of {min_channels_per_group}')
        self.weight, self.bias = (torch.nn.Parameter(torch.full([num_channels], value)) for value in (1.0, 0.0))
        self.num_groups, self.eps = min(num_groups, num_channels // min_channels_per_group), eps

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        x, dx = _split_dual(x, weight, bias)
        if dx is None:
            return group_norm(x, self.num_groups, weight, bias, self.eps)
        if x.device.type != 'cpu':  # the kernels of GPUs know one layout only
            x, dx = x.contiguous(), dx.contiguous()
        # The Jacobian without the affine part is symmetric, so the kernel of the backward pass gives its products.
        size = [x.shape[0], x.shape[1], math.prod(x.shape[2:]), self.num_groups]
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *size, self.eps)
        dy, _, _ = torch.ops.aten.native_group_norm_backward(dx, x, mean, rstd, None, *size, [True, False, False])
        return forward_ad.make_dual(y, _multiply(dy, weight[:, None, None]))


class AttentionOp:
    """Attention weights softmax(qᵀk/√c) over the keys, computed in float32 or wider, returned in q's dtype.

    q, k: [B, c, L]; result [B, L, L]. Plain operations, so that every kind of derivative exists.
    """

    @staticmethod
    def apply(q, k):
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = q.to(wide).transpose(1, 2) @ (k.to(wide) / math.sqrt(k.shape[1]))
        return logits.softmax(dim=2).to(q.dtype)


def _attention(q, k, v):
    """w v with the weights w = softmax(q kᵀ/√c) of `AttentionOp`, rows of them.  q, k, v: [B, L, c] → [B, L, c]."""
    primals, tangents = zip(*map(_split_dual, (q, k, v)), strict=True)
    if tangents[0] is not None:
        slices = [_attention_with_tangent(*each) for each in _cached_slices(*primals, *tangents)]
        return forward_ad.make_dual(*map(torch.cat, zip(*slices, strict=True)))
    if torch.is_grad_enabled():
        return AttentionOp.apply(q.transpose(1, 2), k.transpose(1, 2)) @ v
    if _convolution_multiplies(q):
        return torch.cat([_bmm(_attention_weights(q, k), v) for q, k, v in _cached_slices(q, k, v)])
    # The same in one kernel, which has no forward mode.
    return scaled_dot_product_attention(q[None], k[None], v[None])[0]


def _cached_slices(*tensors):
    """Slices of the batch whose weights fit into a processor's cache; the whole batch where that does not matter."""
    batch, length, _ = tensors[0].shape
    size = max(_L2 // length**2, 1) if tensors[0].device.type == 'cpu' else batch
    return [[each[i : i + size] for each in tensors] for i in range(0, batch, size)]


def _attention_weights(q, k):
    """softmax(q kᵀ/√c) over the keys: [B, L, L]."""
    return _bmm(q, k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(dim=2)


def _attention_with_tangent(q, k, v, dq, dk, dv):
    """a = w v and da = w dv + dw v, [B, L, c].  With the logits' tangent l: dw = w l − w Σ(w l), sums over the keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, dq, dk = (each.to(wide) for each in (q, k, dq, dk))
    w = _attention_weights(q, k)
    both = torch.cat([k, dk], dim=2).transpose(1, 2) / math.sqrt(q.shape[2])
    wl = _bmm(torch.cat([dq, q], dim=2), both).mul_(w)
    total, w, wl = (each.to(v.dtype) for each in (wl.sum(dim=2, keepdim=True), w, wl))
    a, da = _bmm(w, v), _bmm(w, dv) + _bmm(wl, v)
    return a, torch.addcmul(da, a, total, value=-1)


def _bmm(a, b):
    """a b for each of a batch.  a: [B, L, c], b: [B, c, K] → [B, L, K].

    The convolution with a's rows as kernels is the same. See `_mkl_is_slow`.
    """
    if not _convolution_multiplies(a):
        return a @ b
    kernels = a.reshape(-1, a.shape[2], 1, 1)
    if len(b) == 1:  # A single group takes a kernel that rounds otherwise, so each half of the rows gets a group.
        b = b.expand(2, -1, -1)
    return conv2d(b.reshape(1, -1, 1, b.shape[2]), kernels, groups=len(b)).view(*a.shape[:2], -1)


def _convolution_multiplies(a):
    """Is a convolution the faster way to multiply `a`? Whatever the batch, on which images must not depend."""
    many = a.shape[1] >= 2**8 and a.shape[1] % 2 == 0
    return many and _runs_kernels_of_float32_on_cpu(a) and _mkl_is_slow()


@functools.cache
def _mkl_is_slow():
    """Is this Linux on an AMD processor with AVX-512?

    There MKL, from which PyTorch takes its matrix products, reaches half the speed of oneDNN, from which it takes its
    convolutions. With AVX2 they are equally fast.
    """
    if torch.backends.cpu.get_cpu_capability() != 'AVX512' or not torch.backends.mkl.is_available():
        return False
    try:
        with open('/proc/cpuinfo') as file:
            return 'AuthenticAMD' in file.read()
    except OSError:
        return False


@persistence.persistent_class
class UNetBlock(torch.nn.Module):
    """Residual block, modulated by the embedding, with optional resampling and self-attention.

    x: [N, in_channels, H, W], emb: [N or 1, emb_channels] → [N, out_channels, H', W'] with H' = 2H, H/2 or H.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        emb_channels,
        up=False,
        down=False,
        attention=False,
        num_heads=None,
        channels_per_head=64,
        dropout=0,
        skip_scale=1,
        eps=1e-5,
        resample_filter=(1, 1),
        resample_proj=False,
        adaptive_scale=True,
        init=None,
        init_zero=None,
        init_attn=None,
    ):
        super().__init__()
        init = {} if init is None else init
        init_zero = {'init_weight': 0} if init_zero is None else init_zero
        init_attn = init if init_attn is None else init_attn
        resampling = {'up': up, 'down': down, 'resample_filter': resample_filter}
        self.in_channels, self.out_channels, self.emb_channels = in_channels, out_channels, emb_channels
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, float(skip_scale), adaptive_scale
        self.num_heads = (num_heads or out_channels // channels_per_head) if attention else 0

        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resampling, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, **init_zero)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, **resampling, **init)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, kernel=1, **init_attn)
            self.proj = Conv2d(out_channels, out_channels, kernel=1, **init_zero)

    def forward(self, x, emb):
        h = self.conv0(_silu(self.norm0(x)))
        h = self._modulate(h, self.affine(emb)[:, :, None, None].to(h.dtype))
        h = self.conv1(_dropout(h, self.dropout if self.training else 0))
        x = _scale(_add(h, x if self.skip is None else self.skip(x)), self.skip_scale)
        return _scale(_add(self._attend(x), x), self.skip_scale) if self.num_heads else x

    def _modulate(self, h, params):
        if not self.adaptive_scale:
            return _silu(self.norm1(_add(h, params)))
        scale, shift = params.chunk(2, dim=1)
        return _silu(_add(_scale(self.norm1(h), scale + 1), shift))

    def _attend(self, x):
        # The 3·C channels of qkv run over heads first, then channels of a head, then {q, k, v}.
        qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.num_heads, -1, 3))
        q, k, v = (each.transpose(2, 3).flatten(0, 1).contiguous() for each in qkv.unbind(3))
        a = _attention(q, k, v).unflatten(0, (-1, self.num_heads))
        a = a.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.proj(a if x.stride(1) == 1 else a.contiguous())  # a has channels last, which x may not have


@persistence.persistent_class
class PositionalEmbedding(torch.nn.Module):
    """[cos(x f), sin(x f)] with f_i = max_positions^(−i/(C/2 − endpoint)), i < C/2.  x: [N] → [N, C]."""

    def __init__(self, num_channels, max_positions=10000, endpoint=False):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, max_positions, endpoint

    def forward(self, x):
        half = self.num_channels // 2
        exponent = torch.arange(half, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        freqs = (1 / self.max_positions) ** (exponent / (half - int(self.endpoint)))
        angle = torch.outer(x, freqs.to(x.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


@persistence.persistent_class
class FourierEmbedding(torch.nn.Module):
    """[cos(2π x f), sin(2π x f)] with random frequencies f ~ scale·N(0, 1).  x: [N] → [N, C]."""

    def __init__(self, num_channels, scale=16):
        super().__init__()
        self.register_buffer('freqs', scale * torch.randn(num_channels // 2))

    def forward(self, x):
        angle = torch.outer(x, (2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


def _drop_labels(labels, probability):
    """Classifier-free training: whole label rows become zero with the given probability."""
    keep = torch.rand([labels.shape[0], 1], device=labels.device) >= probability
    return labels * keep.to(labels.dtype)


def _encoder(stem, levels, num_blocks, block, attn_resolutions, shortcut=None):
    """Encoder of a U-Net: its layers by name, and the channels of each result that the decoder takes, in order.

    levels: resolution and channels of each, finest first. block: (channels in, channels out, options) → layer.
    shortcut: channels → further layers by name, after each halving.
    """
    enc, skips = torch.nn.ModuleDict(), []
    c = stem.out_channels
    for level, (res, channels) in enumerate(levels):
        if level == 0:
            enc[f'{res}x{res}_conv'] = stem
        else:
            enc[f'{res}x{res}_down'] = block(c, c, down=True)
            for name, layer in shortcut(c).items() if shortcut else ():
                enc[f'{res}x{res}_{name}'] = layer
        skips.append(c)
        for i in range(num_blocks):
            enc[f'{res}x{res}_block{i}'] = block(c, channels, attention=res in attn_resolutions)
            c = channels
            skips.append(c)
    return enc, skips


def _decoder(skips, levels, num_blocks, block, attn_resolutions, first_attending=0, to_image=None):
    """Decoder of a U-Net: its layers by name, and the channels of its result.

    skips, levels, block: of `_encoder`. first_attending: which block of a level is the first with attention.
    to_image: (channels, is this the coarsest level?, the finest?) → further layers by name, after each level.
    """
    dec, skips = torch.nn.ModuleDict(), list(skips)
    c = skips[-1]
    for level, (res, channels) in reversed(list(enumerate(levels))):
        coarsest = level == len(levels) - 1
        if coarsest:
            dec[f'{res}x{res}_in0'] = block(c, c, attention=True)
            dec[f'{res}x{res}_in1'] = block(c, c)
        else:
            dec[f'{res}x{res}_up'] = block(c, c, up=True)
        for i in range(num_blocks + 1):
            attention = res in attn_resolutions and i >= first_attending
            dec[f'{res}x{res}_block{i}'] = block(c + skips.pop(), channels, attention=attention)
            c = channels
        for name, layer in to_image(c, coarsest, level == 0).items() if to_image else ():
            dec[f'{res}x{res}_{name}'] = layer
    return dec, c


def _input_shortcut(encoder_type, c_input, resample_filter, init):
    """channels of the features → the layers that halve the input and bring it to them, by name."""
    down = {'down': True, 'resample_filter': resample_filter}

    def skip(c):
        halve = Conv2d(c_input, c_input, kernel=0, **down)
        return {'aux_down': halve, 'aux_skip': Conv2d(c_input, c, kernel=1, **init)}

    def residual(c):
        nonlocal c_input  # the result takes the place of the input
        c_before, c_input = c_input, c
        return {'aux_residual': Conv2d(c_before, c, kernel=3, fused_resample=True, **down, **init)}

    return {'standard': None, 'skip': skip, 'residual': residual}[encoder_type]


def _to_image(decoder_type, out_channels, resample_filter, init):
    """`to_image` of `_decoder`: the image comes from the finest level only, or (skip) is a sum over all levels."""

    def layers(c, coarsest, finest):
        made = {}
        if decoder_type == 'skip' and not coarsest:
            made['aux_up'] = Conv2d(out_channels, out_channels, kernel=0, up=True, resample_filter=resample_filter)
        if decoder_type == 'skip' or finest:
            made['aux_norm'] = GroupNorm(c, eps=1e-6)
            made['aux_conv'] = Conv2d(c, out_channels, kernel=3, **init)
        return made

    return layers


@persistence.persistent_class
class SongUNet(torch.nn.Module):
    """U-Net of DDPM++ (positional, standard, standard) and NCSN++ (fourier, residual, standard).

    x: [N, in_channels, R, R], noise_labels: [N or 1], class_labels: [N or 1, label_dim] or None,
    augment_labels: [N, augment_dim] or None → [N, out_channels, R, R].
    """

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.10,
        label_dropout=0,
        embedding_type='positional',
        channel_mult_noise=1,
        encoder_type='standard',
        decoder_type='standard',
        resample_filter=(1, 1),
    ):
        _check_choice('embedding_type', embedding_type, ('positional', 'fourier'))
        _check_choice('encoder_type', encoder_type, ('standard', 'skip', 'residual'))
        _check_choice('decoder_type', decoder_type, ('standard', 'skip'))
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        init = {'init_mode': 'xavier_uniform'}
        init_zero = {'init_mode': 'xavier_uniform', 'init_weight': 1e-5}

        def block(c_in, c_out, **options):
            init_attn = {'init_mode': 'xavier_uniform', 'init_weight': math.sqrt(0.2)}
            return UNetBlock(
                c_in, c_out, emb_channels, num_heads=1, dropout=dropout, skip_scale=math.sqrt(0.5), eps=1e-6,
                resample_filter=resample_filter, resample_proj=True, adaptive_scale=False,
                init=init, init_zero=init_zero, init_attn=init_attn, **options,
            )  # fmt: skip

        if embedding_type == 'positional':
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)

        levels = [(img_resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        stem = Conv2d(in_channels, model_channels, kernel=3, **init)
        shortcut = _input_shortcut(encoder_type, in_channels, resample_filter, init)
        self.enc, skips = _encoder(stem, levels, num_blocks, block, attn_resolutions, shortcut)
        to_image = _to_image(decoder_type, out_channels, resample_filter, init_zero)
        self.dec, _ = _decoder(skips, levels, num_blocks, block, attn_resolutions, num_blocks, to_image)

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        emb = self._embed(noise_labels, class_labels, augment_labels)
        skips = self._encode(x, emb)
        return self._decode(skips, emb)

    def _embed(self, noise_labels, class_labels, augment_labels):
        emb = self.map_noise(noise_labels)
        emb = torch.cat(emb.chunk(2, dim=1)[::-1], dim=1)  # [cos, sin] → [sin, cos]
        if self.map_label is not None:
            labels = class_labels
            if self.training and self.label_dropout:
                labels = _drop_labels(labels, self.label_dropout)
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return silu(self.map_layer1(silu(self.map_layer0(emb))))

    def _encode(self, x, emb):
        skips, aux = [], x
        for name, layer in self.enc.items():
            if 'aux_down' in name:
                aux = layer(aux)
            elif 'aux_skip' in name:
                x = skips[-1] = x + layer(aux)
            elif 'aux_residual' in name:
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        return skips

    def _decode(self, skips, emb):
        x, aux, tmp = skips[-1], None, None
        for name, layer in self.dec.items():
            if 'aux_up' in name:
                aux = layer(aux)
            elif 'aux_norm' in name:
                tmp = layer(x)
            elif 'aux_conv' in name:
                tmp = layer(_silu(tmp))
                aux = tmp if aux is None else tmp + aux
            else:
                if x.shape[1] != layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        return aux


@persistence.persistent_class
class DhariwalUNet(torch.nn.Module):
    """U-Net of ADM. Same inputs and output as `SongUNet`."""

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb=4,
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.10,
        label_dropout=0,
    ):
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        third = math.sqrt(1 / 3)
        init = {'init_mode': 'kaiming_uniform', 'init_weight': third, 'init_bias': third}
        init_zero = {'init_mode': 'kaiming_uniform', 'init_weight': 0, 'init_bias': 0}

        def block(c_in, c_out, **options):
            heads = {'channels_per_head': 64, 'init': init, 'init_zero': init_zero}
            return UNetBlock(c_in, c_out, emb_channels, dropout=dropout, **heads, **options)

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, **init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        label_init = {'bias': False, 'init_mode': 'kaiming_normal', 'init_weight': math.sqrt(label_dim)}
        self.map_label = Linear(label_dim, emb_channels, **label_init) if label_dim else None

        levels = [(img_resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        stem = Conv2d(in_channels, levels[0][1], kernel=3, **init)
        self.enc, skips = _encoder(stem, levels, num_blocks, block, attn_resolutions)
        self.dec, c = _decoder(skips, levels, num_blocks, block, attn_resolutions)
        self.out_norm = GroupNorm(c)
        self.out_conv = Conv2d(c, out_channels, kernel=3, **init_zero)

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        emb = self._embed(noise_labels, class_labels, augment_labels)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if x.shape[1] != layer.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        return self.out_conv(_silu(self.out_norm(x)))

    def _embed(self, noise_labels, class_labels, augment_labels):
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(silu(self.map_layer0(emb)))
        if self.map_label is not None:
            labels = class_labels
            if self.training and self.label_dropout:
                labels = _drop_labels(labels, self.label_dropout)
            emb = emb + self.map_label(labels)
        return silu(emb)


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f'{name}={value!r} is not one of {", ".join(choices)}')


class Precond(torch.nn.Module):
    """What the four preconditioners share: D(x; σ) = c_skip x + c_out F(c_in x; c_noise).

    x: [N, C, R, R]; sigma: scalar, [1] or [N]; class_labels: [N or 1, label_dim] or None (all zero).
    Returns D in float32, or in float64 after `net.double()`. `use_fp16` runs F in float16 on CUDA.
    A subclass sets `sigma_min` and `sigma_max` and says what `coefficients(sigma)` are.
    """

    def __init__(self, img_resolution, img_channels, label_dim, use_fp16, model_type, out_channels, model_kwargs):
        super().__init__()
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim, self.use_fp16 = label_dim, use_fp16
        _check_choice('model_type', model_type, ('SongUNet', 'DhariwalUNet'))
        shape = {'img_resolution': img_resolution, 'in_channels': img_channels, 'out_channels': out_channels}
        self.model = globals()[model_type](**shape, label_dim=label_dim, **model_kwargs)

    def coefficients(self, sigma):
        """(c_skip, c_out, c_in, c_noise) for sigma: [N or 1, 1, 1, 1]; each subclass has its own."""
        raise TypeError(f'{type(self).__name__} does not say what its coefficients are')

    def round_sigma(self, sigma):
        """The noise level nearest to `sigma` that the network knows: any, unless a subclass says otherwise."""
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **model_kwargs):
        first_weight = next(self.model.parameters())
        wide = torch.float64 if first_weight.dtype == torch.float64 else torch.float32
        half = self.use_fp16 and not force_fp32 and x.device.type == 'cuda'
        dtype = torch.float16 if half else wide
        x = x.to(wide)
        sigma = torch.as_tensor(sigma, device=x.device).to(wide).reshape(-1, 1, 1, 1)
        labels = self._labels(class_labels, x)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        F_x = self.model((c_in * x).to(dtype), c_noise.flatten(), class_labels=labels, **model_kwargs)
        assert F_x.dtype == dtype or torch.is_autocast_enabled(x.device.type)
        return c_skip * x + c_out * F_x[:, : self.img_channels].to(wide)

    def _labels(self, class_labels, x):
        if self.label_dim == 0:
            return None
        if class_labels is None:
            return torch.zeros([1, self.label_dim], dtype=x.dtype, device=x.device)
        return class_labels.to(x.dtype).reshape(-1, self.label_dim)


@persistence.persistent_class
class VPPrecond(Precond):
    """Variance-preserving: c_skip 1, c_out −σ, c_in 1/√(σ²+1), c_noise (M−1) t(σ).

    t(σ) is the inverse of σ(t) = √(exp(½β_d t² + β_min t) − 1).
    """

    def __init__(
        self,
        img_resolution,
        img_channels,
        label_dim=0,
        use_fp16=False,
        beta_d=19.9,
        beta_min=0.1,
        M=1000,
        epsilon_t=1e-5,
        model_type='SongUNet',
        **model_kwargs,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, img_channels, model_kwargs)
        self.beta_d, self.beta_min, self.M, self.epsilon_t = beta_d, beta_min, M, epsilon_t
        self.sigma_min, self.sigma_max = float(self.sigma(epsilon_t)), float(self.sigma(1))

    def sigma(self, t):
        t = torch.as_tensor(t)
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_inv(self, sigma):
        sigma = torch.as_tensor(sigma)
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def coefficients(self, sigma):
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


@persistence.persistent_class
class VEPrecond(Precond):
    """Variance-exploding: c_skip 1, c_out σ, c_in 1, c_noise ln(σ/2)."""

    def __init__(
        self,
        img_resolution,
        img_channels,
        label_dim=0,
        use_fp16=False,
        sigma_min=0.02,
        sigma_max=100,
        model_type='SongUNet',
        **model_kwargs,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, img_channels, model_kwargs)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma):
        return 1, sigma, 1, (0.5 * sigma).log()


@persistence.persistent_class
class iDDPMPrecond(Precond):
    """Improved DDPM: c_skip 1, c_out −σ, c_in 1/√(σ²+1), c_noise M − 1 − j where u_j is the level nearest to σ.

    The network knows the levels u_0 > … > u_M = 0 only; c_noise is constant between them (derivative zero).
    Nichol & Dhariwal 2021 (arXiv 2102.09672).
    """

    def __init__(
        self,
        img_resolution,
        img_channels,
        label_dim=0,
        use_fp16=False,
        C_1=0.001,
        C_2=0.008,
        M=1000,
        model_type='DhariwalUNet',
        **model_kwargs,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, 2 * img_channels, model_kwargs)
        self.C_1, self.C_2, self.M = C_1, C_2, M
        u = torch.zeros(M + 1)
        for j in range(M, 0, -1):
            shrink = (self.alpha_bar(j - 1) / self.alpha_bar(j)).clamp(min=C_1)
            u[j - 1] = ((u[j] ** 2 + 1) / shrink - 1).sqrt()
        self.register_buffer('u', u)
        self.sigma_min, self.sigma_max = float(u[M - 1]), float(u[0])

    def alpha_bar(self, j):
        return (0.5 * math.pi * torch.as_tensor(j) / self.M / (self.C_2 + 1)).sin() ** 2

    def round_sigma(self, sigma, return_index=False):
        sigma = torch.as_tensor(sigma)
        u = self.u.to(sigma.device, torch.float32)  # on sigma's device, because not every device has its dtype
        index = (sigma.to(torch.float32).reshape(-1, 1) - u).abs().argmin(dim=1).reshape(sigma.shape)
        return index if return_index else u[index].to(sigma.dtype)

    def coefficients(self, sigma):
        c_noise = self.M - 1 - self.round_sigma(sigma, return_index=True).to(sigma.dtype)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise


@persistence.persistent_class
class EDMPrecond(Precond):
    """EDM: c_skip σ_d²/(σ²+σ_d²), c_out σσ_d/√(σ²+σ_d²), c_in 1/√(σ²+σ_d²), c_noise ln(σ)/4."""

    def __init__(
        self,
        img_resolution,
        img_channels,
        label_dim=0,
        use_fp16=False,
        sigma_min=0,
        sigma_max=float('inf'),
        sigma_data=0.5,
        model_type='DhariwalUNet',
        **model_kwargs,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, img_channels, model_kwargs)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def coefficients(self, sigma):
        total = sigma**2 + self.sigma_data**2
        c_in = 1 / total.sqrt()
        return self.sigma_data**2 / total, sigma * self.sigma_data * c_in, c_in, sigma.log() / 4
