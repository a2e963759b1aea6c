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

from ensemble_distill.cache.alignment import Alignment
from ensemble_distill.cache.commits import Commits
from ensemble_distill.cache.groups import MAIN, ROW, TARGETS, Group, field_name, padded_arrays
from ensemble_distill.cache.join import KeyTable
from ensemble_distill.cache.partial import LooseCommits, Part
from ensemble_distill.cache.plan import Calibration, Plan
from ensemble_distill.cache.rows import Rows
from ensemble_distill.cache.samples import read, render_inputs
from ensemble_distill.codec import Features, HeadCodec, Members, TopK
from ensemble_distill.codecs.domain import BadRow
from ensemble_distill.codecs.features import decode as decode_feature
from ensemble_distill.codecs.features import mask_of
from ensemble_distill.codecs.heads import decode, with_figures, with_figures_of
from ensemble_distill.config import DataConfig, EnsembleConfig
from ensemble_distill.errors import Corrupt, Mismatch, UsageError
from ensemble_distill.explain import suggestion
from ensemble_distill.fingerprint import KEY_BYTES
from ensemble_distill.mixture import Mixture
from ensemble_distill.philox import permutation
from ensemble_distill.prefetch import prefetch
from ensemble_distill.sources.arrays import Source
from ensemble_distill.sources.loading import load
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
        self._rows = Rows(store, plan, commits, parts, memory)
        self._tables: dict[str, KeyTable] = {}
        self._aligned = Alignment(self)

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
        the cache. A source is looked at before it is read for the first time, also as ``check_labels`` does. ``start``
        skips batches (to resume). ``views``: walk the first ones only (default: all).
        ``workers`` threads read, hash and render ahead.
        """
        self.table(split)  # a missing split or a damaged key table is reported before any thread starts
        view = epoch % min(views or self.parts[split].views, self.parts[split].views)
        self._aligned.source(source, split, view)
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
        self._aligned.pipeline(data)

    def check_views(self, source: Source, split: str = "train") -> None:
        """Refuse views that look otherwise than those that the ensemble saw (Mismatch), by a few samples.

        So a transform is found that was changed under its old name. Of a source whose first samples are others than
        the cache's, these cannot be compared, and a warning says so. The loader looks once, before it renders.
        """
        self._aligned.pixels(source, split)

    def check_labels(self, source: Source, split: str) -> None:
        """Refuse labels that changed since the capture (Mismatch). Another order or size of the source is no change.

        Labels whose digest differs call for a look at every key, since only that tells a relabelled source from a
        reordered one: put back into the captured order, the labels of that have the captured digest.
        """
        self._aligned.labels(source, split)

    def check_partners(self, partners: Partners, split: str, view: int, rows: np.ndarray, index: np.ndarray) -> None:
        """Refuse partners (Mismatch) that these rows, at ``index`` of the source, were not captured with."""
        self._aligned.partners(partners, split, view, rows, index)

    def verify_source(self, source: Source, split: str, batch_size: int = 4096) -> np.ndarray:
        """Look up every sample's key (Mismatch if one is not held): bool [N], whether it stands at its own row."""
        own = [rows == index for index, _, rows in self.look_up(source, split, batch_size)]
        return np.concatenate(own) if own else np.empty(0, bool)

    def look_up(
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
        aligned = self._aligned
        aligned.inputs(inputs)
        aligned.labels_of(targets, split, index, rows, keys)
        inputs = render_inputs(inputs, keys, aligned.views, view)
        inputs, partners = mixed(inputs, keys, source, aligned.views, view, self.plan.splits[split].rows)
        if partners is not None:
            self.check_partners(partners, split, view, rows, index)
        return Batch(inputs, labels, targets, keys, index, view, partners)

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
