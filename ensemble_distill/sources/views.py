"""Views: deterministic augmentations that both stages render alike.

What a view draws is a pure function of (seed, content key, view number, slot): one Philox-4x32-10
evaluation for each four numbers, vectorised over the batch. So a view does not depend on the batch a
sample sits in, on the order, on workers or ranks, or on the epoch a run started at, and a target that
was captured for a view belongs to exactly the pixels that the student will be shown.

Shapes: images [B, C, H, W] (any dtype), keys uint8 [B, 16], draws float64 [B, D] in [0, 1).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.philox import philox
from ensemble_distill.sources.pixels import color_jitter, resized_crop, rotate
from ensemble_distill.transforms import (
    ColorJitter,
    Crop,
    Custom,
    Erase,
    Flip,
    ResizedCrop,
    Rotate,
    Transform,
    ViewsConfig,
    named,
)

MAX_SLOTS = 1024
ALONE_ROWS = 8
OTHER_CALLS = 3
AUDIT_ROWS = 4
AUDIT_CELLS = 8
AUDIT_CHANNELS = 64
LARGEST = 3e38  # of float32

# Batches are rendered on several threads, and a function of a pipeline may share what it writes to between its calls,
# as a generator that it seeds anew for each row. It may call another one: hence reentrant.
_ONE_AT_A_TIME = threading.RLock()


def draw(keys: np.ndarray, seed: int, view: int, slots: int) -> np.ndarray:
    """Uniform numbers in [0, 1): float64 [B, slots], a pure function of (seed, key, view, slot).

    The sample's 16-byte content key is the Philox counter; seed, view and slot block are its key.
    """
    counter = np.ascontiguousarray(keys).view("<u4")
    # 24 bits of view, 8 bits of slot block: 16 million views, 1024 numbers each.
    blocks = [philox(counter, (seed, view << 8 | block)) for block in range(max(1, -(-slots // 4)))]
    return np.concatenate(blocks, axis=1)[:, :slots] / 2.0**32


def render(images: Tensor, keys: np.ndarray, config: ViewsConfig, view: int) -> Tensor:
    """View number ``view`` of a batch of images [B, C, H, W]; same dtype, on the images' device."""
    if not config.transforms:
        return images
    _check_shape(images, config)
    for transform, u in _drawn(keys, config, view):
        images = _apply(transform, images, u)
    return images


def _check_shape(images: Tensor, config: ViewsConfig) -> None:
    if images.ndim != 4:
        raise UsageError(f"views need images [B, C, H, W], the input {config.input!r} is {list(images.shape)}")


_SLOTS = {Flip: 1, Crop: 2, Erase: 5, Rotate: 1, ColorJitter: 4, ResizedCrop: 4}


def _drawn(keys: np.ndarray, config: ViewsConfig, view: int) -> Iterator[tuple[Transform, Tensor]]:
    """The transforms in their order, each with its own draws: float64 [B, slots]."""
    slots = [t.slots if isinstance(t, Custom) else _SLOTS[type(t)] for t in config.transforms]
    if sum(slots) > MAX_SLOTS:
        raise UsageError(f"the transforms of a view draw {sum(slots)} numbers, there are {MAX_SLOTS}")
    draws = torch.from_numpy(draw(keys, config.seed, view, sum(slots)))
    yield from zip(config.transforms, torch.split(draws, slots, dim=1), strict=True)


def _apply(transform: Transform, images: Tensor, u: Tensor) -> Tensor:
    match transform:
        case Flip():
            return _flip(images, u)
        case Crop():
            return _crop(images, u, transform.padding, transform.size)
        case Erase():
            return _erase(images, u, transform)
        case Rotate():
            return rotate(images, u, transform)
        case ColorJitter():
            return color_jitter(images, u, transform)
        case ResizedCrop():
            return resized_crop(images, u, transform)
        case Custom():
            return _custom(images, u, transform)


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


