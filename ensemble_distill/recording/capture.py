"""Capture: work items through the ensemble into committed units, and the seal at the end.

A thread reads and renders ahead, the calling thread runs the members, another builds and commits shards.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from ensemble_distill.cache.cache import TARGETS, read, render_inputs
from ensemble_distill.cache.plan import Plan, WorkItem
from ensemble_distill.device import memory_errors
from ensemble_distill.ensemble.ensemble import Ensemble, InvalidRow, Outputs
from ensemble_distill.errors import Corrupt, Interrupted, InvalidOutput, Mismatch, StorageError
from ensemble_distill.fingerprint import json_digest, sha256
from ensemble_distill.metrics import Tally
from ensemble_distill.prefetch import prefetch, timed
from ensemble_distill.provenance import provenance
from ensemble_distill.sources.arrays import Source
from ensemble_distill.store.records import PAGE_UNITS, Commit, Manifest, Page, dump
from ensemble_distill.store.store import Store


@dataclass
class Progress:
    """How far a capture is. seconds: what the calling thread spent on each, since the start."""

    units: int
    units_total: int
    rows: int = 0
    bytes: int = 0
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"source": 0.0, "teachers": 0.0, "disk": 0.0})

    @property
    def seconds_so_far(self) -> float:
        return time.perf_counter() - self.started

    @property
    def rows_per_second(self) -> float:
        return self.rows / max(1e-9, self.seconds_so_far)

    def waited(self, seconds: float) -> None:
        self.seconds["source"] += seconds

    @property
    def waiting_for(self) -> str:
        """What most of the time went to: ``teachers 97%``."""
        total = sum(self.seconds.values()) or 1.0
        name, value = max(self.seconds.items(), key=lambda item: item[1])
        return f"{name} {value / total:.0%}"

    @property
    def shares(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        return ", ".join(f"{name} {value / total:.0%}" for name, value in self.seconds.items())


@dataclass(frozen=True)
class _Piece:
    """One batch of a work item, read and rendered."""

    item: WorkItem
    first: int
    inputs: dict[str, Tensor]
    labels: Tensor | None
    keys: np.ndarray
    last_of_item: bool


class Recorder:
    """Fills a store with the units that its plan still lacks, then seals it."""

    def __init__(self, plan: Plan, ensemble: Ensemble, sources: Mapping[str, Source], store: Store) -> None:
        self.plan, self.ensemble, self.sources, self.store = plan, ensemble, sources, store
        self.provenance = provenance() | {"device": ",".join(map(str, dict.fromkeys(ensemble.devices)))}
        self.progress = Progress(units=0, units_total=plan.units)
        self._done: set[str] = set()
        self._digest = ""

    def run(
        self,
        report: Callable[[Progress], None] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
        workers: int = 1,
    ) -> str:
        """Capture what is missing and seal; the manifest's digest. Interrupted when ``stop`` says so."""
        self._done = self.store.committed()
        todo = [i for i in self.plan.items() if any(i.unit(g) not in self._done for g in self.plan.groups)]
        self._check_space(todo)
        self._digest = self.store.put_plan(self.plan)
        if self.store.plans() != [self._digest]:
            raise Mismatch(
                f"{self.store.root}: another capture with another plan began here at the same time",
                hint="choose another --out",
            )
        self.progress = progress = Progress(units=len(self._done), units_total=self.plan.units)
        report(progress)
        with ThreadPoolExecutor(1, thread_name_prefix="commit") as writer:
            self._capture(todo, progress, report, stop, workers, writer)
        return seal(self.plan, self.store)

    def _capture(
        self,
        todo: list[WorkItem],
        progress: Progress,
        report: Callable[[Progress], None],
        stop: Callable[[], bool],
        workers: int,
        writer: ThreadPoolExecutor,
    ) -> None:
        pending: Future[list[Commit]] | None = None
        opened: _OpenItem | None = None
        pieces = prefetch(self._pieces(todo), workers)
        try:
            for piece in timed(pieces, progress.waited):
                if stop():
                    raise Interrupted("")
                opened = opened or _OpenItem(piece.item, self.plan, self.ensemble.names)
                start = time.perf_counter()
                with memory_errors(self.plan.capture.batch_size):
                    opened.add(piece, self._forward(piece))
                progress.seconds["teachers"] += time.perf_counter() - start
                progress.rows += len(piece.keys)
                if piece.last_of_item:
                    self._finish(pending, progress)
                    pending, opened = writer.submit(self._commit, opened), None
                report(progress)
            self._finish(pending, progress)
        except (Interrupted, KeyboardInterrupt):
            self._finish(pending, progress)
            raise Interrupted(
                f"{progress.units}/{progress.units_total} units committed",
                hint="run the same command to go on",
            ) from None
        finally:
            pieces.close()  # type: ignore[attr-defined]
        report(progress)

    def _pieces(self, todo: list[WorkItem]) -> Iterator[Callable[[], _Piece]]:
        """Batches of nearly equal size that never cross a work item."""
        for item in todo:
            count = -(-(item.last - item.first) // self.plan.capture.batch_size)
            for i, part in enumerate(np.array_split(np.arange(item.first, item.last), count)):
                yield partial(self._read, item, part, i == count - 1)

    def _read(self, item: WorkItem, index: np.ndarray, last: bool) -> _Piece:
        inputs, labels, keys = read(self.sources[item.split], index)
        return _Piece(item, int(index[0]), render_inputs(inputs, keys, self.plan, item.view), labels, keys, last)

    def _forward(self, piece: _Piece) -> Outputs:
        try:
            return self.ensemble(piece.inputs)
        except InvalidRow as error:
            raise InvalidOutput(
                f"{error} for sample {piece.first + error.row} of {piece.item.split} "
                f"(view {piece.item.view}, key {piece.keys[error.row].tobytes().hex()}, "
                f"batch of rows {piece.first}–{piece.first + len(piece.keys) - 1}); "
                f"nothing of its unit is committed",
                hint=f"look at what {error.member} does with this sample, or use --set precision=fp32",
            ) from error

    def _commit(self, opened: _OpenItem) -> list[Commit]:
        item = opened.item
        keys = self.store.put_keys(item.split, item.page, opened.keys)
        commits = []
        for group in self.plan.groups:
            statistics = opened.tally.state() if group.name == TARGETS else None
            records, unit = opened.records[group.name], item.unit(group)
            commits.append(
                self.store.put_unit(self._digest, unit, records, self.plan.format, keys, statistics, self.provenance)
            )
        return commits

    def _finish(self, pending: Future[list[Commit]] | None, progress: Progress) -> None:
        if pending is not None:
            start = time.perf_counter()
            commits = pending.result()
            progress.seconds["disk"] += time.perf_counter() - start
            self._done |= {commit.unit for commit in commits}
            progress.units = len(self._done)
            progress.bytes += sum(commit.size for commit in commits)

    def _check_space(self, todo: list[WorkItem]) -> None:
        needed = sum((i.last - i.first) * self.plan.bytes_per_row for i in todo)
        root = Path(self.store.root).absolute()
        while not root.exists():
            root = root.parent
        free = shutil.disk_usage(root).free
        if needed > free:
            raise StorageError(
                f"{self.store.root}: the capture needs {needed / 1e6:.1f} MB more, {free / 1e6:.1f} MB are free",
                hint="free some space, or choose another --out",
            )


class _OpenItem:
    """The records of one work item while they are filled."""

    def __init__(self, item: WorkItem, plan: Plan, members: list[str]) -> None:
        self.item = item
        rows = item.last - item.first
        self._fields = {f.name: (g.name, f.codec) for g in plan.groups for f in g.fields}
        # zeros: the padding inside records is part of what is hashed and committed
        self.records = {g.name: np.zeros(rows, g.dtype) for g in plan.groups}
        self.keys = np.empty((rows, 16), np.uint8)
        self.tally = Tally.empty([*members, "ensemble"])

    def add(self, piece: _Piece, outputs: Outputs) -> None:
        start = piece.first - self.item.first
        part = slice(start, start + len(piece.keys))
        self.keys[part] = piece.keys
        for name, values in {"main/logprobs": outputs.logprobs, **outputs.features}.items():
            group, codec = self._fields[name]
            self.records[group][name][part] = codec.encode(values).cpu().numpy()
        self.tally.add([*outputs.members, outputs.logprobs], piece.labels)


def seal(plan: Plan, store: Store) -> str:
    """Write the manifest of a complete store and put it in force; its digest."""
    units = [(item, group) for item in plan.items() for group in plan.groups]
    commits = [store.commit(item.unit(group)) for item, group in units]
    plan_digest = store.put_plan(plan)
    keys: dict[str, dict[int, str]] = {}
    tallies: dict[str, Tally] = {}
    for (item, _), commit in zip(units, commits, strict=True):
        if commit.plan != plan_digest:
            raise Corrupt(f"{store.root}: unit {commit.unit} was captured under another plan")
        held = keys.setdefault(item.split, {}).setdefault(item.page, commit.keys)
        if held != commit.keys:
            raise Corrupt(f"{store.root}: unit {commit.unit} belongs to other samples than the units beside it")
        if commit.statistics is not None:
            tally = Tally.from_state(commit.statistics)
            tallies.setdefault(item.split, Tally.empty(tally.names)).merge(tally)
    for split, pages_of_split in keys.items():
        for page, digest in pages_of_split.items():
            store.keys(split, page, digest)  # a damaged page must not be sealed
    pages = [Page(commits=tuple(commits[i : i + PAGE_UNITS])) for i in range(0, len(commits), PAGE_UNITS)]
    manifest = Manifest(
        plan=plan_digest,
        pages=tuple(sha256(dump(page)) for page in pages),
        keys={split: tuple(digest for _, digest in sorted(held.items())) for split, held in keys.items()},
        content_digest=content_digest(plan, commits, keys),
        units=len(commits),
        rows=plan.rows,
        bytes=sum(commit.size for commit in commits),
        statistics={split: tally.report() for split, tally in tallies.items()},
        provenance=_summary([commit.provenance for commit in commits]),
    )
    return store.put_manifest(manifest, pages)


def content_digest(plan: Plan, commits: list[Commit], keys: Mapping[str, Mapping[int, str]]) -> str:
    """The identity of what a cache says: reading section, keys, labels, logical content of every unit.

    Not of how it is stored: HDF5 and Parquet give the same, and so do any workers in any order.
    """
    return json_digest(
        {
            "reading": plan.reading.model_dump(mode="json"),
            "splits": {name: [s.rows, s.views, s.labels] for name, s in plan.splits.items()},
            "keys": {split: {str(page): digest for page, digest in held.items()} for split, held in keys.items()},
            "units": {commit.unit: commit.content for commit in commits},
        }
    )


def _summary(parts: list[dict[str, object]]) -> dict[str, object]:
    """Distinct values of each provenance field over the units, times as first and last."""
    times = sorted(str(part["time"]) for part in parts)
    rest: dict[str, list[object]] = {}
    for part in parts:
        for name, value in part.items():
            if name != "time" and value not in rest.setdefault(name, []):
                rest[name].append(value)
    return {**rest, "time": [times[0], times[-1]]}
