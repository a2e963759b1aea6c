"""A small network of depthwise separable convolutions (Howard et al. 2017), with shortcuts where shapes agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Separable(nn.Module):
    """A 3×3 convolution of each channel, then a 1×1 across them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.point = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.point(F.relu(self.norm1(self.depth(x)))))
        return F.relu(y + x) if self.shortcut else F.relu(y)


class SeparableNet(nn.Module):
    """Raw images uint8 [B, C, H, W] to logits [B, classes]. ``blocks``: (channels, stride) of each."""

    def __init__(
        self,
        stem: int,
        blocks: Sequence[tuple[int, int]],
        classes: int,
        channels: int = 1,
        mean: float = 0.286,
        std: float = 0.353,
    ) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.stem = nn.Sequential(nn.Conv2d(channels, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        widths = [stem, *(width for width, _ in blocks)]
        pairs = zip(widths, blocks, strict=False)
        self.body = nn.Sequential(*(Separable(before, width, stride) for before, (width, stride) in pairs))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem((images.float() / 255 - self.mean) / self.std)
        return self.head(self.pool(self.body(x)))
