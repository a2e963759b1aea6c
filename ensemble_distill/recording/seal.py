"""Seal: the manifest of a complete store, written page by page, in memory that does not grow with the units."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ensemble_distill.cache.commits import committed_units, missing
from ensemble_distill.cache.plan import Plan, WorkItem
from ensemble_distill.errors import Corrupt, Mismatch
from ensemble_distill.fingerprint import canonical_json
from ensemble_distill.metrics import Tally
from ensemble_distill.prefetch import prefetch
from ensemble_distill.store.records import PAGE_UNITS, Commit, Manifest
from ensemble_distill.store.store import Store

READERS = 4


def seal(plan: Plan, plan_digest: str, store: Store, done: np.ndarray | None = None) -> str:
    """Write the manifest and put it in force; its digest. Mismatch if units are missing, Corrupt if one is wrong.

    done: which units are committed, bool [units], where the caller knows it.
    """
    done = committed_units(store, plan) if done is None else done
    if not done.all():
        raise Mismatch(
            f"{store.root} is not complete: {done.sum()}/{plan.units} units committed{missing(plan, done)}",
            hint="run `ensemble-distill cache` for them: it goes on where it stopped",
        )
    keys: dict[tuple[str, int], str] = {}
    tallies: dict[str, Tally] = {}
    summary = _Summary()
    content = hashlib.sha256(_header(plan))
    pages: list[str] = []
    bodies: list[bytes] = []
    size = 0
    for item, unit, body in _commits(plan, store):
        commit = _said(body, unit, store.root)
        if commit["plan"] != plan_digest:
            raise Corrupt(f"{store.root}: unit {unit} was captured under another plan")
        held = keys.setdefault((item.split, item.page), commit["keys"])
        if held != commit["keys"]:
            raise Corrupt(f"{store.root}: unit {unit} belongs to other samples than the units beside it")
        if (statistics := commit["statistics"]) is not None:
            tallies.setdefault(item.split, Tally.empty(statistics["names"])).merge(statistics)
        summary.add(commit["provenance"])
        content.update(f"{unit} {commit['content']} {commit['keys']}\n".encode())
        size += commit["size"]
        bodies.append(body)
        if len(bodies) == PAGE_UNITS:
            pages.append(store.put_page(bodies))
            bodies = []
    if bodies:
        pages.append(store.put_page(bodies))
    for (split, page), digest in keys.items():
        first = page * plan.splits[split].unit_rows
        rows = min(plan.splits[split].rows - first, plan.splits[split].unit_rows)
        store.keys(split, page, digest, rows)  # a damaged page must not be sealed
    return store.put_manifest(
        Manifest(
            plan=plan_digest,
            pages=tuple(pages),
            content_digest=content.hexdigest(),
            units=plan.units,
            rows=plan.rows,
            bytes=size,
            statistics={split: tally.report() for split, tally in tallies.items()},
            provenance=summary.report(),
        )
    )


def _header(plan: Plan) -> bytes:
    """What the content digest says beside each unit's content and keys: the reading section, rows and labels.

    Not how it is stored: HDF5 and Parquet give the same, and so do any workers in any order.
    """
    splits = {name: [s.rows, s.views, s.labels] for name, s in plan.splits.items()}
    return canonical_json({"reading": plan.reading.model_dump(mode="json"), "splits": splits}) + b"\n"


def _commits(plan: Plan, store: Store) -> Iterator[tuple[WorkItem, str, bytes]]:
    """Each unit's work item, name and commit, in the order of the units."""
    units = ((item, item.unit(group)) for item in plan.items() for group in plan.groups)

    def read(part: list[tuple[WorkItem, str]]) -> list[tuple[WorkItem, str, bytes]]:
        return [(item, unit, store.commit_body(unit)) for item, unit in part]

    parts = iter(lambda: list(itertools.islice(units, 256)), [])
    for bodies in prefetch((partial(read, part) for part in parts), READERS):
        yield from bodies


def _said(body: bytes, unit: str, root: str) -> dict[str, Any]:
    """What a commit says, in a fifth of the time of its full validation, which readers of the manifest do."""
    try:
        commit: dict[str, Any] = json.loads(body)
        if commit["unit"] != unit:
            raise Corrupt(f"{root}/commits/{unit}.json: it commits unit {str(commit['unit'])[:200]}")
        if commit.keys() != Commit.model_fields.keys():
            raise ValueError(f"its fields are {', '.join(commit)[:200]}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{root}/commits/{unit}.json: not the record that was written ({error})") from error
    return commit


class _Summary:
    """Distinct values of each provenance field over the units, times as first and last."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}
        self._last: dict[str, Any] = {}

    def add(self, part: dict[str, Any]) -> None:
        if part == self._last:
            return
        self._last = part
        for name, value in part.items():
            if value not in self._values.setdefault(name, []):
                self._values[name].append(value)

    def report(self) -> dict[str, Any]:
        times = sorted(map(str, self._values.get("time", [""])))
        return {**self._values, "time": [times[0], times[-1]]}
