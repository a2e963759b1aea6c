"""A small residual network for small images: a stem, one basic block a stage, pooled, linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """The basic block of He et al. 2016: two 3×3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Raw images uint8 [B, C, H, W] to logits [B, classes]; pixels are scaled inside, so it deploys as is.

    Taps of interest: ``stage1`` … ``stageN`` [B, widths[i], h, w] and ``pool`` [B, widths[-1]].
    """

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        channels: int = 1,
        first_stride: int = 1,
        mean: float = 0.286,
        std: float = 0.353,
    ) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        previous = widths[0]
        self.stages: list[str] = []
        for i, width in enumerate(widths, 1):
            self.add_module(f"stage{i}", Block(previous, width, first_stride if i == 1 else 2))
            self.stages.append(f"stage{i}")
            previous = width
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(previous, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem((images.float() / 255 - self.mean) / self.std)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.head(self.pool(x))
