"""Whether a plan has grown out of another: it says what that said, and more. For plans that lie in a cache."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ensemble_distill.cache.plan import Plan, Split
from ensemble_distill.errors import Corrupt
from ensemble_distill.explain import difference
from ensemble_distill.store.store import MEND, Store


def check_grown(store: Store, base: str, digest: str) -> None:
    """Corrupt unless the plan ``digest`` has grown out of the plan ``base``, step by step, as appends let it.

    Of steps between whose plans are not there, as in an old copy, the plan after them tells.
    """
    plan = store.plan(digest, Plan)
    line = [*plan.parents, digest]
    if base not in line:
        raise Corrupt(f"{store.root}: the plan {digest} has not grown out of the plan that is sealed", hint=MEND)
    line = [name for name in line[line.index(base) :] if store.storage.size(f"plans/{name}.json") is not None]
    for before, after in pairwise(line):
        old, new = (store.plan(name, Plan) for name in (before, after))
        field = _differs(old, new) if new.parents[: len(old.parents) + 1] == (*old.parents, before) else "its parents"
        if field is not None:
            raise Corrupt(f"{store.root}: the plan {after} is no growth of {before}: {field}", hint=MEND)


def _differs(old: Plan, new: Plan) -> str | None:
    """The first field in which a plan contradicts what it is said to have grown out of."""
    if (hit := contradicts(old, new)) is not None:
        return hit[0]
    for name, split in old.splits.items():
        if name not in new.splits or not _split_grew(split, new.splits[name]):
            return f"splits.{name}"
    if new.groups[: len(old.groups)] != old.groups:
        return "groups"
    return None if (new.splits, new.groups) != (old.splits, old.groups) else "it has nothing more"


def contradicts(old: Plan, new: Plan) -> tuple[str, Any, Any] | None:
    """The first (field, before, now) in which a plan does not say what an append leaves as it was; None if it does."""
    count = len(old.capture.members)
    return difference(_kept(old, count), _kept(new, count))


def _kept(plan: Plan, members: int) -> dict[str, Any]:
    """What an append changes nothing of, of the first ``members`` members."""
    reading, capture = plan.reading.model_dump(mode="json"), plan.capture
    reading["temperature_before"] = reading["temperature_before"][:members]
    kept = [member.model_dump(mode="json") for member in capture.members[:members]]
    # They sum to one, so that new members change them; the plan says what they were.
    stages = (*capture.shares_before, tuple(member.share for member in capture.members))
    shares = next((held for held in stages if len(held) == members), ())
    for member in kept:
        member.pop("share")
    return {
        **reading,
        "members": kept,
        "shares": shares,
        "precision": capture.precision,
        "calibration": capture.calibration,
        "tail": capture.tail,
        "format": plan.format,
    }


def _split_grew(old: Split, new: Split) -> bool:
    if old.unit_rows != new.unit_rows or new.rows < old.rows or new.views < old.views:
        return False
    if new.rows == old.rows:
        return new.cuts == old.cuts and new.labels == old.labels
    cuts = (*old.cuts, old.rows) if old.rows else old.cuts
    return new.cuts[: len(cuts)] == cuts