def _custom(images: Tensor, u: Tensor, config: Custom) -> Tensor:
    """What the user's function makes of the images, called by one thread at a time: as many, in their dtype."""
    if config.function is None:
        raise UsageError(
            f"the transform {config.name!r} has no function: a plan knows it by its name only",
            hint="hand in the views of the pipeline: cache.check(data) before cache.loader(...)",
        )
    with _ONE_AT_A_TIME:
        result = config.function(images, u)
    if not isinstance(result, Tensor):
        raise UsageError(f"the transform {config.name!r} returned a {type(result).__name__}, not a tensor")
    if result.ndim != 4 or len(result) != len(images) or result.dtype != images.dtype:
        raise UsageError(
            f"the transform {config.name!r} made {list(result.shape)} {result.dtype} of "
            f"{list(images.shape)} {images.dtype}: expected as many images [B, C, H, W] of the same dtype"
        )
    return result


# Proofs ---------------------------------------------------------------------------------------------


def check_deterministic(images: Tensor, keys: np.ndarray, config: ViewsConfig) -> None:
    """Refuse a transform that is no pure function of (row, draws), found by rendering view 1 more than once.

    Raises UsageError naming the first transform whose output differs, in any bit, between two renderings of the same
    rows, or between a row in its batch and alone (a few rows are tried); or that changes the images it is given, or
    those that it gave before; or that draws from a generator of the whole process, or seeds it, as others do meanwhile.
    """
    _check_shape(images, config)
    for transform, u in _drawn(keys, config, 1) if config.transforms else ():
        before, generators = images.clone(), _generators()
        once = _apply(transform, images, u)
        given = once.clone()
        again = _apply(transform, images, u)
        for _ in range(OTHER_CALLS):
            _apply(transform, images.flip(0), u.flip(0))
        if not _same_bits(images, before):
            problem = "changes the images that it is given"
        elif not _same_bits(once, given):
            problem = "writes into the images that it gave before, and batches are read ahead of the one that is used"
        elif generators != _generators():
            problem = "draws from a generator of the whole process, or seeds it"
        elif not _same_bits(once, again):
            problem = "gives other pixels when the same rows are rendered again"
        elif any(not _same_bits(_apply(transform, images[r], u[r]), once[r]) for r in _some_rows(len(images))):
            problem = "gives a row other pixels when it is rendered alone than in its batch"
        else:
            images = once
            continue
        raise UsageError(
            f"the transform {named(transform)} {problem}",
            hint="it must be a function of each image and its draws u alone: no random numbers of its own, "
            "nothing of the other rows, nothing in place",
        )


