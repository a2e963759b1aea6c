"""Transforms that compute new pixels: rotation, colour, resized crops. Each row by itself, to the bit.

A view must not depend on the batch it was rendered in, nor on the machine: what was captured on one is shown to a
student on another. So pixels come from single additions, multiplications and roundings, which IEEE 754 fixes,
never from fused or blocked kernels (``grid_sample``, ``interpolate``, ``mean``), whose last bits may vary with
shapes, threads and instruction sets. Angles and positions are computed in float64 and rounded to a grid of 2⁻¹⁶ pixels.

Shapes: images [B, C, H, W], uint8 or floating; u float64 [B, slots] in [0, 1). The result has the images' dtype:
uint8 is rounded and clamped to 0..255; floating images are taken to lie in [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.transforms import ColorJitter, ResizedCrop, Rotate

_BITS = 16
_GRID = 1 << _BITS  # positions in a pixel
_GRAY = (0.2989, 0.587, 0.114)


def rotate(images: Tensor, u: Tensor, config: Rotate) -> Tensor:
    """Turn each image about its centre by (2u − 1) · degrees, counter-clockwise; slots: angle.

    Bilinear between the four nearest pixels; all around the image lies ``fill``.
    """
    height, width = images.shape[2:]
    angle = (2 * u - 1) * math.radians(config.degrees)  # [B, 1]
    x, y = torch.arange(width) - (width - 1) / 2, torch.arange(height) - (height - 1) / 2
    columns = _on_grid(angle.cos() * x + (width - 1) / 2)[:, None, :] - _on_grid(angle.sin() * y)[:, :, None]
    rows = _on_grid(angle.sin() * x)[:, None, :] + _on_grid(angle.cos() * y + (height - 1) / 2)[:, :, None]
    padded = torch.nn.functional.pad(_working(images, "Rotate"), [1, 2, 1, 2], value=config.fill)
    return _as(images, _bilinear(padded, rows + _GRID, columns + _GRID))


def _on_grid(positions: Tensor) -> Tensor:
    return (positions * _GRID).round().long()


def _bilinear(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values at ``rows`` and ``columns`` (int64 [B, h, w], in 1/_GRID pixels): [B, C, h, w].

    Positions are clamped to the image without its last row and column, which are read but count nothing there.
    """
    batch, channels, height, width = images.shape
    rows, columns = rows.clamp(0, (height - 2) * _GRID), columns.clamp(0, (width - 2) * _GRID)
    corner = ((rows >> _BITS) * width + (columns >> _BITS)).reshape(batch, 1, -1).to(images.device)
    down, right = (_fraction(p, images).reshape(batch, 1, -1) for p in (rows, columns))
    flat = images.reshape(batch, channels, height * width)

    def at(offset: int) -> Tensor:
        return flat.gather(2, (corner + offset).expand(-1, channels, -1))

    upper, lower = _between(at(0), at(1), right), _between(at(width), at(width + 1), right)
    return _between(upper, lower, down).reshape(batch, channels, *rows.shape[1:])


def _fraction(positions: Tensor, images: Tensor) -> Tensor:
    """How far positions lie beyond the pixel before them, in the dtype of the images."""
    return (positions & (_GRID - 1)).to(images.device, images.dtype) / _GRID


