"""Capture: work items through the ensemble into committed units, and the seal at the end.

A thread reads and renders ahead, the calling thread runs the members, another builds and commits shards.
Any number of processes may do this in one cache at once: leases share the items out, commits decide.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from torch import Tensor

from ensemble_distill.cache.commits import committed_units
from ensemble_distill.cache.partial import SealedCommits, whole
from ensemble_distill.cache.plan import Plan, WorkItem
from ensemble_distill.cache.rows import Rows
from ensemble_distill.device import memory_errors
from ensemble_distill.ensemble.distributions import InvalidRow
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.errors import Interrupted, InvalidOutput, Mismatch, StorageError
from ensemble_distill.prefetch import prefetch, timed
from ensemble_distill.provenance import provenance
from ensemble_distill.recording.item import OpenItem, Piece
from ensemble_distill.recording.keys import KeyPages
from ensemble_distill.recording.planning import as_held, refuse_difference, with_held_audit
from ensemble_distill.recording.progress import Progress
from ensemble_distill.recording.seal import seal
from ensemble_distill.recording.shown import show
from ensemble_distill.recording.stages import Stage, stages
from ensemble_distill.sources.arrays import Source
from ensemble_distill.store.leases import CAPTURING, PLANNING, Leases, at_work
from ensemble_distill.store.records import Commit
from ensemble_distill.store.store import Store

# Seconds left before the process has to be gone, or None while nobody asked it to stop.
Stop = Callable[[], float | None]

POLL = 0.5


class Recorder:
    """Fills a store with the units that its plan still lacks, then seals it."""

    def __init__(
        self, plan: Plan, ensemble: Ensemble, sources: Mapping[str, Source], store: Store, leases: Leases
    ) -> None:
        self.plan, self.ensemble, self.sources, self.store, self.leases = plan, ensemble, sources, store, leases
        self.provenance = provenance() | {"device": ",".join(map(str, dict.fromkeys(ensemble.devices)))}
        self.progress = Progress(units=0, units_total=plan.units)
        self._done = np.zeros(0, bool)
        self._digest = self._own = ""

    def run(
        self,
        report: Callable[[Progress], None] = lambda progress: None,
        stop: Stop = lambda: None,
        workers: int = 1,
        span: range | None = None,
    ) -> str | None:
        """Capture what is missing and seal; the manifest's digest, or None where units outside ``span`` are missing.

        ``span``: the numbers of the units to care for. Interrupted when ``stop`` says so.
        """
        self._done = committed_units(self.store, self.plan)
        self._check_space(span)
        with at_work(self.store.storage, CAPTURING) as self._own:  # before a plan is adopted: so nobody drops that
            return self._run(report, stop, workers, span)

    def _run(self, report: Callable[[Progress], None], stop: Stop, workers: int, span: range | None) -> str | None:
        self._digest = self._adopt_plan()
        self._stages = stages(self.plan)
        self._keys = KeyPages(self.plan, self.store, self.sources, self._done)
        # Only what was committed before is read, a unit at a time.
        commits = SealedCommits(self.store, self.plan, self._digest)
        self._rows = Rows(self.store, self.plan, commits, whole(self.plan), 0)
        self.progress = progress = Progress(units=int(self._done.sum()), units_total=self.plan.units)
        report(progress)
        with self.leases.renewing(), ThreadPoolExecutor(1, thread_name_prefix="commit") as writer:
            while len(todo := self._todo(span)):
                rows, late = progress.rows, progress.late
                self._capture(self._claim(todo), report, stop, workers, writer)
                if (rows, late) == (progress.rows, progress.late):
                    self._wait(stop, report)
                self._done |= committed_units(self.store, self.plan)  # a bucket's listing may be behind
                progress.units = int(self._done.sum())
        report(progress)
        return seal(self.plan, self._digest, self.store, self._done) if self._done.all() else None

    # What to do -------------------------------------------------------------------------------------

    def _todo(self, span: range | None) -> np.ndarray:
        """The numbers of the work items that lack a unit, int64 [n]."""
        todo = np.flatnonzero(~self._done.reshape(-1, len(self.plan.groups)).all(axis=1))
        if span is not None:
            first_unit = todo * len(self.plan.groups)  # an item belongs to the span that holds its first unit
            todo = todo[(first_unit >= span.start) & (first_unit < span.stop)]
        return todo

    def _claim(self, todo: np.ndarray) -> Iterator[WorkItem]:
        """The items that this worker may do now; what others are at work on is left out."""
        if any(item != self._own for item in self.leases.live()):
            todo = np.roll(todo, secrets.randbelow(len(todo)))  # begin elsewhere than they did
        for number in todo:
            item = self.plan.item(int(number))
            if not self.leases.claim(item.name):
                continue
            units = [item.unit(group) for group in self.plan.groups]
            if all(map(self.store.is_committed, units)):
                self.progress.late += len(units)
                self._mark(units)
                self.leases.release(item.name)
                continue
            yield item

    def _wait(self, stop: Stop, report: Callable[[Progress], None]) -> None:
        """Others hold all that is left: look again soon, for they may die."""
        if stop() is not None:
            raise self._interrupted()
        time.sleep(POLL)
        self.progress.seconds["others"] += POLL
        report(self.progress)

    def _adopt_plan(self) -> str:
        """Make this the cache's plan; Mismatch if another stands there."""
        digest = self.store.put_plan(self.plan, self.plan.parents[-1] if self.plan.parents else None)
        held = self.store.plan(digest, Plan)
        self.plan = with_held_audit(held, self.plan)
        if held != self.plan:
            # Two workers that plan at once may have measured differently: the first plan decides.
            self.plan = as_held(self.plan, held, self.ensemble.config, self.store)
            self.ensemble.precision = self.plan.capture.precision
            self.ensemble.temper(self.plan.reading.temperature_before, self.plan.reading.temperature_after)
        refuse_difference(held, self.plan, self.store.root)
        while any(item.startswith(f"{PLANNING}-") for item in self.leases.live()):
            time.sleep(POLL)  # somebody looks whether the plan may be dropped; he is done in a moment, or dead
        # Once more, for he may have dropped it: then it is made again.
        if self.store.put_plan(held, held.parents[-1] if held.parents else None) != digest:
            raise Mismatch(f"{self.store.root}: its plan has changed meanwhile", hint="run the same command again")
        return digest

    def _check_space(self, span: range | None) -> None:
        items = self._todo(span)
        missing = ~self._done.reshape(-1, len(self.plan.groups))[items]
        # Of ragged features the rows alone: nobody knows how many tokens there are.
        sizes = np.array([group.dtype.itemsize for group in self.plan.groups])
        needed = int((self.plan.item_rows()[items] * (missing @ sizes)).sum())
        free = self.store.storage.free()
        if free is not None and needed > free:
            raise StorageError(
                f"{self.store.root}: the capture needs {needed / 1e6:.1f} MB more, {free / 1e6:.1f} MB are free",
                hint="free some space, or choose another --out",
            )

    # Doing it ---------------------------------------------------------------------------------------

    def _capture(
        self,
        items: Iterator[WorkItem],
        report: Callable[[Progress], None],
        stop: Stop,
        workers: int,
        writer: ThreadPoolExecutor,
    ) -> None:
        pending: Future[list[Commit]] | None = None
        opened: OpenItem | None = None
        progress = self.progress
        pieces = prefetch(self._pieces(items), workers)
        try:
            for piece in timed(pieces, progress.waited):
                if (left := stop()) is not None and (opened is None or self._seconds(opened) > left / 2):
                    raise Interrupted("")
                opened = opened or self._open(piece.item)
                start = time.perf_counter()
                with memory_errors(self.plan.capture.batch_size):
                    self._batch(piece, opened)
                progress.seconds["teachers"] += time.perf_counter() - start
                progress.rows += len(piece.shown.keys)
                if piece.last_of_item:
                    self._finish(pending)
                    pending, opened = writer.submit(self._commit, opened), None
                report(progress)
            self._finish(pending)
        except (Interrupted, KeyboardInterrupt):
            self._finish(pending)
            raise self._interrupted() from None
        finally:
            pieces.close()  # type: ignore[attr-defined]

    def _interrupted(self) -> Interrupted:
        done, total = self.progress.units, self.progress.units_total
        return Interrupted(f"{done}/{total} units committed", hint="run the same command to go on")

    def _seconds(self, opened: OpenItem) -> float:
        """What the rest of an item will take, at the speed so far."""
        return opened.missing / max(1e-9, self.progress.rows_per_second)

    def _pieces(self, items: Iterator[WorkItem]) -> Iterator[Callable[[], Piece]]:
        """Batches of nearly equal size that never cross a work item."""
        for item in items:
            count = -(-item.rows // self.plan.capture.batch_size)
            for i, part in enumerate(np.array_split(np.arange(item.first, item.last), count)):
                yield partial(self._read, item, part, i == count - 1)

    def _read(self, item: WorkItem, index: np.ndarray, last: bool) -> Piece:
        return Piece(item, int(index[0]), show(self.sources[item.split], self.plan, item, index), last)

    def _open(self, item: WorkItem) -> OpenItem:
        """What an item still lacks: all of it in a first capture, less where something is appended or was dropped."""
        first = self.plan.number(item.split, item.view, item.page) * len(self.plan.groups)
        lacking = [g for g, done in zip(self.plan.groups, self._done[first:], strict=False) if not done]
        return OpenItem(item, self.plan, self._stages, lacking or list(self.plan.groups))

    def _batch(self, piece: Piece, opened: OpenItem) -> None:
        """A batch through the members, stage by stage, into the records of its item."""
        try:
            ran = self.ensemble.run(piece.shown.inputs, opened.running)
            before: dict[str, Tensor] = {}
            for stage in opened.stages:
                if opened.lacks(stage):
                    opened.add_said(stage, piece, stage.said(self.ensemble, ran, before, piece.shown, piece.item.view))
                if stage is not opened.stages[-1]:
                    before |= stage.kept(self._arrays(stage, piece, opened))
            opened.add(piece, ran)
        except InvalidRow as error:
            raise InvalidOutput(
                f"{error} for sample {piece.first + error.row} of {piece.item.split} "
                f"(view {piece.item.view}, key {piece.shown.keys[error.row].tobytes().hex()}, "
                f"batch of rows {piece.first}–{piece.first + len(piece.shown.keys) - 1}); "
                f"nothing of its unit is committed",
                hint=error.hint or f"look at what {error.member} does with this sample, or use --set precision=fp32",
            ) from error

    def _arrays(self, stage: Stage, piece: Piece, opened: OpenItem) -> dict[str, Tensor]:
        """What a stage has kept of the predictions of a batch: just now, or when its unit was captured."""
        if opened.lacks(stage):
            rows = opened.records[stage.group.name][opened.part(piece)]
        else:
            index = np.arange(piece.first, piece.first + len(piece.shown.keys))
            rows = self._rows.gather(stage.group, piece.item.split, piece.item.view, index)
        return stage.arrays(rows)

    def _commit(self, opened: OpenItem) -> list[Commit]:
        item = opened.item
        for rows, partner_keys in opened.partners:
            self._keys.prove(item.split, rows, partner_keys)
        keys = self._keys.put(item, opened.keys)
        opened.measure()
        commits = []
        for group in opened.groups:
            statistics = opened.tallies[group.name].state() if group.name in opened.tallies else None
            records, unit = opened.records[group.name], item.unit(group)
            tokens = opened.tokens[group.name].table() if group.name in opened.tokens else None
            commit, first = self.store.put_unit(
                self._digest, unit, records, self.plan.format, keys, statistics, self.provenance, tokens
            )
            self.progress.late += not (first or self._done[self.plan.unit_number(unit)])
            commits.append(commit)
        self.leases.release(item.name)
        return commits

    def _mark(self, units: list[str]) -> None:
        for unit in units:
            number = self.plan.unit_number(unit)
            self.progress.units += not self._done[number]
            self._done[number] = True

    def _finish(self, pending: Future[list[Commit]] | None) -> None:
        if pending is None:
            return
        start = time.perf_counter()
        commits = pending.result()
        self.progress.seconds["disk"] += time.perf_counter() - start
        self._mark([commit.unit for commit in commits])
        self.progress.bytes += sum(commit.size for commit in commits)
