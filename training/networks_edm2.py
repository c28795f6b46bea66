"""EDM2's magnitude-preserving U-Net, and the preconditioner that turns it into a denoiser D(x; σ).

Every class is stored inside network pickles together with this file's text, so the file stands alone: it imports
torch and `torch_utils.persistence` only. In eval mode, forward-mode derivatives (`torch.func.jvp`) pass through in x
and in σ. `net.double()` makes a network compute in float64.

Each operation turns inputs of unit variance into outputs of unit variance, so that no activation norms, biases or group
norms are needed: weights are normalized wherever they are used, sums and concatenations are rescaled, nonlinearities
divided by what they lose.

Read it from the bottom: `Precond.forward` is D(x; σ) = c_skip x + c_out F(c_in x; c_noise), F is `UNet`, a chain of
`Block`s, and those are made of `MPConv`s and the functions at the top.

Karras et al. 2024 (arXiv 2312.02696), appendix B; the equations are numbered as there.
"""

import math

import torch
from torch.nn.functional import conv2d, conv_transpose2d, dropout, linear, silu

from torch_utils import persistence

# ----------------------------------------------------------------------------
# Functions that preserve magnitudes.


def _wide(dtype):
    """float64 for float64, float32 for anything narrower."""
    return torch.promote_types(dtype, torch.float32)


def normalize(x, dim=None, eps=1e-4):
    """x / (ε + ρ), ρ the root mean square over the dimensions `dim`, all but the first unless given (eqs. 47, 66)."""
    dim = tuple(range(1, x.ndim)) if dim is None else dim
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=_wide(x.dtype))
    rms = norm / math.sqrt(x.numel() / norm.numel())
    return x / (rms + eps).to(x.dtype)


def mp_silu(x):
    """silu(x) / 0.596, the root mean square of silu(𝒩(0, 1)) (eq. 81)."""
    return silu(x) / 0.596


