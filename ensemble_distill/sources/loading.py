"""Batches out of sources, as tensors; and what is looked at before the first one: whether they stay as they were."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.fingerprint import KEY_BYTES
from ensemble_distill.sources.arrays import Loaded, Source, check_labels
from ensemble_distill.sources.interrupted import interrupted

CALLS = 8


def load(source: Source, index: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
    """Inputs by name [B, ...] and keys uint8 [B, 16] of the samples at positions ``index`` int64 [B], raw.

    UsageError for another number of rows than was asked for, for other keys, and for what torch has no tensors of.
    """
    loaded = _loaded(source, index)
    return {name: _tensor(name, array) for name, array in loaded.inputs.items()}, loaded.keys


def labels_at(source: Source, index: np.ndarray | slice) -> Tensor | None:
    """The labels of the samples at these positions, int64 [B], whichever integers they are held as; None without."""
    return None if source.labels is None else torch.from_numpy(source.labels[index].astype(np.int64))


def _loaded(source: Source, index: np.ndarray) -> Loaded:
    loaded, who = source.load(index), f"load() of a {type(source).__name__} gave"
    for name, array in [*loaded.inputs.items(), ("keys", loaded.keys)]:
        if not isinstance(array, np.ndarray):
            raise UsageError(f"{who} {name!r} as a {type(array).__name__}, expected a numpy array")
        if len(array) != len(index):
            raise UsageError(f"{who} {len(array)} rows of {name!r} for {len(index)} positions")
    if loaded.keys.dtype != np.uint8 or loaded.keys.shape[1:] != (KEY_BYTES,):
        raise UsageError(
            f"{who} keys of {loaded.keys.dtype} {list(loaded.keys.shape)}, expected uint8 [{len(index)}, {KEY_BYTES}]",
            hint="hand in what ensemble_distill.fingerprint.sample_keys(inputs) gives",
        )
    return loaded


def _tensor(name: str, array: np.ndarray) -> Tensor:
    """A tensor of the array's memory; of a copy where that is read-only, or in an order that torch does not know."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if min(array.strides, default=0) < 0 or not array.flags.writeable:
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise UsageError(f"the input {name!r} is an array of {array.dtype}, of which torch has no tensors") from error


# Proofs ---------------------------------------------------------------------------------------------

# Of a sample dtype, shape and bytes of each input and of the key.
_Sample = dict[str, tuple[str, tuple[int, ...], bytes]]


def check_source(source: Source, split: str) -> tuple[str, ...]:
    """The names of a source's inputs, in their order, once its labels and some calls of ``load`` were looked at.

    UsageError for one that writes into arrays that it gave before, since batches are read ahead of the one that is
    used; whose samples are others alone than in a batch; or that gives others where two threads call it at once.
    """
    check_labels(source, split)
    rows = np.unique(np.linspace(0, max(0, len(source) - 1), 2 * CALLS - 2).astype(np.int64))[: len(source)]
    given = [(loaded, _samples(loaded)) for loaded in (_loaded(source, index) for index in (rows, *rows[1::2, None]))]
    for loaded, before in given:
        if wrong := _others(before, _samples(loaded)):
            raise UsageError(
                f"load() of the source {split!r} writes into the {wrong[0]} that it gave before, "
                "and batches are read ahead of the one that is used",
                hint="return arrays of their own, as with .copy()",
            )
    (together, samples), *alone = given
    for row, sample, (_, by_itself) in zip(rows[1::2], samples[1::2], alone, strict=True):
        if wrong := _others([sample], by_itself):
            raise UsageError(
                f"load() of the source {split!r} gives other {wrong[0]} of sample {row} alone than in a batch: "
                "a sample's inputs must not depend on its batch",
                hint="pad all samples of all splits to one length; nothing is drawn by chance there",
            )
    if len(rows) > 1:
        _check_threads(source, split, rows, samples)
    return tuple(together.inputs)


def _check_threads(source: Source, split: str, rows: np.ndarray, samples: list[_Sample]) -> None:
    """UsageError where two threads that call ``load`` at once are not given these samples of these rows."""
    first = rows[:-1][:2]
    problem, cause = "", None
    try:
        given, others = interrupted(lambda: _read(source, first), lambda: _read(source, rows[-1:]))
        wrong = _others(samples[: len(first)] + samples[-1:] * len(others), given + [row for (row,) in others])
        problem = f"gives other {wrong[0]}" if wrong else ""
    except Exception as error:  # whatever becomes of what is read at two places
        problem, cause = f"fails ({type(error).__name__}: {error})", error
    if problem:
        raise UsageError(
            f"load() of the source {split!r} {problem} where two threads call it at once, as --workers do",
            hint="share nothing between calls that they change: open files in each, or hold a threading.Lock meanwhile",
        ) from cause


def _read(source: Source, index: np.ndarray) -> list[_Sample]:
    return _samples(_loaded(source, index))


def _samples(loaded: Loaded) -> list[_Sample]:
    arrays = loaded.inputs | {"keys": loaded.keys}
    return [
        {name: (array.dtype.str, array.shape[1:], array[i].tobytes()) for name, array in arrays.items()}
        for i in range(len(loaded.keys))
    ]


def _others(expected: list[_Sample], found: list[_Sample]) -> list[str]:
    """The names of what is not the same in these samples, one by one."""
    pairs = zip(expected, found, strict=True)
    return [name for a, b in pairs for name in {**a, **b} if a.get(name) != b.get(name)]
