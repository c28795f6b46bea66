"""Denoising U-Nets (DDPM++, NCSN++, ADM) and the preconditioners that turn them into denoisers D(x; σ).

Every class is stored inside network pickles together with this file's text, so the file stands alone: it imports
torch and `torch_utils.persistence` only. It is definitions in plain operations of PyTorch, through which forward-mode
derivatives (`torch.func.jvp`) pass in x and in σ; `training.fast.install(net)` makes a network compute the same with
less work. `net.double()` makes it compute in float64.

Read it from the bottom: `Precond.forward` is D(x; σ) = c_skip x + c_out F(c_in x; c_noise), F is `SongUNet` or
`DhariwalUNet`, both chains of `UNetBlock`s.

Architectures: Ho et al. 2020 (arXiv 2006.11239), Song et al. 2021 (2011.13456), Dhariwal & Nichol 2021 (2105.05233);
preconditioning: Karras et al. 2022 (2206.00364), table 1.
"""

import math

import torch
from torch.nn.functional import conv2d, conv_transpose2d, dropout, group_norm, linear, silu

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
        weight, bias = (None if param is None else param.to(x.dtype) for param in (self.weight, self.bias))
        return self._convolve(x, weight, bias)

    def _convolve(self, x, weight, bias):
        w_pad = 0 if weight is None else weight.shape[-1] // 2
        if self.resample_filter is None:
            return conv2d(x, weight, bias, padding=w_pad)
        f_pad = (self.resample_filter.shape[-1] - 1) // 2
        if weight is None:
            return self._resample(x, f_pad)
        if not self.fused_resample:
            return conv2d(self._resample(x, f_pad), weight, bias, padding=w_pad)
        if self.up:
            return conv2d(self._resample(x, max(f_pad - w_pad, 0)), weight, bias, padding=max(w_pad - f_pad, 0))
        # The filter sums to one and sees no padding, so the bias may as well come before it.
        return self._resample(conv2d(x, weight, bias, padding=w_pad + f_pad), 0)

    def _resample(self, x, padding):
        """Depthwise 2× up- or downsampling; ×4 on the way up makes good for the zeros in between."""
        channels, f = x.shape[1], self.resample_filter.to(x.dtype)
        if self.up:
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
        return group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class AttentionOp:
    """Attention weights softmax(qᵀk/√c) over the keys, computed in float32 or wider, returned in q's dtype.

    q, k: [B, c, L]; result [B, L, L]. Plain operations, so that every kind of derivative exists.
    """

    @staticmethod
    def apply(q, k):
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = q.to(wide).transpose(1, 2) @ (k.to(wide) / math.sqrt(k.shape[1]))
        return logits.softmax(dim=2).to(q.dtype)


@persistence.persistent_class
class UNetBlock(torch.nn.Module):
    """Residual block, modulated by the embedding, with optional resampling and self-attention.

    x: [N, in_channels, H, W], emb: [N or 1, emb_channels] → [N, out_channels, H', W'] with H' = 2H, H/2 or H.
    """

    activation = staticmethod(silu)

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
        h = self.conv0(self.activation(self.norm0(x)))
        h = self._modulate(h, self.affine(emb)[:, :, None, None].to(h.dtype))
        h = self.conv1(dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (self._attend(x) + x) * self.skip_scale if self.num_heads else x

    def _modulate(self, h, params):
        if not self.adaptive_scale:
            return self.activation(self.norm1(h + params))
        scale, shift = params.chunk(2, dim=1)
        return self.activation(self.norm1(h) * (scale + 1) + shift)

    def _attend(self, x):
        # The 3·C channels of qkv run over heads first, then channels of a head, then {q, k, v}.
        qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.num_heads, -1, 3))
        q, k, v = (each.flatten(0, 1) for each in qkv.unbind(3))
        return self.proj((v @ AttentionOp.apply(q, k).transpose(1, 2)).reshape(x.shape))


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

    activation = staticmethod(silu)

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
                tmp = layer(self.activation(tmp))
                aux = tmp if aux is None else tmp + aux
            else:
                if x.shape[1] != layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        return aux


@persistence.persistent_class
class DhariwalUNet(torch.nn.Module):
    """U-Net of ADM. Same inputs and output as `SongUNet`."""

    activation = staticmethod(silu)

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
        return self.out_conv(self.activation(self.out_norm(x)))

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