def _between(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """a + share · (b − a), in single operations, which ``lerp`` is free to fuse."""
    return (b - a).mul_(share).add_(a)


def resized_crop(images: Tensor, u: Tensor, config: ResizedCrop) -> Tensor:
    """Cut a rectangle of whole pixels and resize it; slots: area, aspect, top, left.

    Bilinear with half-pixel centres, as ``interpolate(align_corners=False)``: within the rectangle alone, and
    without smoothing where it is larger than ``size``.
    """
    height, width = images.shape[2:]
    area = (config.area[0] + u[:, 0] * (config.area[1] - config.area[0])) * height * width
    low, high = map(math.log, config.aspect)
    aspect = torch.exp(low + u[:, 1] * (high - low))
    h = torch.sqrt(area / aspect).round().clamp(1, height)
    w = torch.sqrt(area * aspect).round().clamp(1, width)
    top, left = (u[:, 2] * (height - h + 1)).floor(), (u[:, 3] * (width - w + 1)).floor()
    pixels = _resample(_working(images, "ResizedCrop"), top, h, config.size)
    return _as(images, _resample(pixels.transpose(2, 3), left, w, config.size).transpose(2, 3))


def _resample(images: Tensor, start: Tensor, length: Tensor, size: int) -> Tensor:
    """``size`` rows out of the ``length`` rows from ``start`` on (whole numbers, float64 [B]): [B, C, size, W]."""
    batch, channels, height, width = images.shape
    centres = (torch.arange(size) + 0.5) * (length[:, None] / size) - 0.5
    positions = _on_grid(torch.minimum(centres.clamp(min=0), length[:, None] - 1))
    before = positions >> _BITS
    after = torch.minimum(before + 1, length[:, None].long() - 1)
    planes = torch.arange(batch * channels).reshape(batch, channels, 1) * height + start[:, None, None].long()
    lines = images.reshape(batch * channels * height, width)

    def at(rows: Tensor) -> Tensor:
        index = (planes + rows[:, None, :]).reshape(-1).to(images.device)
        return lines.index_select(0, index).reshape(batch, channels, size, width)

    return _between(at(before), at(after), _fraction(positions, images)[:, None, :, None])


def color_jitter(images: Tensor, u: Tensor, config: ColorJitter) -> Tensor:
    """Brightness, contrast, saturation, hue, in this order; slots: one for each.

    By factors f, with clamping to black and white after each: brightness f · x; contrast f · x + (1 − f) · m, m the
    mean of the image's gray; saturation f · x + (1 − f) · gray, each pixel's own; hue as in HSV, by a part of a turn.
    Gray is .2989 R + .587 G + .114 B; without three channels, the mean of all.
    """
    if (config.saturation or config.hue) and images.shape[1] != 3:
        raise UsageError(
            f"ColorJitter changes saturation and hue of three channels only, these images have {images.shape[1]}",
            hint="leave saturation and hue at 0",
        )
    pixels, white = _working(images, "ColorJitter"), 255.0 if images.dtype == torch.uint8 else 1.0
    if config.brightness:
        pixels = _blend(pixels, 0, _factor(u[:, 0], config.brightness), white)
    if config.contrast:
        pixels = _blend(pixels, _mean(_gray(pixels), white), _factor(u[:, 1], config.contrast), white)
    if config.saturation:
        pixels = _blend(pixels, _gray(pixels), _factor(u[:, 2], config.saturation), white)
    if config.hue:
        pixels = _turn_hue(pixels, (2 * u[:, 3] - 1) * config.hue)
    return _as(images, pixels)


def _factor(u: Tensor, amount: float) -> Tensor:
    low = max(0.0, 1 - amount)
    return low + u * (1 + amount - low)


def _blend(pixels: Tensor, other: Tensor | float, factor: Tensor, white: float) -> Tensor:
    """factor · pixels + (1 − factor) · other, clamped: factor float64 [B], other [B or 1, 1, H or 1, W or 1]."""
    factor = factor[:, None, None, None]
    mine, its = (f.to(pixels.device, pixels.dtype) for f in (factor, 1 - factor))
    mixed = pixels * mine
    return (mixed if isinstance(other, int) else mixed.add_(other * its)).clamp_(0, white)


def _gray(pixels: Tensor) -> Tensor:
    """[B, 1, H, W]"""
    channels = pixels.unbind(1)
    weights = _GRAY if len(channels) == 3 else (1 / len(channels),) * len(channels)
    gray = channels[0] * weights[0]
    for channel, weight in zip(channels[1:], weights[1:], strict=True):
        gray.add_(channel * weight)
    return gray[:, None]


def _mean(gray: Tensor, white: float) -> Tensor:
    """Means [B, 1, 1, 1] of images [B, 1, H, W], of whole numbers, whose sum is the same in any order."""
    unit = 2.0**16 if white > 1 else 2.0**24
    total = (gray * unit).round_().sum((1, 2, 3), keepdim=True, dtype=torch.float64)
    return (total / (unit * gray[0].numel())).to(gray.dtype)


def _turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Add ``turns`` (float64 [B]) to the hue of RGB images: a channel is v − c · clamp(min(k, 4 − k), 0, 1).

    v is the largest channel, c its distance to the smallest, k = (n + 6 · hue) mod 6 with n = 5, 3, 1 for R, G, B.
    """
    red, green, blue = pixels.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    by_red, by_green = value == red, value == green
    ahead = torch.where(by_red, green - blue, torch.where(by_green, blue - red, red - green))
    sixths = ahead.div_(chroma.masked_fill(chroma == 0, 1))
    sixths += torch.where(by_red, 0.0, torch.where(by_green, 2.0, 4.0))
    sixths += (6 * turns).to(pixels.device, pixels.dtype)[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = sixths + n
        k -= (k / 6).floor_().mul_(6)
        channels.append(value - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma))
    return torch.stack(channels, 1)


def mixup(images: Tensor, others: Tensor, lam: Tensor) -> Tensor:
    """lam · images + (1 − lam) · others: lam float64 [B], multiples of 2⁻¹⁶, which every dtype here holds exactly."""
    lam = lam[:, None, None, None]
    mine, theirs = _working(images, "Mixup"), _working(others, "Mixup")
    own, rest = (share.to(mine.device, mine.dtype) for share in (lam, 1 - lam))
    return _as(images, (mine * own).add_(theirs * rest))


def _working(images: Tensor, name: str) -> Tensor:
    """The images as float32, or float64 if they are that."""
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise UsageError(f"{name} needs uint8 or floating images, not {images.dtype}")
    return images if images.dtype == torch.float64 else images.float()


def _as(images: Tensor, pixels: Tensor) -> Tensor:
    """Computed pixels (of uint8 images they are overwritten) in the dtype that the images had."""
    return pixels.round_().clamp_(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else pixels.to(images.dtype)
