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
        """Integers [N], one for each sample, or None where there are no labels."""

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
        self._labels = None if labels is None else _whole_numbers(labels)
        self._size = next(iter(lengths.values()))

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    def __len__(self) -> int:
        return self._size

    def load(self, index: np.ndarray) -> Loaded:
        inputs = {name: array[index] for name, array in self._inputs.items()}
        return Loaded(inputs, sample_keys(inputs))


def _whole_numbers(labels: np.ndarray) -> np.ndarray:
    """Labels as int64; UsageError for numbers that are not whole."""
    found = np.asarray(labels)
    if found.dtype.kind == "f" and (wrong := found[~np.isfinite(found) | (found != np.trunc(found))]).size:
        raise UsageError(
            f"an ArraySource needs whole numbers as labels, found {wrong[0]}", hint="a label is the number of a class"
        )
    return np.asarray(found, np.int64)


class Limited:
    """The first ``rows`` samples of another source."""

    def __init__(self, source: Source, rows: int) -> None:
        self.whole, self._rows = source, min(rows, len(source))

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.whole.labels is None else self.whole.labels[: self._rows]

    def __len__(self) -> int:
        return self._rows

    def load(self, index: np.ndarray) -> Loaded:
        return self.whole.load(index)


def check_labels(source: Source, split: str) -> None:
    """Refuse labels (UsageError) that are not one integer for each sample, also of those that a limit leaves out."""
    source = source.whole if isinstance(source, Limited) else source
    labels = source.labels
    if labels is None:
        return
    if not isinstance(labels, np.ndarray) or not np.issubdtype(labels.dtype, np.integer):
        found = f"an array of {labels.dtype}" if isinstance(labels, np.ndarray) else f"a {type(labels).__name__}"
        raise UsageError(
            f"source {split!r} has {found} as labels, expected a numpy array of integers",
            hint="hand in np.asarray(labels).astype(np.int64), where each is the number of a class",
        )
    if labels.ndim != 1:
        raise UsageError(
            f"source {split!r} has labels of shape {list(labels.shape)}, expected one class number a sample",
            hint="of one-hot rows: labels.argmax(axis=1)",
        )
    if len(labels) != len(source):
        raise UsageError(
            f"source {split!r} has {len(labels)} labels for {len(source)} samples",
            hint="cut the labels as the samples are: label i is that of the sample at position i",
        )


def check_label_range(source: Source, split: str, classes: int) -> None:
    """Refuse labels that name no class (Mismatch), and what is no label of each sample (UsageError)."""
    check_labels(source, split)
    labels = source.labels
    if labels is None or len(labels) == 0 or (labels.min() >= 0 and labels.max() < classes):
        return
    raise Mismatch(
        f"source {split!r} has labels {labels.min()} to {labels.max()}, "
        f"but there are {classes} classes (0 to {classes - 1})",
        hint="mend the labels, or name all the classes in data()",
    )
