"""Views: deterministic augmentations that both stages render alike.

What a view draws is a pure function of (seed, content key, view number, slot): one Philox-4x32-10
evaluation for each four numbers, vectorised over the batch. So a view does not depend on the batch a
sample sits in, on the order, on workers or ranks, or on the epoch a run started at, and a target that
was captured for a view belongs to exactly the pixels that the student will be shown.

Shapes: images [B, C, H, W] (any dtype), keys uint8 [B, 16], draws float64 [B, D] in [0, 1).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.config import Crop, Erase, Flip, Transform, ViewsConfig
from ensemble_distill.errors import UsageError
from ensemble_distill.philox import philox


def draw(keys: np.ndarray, seed: int, view: int, slots: int) -> np.ndarray:
    """Uniform numbers in [0, 1): float64 [B, slots], a pure function of (seed, key, view, slot).

    The sample's 16-byte content key is the Philox counter; seed, view and slot block are its key.
    """
    counter = np.ascontiguousarray(keys).view("<u4")
    # 24 bits of view, 8 bits of slot block: 16 million views, 1024 numbers each.
    blocks = [philox(counter, (seed, view << 8 | block)) for block in range(-(-slots // 4))]
    return np.concatenate(blocks, axis=1)[:, :slots] / 2.0**32


def render(images: Tensor, keys: np.ndarray, config: ViewsConfig, view: int) -> Tensor:
    """View number ``view`` of a batch of images [B, C, H, W]; same dtype, on the images' device."""
    if not config.transforms:
        return images
    if images.ndim != 4:
        raise UsageError(f"views need images [B, C, H, W], the input {config.input!r} is {list(images.shape)}")
    slots = [_SLOTS[type(t)] for t in config.transforms]
    draws = torch.from_numpy(draw(keys, config.seed, view, sum(slots)))
    for transform, u in zip(config.transforms, torch.split(draws, slots, dim=1), strict=True):
        images = _apply(transform, images, u)
    return images


_SLOTS = {Flip: 1, Crop: 2, Erase: 5}


def _apply(transform: Transform, images: Tensor, u: Tensor) -> Tensor:
    if isinstance(transform, Flip):
        return _flip(images, u)
    if isinstance(transform, Crop):
        return _crop(images, u, transform.padding, transform.size)
    return _erase(images, u, transform)


def _flip(images: Tensor, u: Tensor) -> Tensor:
    mask = (u[:, 0] < 0.5).to(images.device)
    return torch.where(mask[:, None, None, None], images.flip(3), images)


def _crop(images: Tensor, u: Tensor, padding: int, size: int | None) -> Tensor:
    """Pad with zeros, then cut a window of ``size`` (default: the image's own) at a drawn corner."""
    padded = torch.nn.functional.pad(images, [padding] * 4)
    batch, channels, height, width = padded.shape
    out_h, out_w = (size, size) if size else images.shape[2:]
    if out_h > height or out_w > width:
        raise UsageError(f"Crop(size={size}) is larger than the padded image, {height} × {width}")
    span = torch.tensor([height - out_h + 1, width - out_w + 1])
    corner = (u * span).long()
    rows = (corner[:, :1] + torch.arange(out_h)).to(images.device)
    cols = (corner[:, 1:] + torch.arange(out_w)).to(images.device)
    index = rows[:, :, None] * width + cols[:, None, :]
    flat = padded.reshape(batch, channels, height * width)
    index = index.reshape(batch, 1, -1).expand(-1, channels, -1)
    return flat.gather(2, index).reshape(batch, channels, out_h, out_w)


def _erase(images: Tensor, u: Tensor, config: Erase) -> Tensor:
    """Random erasing (Zhong et al. 2020): with probability p a random rectangle becomes one flat value.

    The rectangle's area is uniform in ``area`` (a share of the image), its aspect log-uniform in
    ``aspect``; it is clipped to the image.
    """
    height, width = images.shape[2:]
    low, high = np.log(config.aspect[0]), np.log(config.aspect[1])
    area = (config.area[0] + u[:, 1] * (config.area[1] - config.area[0])) * height * width
    aspect = torch.exp(low + u[:, 2] * (high - low))
    h = torch.sqrt(area * aspect).round().clamp(1, height)
    w = torch.sqrt(area / aspect).round().clamp(1, width)
    top, left = (u[:, 3] * (height - h + 1)).floor(), (u[:, 4] * (width - w + 1)).floor()
    y, x = torch.arange(height), torch.arange(width)
    inside_y = (y >= top[:, None]) & (y < (top + h)[:, None])
    inside_x = (x >= left[:, None]) & (x < (left + w)[:, None])
    hit = (u[:, 0] < config.p)[:, None, None] & inside_y[:, :, None] & inside_x[:, None, :]
    return images.masked_fill(hit[:, None].to(images.device), config.fill)
