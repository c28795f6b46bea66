"""Speed and forward-mode rules for training/networks.py: the same numbers, for less work.

`install(net)` is the way in. It gives each layer of a network, in place, a class of this file instead of its own: the
`Conv2d` here is a `networks.Conv2d` with another `forward`, of the same name and with the same attributes. So whatever
looks at a network finds what it did before, and a pickle stores what it always stored: the layer as networks.py defines
it (`persistence.stored_as_its_base`), and nothing of this file. A deep copy keeps the rules; what is read from
a file gets them from whoever read it (`torch_utils.network_io`). Layers of other classes stay as they are.

Forward mode (`torch.func.jvp`), by layer. The Jacobians of a normalization, before its affine part, and of softmax are
symmetric, that of SiLU is diagonal: their products are the existing kernels of the backward pass, applied to the
tangent. A convolution's tangent is a convolution without bias; PyTorch's own rule also convolves with the zero tangent
of the weight. benchmarks/cost.py tells what the rules save, tests/test_fast.py compares them with the definitions.
"""

import copy
import functools
import math
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.functional import conv2d, conv_transpose2d, dropout, group_norm, pad, scaled_dot_product_attention, silu

from torch_utils import persistence
from training import networks
from training.winograd import L2, conv3x3, have_tangents, is_batched, runs_kernels_of_float32_on_cpu


def install(net: torch.nn.Module) -> torch.nn.Module:
    """Give every layer of a network that training/networks.py defines its rules, in place. Returns the network."""
    for layer in net.modules():
        layer.__class__ = RULES.get(type(layer), type(layer))
    return net


def remove(net: torch.nn.Module) -> torch.nn.Module:
    """Undo `install`. Returns the network."""
    definitions = {rules: definition for definition, rules in RULES.items()}
    for layer in net.modules():
        layer.__class__ = definitions.get(type(layer), type(layer))
    return net


def _deepcopy(layer: torch.nn.Module, memo: dict[int, Any]) -> torch.nn.Module:
    """A copy of a layer with the rules; the way of pickles, which `copy` goes by default, would lose them."""
    copied = memo[id(layer)] = type(layer).__new__(type(layer))
    copied.__dict__.update(copy.deepcopy(layer.__dict__, memo))
    return copied


# ----------------------------------------------------------------------------
# Elementwise operations, in place where that is allowed, and forward mode apart.


def _split_dual(x, *params):
    """(x, its tangent) for a layer's forward-mode rule, which returns `forward_ad.make_dual(y, tangent of y)`.

    The tangent is None, and x as it was, where the rule must stand back: outside forward mode; where gradients are
    enabled, as the rules use kernels without derivatives (call `torch.func.jvp` under `torch.no_grad()`); and where a
    parameter has a tangent. Then PyTorch's own rules apply.
    """
    if torch.is_grad_enabled():
        return x, None
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is None or have_tangents(*params):
        return x, None
    return primal, tangent


