"""EfficientNet-Lite0, whose ImageNet weights come with a Python package: features for machines without a network.

Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural networks", 2019; "Lite" leaves out
squeeze-and-excitation and has ReLU6 in the place of swish.
"""

import torch
from torch import nn
from torch.nn.functional import interpolate, pad, relu6

SIDE = 224

# repeats, kernel, stride of the first, expansion, channels
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


class EfficientNetLite0(nn.Module):
    """Images [N,3,H,W] in [0, 255] → features [N,1280], or logits [N,1000] by `classify`.

    The names of layers are those of the state dict.
    """

    def __init__(self):
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, stride=2)
        self._bn0 = norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expand, out_channels in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, out_channels, kernel, stride if i == 0 else 1, expand))
                channels = out_channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(channels, 1280, 1)
        self._bn1 = norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = interpolate(images.float(), [SIDE, SIDE], mode='bicubic', antialias=True).clamp(0, 255)
        x = (x - 127) / 128
        x = relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return relu6(self._bn1(self._conv_head(x))).mean(dim=[2, 3])

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        return self._fc(self(images))


class Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; added to the input where the shapes agree."""

    def __init__(self, in_channels, out_channels, kernel, stride, expand):
        super().__init__()
        inner = in_channels * expand
        self._expands, self._adds = expand > 1, stride == 1 and in_channels == out_channels
        if self._expands:
            self._expand_conv = SameConv(in_channels, inner, 1)
            self._bn0 = norm(inner)
        self._depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner)
        self._bn1 = norm(inner)
        self._project_conv = SameConv(inner, out_channels, 1)
        self._bn2 = norm(out_channels)

    def forward(self, x):
        y = relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        y = relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self._adds else y


class SameConv(nn.Conv2d):
    """TensorFlow's padding 'SAME' on even sides: with stride 2, one pixel more at the right and bottom."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, groups=1):
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
        total = kernel - stride if kernel > 1 else 0
        self._pad = [total // 2, total - total // 2] * 2

    def forward(self, x):
        return super().forward(pad(x, self._pad))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