def mp_sum(a, b, t=0.5):
    """((1−t) a + t b) / √((1−t)² + t²) (eq. 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a, b, dim=1, t=0.5):
    """a and b side by side, weighted so that what comes next gets them (1−t) : t, whatever their sizes (eq. 103)."""
    size_a, size_b = a.shape[dim], b.shape[dim]
    scale = math.sqrt(size_a + size_b) / math.hypot(1 - t, t)
    weight_a, weight_b = (1 - t) / math.sqrt(size_a), t / math.sqrt(size_b)
    return torch.cat([scale * weight_a * a, scale * weight_b * b], dim=dim)


def resample(x, f=(1, 1), mode='keep'):
    """2× up- or downsampling ('up', 'down') by the separable filter f/Σf, of even length; 'keep' returns x."""
    if mode == 'keep':
        return x
    channels = x.shape[1]
    taps = torch.cat([x.new_full([1], tap / sum(f)) for tap in f])  # a GPU would wait for the copy of a list
    kernel = torch.outer(taps, taps).expand(channels, 1, -1, -1)
    geometry = {'stride': 2, 'padding': (len(f) - 1) // 2, 'groups': channels}
    return conv2d(x, kernel, **geometry) if mode == 'down' else conv_transpose2d(x, 4 * kernel, **geometry)


def convolve(x, weight):
    """Convolution that keeps height and width; with a matrix as weight, a linear layer."""
    return linear(x, weight) if weight.ndim == 2 else conv2d(x, weight, padding=weight.shape[-1] // 2)


# ----------------------------------------------------------------------------
# Layers.


@persistence.persistent_class
class MPFourier(torch.nn.Module):
    """√2 cos(x f + φ) with random frequencies f ~ 2π·bandwidth·𝒩(0, 1), phases φ ~ 2π·U(0, 1).  x: [N] → [N, C].

    Equation 75.
    """

    def __init__(self, num_channels, bandwidth=1):
        super().__init__()
        self.register_buffer('freqs', 2 * math.pi * bandwidth * torch.randn(num_channels))
        self.register_buffer('phases', 2 * math.pi * torch.rand(num_channels))

    def forward(self, x):
        wide = _wide(x.dtype)
        angle = torch.outer(x.to(wide), self.freqs.to(wide)) + self.phases.to(wide)
        return (math.sqrt(2) * angle.cos()).to(x.dtype)


@persistence.persistent_class
class MPConv(torch.nn.Module):
    """Convolution without bias that keeps height and width, or a linear layer (`kernel=[]`), in x's dtype.

    The weight in use is gain · normalize(weight)/√fan_in, row by row: a unit vector for each output channel (eq. 47).
    So the length of a stored row means nothing. Training forces it to √fan_in before each use, lest the learning rate
    fade as rows grow (eq. 66).
    """

    def __init__(self, in_channels, out_channels, kernel):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.out_channels = out_channels

    def forward(self, x, gain=1):
        if self.training:
            self.force_normalization()
        return convolve(x, self.scaled_weight(gain).to(x.dtype))

    @torch.no_grad()
    def force_normalization(self):
        self.weight.copy_(normalize(self._wide_weight()))

    def scaled_weight(self, gain=1):
        weight = normalize(self._wide_weight())
        return weight * (gain / math.sqrt(weight[0].numel()))

    def _wide_weight(self):
        return self.weight.to(_wide(self.weight.dtype))


@persistence.persistent_class
class Block(torch.nn.Module):
    """Residual block, modulated by the embedding, with optional resampling and cosine attention.

    x: [N, in_channels, H, W], emb: [N or 1, emb_channels] → [N, out_channels, H', W'] with H' = 2H, H/2 or H.

    Args:
        flavor: 'enc' normalizes its main path over the channels, 'dec' does not.
        resample_mode, resample_filter: of `resample`, which comes first.
        channels_per_head: attention has out_channels // channels_per_head heads, none if that is 0.
        res_balance, attn_balance: t of the sums with the residual branch and with the attention.
        clip_act: bound of the result's elements, or None.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        emb_channels,
        flavor='enc',
        resample_mode='keep',
        resample_filter=(1, 1),
        attention=False,
        channels_per_head=64,
        dropout=0,
        res_balance=0.3,
        attn_balance=0.3,
        clip_act=256,
    ):
        super().__init__()
        _check_choice('flavor', flavor, ('enc', 'dec'))
        _check_choice('resample_mode', resample_mode, ('keep', 'up', 'down'))
        self.out_channels, self.flavor, self.dropout, self.clip_act = out_channels, flavor, dropout, clip_act
        self.resample_mode, self.resample_filter = resample_mode, resample_filter
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.res_balance, self.attn_balance = res_balance, attn_balance

        convolved = out_channels if flavor == 'enc' else in_channels  # enc has conv_skip first
        self.emb_gain = torch.nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(convolved, out_channels, kernel=[3, 3])
        self.emb_linear = MPConv(emb_channels, out_channels, kernel=[])
        self.conv_res1 = MPConv(out_channels, out_channels, kernel=[3, 3])
        self.conv_skip = MPConv(in_channels, out_channels, kernel=[1, 1]) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, kernel=[1, 1]) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, kernel=[1, 1]) if self.num_heads else None

    def forward(self, x, emb):
        x = resample(x, self.resample_filter, self.resample_mode)
        if self.flavor == 'enc':
            x = normalize(self._skip(x), dim=1)
        y = self._residual(x, emb)
        x = mp_sum(x if self.flavor == 'enc' else self._skip(x), y, t=self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self._attend(x), t=self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _skip(self, x):
        return x if self.conv_skip is None else self.conv_skip(x)

    def _residual(self, x, emb):
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        return self.conv_res1(dropout(y, self.dropout, self.training))

    def _attend(self, x):
        # The 3·C channels of qkv run over heads first, then channels of a head, then {q, k, v}.
        qkv = self.attn_qkv(x).flatten(2).unflatten(1, (self.num_heads, -1, 3))
        q, k, v = normalize(qkv, dim=2).unbind(3)  # [N, heads, channels, pixels]
        logits = q.transpose(2, 3) @ (k / math.sqrt(k.shape[2]))
        a = v @ logits.softmax(dim=3).transpose(2, 3)
        return self.attn_proj(a.reshape(x.shape))


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f'{name}={value!r} is not one of {", ".join(choices)}')


# ----------------------------------------------------------------------------
# The U-Net.


@persistence.persistent_class
class UNet(torch.nn.Module):
    """U-Net of EDM2.

    x: [N, img_channels, R, R], noise_labels: [N or 1], class_labels: [N or 1, label_dim] or None → like x.

    Args:
        channel_mult: channels of each level, finest first, in units of model_channels.
        channel_mult_noise, channel_mult_emb: those of the noise's Fourier features (None: as the finest level has) and
            of the embedding (None: as the widest level has).
        num_blocks: of each level in the encoder; the decoder has one more.
        attn_resolutions: the levels with attention, by their resolution.
        label_balance, concat_balance: t of the sum with the class embedding, and of the concatenations with the skips.
        block_kwargs: further arguments of `Block`.
    """

    def __init__(
        self,
        img_resolution,
        img_channels,
        label_dim,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_noise=None,
        channel_mult_emb=None,
        num_blocks=3,
        attn_resolutions=(16, 8),
        label_balance=0.5,
        concat_balance=0.5,
        **block_kwargs,
    ):
        super().__init__()
        self.label_balance, self.concat_balance = label_balance, concat_balance
        widths = [model_channels * mult for mult in channel_mult]
        noise_channels = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb_channels = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        levels = [(img_resolution >> level, width) for level, width in enumerate(widths)]

        def block(c_in, c_out, **options):
            return Block(c_in, c_out, emb_channels, **options, **block_kwargs)

        self.out_gain = torch.nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels, kernel=[])
        self.emb_label = MPConv(label_dim, emb_channels, kernel=[]) if label_dim else None
        stem = MPConv(img_channels + 1, widths[0], kernel=[3, 3])
        self.enc = _encoder(stem, levels, num_blocks, attn_resolutions, block)
        skips = [layer.out_channels for layer in self.enc.values()]
        self.dec = _decoder(skips, levels, num_blocks, attn_resolutions, block)
        self.out_conv = MPConv(widths[0], img_channels, kernel=[3, 3])

    def forward(self, x, noise_labels, class_labels=None):
        emb = self._embed(noise_labels, class_labels)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # in the place of biases
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(mp_cat(x, skips.pop(), t=self.concat_balance) if 'block' in name else x, emb)
        return self.out_conv(x, gain=self.out_gain)

    def _embed(self, noise_labels, class_labels):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            one_hot_of_unit_variance = class_labels * math.sqrt(class_labels.shape[1])
            emb = mp_sum(emb, self.emb_label(one_hot_of_unit_variance), t=self.label_balance)
        return mp_silu(emb)