def _may_overwrite(*tensors):
    """May a result take the place of an input that nobody else needs? It saves the memory traffic of a new tensor.

    Not where gradients are recorded, nor under `vmap`, where one tensor stands for many. `torch.compile` plans memory
    by itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not any(map(is_batched, tensors))


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
# Layers.


@persistence.stored_as_its_base
class Conv2d(networks.Conv2d):
    """Tangents apart, without bias; less arithmetic for 3×3 and for upsampling on a CPU."""

    __deepcopy__ = _deepcopy

    def forward(self, x):
        weight, bias = (None if param is None else param.to(x.dtype) for param in (self.weight, self.bias))
        x, dx = _split_dual(x, *(param for param in (weight, bias) if param is not None))
        y = self._convolve(x, weight, bias)
        return y if dx is None else forward_ad.make_dual(y, self._convolve(dx, weight, None))

    def _convolve(self, x, weight, bias):
        if weight is None or self.fused_resample:
            return super()._convolve(x, weight, bias)
        if self.resample_filter is None:
            return _convolve_same(x, weight, bias)
        f_pad = (self.resample_filter.shape[-1] - 1) // 2
        if self.up and x.device.type == 'cpu':
            return self._upsample_and_convolve(x, f_pad, weight, bias)
        return _convolve_same(self._resample(x, f_pad), weight, bias)

    def _upsample_and_convolve(self, x, f_pad, weight, bias):
        """2× upsampling by the filter f, then `_convolve_same`, with less arithmetic."""
        f = self.resample_filter.to(x.dtype)
        if weight.shape[-1] == 1:  # commutes with the filter
            y = self._resample(conv2d(x, weight), f_pad)
            return y if bias is None else _add(y, bias[:, None, None])
        if weight.shape[-1] == 3 and f.shape[-1] == 2:  # In one: 16 products per pixel of x instead of 36.
            outer = torch.stack([pad(2 * f[0, 0].sum(0), (2 - i, i)) for i in range(3)])
            kernel = torch.einsum('oiab,ak,bl->iokl', weight, outer, outer)
            return conv_transpose2d(x, kernel, bias, stride=2, padding=1)
        return _convolve_same(self._resample(x, f_pad), weight, bias)


def _convolve_same(x, weight, bias):
    """Convolution that keeps height and width."""
    padding = weight.shape[-1] // 2
    return conv3x3(x, weight, bias) if padding == 1 else conv2d(x, weight, bias, padding=padding)


@persistence.stored_as_its_base
class GroupNorm(networks.GroupNorm):
    """Its forward-mode product by the kernel of its backward pass."""

    __deepcopy__ = _deepcopy

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


@persistence.stored_as_its_base
class UNetBlock(networks.UNetBlock):
    """Sums and products in place, faster dropout and attention."""

    __deepcopy__ = _deepcopy
    activation = staticmethod(_silu)  # type: ignore[assignment]

    def forward(self, x, emb):
        h = self.conv0(self.activation(self.norm0(x)))
        h = self._modulate(h, self.affine(emb)[:, :, None, None].to(h.dtype))
        h = self.conv1(_dropout(h, self.dropout if self.training else 0))
        x = _scale(_add(h, x if self.skip is None else self.skip(x)), self.skip_scale)
        return _scale(_add(self._attend(x), x), self.skip_scale) if self.num_heads else x

    def _modulate(self, h, params):
        if not self.adaptive_scale:
            return self.activation(self.norm1(_add(h, params)))
        scale, shift = params.chunk(2, dim=1)
        return self.activation(_add(_scale(self.norm1(h), scale + 1), shift))

    def _attend(self, x):
        # The 3·C channels of qkv run over heads first, then channels of a head, then {q, k, v}.
        qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.num_heads, -1, 3))
        q, k, v = (each.transpose(2, 3).flatten(0, 1).contiguous() for each in qkv.unbind(3))
        a = _attention(q, k, v).unflatten(0, (-1, self.num_heads))
        a = a.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.proj(a if x.stride(1) == 1 else a.contiguous())  # a has channels last, which x may not have


@persistence.stored_as_its_base
class SongUNet(networks.SongUNet):
    __deepcopy__ = _deepcopy
    activation = staticmethod(_silu)  # type: ignore[assignment]


@persistence.stored_as_its_base
class DhariwalUNet(networks.DhariwalUNet):
    __deepcopy__ = _deepcopy
    activation = staticmethod(_silu)  # type: ignore[assignment]


RULES: dict[Any, type] = {each.__base__: each for each in (Conv2d, GroupNorm, UNetBlock, SongUNet, DhariwalUNet)}

# ----------------------------------------------------------------------------
# Attention.


def _attention(q, k, v):
    """w v with the weights w = softmax(q kᵀ/√c) of `AttentionOp`, rows of them.  q, k, v: [B, L, c] → [B, L, c]."""
    primals, tangents = zip(*map(_split_dual, (q, k, v)), strict=True)
    if tangents[0] is not None:
        slices = [_attention_with_tangent(*each) for each in _cached_slices(*primals, *tangents)]
        return forward_ad.make_dual(*map(torch.cat, zip(*slices, strict=True)))
    if torch.is_grad_enabled():
        return networks.AttentionOp.apply(q.transpose(1, 2), k.transpose(1, 2)) @ v
    if _convolution_multiplies(q):
        return torch.cat([_bmm(_attention_weights(q, k), v) for q, k, v in _cached_slices(q, k, v)])
    # The same in one kernel, which has no forward mode.
    return scaled_dot_product_attention(q[None], k[None], v[None])[0]


def _cached_slices(*tensors):
    """Slices of the batch whose weights fit into a processor's cache; the whole batch where that does not matter."""
    batch, length, _ = tensors[0].shape
    size = max(L2 // length**2, 1) if tensors[0].device.type == 'cpu' else batch
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
    return many and runs_kernels_of_float32_on_cpu(a) and _mkl_is_slow()


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