def _generators() -> tuple[object, ...]:
    """The states of the generators that all of a process shares."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - a transform may use it nevertheless
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), name, np.asarray(keys).tobytes(), *rest


def _some_rows(size: int) -> list[slice]:
    """At most ALONE_ROWS rows of a batch, from the first to the last, each as a batch of its own."""
    count = min(ALONE_ROWS, size)
    return [slice(i, i + 1) for i in (k * (size - 1) // max(1, count - 1) for k in range(count))]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def audit(images: Tensor, keys: np.ndarray, config: ViewsConfig, views: Sequence[int]) -> list[dict[str, Any]]:
    """A compact rendering of the first samples (at most 4) in some views, small enough for JSON.

    Each entry is a view of a sample: its position in the batch, its key in hex, the view's number, and the image
    (its first 64 channels) pooled to at most 8×8 cells a channel (adaptive average), in levels of 0..255: ``shape``
    [C, h, w], ``cells`` in hex. Floating images are taken to lie in [0, 1], integers to fill their type. Of floating
    ones that do not lie there, such as spectrograms in dB, ``values`` has the cells as they are (float32, in hex).
    View 0 is the sample as it is.

    Whoever renders the same samples with the same configuration later, on another machine or with another version,
    finds by ``audit_differs`` whether the pixels are still those that the ensemble saw. A transform whose function
    was changed under its old name is found so, unless what changed is lost in the pooling.
    """
    images, keys, entries = images[:AUDIT_ROWS], keys[:AUDIT_ROWS], []
    for view in views:
        entries += audited(images if view == 0 else render(images, keys, config, view), keys, view)
    return sorted(entries, key=lambda entry: (entry["sample"], entry["view"]))


def audited(rendered: Tensor, keys: np.ndarray, view: int) -> list[dict[str, Any]]:
    """The entries of ``audit`` for images [B, C, H, W] that have been rendered."""
    return [
        {
            "sample": sample,
            "key": keys[sample].tobytes().hex(),
            "view": view,
            "shape": list(cells.shape),
            "cells": (cells * 255).round().clamp(0, 255).to(torch.uint8).numpy().tobytes().hex(),
            **({"values": cells.numpy().astype("<f4").tobytes().hex()} if _saturates(rendered, cells) else {}),
        }
        for sample, cells in enumerate(_pooled(rendered))
    ]


def _saturates(images: Tensor, cells: Tensor) -> bool:
    """Whether levels of [0, 1] lose some cells of a floating image."""
    return images.dtype.is_floating_point and bool(((cells < 0) | (cells > 1)).any())


def _pooled(images: Tensor) -> Tensor:
    """float64 [B, C, h, w], of which 1 is white: h, w at most AUDIT_CELLS, of at most AUDIT_CHANNELS channels."""
    images = images[:, :AUDIT_CHANNELS]
    white = 1 if images.dtype.is_floating_point or images.dtype == torch.bool else torch.iinfo(images.dtype).max
    height, width = (min(AUDIT_CELLS, length) for length in images.shape[2:])
    pooled = torch.nn.functional.adaptive_avg_pool2d(images.cpu().double(), (height, width))
    return (pooled / white).nan_to_num(0, posinf=0, neginf=0).clamp(-LARGEST, LARGEST)


def audit_differs(expected: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], tolerance: int = 2) -> str:
    """The first (sample, view) whose audit renderings differ, in words; "" if there is none.

    They differ if any cell does by more than ``tolerance`` levels of 255 (of values, of 255 parts of what they span, or
    of a tenth of the largest), or if their shapes or keys do, or if one is missing. The tolerance leaves room for the
    last bits of another machine's arithmetic.
    """
    made = {(entry["sample"], entry["view"]): entry for entry in found}
    for entry in expected:
        where = f"sample {entry['sample']} in view {entry['view']}"
        other = made.pop((entry["sample"], entry["view"]), None)
        if other is None:
            return f"{where} is missing"
        if entry["key"] != other["key"]:
            return f"{where} has key {other['key']}, expected {entry['key']}"
        if list(entry["shape"]) != list(other["shape"]):
            return f"{where} is {list(other['shape'])}, expected {list(entry['shape'])}"
        a, b = (np.frombuffer(bytes.fromhex(e["cells"]), np.uint8).astype(int) for e in (entry, other))
        if a.shape != b.shape or (len(a) and np.abs(a - b).max() > tolerance):
            off = f" by {np.abs(a - b).max()} levels of 255" if a.shape == b.shape else ""
            return f"{where} differs{off}"
        if _values_differ(entry, other, tolerance):
            return f"{where} differs in values outside of [0, 1]"
    return "".join(f"sample {sample} in view {view} was not expected" for sample, view in list(made)[:1])


def _values_differ(expected: Mapping[str, Any], found: Mapping[str, Any], tolerance: int) -> bool:
    """The same for what levels of [0, 1] lose. Of renderings without values, as older plans have, nothing is lost."""
    if not expected.get("values"):
        return False
    a, b = _values(expected), _values(found)
    scale = max(a.max() - a.min(), 0.1 * np.abs(a).max())
    if not found.get("values"):
        scale = max(scale, 1.0)  # which its levels are parts of
    return a.shape != b.shape or not bool((np.abs(a - b) <= (tolerance + 0.5) * scale / 255).all())


def _values(entry: Mapping[str, Any]) -> np.ndarray:
    if entry.get("values"):
        return np.frombuffer(bytes.fromhex(entry["values"]), "<f4").astype(np.float64)
    return np.frombuffer(bytes.fromhex(entry["cells"]), np.uint8) / 255
