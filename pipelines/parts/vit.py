"""A small vision transformer for small images (Dosovitskiy et al. 2021): patches, a class token, learned positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, written out so that ``softmax`` gives its probabilities [B, heads, T, T]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.softmax = nn.Softmax(dim=-1)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = queries @ keys.transpose(2, 3) * queries.shape[3] ** -0.5
        return self.out((self.softmax(scores) @ values).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two linear layers, each behind a norm and beside a shortcut: tokens [B, T, width] to the same."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def embedding(channels: int, width: int, patch: int, stem: int | None) -> nn.Module:
    """Images to one vector a patch; with ``stem`` channels of a 3×3 convolution first (Xiao et al. 2021)."""
    if stem is None:
        return nn.Conv2d(channels, width, patch, patch)
    first = nn.Conv2d(channels, stem, 3, 2, 1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(stem), nn.ReLU(), nn.Conv2d(stem, width, patch // 2, patch // 2))


class ClassToken(nn.Module):
    """The first of the tokens [B, T, width], as [B, width]."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


class ViT(nn.Module):
    """Raw images uint8 [B, C, size, size] to logits [B, classes]; pixels are scaled inside, so it deploys as is.

    T = 1 + (size / patch)² tokens, the class token first. Taps of interest: ``blocks.I`` [B, T, width],
    ``blocks.I.attention.softmax`` [B, heads, T, T] (row: the query, column: the key), ``norm`` [B, T, width] and
    ``pool`` [B, width]. Raises ValueError where the patch does not divide the size, or the heads the width.
    """

    def __init__(
        self,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        size: int = 28,
        hidden: int | None = None,
        stem: int | None = None,
        channels: int = 1,
        mean: float = 0.286,
        std: float = 0.353,
    ) -> None:
        super().__init__()
        if size % patch or width % heads:
            raise ValueError(f"a patch of {patch} must divide the size {size}, and {heads} heads the width {width}")
        self.mean, self.std = mean, std
        self.patches = embedding(channels, width, patch, stem)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden or 4 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.pool = ClassToken()
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches((images.float() / 255 - self.mean) / self.std).flatten(2).transpose(1, 2)
        first = self.class_token.to(patches.dtype).expand(len(patches), -1, -1)
        tokens = torch.cat((first, patches), 1) + self.positions
        return self.head(self.pool(self.norm(self.blocks(tokens))))
