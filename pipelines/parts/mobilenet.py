"""A small network of inverted residuals for small images (Sandler et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def convolution(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and its norm."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels_out)]


class InvertedResidual(nn.Module):
    """1×1 to ``expansion`` times the channels, 3×3 of each, 1×1 back and no activation; a shortcut if shapes agree."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * channels_in
        self.expand = nn.Sequential(*convolution(channels_in, wide, 1), nn.ReLU6())
        self.depth = nn.Sequential(*convolution(wide, wide, 3, stride, groups=wide), nn.ReLU6())
        self.project = nn.Sequential(*convolution(wide, channels_out, 1))
        self.shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depth(self.expand(x)))
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """Raw images uint8 [B, C, H, W] to logits [B, classes]; pixels are scaled inside. ``blocks``: (channels, stride).

    Taps of interest: ``body.I`` [B, channels, h, w], ``last`` [B, last, h, w] and ``pool`` [B, last].
    """

    def __init__(
        self,
        stem: int,
        blocks: Sequence[tuple[int, int]],
        last: int,
        classes: int,
        expansion: int = 4,
        channels: int = 1,
        mean: float = 0.286,
        std: float = 0.353,
    ) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.stem = nn.Sequential(*convolution(channels, stem, 3), nn.ReLU6())
        widths = [stem, *(width for width, _ in blocks)]
        pairs = zip(widths, blocks, strict=False)
        self.body = nn.Sequential(*(InvertedResidual(before, *block, expansion) for before, block in pairs))
        self.last = nn.Sequential(*convolution(widths[-1], last, 1), nn.ReLU6())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem((images.float() / 255 - self.mean) / self.std)
        return self.head(self.pool(self.last(self.body(x))))
