"""Alignment: whether a source shows the samples, labels, inputs, views and partners that the ensemble was shown."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ensemble_distill.cache.audit import comparable, refuse_other_pixels
from ensemble_distill.cache.groups import PARTNER
from ensemble_distill.cache.labels import in_captured_order, other_label
from ensemble_distill.cache.samples import renderings
from ensemble_distill.config import DataConfig
from ensemble_distill.errors import Mismatch
from ensemble_distill.explain import difference
from ensemble_distill.fingerprint import array_digest
from ensemble_distill.sources.arrays import Source, check_label_range
from ensemble_distill.sources.loading import check_source
from ensemble_distill.sources.mixing import Partners
from ensemble_distill.targets import Targets

if TYPE_CHECKING:
    from ensemble_distill.cache.cache import Cache

RELABEL = "restore the labels, or capture again: ensemble-distill cache PIPELINE --out NEW_DIR"
log = logging.getLogger(__name__)


class Alignment:
    """What is known of the sources that a cache is read with. Every method raises Mismatch where they differ.

    views: as batches are rendered: those of the plan, or the pipeline's, whose Custom transforms have functions.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache, self._plan, self.root = cache, cache.plan, cache.root
        self.views = cache.plan.reading.views
        self._sources: Mapping[str, Source] = {}
        self._labels: dict[str, np.ndarray] = {}  # by split, where they are proved to be the captured ones: by row
        self._views_checked: set[str] = set()
        self._sources_checked: dict[str, Source] = {}  # by split, the last one
        self._labels_checked: dict[str, Source] = {}

    def pipeline(self, data: DataConfig) -> None:
        """The classes and views of a pipeline; from then on batches are rendered with these views."""
        reading = self._plan.reading
        expected = {"classes": list(reading.classes), "views": reading.views.model_dump(mode="json")}
        found = {"classes": list(data.classes), "views": data.views.model_dump(mode="json")}
        if (hit := difference(expected, found)) is not None:
            field, old, new = hit
            raise Mismatch(
                f"{self.root} was captured with {field} = {old!r}, this pipeline says {new!r}",
                hint=f"restore {field}, or capture again: ensemble-distill cache PIPELINE --out NEW_DIR",
            )
        self.views, self._sources = data.views, data.sources
        self._views_checked.clear()

    def source(self, source: Source, split: str, view: int) -> None:
        """Look at a source before it is read in a view; once for each source, and once for the views of a split."""
        if self._sources_checked.get(split) is not source:
            check_source(source, split)
            self._sources_checked[split] = source
        self._know_labels(source, split)
        if self._labels_checked.get(split) is not source:
            self._same_labels(source, split)
        if view > 0 and split not in self._views_checked:
            self.pixels(source, split)

    def pixels(self, source: Source, split: str) -> None:
        """The views of a few samples, in pixels."""
        cache, views = self._cache, self.views
        if split not in cache.parts or cache.parts[split].views == 1 or views.plain:
            return
        rows, expected = self._plan.splits[split].rows, self._plan.capture.audit
        made = renderings(source, views, sorted({entry.view for entry in expected}), rows)
        same = comparable(expected, made)
        if len(same) < len(expected):
            log.warning("the first samples of %s are not the cache's: its views were not compared by pixels", split)
        refuse_other_pixels(same, comparable(made, same), self.root)
        self._views_checked.add(split)

    def labels(self, source: Source, split: str) -> None:
        """All labels of a source, by their digest; where it is another, by key."""
        check_label_range(source, split, len(self._plan.reading.classes))
        self._know_labels(source, split)
        self._same_labels(source, split)

    def inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """The order of a model's inputs: members were given them in this one."""
        if (expected := self._plan.reading.inputs) and tuple(inputs) != expected:
            raise Mismatch(
                f"{self.root} was captured with the inputs {', '.join(expected)}, the source gives {', '.join(inputs)}",
                hint="restore their order in the source: a module is called with them one after another",
            )

    def labels_of(self, targets: Targets, split: str, index: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> None:
        """The labels of a batch, sample by sample.

        Where the captured labels are not known (of a part of the samples), what the ensemble gave to them decides.
        """
        if targets.labels is None:
            return
        held, labels = self._labels.get(split), targets.labels.numpy()
        wrong = other_label(targets) if held is None else held[rows] != labels
        for i in np.flatnonzero(wrong):
            # Of equal samples it is not known whose label is whose, and they have the same targets.
            twins = self._cache.table(split).twins(keys[i])
            if len(twins) > 1 and (held is None or labels[i] in held[twins]):
                continue
            raise Mismatch(
                f"sample {index[i]} of {split} has another label than when {self.root} was captured", hint=RELABEL
            )

    def partners(self, partners: Partners, split: str, view: int, rows: np.ndarray, index: np.ndarray) -> None:
        """The partners of mixed samples: the rows of the cache hold the keys of those that the ensemble saw."""
        for group in self._plan.said:  # each group of members was captured by itself, and may be of others
            expected = self._cache.arrays_at(group, rows, view, split)[PARTNER][""].numpy()
            wrong = np.flatnonzero((expected != partners.keys).any(axis=1))
            if not wrong.size:
                continue
            i = int(wrong[0])
            raise Mismatch(
                f"the views of {self.root} mix samples, so {split} must be in the captured order: "
                f"sample {index[i]} was mixed in view {view} with row {partners.rows[i]}, "
                f"of key {expected[i].tobytes().hex()}, and the source has {partners.keys[i].tobytes().hex()} there",
                hint="restore the source, or capture it as it is now: ensemble-distill cache PIPELINE --out NEW_DIR",
            )

    def _know_labels(self, source: Source, split: str) -> None:
        """Know the labels of a split as they were captured, if this source or the pipeline's has all in their order.

        Their digest proves them, and by row they prove those of any part, whatever codec keeps the targets.
        """
        spec = self._plan.splits.get(split)
        for some in (source, self._sources.get(split)):
            if split in self._labels or spec is None or some is None or len(some) != spec.rows:
                continue
            if some.labels is not None and array_digest(some.labels) == spec.labels:
                self._labels[split] = np.asarray(some.labels)

    def _same_labels(self, source: Source, split: str) -> None:
        """Of a source as large as its split, whose digest says whether its labels are those that were captured."""
        spec = self._plan.splits.get(split) if split in self._cache.parts else None
        if spec is None or spec.labels is None or source.labels is None or len(source) != spec.rows:
            return
        if array_digest(source.labels) != spec.labels and self._relabelled(source, split, spec.labels):
            raise Mismatch(
                f"the labels of {split} are not those that {self.root} was captured with, sample by sample",
                hint=RELABEL,
            )
        self._labels_checked[split] = source

    def _relabelled(self, source: Source, split: str, digest: str) -> bool:
        """Whether samples of a source have other labels than when they were captured, as far as their keys can tell."""
        cache, looked_up = self._cache, list(self._cache.look_up(source, split))
        if source.labels is None or all(np.array_equal(index, rows) for index, _, rows in looked_up):
            return True
        keys = np.concatenate([keys for _, keys, _ in looked_up])
        back = in_captured_order(source.labels, keys, cache.table(split).keys) if cache.digest else None
        if back is not None and array_digest(back.labels) == digest:
            self._labels[split] = back.labels
            return False
        return back is not None and back.sure
