"""Random projections of features that are too large to keep, from the counter: a matrix is a function of its size."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.philox import philox
from ensemble_distill.reduction import Random

MAX_VALUES = 1 << 28  # a GiB of float32
_PROJECTIONS = 0xBB67AE85
_BLOCK = 1 << 20


def matrix(random: Random, width: int) -> np.ndarray:
    """float32 [width, dim], a pure function of (kind, seed, width, dim). ValueError above a GiB.

    So that E ‖x R‖² = ‖x‖². The entries stand in the order of rows, four of a counter (two of a Gaussian one).
    """
    count = width * random.dim
    if count > MAX_VALUES:
        raise ValueError(f"a projection of {width} to {random.dim} values takes {count * 4 / 1e9:.1f} GB")
    draw = _sparse if random.kind == "sparse" else _gaussian
    parts = [draw(_words(random, width, first, count)) for first in range(0, count, _BLOCK)]
    result: np.ndarray = np.concatenate(parts).reshape(width, random.dim) / np.float32(math.sqrt(random.dim))
    return result


def _words(random: Random, width: int, first: int, count: int) -> np.ndarray:
    """uint32 words for the entries from ``first`` on, one block of them: [n, 1] sparse, [n, 2] Gaussian."""
    per = 4 if random.kind == "sparse" else 2  # entries of a counter
    entries = min(_BLOCK, count - first)
    counter = np.zeros((-(-entries // per), 4), np.uint32)
    counter[:, 0] = first // per + np.arange(len(counter))
    counter[:, 2], counter[:, 3] = width, random.dim
    drawn = philox(counter, ((random.seed + _PROJECTIONS) & 0xFFFFFFFF, 0 if random.kind == "sparse" else 1))
    return drawn.reshape(-1, 4 // per)[:entries]


def _sparse(words: np.ndarray) -> np.ndarray:
    """√3 · (+1, 0, −1) with probabilities 1/6, 2/3, 1/6, float32 [n]."""
    sixth = (1 << 32) // 6
    signs = (words[:, 0] < sixth).astype(np.float32) - (words[:, 0] >= (1 << 32) - sixth).astype(np.float32)
    scaled: np.ndarray = signs * np.float32(math.sqrt(3))
    return scaled


def _gaussian(words: np.ndarray) -> np.ndarray:
    """Normal numbers by Box & Muller 1958, float32 [n]: of two uniforms the cosine alone, so that each stands alone."""
    u, v = ((words[:, i].astype(np.float64) + 0.5) / 2.0**32 for i in range(2))
    drawn: np.ndarray = (np.sqrt(-2 * np.log(u)) * np.cos(2 * math.pi * v)).astype(np.float32)
    return drawn


class Projector:
    """Applies projections; a matrix is drawn once for each width and device."""

    def __init__(self) -> None:
        self._held: dict[tuple[Random, int, torch.device], Tensor] = {}

    def __call__(self, random: Random, features_B: Tensor) -> Tensor:
        """float32 [B, ...] to [B, dim], with all its axes in a row. ValueError where the matrix would be too large."""
        flat = features_B.float().flatten(1)
        place = (random, flat.shape[1], flat.device)
        if place not in self._held:
            self._held[place] = torch.from_numpy(matrix(random, flat.shape[1])).to(flat.device)
        return flat @ self._held[place]


def distortion(before_B: Tensor, after_B: Tensor) -> float | None:
    """How far squared distances between rows change: the mean of |after − before| / before over all pairs.

    None where no two rows differ. In float64 on the CPU.
    """
    old, new = (_squared_distances(x) for x in (before_B, after_B))
    held = old > 0
    return float(((new - old).abs()[held] / old[held]).mean()) if held.any() else None


def _squared_distances(rows_B: Tensor) -> Tensor:
    """‖a − b‖² of each pair once, float64."""
    distances: Tensor = torch.nn.functional.pdist(rows_B.detach().cpu().double().flatten(1))
    return distances.square()
