"""Mixed views: each sample with a partner, by Mixup or CutMix, before teachers and students see it.

Who the partner is and how much of it there is are functions of (seed, content key, view number), as all that a view
draws: the partner is a row of the captured split, never a neighbour in the batch. Both are shown in the same view,
each with its own draws for the transforms; then they are mixed. What the ensemble says of the mixed pixels is the
target, and nothing is blended afterwards, but for the labels of those who want them: λ of the sample's own label and
1 − λ of the partner's.

Draws: 0 and 1 the partner, 2 and 3 λ, 4 and 5 the middle of CutMix's rectangle (row, column), from a stream of their
own, so that other transforms leave them as they are.

Shapes: images [B, C, H, W], keys uint8 [B, 16], u float64 [B] in [0, 1), lam float64 [B].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.errors import Mismatch, UsageError
from ensemble_distill.sources.arrays import Source
from ensemble_distill.sources.loading import labels_at, load
from ensemble_distill.sources.pixels import mixup
from ensemble_distill.sources.views import draw, render
from ensemble_distill.transforms import Mixup, ViewsConfig

_STREAM = 0x3C6EF372
_SLOTS = 6
GRID = 1 << 16  # λ is a multiple of 2⁻¹⁶: the last bits of log and cos are not the same on every machine


@dataclass(frozen=True)
class Partners:
    """What the samples of a batch were mixed with.

    rows: of the captured split, int64 [B]. keys: of what was read there just now, uint8 [B, 16]. labels: int64 [B] or
    None. lam: the sample's own share λ, float64 [B]; CutMix's is the share of pixels that are really its own.
    """

    rows: np.ndarray
    keys: np.ndarray
    labels: Tensor | None
    lam: Tensor


def mixed(
    inputs: dict[str, Tensor], keys: np.ndarray, source: Source, views: ViewsConfig, view: int, rows: int
) -> tuple[dict[str, Tensor], Partners | None]:
    """A rendered batch after mixing, and with what; as it is, and None, where the view mixes nothing.

    rows: of the captured split, whose order the source must have. Mismatch if it is shorter.
    """
    if view == 0 or views.mix is None:
        return inputs, None
    if len(source) < rows:
        raise Mismatch(
            f"the views mix samples, so their source must be whole and in the captured order: "
            f"it has {len(source)} samples, {rows} were captured",
            hint="leave out --limit, or capture with the same --limit into another directory",
        )
    u = draw(keys, (views.seed + _STREAM) & 0xFFFFFFFF, view, _SLOTS)
    index = partner_rows(u[:, 0], u[:, 1], rows)
    loaded, partner_keys = load(source, index)
    others = render(loaded[views.input], partner_keys, views, view)
    images = _fitting(inputs[views.input], others, views)
    lam = beta(u[:, 2], u[:, 3], views.mix.alpha)
    if isinstance(views.mix, Mixup):
        images = mixup(images, others, torch.from_numpy(lam))
    else:
        images, lam = cutmix(images, others, lam, u[:, 4], u[:, 5])
    return inputs | {views.input: images}, Partners(
        index, partner_keys, labels_at(source, index), torch.from_numpy(lam)
    )


def _fitting(images: Tensor, others: Tensor, views: ViewsConfig) -> Tensor:
    if images.ndim != 4 or images.shape != others.shape:
        raise UsageError(
            f"mixing needs images [B, C, H, W] of one shape, the input {views.input!r} is {list(images.shape)} "
            f"and that of the partners {list(others.shape)}"
        )
    return images


def partner_rows(u: np.ndarray, v: np.ndarray, rows: int) -> np.ndarray:
    """Row numbers uniform in 0 … rows − 1, int64 [B]: of 53 bits, 32 from u and 21 from v."""
    fine = u + np.floor(v * 2**21) / 2**53
    drawn: np.ndarray = np.minimum((fine * rows).astype(np.int64), rows - 1)
    return drawn


def beta(u: np.ndarray, v: np.ndarray, alpha: float) -> np.ndarray:
    """Numbers from Beta(α, α), float64 [B], rounded to multiples of 2⁻¹⁶.

    In closed form for any α > 0, since t = √(2α (U^(−1/α) − 1)) cos 2πV is Student's t with 2α degrees of freedom
    (Bailey 1994) and ½ + ½ t / √(2α + t²) is then Beta(α, α) (Devroye 1996, "Random variate generation in one line
    of code"). Here U = 1 − u, and √(t² / (2α + t²)) is written such that nothing overflows.
    """
    power = np.log1p(-u) / alpha  # log U^(1/α)
    across = np.cos(2 * np.pi * v)
    far = -np.expm1(power) * across**2
    lam = 0.5 + 0.5 * np.sign(across) * np.sqrt(far / (np.exp(power) + far))
    return np.asarray(np.round(lam * GRID) / GRID)


def cutmix(images: Tensor, others: Tensor, lam: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Images with a rectangle of the others, and the share of pixels that are the images' own, float64 [B].

    The rectangle's sides are √(1 − lam) of the image's, in whole pixels; its middle is uniform over the image, to
    which it is clipped (Yun et al. 2019, eq. 2). So the share of what is left is at least lam.
    """
    height, width = images.shape[2:]
    side = np.sqrt(1 - lam)
    (top, bottom), (left, right) = _span(side, u, height), _span(side, v, width)
    y, x = np.arange(height), np.arange(width)
    inside_y = (y >= top[:, None]) & (y < bottom[:, None])
    inside_x = (x >= left[:, None]) & (x < right[:, None])
    theirs = torch.from_numpy(inside_y[:, None, :, None] & inside_x[:, None, None, :]).to(images.device)
    return torch.where(theirs, others, images), 1 - (bottom - top) * (right - left) / (height * width)


def _span(side: np.ndarray, u: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel and the one after the last, of whole pixels clipped to the image: float64 [B] each."""
    size = np.floor(side * length)
    first = np.floor(u * length) - np.floor(size / 2)
    return first.clip(0, length), (first + size).clip(0, length)
