"""What the commits of a cache add up to: its content digest, bytes, statistics and provenance. No torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ensemble_distill.cache.groups import MAIN, TARGETS, Group
from ensemble_distill.cache.plan import Plan, WorkItem
from ensemble_distill.errors import Corrupt
from ensemble_distill.fingerprint import canonical_json
from ensemble_distill.provenance import MAX_LISTED, MAX_PROVENANCE, MAX_TIME, MAX_VALUES
from ensemble_distill.store.records import Manifest
from ensemble_distill.store.store import MEND
from ensemble_distill.tally import Tally

BATCH = 256
RECENT = 64


class _State(NamedTuple):
    """The statistics of a unit, and the group of predictions that it belongs to."""

    unit: str
    item: WorkItem
    group: str
    statistics: Mapping[str, Any]


class Sums:
    """Add commits in the order of their units; ``manifest`` says what they are together.

    Corrupt for statistics and provenance that no capture of this plan writes: they are checked before they are summed.
    """

    def __init__(self, plan: Plan, root: str) -> None:
        self._plan, self._root = plan, root
        self._content = hashlib.sha256(plan.content_header())
        self._tallies: dict[tuple[str, str], Tally] = {}  # by split and group of predictions
        self._waiting: list[_State] = []
        self._provenance = _Provenance()
        self.units = self._size = 0

    def add(self, item: WorkItem, group: Group, commit: Mapping[str, Any]) -> None:
        """A unit's commit, by field."""
        unit = item.unit(group)
        self._content.update(f"{unit} {commit['content']} {commit['keys']}\n".encode())
        self._size += commit["size"]
        self.units += 1
        self._add_provenance(self._provenance, unit, commit)
        self._waiting += self._states(item, group, commit)
        if self.units % BATCH == 0:
            self._flush()

    def check(self, item: WorkItem, group: Group, commit: Mapping[str, Any]) -> None:
        """Corrupt for a commit that ``add`` refuses, now or when it sums what waits."""
        self._add_provenance(_Provenance(), item.unit(group), commit)
        if states := self._states(item, group, commit):
            self._merge(self._empty(group.name), states)

    def manifest(self, plan_digest: str, pages: tuple[str, ...], parent: str | None = None) -> Manifest:
        """The manifest of all that was added; ``parent``: that of what it was added to."""
        self._flush()
        last = self._plan.said[-1].name  # those of earlier groups are of the ensemble before members were appended
        return Manifest(
            plan=plan_digest,
            pages=pages,
            content_digest=self._content.hexdigest(),
            units=self.units,
            rows=self._plan.rows,
            bytes=self._size,
            statistics={split: tally.report() for (split, group), tally in self._tallies.items() if group == last},
            provenance=self._provenance.report(),
            parent=parent,
        )

    def _add_provenance(self, provenance: _Provenance, unit: str, commit: Mapping[str, Any]) -> None:
        try:
            provenance.add(commit["provenance"])
        except (ValueError, TypeError, RecursionError) as error:
            problem = f"{self._root}: unit {unit}: a provenance that no capture writes ({error})"
            raise Corrupt(problem, hint=MEND) from error

    def _states(self, item: WorkItem, group: Group, commit: Mapping[str, Any]) -> list[_State]:
        """The unit's statistics, if it has any."""
        unit = item.unit(group)
        if commit["statistics"] is None:
            return []
        if MAIN not in group.codecs:
            problem = f"{self._root}: unit {unit}: statistics that do not add up (they belong to {TARGETS!r})"
            raise Corrupt(problem, hint=MEND)
        return [_State(unit, item, group.name, commit["statistics"])]

    def _flush(self) -> None:
        """Sum what waits: many at once, for there may be a million."""
        for split, group in dict.fromkeys((state.item.split, state.group) for state in self._waiting):
            states = [state for state in self._waiting if (state.item.split, state.group) == (split, group)]
            self._merge(self._tallies.setdefault((split, group), self._empty(group)), states)
        self._waiting = []

    def _merge(self, tally: Tally, states: list[_State]) -> None:
        try:
            tally.merge([state.statistics for state in states], [state.item.rows for state in states])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            if len(states) > 1:
                for state in states:
                    self._merge(self._empty(state.group), [state])
            problem = f"{self._root}: unit {states[0].unit}: statistics that do not add up ({error})"
            raise Corrupt(problem, hint=MEND) from error

    def _empty(self, group: str) -> Tally:
        return Tally.empty(self._plan.predictors_by(group), len(self._plan.reading.classes))


class _Provenance:
    """The first distinct values of each field over the units; times as the first and the last."""

    def __init__(self) -> None:
        self._values: dict[str, dict[bytes, Any]] = {}
        self._recent: list[dict[str, Any]] = []
        self._first = self._last = ""
        self._room = MAX_LISTED

    def add(self, part: dict[str, Any]) -> None:
        """ValueError for what is too large to be a provenance, or has a time that is no text."""
        if part in self._recent:
            return
        if len(canonical_json(part)) > MAX_PROVENANCE:
            raise ValueError(f"more than {MAX_PROVENANCE} bytes")
        time = part.get("time", "")
        if not isinstance(time, str) or len(time) > MAX_TIME:
            raise ValueError(f"its time is {str(time)[:MAX_TIME]!r}")
        self._recent = [*self._recent[1 - RECENT :], part]
        self._first, self._last = min(self._first or time, time), max(self._last, time)
        for name, value in part.items():
            values = self._values.setdefault(name, {})
            text = canonical_json(value)
            if text not in values and len(values) < MAX_VALUES and len(text) <= self._room:
                values[text] = value
                self._room -= len(text)

    def report(self) -> dict[str, Any]:
        values = {name: list(values.values()) for name, values in self._values.items()}
        return {**values, "time": [self._first, self._last]}


def contradiction(manifest: Manifest, found: Manifest) -> str:
    """The first thing that a manifest says otherwise than its commits add up to, in words, or "".

    Figures may differ in their last digits, which another machine may round otherwise.
    """
    for name in ("content_digest", "units", "rows", "bytes", "statistics", "provenance"):
        said, true = getattr(manifest, name), getattr(found, name)
        if not _alike(said, true):
            shown = f" ({str(said)[:70]}, and not {str(true)[:70]})" if not isinstance(said, dict) else ""
            return f"its manifest's {name} is not what its commits add up to{shown}"
    return ""


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)) and not isinstance(b, bool):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return type(a) is type(b) and bool(a == b)