def _encoder(stem, levels, num_blocks, attn_resolutions, block):
    """The encoder's layers by name; the decoder gets the result of each.

    levels: resolution and channels of each, finest first. block: (channels in, channels out, options) → layer.
    """
    enc = torch.nn.ModuleDict()
    c = stem.out_channels
    for res, width in levels:
        enc[f'{res}x{res}_{"down" if enc else "conv"}'] = block(c, c, resample_mode='down') if enc else stem
        for i in range(num_blocks):
            enc[f'{res}x{res}_block{i}'] = block(c, width, attention=res in attn_resolutions)
            c = width
    return enc


def _decoder(skips, levels, num_blocks, attn_resolutions, block):
    """The decoder's layers by name; those called 'block' take a result of the encoder, the last one first.

    skips: the channels of these results. levels, block: of `_encoder`.
    """
    dec, skips = torch.nn.ModuleDict(), list(skips)
    c = skips[-1]
    for res, width in reversed(levels):
        if dec:
            dec[f'{res}x{res}_up'] = block(c, c, flavor='dec', resample_mode='up')
        else:
            dec[f'{res}x{res}_in0'] = block(c, c, flavor='dec', attention=True)
            dec[f'{res}x{res}_in1'] = block(c, c, flavor='dec')
        for i in range(num_blocks + 1):
            attention = res in attn_resolutions
            dec[f'{res}x{res}_block{i}'] = block(c + skips.pop(), width, flavor='dec', attention=attention)
            c = width
    return dec


# ----------------------------------------------------------------------------
# Preconditioning.


@persistence.persistent_class
class Precond(torch.nn.Module):
    """D(x; σ) = c_skip x + c_out F(c_in x; c_noise) with EDM's coefficients (Karras et al. 2022, table 1).

    x: [N, C, R, R]; sigma: scalar, [1] or [N]; class_labels: [N or 1, label_dim] or None (all zero).
    Returns D in float32, or in float64 after `net.double()`. `use_fp16` runs F in float16 on CUDA.
    With `return_logvar`, returns (D, u): u(σ), [N or 1, 1, 1, 1], the logarithm of the loss that training expects at σ
    (Karras et al. 2024, eq. 21).
    """

    def __init__(
        self,
        img_resolution,
        img_channels,
        label_dim,
        use_fp16=True,
        sigma_data=0.5,
        logvar_channels=128,
        **unet_kwargs,
    ):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_data = use_fp16, sigma_data
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, kernel=[])

    def coefficients(self, sigma):
        """(c_skip, c_out, c_in, c_noise)."""
        total = sigma**2 + self.sigma_data**2
        c_in = 1 / total.sqrt()
        return self.sigma_data**2 / total, sigma * self.sigma_data * c_in, c_in, sigma.log() / 4

    def forward(self, x, sigma, class_labels=None, force_fp32=False, return_logvar=False, **unet_kwargs):
        wide = _wide(self.unet.out_gain.dtype)
        half = self.use_fp16 and not force_fp32 and x.device.type == 'cuda'
        x, sigma = x.to(wide), torch.as_tensor(sigma, device=x.device).to(wide).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        x_in, c_noise = (c_in * x).to(torch.float16 if half else wide), c_noise.flatten()
        F_x = self.unet(x_in, c_noise, self._labels(class_labels, x), **unet_kwargs)
        D_x = c_skip * x + c_out * F_x.to(wide)
        if not return_logvar:
            return D_x
        return D_x, self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)

    def _labels(self, class_labels, x):
        if self.label_dim == 0:
            return None
        if class_labels is None:
            return x.new_zeros([1, self.label_dim])
        return class_labels.to(x.dtype).reshape(-1, self.label_dim)
