"""A cache small enough to be written a thousand times: twelve rows, no teachers, no torch in its writers."""

from __future__ import annotations

import numpy as np

from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.plan import Capture, Plan, Reading, Split, WorkItem
from ensemble_distill.codec import Dense, Features
from ensemble_distill.formats import encode
from ensemble_distill.formats.layout import Segment
from ensemble_distill.store.store import Store
from ensemble_distill.transforms import ViewsConfig


def a_plan(format: str = "hdf5", rows: int = 12, unit_rows: int = 4, views: int = 2, groups: int = 2) -> Plan:
    return Plan(
        reading=Reading(
            classes=("a", "b", "c"), heads={"main": 3}, combine="mean_probs", temperature_before=(1.0,),
            temperature_after=1.0, views=ViewsConfig(),
        ),
        capture=Capture(members=(), precision="fp32", batch_size=4),
        format=format,
        splits={"train": Split(rows=rows, views=views, unit_rows=unit_rows, labels=None)},
        groups=(
            Group.of("targets", {"main": Dense(classes=3)}),
            Group.of("tap.a.x", {"tap/a.x": Features(width=2)}),
        )[:groups],
    )  # fmt: skip


def rows_of(plan: Plan, item: WorkItem, group: Group) -> np.ndarray:
    """What a teacher would have said: a function of split, view and row."""
    records = np.zeros(item.rows, group.dtype)
    for field in group.fields:
        shape = (item.rows, *field.shape)
        base = np.arange(item.first, item.last).reshape(-1, *[1] * len(field.shape)) + item.view
        records[field.name] = -np.broadcast_to(base, shape) / 8
    return records


def keys_of(item: WorkItem) -> np.ndarray:
    return (np.arange(item.first, item.last)[:, None] * np.ones(16)).astype(np.uint8)


def file_of(format: str, records: np.ndarray) -> tuple[bytes, tuple[Segment, ...]]:
    """A shard's bytes in one piece, and its segments."""
    parts, segments = encode(format, records)
    return b"".join(parts), segments


def put_item(store: Store, plan: Plan, digest: str, item: WorkItem, by: str = "") -> list[bool]:
    """Commit a work item as a capture does; for each unit whether this call created it."""
    keys = store.put_keys(item.split, item.page, keys_of(item))
    return [
        store.put_unit(
            digest, item.unit(g), rows_of(plan, item, g), plan.format, keys, None, {"by": by, "time": "2026"}
        )[1]
        for g in plan.groups
    ]
