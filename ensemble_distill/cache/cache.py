"""A sealed cache: open it, get ``Targets`` for keys, or stream batches tied to a source."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.cache.audit import comparable, refuse_other_pixels
from ensemble_distill.cache.commits import Commits
from ensemble_distill.cache.join import KeyTable
from ensemble_distill.cache.labels import in_captured_order, other_label
from ensemble_distill.cache.partial import LooseCommits, Part
from ensemble_distill.cache.plan import MAIN, PARTNER, ROW, TARGETS, Calibration, Group, Plan, field_name, padded_arrays
from ensemble_distill.cache.rows import Rows
from ensemble_distill.cache.samples import read, render_inputs, renderings
from ensemble_distill.codec import Features, HeadCodec, Members, TopK
from ensemble_distill.codecs.domain import BadRow
from ensemble_distill.codecs.features import decode as decode_feature
from ensemble_distill.codecs.features import mask_of
from ensemble_distill.codecs.heads import decode, with_figures, with_figures_of
from ensemble_distill.config import DataConfig, EnsembleConfig, difference, suggestion
from ensemble_distill.errors import Corrupt, Mismatch, UsageError
from ensemble_distill.fingerprint import KEY_BYTES, array_digest
from ensemble_distill.mixture import Mixture
from ensemble_distill.philox import permutation
from ensemble_distill.prefetch import prefetch
from ensemble_distill.sources.arrays import Source, check_label_range
from ensemble_distill.sources.loading import check_source, load
from ensemble_distill.sources.mixing import Partners, mixed
from ensemble_distill.store.records import Manifest
from ensemble_distill.store.store import Store
from ensemble_distill.targets import Targets

MIN_KEYS = 128 << 20
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Inputs as the student shall see them, and what the ensemble said about exactly these.

    inputs: by name, [B, ...]. labels: int64 [B] or None. index: positions in the source, int64 [B]. partners: where
    the view mixes samples, with whose row and label, and the shares λ of the samples themselves.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None
    targets: Targets
    keys: np.ndarray
    index: np.ndarray
    view: int
    partners: Partners | None = None


class Cache:
    """Read access to a cache. Made by ``open_cache``.

    digest: of the manifest, "" where there is none. parts: what of each split can be used; all of it, unless the
    cache is not complete and its user asked for what is there.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        commits: Commits | LooseCommits,
        parts: Mapping[str, Part],
        memory: int,
        *,
        digest: str,
        content_digest: str,
    ) -> None:
        self.root, self.digest, self.content_digest = store.root, digest, content_digest
        self.plan, self.commits, self.parts = plan, commits, parts
        members, reading = plan.capture.members, plan.reading
        self.captured = Mixture(tuple((m.name, m.share) for m in members), reading.combine, reading.temperature_after)
        self.mixture = self.captured
        self._store, self._memory = store, memory
        self._views = plan.reading.views
        self._rows = Rows(store, plan, commits, parts, memory)
        self._tables: dict[str, KeyTable] = {}
        self._views_checked: set[str] = set()
        self._sources: Mapping[str, Source] = {}
        self._labels: dict[str, np.ndarray] = {}  # by split, where they are proved to be the captured ones: by row
        self._sources_checked: set[tuple[str, int]] = set()

    def mixed(self, ensemble: EnsembleConfig) -> Cache:
        """The same cache, whose members are combined as ``ensemble`` says; nothing is read for it.

        Raises UsageError for a member that there is not, and where the codec did not keep what it takes.
        """
        if ensemble == EnsembleConfig():
            return self
        chosen = copy(self)
        chosen.mixture = self._chosen(ensemble)
        return chosen

    def _chosen(self, ensemble: EnsembleConfig) -> Mixture:
        reading, held = self.plan.reading, dict(self.captured.shares)
        before = dict(zip(held, reading.temperature_before, strict=True))
        for name in [*(ensemble.weights or ()), *(ensemble.temperatures or ())]:
            if name not in held:
                raise UsageError(f"ensemble: {self.root} has no member {name!r}{suggestion(name, held)}")
        weights = held if ensemble.weights is None else {n: w for n, w in ensemble.weights.items() if w > 0}
        tempered = {name: t / before[name] for name, t in (ensemble.temperatures or {}).items()}
        mixture = Mixture(
            tuple((name, weights[name]) for name in held if name in weights),
            ensemble.combine or reading.combine,
            ensemble.temperature or reading.temperature_after,
            tuple((name, t) for name, t in tempered.items() if t != 1),
        )
        codec = self.head
        if not isinstance(codec, Members):
            raise UsageError(
                f"ensemble: {self.root} keeps the members' mixture only (codec {codec.name})",
                hint="capture with codec=Members(), and shares and rule can be chosen for each student",
            )
        if isinstance(codec.inner, TopK) and not mixture.linear:
            raise UsageError(
                f"ensemble: {self.root} keeps {codec.inner.k} classes of each member, which is enough for mean_probs "
                "at temperature 1 only",
                hint="choose weights alone, or capture with codec=Members(inner=Dense())",
            )
        return mixture

    def taught_by(self) -> dict[str, Any]:
        """Whose predictions these targets are, and in which order they were tempered and averaged, for reports.

        temperatures: of each member before averaging. temperature: after it. Losses temper once more, after that.
        """
        before = dict(zip(dict(self.captured.shares), self.plan.reading.temperature_before, strict=True))
        tempered, total = dict(self.mixture.tempered), sum(share for _, share in self.mixture.shares)
        return {
            "combine": self.mixture.combine,
            "shares": {name: share / total for name, share in self.mixture.shares},
            "temperatures": {name: before[name] * tempered.get(name, 1.0) for name, _ in self.mixture.shares},
            "temperature": self.mixture.temperature,
        }

    def manifest(self) -> Manifest:
        """What was sealed: digests, rows, bytes, statistics."""
        return self._store.manifest(self.digest)

    def calibration(self) -> Calibration | None:
        """Where temperatures were fitted before the capture: on what, and what that was worth."""
        digest = self.plan.capture.calibration
        return None if digest is None else self._store.calibration(digest, Calibration)

    @property
    def partial(self) -> dict[str, dict[str, int]]:
        """Of a cache that is not complete, by split: the rows and views that can be used, and of how many."""
        return {
            name: {
                "rows": len(self._held(name)),
                "rows_planned": split.rows,
                "views": self.parts[name].views if name in self.parts else 0,
                "views_planned": split.views,
            }
            for name, split in (self.plan.splits.items() if not self.digest else ())
        }

    def positions(self, source: Source, split: str) -> np.ndarray:
        """The samples of a source that this cache can serve, int64 [n]: all of them, if it is complete.

        Of a cache that is not, those whose own row is there: it serves a source in its own order only.
        """
        if self.digest:
            return np.arange(len(source))
        held = self._held(split)
        return held[held < len(source)]

    def _held(self, split: str) -> np.ndarray:
        """The rows of a split that can be used, int64 [n]."""
        if split not in self.parts:
            return np.empty(0, np.int64)
        rows = np.arange(self.plan.splits[split].rows)
        held: np.ndarray = rows[self.parts[split].has(rows, self.plan.splits[split])]
        return held

    @property
    def head(self) -> HeadCodec:
        """How the predictions are kept."""
        return self.plan.head

    @property
    def taps(self) -> list[str]:
        """The features that this cache holds, as ``tap/<member>.<module>``."""
        return [tap for group in self.plan.groups if MAIN not in group.codecs for tap in group.codecs]

    def table(self, split: str) -> KeyTable:
        """The key table of a split, read and checked on first use."""
        if split not in self.parts:
            raise Mismatch(f"{self.root} has no split {split!r}{suggestion(split, self.parts)}")
        if split not in self._tables:
            if (size := self.plan.splits[split].rows * KEY_BYTES) > max(self._memory, MIN_KEYS):
                raise UsageError(
                    f"{self.root}: the keys of {split} take {size / 1e6:.0f} MB, more than may be kept in memory",
                    hint="raise --memory, or memory= of open_cache",
                )
            pages = [self._key_page(split, page) for page in range(self.plan.splits[split].pages)]
            keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *pages])
            self._tables[split] = KeyTable(split, keys, None if self.digest else self._held(split))
        return self._tables[split]

    def targets(self, keys: np.ndarray, view: int = 0, *, split: str = "train", taps: Sequence[str] = ()) -> Targets:
        """What the ensemble said about the samples with these content keys (uint8 [B, 16]).

        ``taps`` names the features wanted beside the log-probabilities. Raises Mismatch for a key, view or
        split that the cache does not hold, UsageError for a tap, Corrupt for bytes that were not committed.
        """
        return self.targets_at(self.table(split).rows(keys), view, split=split, taps=taps)

    def targets_at(self, rows: np.ndarray, view: int = 0, *, split: str = "train", taps: Sequence[str] = ()) -> Targets:
        """The same by row of the cache (int64 [B]), for callers that have joined by key already.

        Raises Mismatch for a row that the cache does not hold.
        """
        self._check_held(rows, view, split)
        try:
            return self._decoded(rows, view, split, taps)
        except BadRow as error:
            raise Corrupt(f"{self.root}: row {rows[error.row]} of {split} in view {view}: {error.problem}") from error

    def _decoded(self, rows: np.ndarray, view: int, split: str, taps: Sequence[str]) -> Targets:
        arrays, codec = self._said(split, view, rows), self.head
        targets = decode(codec, arrays[MAIN], self.mixture)
        held = {tap: self._arrays(self.tap_group(tap), split, view, rows)[tap] for tap in taps}
        features = {tap: decode_feature(self.tap_codec(tap), arrays) for tap, arrays in held.items()}
        masks = {tap: mask_of(self.tap_codec(tap), arrays) for tap, arrays in held.items() if "mask" in arrays}
        targets = replace(targets, features=features, masks=masks)
        if self.mixture != self.captured:
            return with_figures_of(targets, codec, arrays[MAIN], self.mixture)
        return with_figures(targets, arrays[ROW]) if ROW in arrays else targets

    def tap_codec(self, tap: str) -> Features:
        """How a feature is kept: its shape, and how it was taken; UsageError as for ``tap_group``."""
        codec = self.tap_group(tap).codecs[tap]
        if not isinstance(codec, Features):
            raise Corrupt(f"{self.root}: its plan keeps {tap!r} as {codec.name}, expected features")
        return codec

    def tap_group(self, tap: str) -> Group:
        """The group that holds a feature; UsageError, with what there is, for one that the cache lacks."""
        for group in self.plan.groups:
            if tap in group.codecs and MAIN not in group.codecs:
                return group
        raise UsageError(
            f"{self.root} holds no {tap!r}{suggestion(tap, self.taps)}",
            hint=f"add the tap to the pipeline's cache(), then `ensemble-distill append PIPELINE --cache {self.root}`",
        )

    def loader(
        self,
        source: Source,
        batch_size: int,
        *,
        split: str = "train",
        epoch: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        start: int = 0,
        views: int | None = None,
        taps: Sequence[str] = (),
        workers: int = 1,
    ) -> Iterator[Batch]:
        """Batches of one epoch, in an order that depends on (seed, epoch) alone, in view ``epoch mod views``.

        Each sample is hashed as it is read, and no batch is handed out before its keys have been found in
        the cache. ``start`` skips batches (to resume). ``views``: walk the first ones only (default: all).
        ``workers`` threads read, hash and render ahead.
        """
        self.table(split)  # a missing split or a damaged key table is reported before any thread starts
        self._know_labels(source, split)
        view = epoch % min(views or self.parts[split].views, self.parts[split].views)
        if (split, id(source)) not in self._sources_checked:
            check_source(source, split)
            self._sources_checked.add((split, id(source)))
        if view > 0 and split not in self._views_checked:
            self.check_views(source, split)
        order = self.positions(source, split)
        if shuffle:
            order = order[permutation(len(order), seed, epoch)]
        # Of nearly equal size: a last batch of one row would be no batch to a batch norm.
        batches = np.array_split(order, max(1, -(-len(order) // batch_size)))[start:]
        return prefetch((partial(self._batch, source, index, split, view, tuple(taps)) for index in batches), workers)

    def check(self, data: DataConfig) -> None:
        """Refuse a pipeline whose classes or views are not those that were captured (Mismatch).

        From then on batches are rendered with the pipeline's views: a Custom transform has its function there only.
        """
        reading = self.plan.reading
        expected = {"classes": list(reading.classes), "views": reading.views.model_dump(mode="json")}
        found = {"classes": list(data.classes), "views": data.views.model_dump(mode="json")}
        if (hit := difference(expected, found)) is not None:
            field, old, new = hit
            raise Mismatch(
                f"{self.root} was captured with {field} = {old!r}, this pipeline says {new!r}",
                hint=f"restore {field}, or capture again: ensemble-distill cache PIPELINE --out NEW_DIR",
            )
        self._views, self._sources = data.views, data.sources
        self._views_checked.clear()

    def check_views(self, source: Source, split: str = "train") -> None:
        """Refuse views that look otherwise than those that the ensemble saw (Mismatch), by a few samples.

        So a transform is found that was changed under its old name. Of a source whose first samples are others than
        the cache's, these cannot be compared, and a warning says so. The loader looks once, before it renders.
        """
        if split not in self.parts or self.parts[split].views == 1 or self._views.plain:
            return
        rows, expected = self.plan.splits[split].rows, self.plan.capture.audit
        made = renderings(source, self._views, sorted({entry.view for entry in expected}), rows)
        same = comparable(expected, made)
        if len(same) < len(expected):
            log.warning("the first samples of %s are not the cache's: its views were not compared by pixels", split)
        refuse_other_pixels(same, comparable(made, same), self.root)
        self._views_checked.add(split)

    def check_labels(self, source: Source, split: str) -> None:
        """Refuse labels that changed since the capture. Another order or size of the source is no change.

        Labels whose digest differs call for a look at every key, since only that tells a relabelled source (Mismatch)
        from a reordered one: put back into the captured order, the labels of that have the captured digest.
        """
        check_label_range(source, split, len(self.plan.reading.classes))
        self._know_labels(source, split)
        spec = self.plan.splits.get(split) if split in self.parts else None
        if spec is None or spec.labels is None or source.labels is None or len(source) != spec.rows:
            return
        if array_digest(source.labels) != spec.labels and self._relabelled(source, split, spec.labels):
            raise Mismatch(
                f"the labels of {split} are not those that {self.root} was captured with, sample by sample",
                hint="restore the labels, or capture again: ensemble-distill cache PIPELINE --out NEW_DIR",
            )

    def _know_labels(self, source: Source, split: str) -> None:
        """Know the labels of a split as they were captured, if this source or the pipeline's has all in their order.

        Their digest proves them, and by row they prove those of any part, whatever codec keeps the targets.
        """
        spec = self.plan.splits.get(split)
        for some in (source, self._sources.get(split)):
            if split in self._labels or spec is None or some is None or len(some) != spec.rows:
                continue
            if some.labels is not None and array_digest(some.labels) == spec.labels:
                self._labels[split] = np.asarray(some.labels)

    def _relabelled(self, source: Source, split: str, digest: str) -> bool:
        """Whether samples of a source have other labels than when they were captured, as far as their keys can tell."""
        looked_up = list(self._look_up(source, split))
        if source.labels is None or all(np.array_equal(index, rows) for index, _, rows in looked_up):
            return True
        keys = np.concatenate([keys for _, keys, _ in looked_up])
        back = in_captured_order(source.labels, keys, self.table(split).keys) if self.digest else None
        if back is not None and array_digest(back.labels) == digest:
            self._labels[split] = back.labels
            return False
        return back is not None and back.sure

    def _check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Mismatch where a model would be given its inputs in another order than the members were."""
        if (expected := self.plan.reading.inputs) and tuple(inputs) != expected:
            raise Mismatch(
                f"{self.root} was captured with the inputs {', '.join(expected)}, the source gives {', '.join(inputs)}",
                hint="restore their order in the source: a module is called with them one after another",
            )

    def _prove_labels(
        self, targets: Targets, split: str, index: np.ndarray, rows: np.ndarray, keys: np.ndarray
    ) -> None:
        """Mismatch where a sample has another label than the one that was captured with it.

        Where the captured labels are not known (of a part of the samples), what the ensemble gave to them decides.
        """
        if targets.labels is None:
            return
        held, labels = self._labels.get(split), targets.labels.numpy()
        wrong = other_label(targets) if held is None else held[rows] != labels
        for i in np.flatnonzero(wrong):
            twins = self.table(split).twins(
                keys[i]
            )  # equal samples: whose label is whose is not known, and they have the same targets
            if len(twins) > 1 and (held is None or labels[i] in held[twins]):
                continue
            raise Mismatch(
                f"sample {index[i]} of {split} has another label than when {self.root} was captured",
                hint="restore the labels, or capture again: ensemble-distill cache PIPELINE --out NEW_DIR",
            )

    def verify_source(self, source: Source, split: str, batch_size: int = 4096) -> np.ndarray:
        """Look up every sample's key (Mismatch if one is not held): bool [N], whether it stands at its own row."""
        own = [rows == index for index, _, rows in self._look_up(source, split, batch_size)]
        return np.concatenate(own) if own else np.empty(0, bool)

    def _look_up(
        self, source: Source, split: str, batch_size: int = 4096
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of all samples that this cache can serve, batch by batch: positions, keys, and their rows (or Mismatch)."""
        table, positions = self.table(split), self.positions(source, split)
        for first in range(0, len(positions), batch_size):
            index = positions[first : first + batch_size]
            keys = load(source, index)[1]
            yield index, keys, table.rows(keys, index)

    def _batch(self, source: Source, index: np.ndarray, split: str, view: int, taps: tuple[str, ...]) -> Batch:
        inputs, labels, keys = read(source, index)
        rows = self.table(split).rows(keys, index)
        targets = replace(self.targets_at(rows, view, split=split, taps=taps), labels=labels)
        self._check_inputs(inputs)
        self._prove_labels(targets, split, index, rows, keys)
        inputs = render_inputs(inputs, keys, self._views, view)
        inputs, partners = mixed(inputs, keys, source, self._views, view, self.plan.splits[split].rows)
        if partners is not None:
            self._prove(partners, split, view, rows, index)
        return Batch(inputs, labels, targets, keys, index, view, partners)

    def _prove(self, partners: Partners, split: str, view: int, rows: np.ndarray, index: np.ndarray) -> None:
        """Refuse partners that are not those that the ensemble saw (Mismatch): the rows hold the keys of these."""
        for group in self.plan.said:  # each group of members was captured by itself, and may be of others
            expected = self._arrays(group, split, view, rows)[PARTNER][""].numpy()
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

    def _key_page(self, split: str, page: int) -> np.ndarray:
        item = self.plan.item(self.plan.number(split, 0, page))
        if not self.parts[split].pages[page]:
            return np.zeros((item.rows, KEY_BYTES), np.uint8)
        commit = self.commits.get(item, self.plan.group(TARGETS))
        return self._store.keys(split, page, commit.keys, item.rows)

    def arrays_at(self, group: Group, rows: np.ndarray, view: int, split: str) -> dict[str, dict[str, Tensor]]:
        """What stands in the cache for these rows, not decoded: arrays [B, …] by codec and name."""
        self._check_held(rows, view, split)
        return self._arrays(group, split, view, rows)

    def _check_held(self, rows: np.ndarray, view: int, split: str) -> None:
        views = self.parts[split].views if split in self.parts else 0
        if not 0 <= view < views:
            raise Mismatch(f"{self.root} holds {views} view(s) of {split}, there is no view {view}")
        spec = self.plan.splits[split]
        inside = (rows >= 0) & (rows < spec.rows)
        if not (inside.all() and self.parts[split].has(rows, spec).all()):
            wrong = rows[~inside] if not inside.all() else rows[~self.parts[split].has(rows, spec)]
            raise Mismatch(f"{self.root} does not hold row {wrong[0]} of {split}, which has {spec.rows} rows")

    def said_at(self, rows: np.ndarray, view: int, split: str) -> dict[str, dict[str, Tensor]]:
        """The same of all that was predicted: ``main`` by array, all members' together, and the figures of the rows."""
        self._check_held(rows, view, split)
        return self._said(split, view, rows)

    def _said(self, split: str, view: int, rows: np.ndarray) -> dict[str, dict[str, Tensor]]:
        together: dict[str, dict[str, Tensor]] = {}
        for group in self.plan.said:  # the figures of the whole ensemble are those of the last
            for head, arrays in self._arrays(group, split, view, rows).items():
                together[head] = together.get(head, {}) | arrays
        return together

    def _arrays(self, group: Group, split: str, view: int, rows: np.ndarray) -> dict[str, dict[str, Tensor]]:
        """The arrays of a group's rows, [B, …], by codec and name."""
        records = self._rows.gather(group, split, view, rows)
        return {
            head: {name: torch.from_numpy(records[field_name(head, name)]) for name in padded_arrays(codec)}
            for head, codec in group.codecs.items()
        }
