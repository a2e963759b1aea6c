"""Batches out of sources, as tensors; and what is looked at before the first one: whether they stay as they were."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.sources.arrays import Loaded, Source

CALLS = 8


def load(source: Source, index: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
    """Inputs by name [B, ...] and keys uint8 [B, 16] of the samples at positions ``index`` int64 [B], raw.

    UsageError for another number of rows than was asked for, and for what torch has no tensors of.
    """
    loaded = _loaded(source, index)
    return {name: _tensor(name, array) for name, array in loaded.inputs.items()}, loaded.keys


def _loaded(source: Source, index: np.ndarray) -> Loaded:
    loaded, who = source.load(index), f"load() of a {type(source).__name__} gave"
    for name, array in [*loaded.inputs.items(), ("keys", loaded.keys)]:
        if not isinstance(array, np.ndarray):
            raise UsageError(f"{who} {name!r} as a {type(array).__name__}, expected a numpy array")
        if len(array) != len(index):
            raise UsageError(f"{who} {len(array)} rows of {name!r} for {len(index)} positions")
    return loaded


def _tensor(name: str, array: np.ndarray) -> Tensor:
    """A tensor of the array's memory; of a copy, where bytes or rows stand in an order that torch does not know."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if min(array.strides, default=0) < 0:
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise UsageError(f"the input {name!r} is an array of {array.dtype}, of which torch has no tensors") from error


def check_source(source: Source, split: str) -> tuple[str, ...]:
    """The names of a source's inputs, in their order; by a few calls of ``load``, each for two rows.

    UsageError for one that writes into arrays that it gave before: batches are read ahead of the one that is used.
    """
    rows = np.unique(np.linspace(0, len(source) - 1, 2 * CALLS).astype(np.int64)) if len(source) else np.empty(0, int)
    given: list[tuple[str, np.ndarray, bytes]] = []
    names: tuple[str, ...] = ()
    for index in np.array_split(rows, -(-len(rows) // 2) or 1):
        loaded = _loaded(source, index)
        names = tuple(loaded.inputs)
        given += [(name, array, array.tobytes()) for name, array in [*loaded.inputs.items(), ("keys", loaded.keys)]]
    for name, array, before in given:
        if array.tobytes() != before:
            raise UsageError(
                f"load() of the source {split!r} writes into the {name} that it gave before, "
                "and batches are read ahead of the one that is used",
                hint="return arrays of their own, as with .copy()",
            )
    return names
