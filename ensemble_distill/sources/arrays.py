"""Sources: a length, a content key for each sample, and inputs by index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ensemble_distill.errors import Mismatch, UsageError
from ensemble_distill.fingerprint import sample_keys


@dataclass(frozen=True)
class Loaded:
    """A batch as read: inputs by name [B, ...], and keys uint8 [B, 16] of what was read just now."""

    inputs: dict[str, np.ndarray]
    keys: np.ndarray


@runtime_checkable
class Source(Protocol):
    """What a dataset must offer. ``load`` must hash what it returns in the same call: the key is the proof.

    What it returned it must not write into again, for batches are read ahead of the one that is used.
    """

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [N], or None where there are no labels."""

    def __len__(self) -> int: ...

    def load(self, index: np.ndarray) -> Loaded:
        """The samples at positions ``index`` int64 [B], raw: before any view."""


class ArraySource:
    """Samples held in arrays of equal length (memory maps will do), with optional labels."""

    def __init__(self, inputs: Mapping[str, np.ndarray], labels: np.ndarray | None = None) -> None:
        lengths = {name: len(array) for name, array in inputs.items()}
        if labels is not None:
            lengths["labels"] = len(labels)
        if not inputs or len(set(lengths.values())) != 1:
            raise UsageError(f"an ArraySource needs inputs and labels of one length, found {lengths}")
        self._inputs = dict(inputs)
        self._labels = None if labels is None else np.asarray(labels, np.int64)
        self._size = next(iter(lengths.values()))

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    def __len__(self) -> int:
        return self._size

    def load(self, index: np.ndarray) -> Loaded:
        inputs = {name: array[index] for name, array in self._inputs.items()}
        return Loaded(inputs, sample_keys(inputs))


class Limited:
    """The first ``rows`` samples of another source."""

    def __init__(self, source: Source, rows: int) -> None:
        self._source, self._rows = source, min(rows, len(source))

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._source.labels is None else self._source.labels[: self._rows]

    def __len__(self) -> int:
        return self._rows

    def load(self, index: np.ndarray) -> Loaded:
        return self._source.load(index)


def check_label_range(source: Source, split: str, classes: int) -> None:
    """Refuse labels that name no class (Mismatch), or of which a sample has several (UsageError)."""
    labels = source.labels
    if labels is not None and labels.ndim != 1:
        raise UsageError(
            f"source {split!r} has labels of shape {list(labels.shape)}, expected one class number a sample",
            hint="of one-hot rows: labels.argmax(axis=1)",
        )
    if labels is None or len(labels) == 0 or (labels.min() >= 0 and labels.max() < classes):
        return
    raise Mismatch(
        f"source {split!r} has labels {labels.min()} to {labels.max()}, "
        f"but there are {classes} classes (0 to {classes - 1})",
        hint="mend the labels, or name all the classes in data()",
    )
