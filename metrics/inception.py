"""Inception-v3 in its version of 2015-12-05: the network whose pooled features define FID.

The weights are those of TensorFlow's `classify_image_graph_def.pb`, in the state dict that pytorch-fid and
torch-fidelity publish; the names of layers here are the names in it. It is not torchvision's `inception_v3`: three
kinds of pooling, the resize and the number of classes differ.

    Szegedy et al., "Rethinking the Inception architecture for computer vision", 2015
    Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017
"""

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

SIDE = 299


class InceptionV3(nn.Module):
    """Images [N,3,H,W] in [0, 255] → features [N,2048], or logits [N,1008] by `classify`."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = MixedA(192, pool_channels=32)
        self.Mixed_5c = MixedA(256, pool_channels=64)
        self.Mixed_5d = MixedA(288, pool_channels=64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, inner=128)
        self.Mixed_6c = MixedC(768, inner=160)
        self.Mixed_6d = MixedC(768, inner=160)
        self.Mixed_6e = MixedC(768, inner=192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, pool=average_pool)
        self.Mixed_7c = MixedE(2048, pool=max_pool)  # the graph of 2015 has the maximum here
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (resize_tf1(images.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=[2, 3])

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self(images))


def resize_tf1(images: torch.Tensor, side: int) -> torch.Tensor:
    """TensorFlow 1's `resize_bilinear`: [N,C,H,W] → [N,C,side,side].

    Pixel i of the result lies at i·H/side of the source, between the pixels ⌊·⌋ and ⌊·⌋ + 1, the last one repeated.
    There is no offset of half a pixel and no antialiasing, unlike in `torch.nn.functional.interpolate`.
    """

    def along(x: torch.Tensor, dim: int) -> torch.Tensor:
        size = x.shape[dim]
        position = torch.arange(side, dtype=torch.float64) * size / side
        low = position.long()
        high = (low + 1).clamp(max=size - 1)
        weight = (position - low).to(x).reshape([side] + [1] * (x.ndim - 1 - dim))
        first, second = (x.index_select(dim, idx.to(x.device)) for idx in (low, high))
        return first + weight * (second - first)

    return along(along(images, 2), 3)


def average_pool(x: torch.Tensor) -> torch.Tensor:
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: torch.Tensor) -> torch.Tensor:
    return max_pool2d(x, 3, stride=1, padding=1)


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU. kernel, padding: a number, or (vertical, horizontal)."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return relu(self.bn(self.conv(x)))


class MixedA(nn.Module):
    """35×35."""

    def __init__(self, channels, pool_channels):
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1 = Conv(channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pool_channels, 1)

    def forward(self, x):
        a = self.branch1x1(x)
        b = self.branch5x5_2(self.branch5x5_1(x))
        c = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([a, b, c, self.branch_pool(average_pool(x))], dim=1)


class MixedB(nn.Module):
    """35×35 → 17×17."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x):
        b = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), b, max_pool2d(x, 3, stride=2)], dim=1)


class MixedC(nn.Module):
    """17×17, with 7×7 kernels taken apart into rows and columns."""

    def __init__(self, channels, inner):
        super().__init__()
        row, column = {'kernel': (1, 7), 'padding': (0, 3)}, {'kernel': (7, 1), 'padding': (3, 0)}
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1 = Conv(channels, inner, 1)
        self.branch7x7_2 = Conv(inner, inner, **row)
        self.branch7x7_3 = Conv(inner, 192, **column)
        self.branch7x7dbl_1 = Conv(channels, inner, 1)
        self.branch7x7dbl_2 = Conv(inner, inner, **column)
        self.branch7x7dbl_3 = Conv(inner, inner, **row)
        self.branch7x7dbl_4 = Conv(inner, inner, **column)
        self.branch7x7dbl_5 = Conv(inner, 192, **row)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x):
        b = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        c = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        c = self.branch7x7dbl_5(self.branch7x7dbl_4(c))
        return torch.cat([self.branch1x1(x), b, c, self.branch_pool(average_pool(x))], dim=1)


class MixedD(nn.Module):
    """17×17 → 8×8."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3_1 = Conv(channels, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(channels, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x):
        a = self.branch3x3_2(self.branch3x3_1(x))
        b = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([a, b, max_pool2d(x, 3, stride=2)], dim=1)


class MixedE(nn.Module):
    """8×8."""

    def __init__(self, channels, pool):
        super().__init__()
        row, column = {'kernel': (1, 3), 'padding': (0, 1)}, {'kernel': (3, 1), 'padding': (1, 0)}
        self.pool = pool
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, **row)
        self.branch3x3_2b = Conv(384, 384, **column)
        self.branch3x3dbl_1 = Conv(channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, **row)
        self.branch3x3dbl_3b = Conv(384, 384, **column)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x):
        b = self.branch3x3_1(x)
        c = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [self.branch3x3_2a(b), self.branch3x3_2b(b), self.branch3x3dbl_3a(c), self.branch3x3dbl_3b(c)]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self.pool(x))], dim=1)
