"""Growing: a plan laid out upon another, so that all units of that one stay as they are and only more are captured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from ensemble_distill.cache.groups import MAIN, ROW, Group
from ensemble_distill.cache.growth import contradicts
from ensemble_distill.cache.plan import Plan, Split
from ensemble_distill.codec import Dense, Members, RowFigures
from ensemble_distill.errors import Mismatch, UsageError
from ensemble_distill.explain import explain
from ensemble_distill.fingerprint import array_digest
from ensemble_distill.sources.arrays import Source


def grown(base: Plan, digest: str, wanted: Plan, sources: Mapping[str, Source], where: str) -> Plan:
    """``wanted`` as it is laid out upon ``base`` (the plan of this digest): with its units, and more after them.

    More may be members (of a codec that keeps each), taps, views, samples behind those there are, and splits. Where
    there is no more, the plan has no other parents than ``base`` has. Raises Mismatch, naming the first field that
    differs, where ``base`` holds what ``wanted`` does not; UsageError for what cannot be appended.
    """
    capture = wanted.capture.model_copy(update={"shares_before": _shares_before(base, wanted)})
    wanted = wanted.model_copy(update={"capture": capture})
    _same(base, wanted, where)
    splits = {name: _split(name, split, wanted, sources, where) for name, split in base.splits.items()}
    splits |= {name: split for name, split in wanted.splits.items() if name not in splits}
    groups = tuple(_groups(base, wanted, where))
    if wanted.mixes and not base.mixes:
        raise UsageError(
            f"{where} holds no view that mixes samples, and its rows have no place for the keys of partners: "
            "no such view can be appended",
            hint="capture them into a cache of their own",
        )
    if base.mixes and any(
        split.cuts != base.splits[name].cuts for name, split in splits.items() if name in base.splits
    ):
        raise UsageError(
            f"{where}: its views mix samples, and a partner is one of all rows: no samples can be appended",
            hint="capture them into a cache of their own",
        )
    more = splits != base.splits or groups != base.groups
    fields: dict[str, Any] = dict(wanted) | {
        "splits": splits,
        "groups": groups,
        "parents": (*base.parents, digest) if more else base.parents,
    }
    try:
        return Plan.model_validate(fields)
    except ValidationError as error:
        raise UsageError(
            f"{where}: this cannot be appended ({explain(error, Plan)})", hint="capture it into another directory"
        ) from error


def _shares_before(base: Plan, wanted: Plan) -> tuple[tuple[float, ...], ...]:
    """The shares before each append of members, so that units of before can be captured again as they were."""
    shares = tuple(member.share for member in base.capture.members)
    before = base.capture.shares_before
    return (*before, shares) if len(wanted.capture.members) > len(shares) else before


def _same(base: Plan, wanted: Plan, where: str) -> None:
    """Mismatch unless all that ``base`` says of itself holds of ``wanted`` too."""
    if len(wanted.capture.members) > len(base.capture.members) and base.capture.calibration is not None:
        raise UsageError(
            f"{where} is calibrated, and another member would change the temperature after averaging",
            hint="capture anew, or capture with codec=Members() and fit temperatures after it",
        )
    if (hit := contradicts(base, wanted)) is not None:
        field, before, now = hit
        raise Mismatch(
            f"{where} holds {field} = {_short(before)}, this pipeline says {_short(now)}",
            hint=f"restore {field}: only more can be appended, and new members stand behind those there are",
        )


def _split(name: str, held: Split, wanted: Plan, sources: Mapping[str, Source], where: str) -> Split:
    """A split of ``base`` with the rows and views that there are now."""
    split = wanted.splits.get(name)
    if split is None or split.rows < held.rows or split.views < held.views:
        found = "none of it" if split is None else f"{split.rows} rows in {split.views} view(s)"
        raise Mismatch(
            f"{where} holds {held.rows} rows of {name} in {held.views} view(s), this pipeline has {found}",
            hint="restore the source and --views: only more can be appended",
        )
    labels = sources[name].labels
    before = None if labels is None else array_digest(labels[: held.rows])
    if before != held.labels:
        raise Mismatch(
            f"the labels of the first {held.rows} rows of {name} are not those that {where} was captured with",
            hint="restore the labels: samples are appended behind those there are",
        )
    cuts = (*held.cuts, held.rows) if split.rows > held.rows > 0 else held.cuts
    return Split(rows=split.rows, views=split.views, unit_rows=held.unit_rows, labels=split.labels, cuts=cuts)


def _groups(base: Plan, wanted: Plan, where: str) -> Iterator[Group]:
    """The groups of ``base``, then one of new members, then those of new taps."""
    yield from base.groups
    held = {group.name: group for group in base.groups}
    for group in base.groups:
        if MAIN not in group.codecs and group not in wanted.groups:
            raise Mismatch(f"{where} holds {group.name}, for which cache() has no such tap", hint="restore the tap")
    if (head := wanted.head) != base.head or len(wanted.capture.members) > len(base.capture.members):
        yield _of_members(base, head, wanted, where)
    yield from (group for group in wanted.groups if MAIN not in group.codecs and group.name not in held)


def _of_members(base: Plan, head: object, wanted: Plan, where: str) -> Group:
    """The group of the members that ``wanted`` has beyond ``base``."""
    old = base.head
    if not isinstance(old, Members) or not isinstance(head, Members) or old.inner != head.inner:
        what = "another codec" if len(wanted.capture.members) == len(base.capture.members) else "another member"
        raise UsageError(
            f"{where} keeps its predictions as {old.name}, to which {what} cannot be appended",
            hint="capture with codec=Members(), to which members can be",
        )
    if not isinstance(old.inner, Dense):
        raise UsageError(
            f"{where} keeps the {old.inner.k} likeliest classes of its ensemble: of another one they would be others",
            hint="capture anew, or with codec=Members(inner=Dense())",
        )
    codec = Members(inner=old.inner, members=head.members[len(old.members) :])
    more = {name: c for name, c in wanted.said[0].codecs.items() if name not in (MAIN, ROW)}
    return Group.of(f"{base.said[0].name}.{len(base.said)}", {MAIN: codec, ROW: RowFigures(), **more})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
