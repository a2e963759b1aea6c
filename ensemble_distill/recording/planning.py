"""From a pipeline to a plan: load the members, look at one batch, fix what ``auto`` left open."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from ensemble_distill.cache.audit import comparable, differs, refuse_other_pixels
from ensemble_distill.cache.commits import check_sealed
from ensemble_distill.cache.groups import MAIN, PARTNER, ROW, TARGETS, Group
from ensemble_distill.cache.history import newest, put_back
from ensemble_distill.cache.plan import (
    MAX_SHARD,
    Calibration,
    Capture,
    MemberIdentity,
    Plan,
    Reading,
    Split,
    WorkItem,
    unit_rows,
)
from ensemble_distill.cache.renderings import AUDIT_VIEWS, Rendering, Renderings
from ensemble_distill.cache.samples import read, renderings, viewed
from ensemble_distill.codec import Features, PartnerKey, RowFigures, Sampled, VarOpt, resolved
from ensemble_distill.config import CacheConfig, DataConfig, Precision
from ensemble_distill.device import Resolved
from ensemble_distill.ensemble.distributions import InvalidRow
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.ensemble.members import load_members
from ensemble_distill.errors import Corrupt, InvalidOutput, Mismatch, Unsafe, UsageError
from ensemble_distill.explain import difference, explain, suggestion
from ensemble_distill.fingerprint import array_digest, sha256
from ensemble_distill.phase import Report, silent
from ensemble_distill.recording.calibrate import calibrate, calibrated_on
from ensemble_distill.recording.growing import grown
from ensemble_distill.recording.tail import resolved_tail
from ensemble_distill.recording.taps import feature_codec
from ensemble_distill.sources.arrays import Source, check_label_range
from ensemble_distill.sources.loading import check_source, load
from ensemble_distill.sources.views import check_deterministic
from ensemble_distill.store import records
from ensemble_distill.store.leases import PLANNING, Leases, at_work
from ensemble_distill.store.store import MEND, Store
from ensemble_distill.tally import MAX_STATE_BYTES, state_bytes

PROBE_ROWS = 128
# Of a split to which samples are appended, rows whose samples are compared with those that were captured.
PROVED_ROWS = 4096
# The same of a capture that is gone on with: each may call for a page of keys.
RESUMED_ROWS = 64


@dataclass(frozen=True)
class Pieces:
    """What a plan is made of beside the configuration: read, loaded or measured once.

    taps: the codec of each tap's feature, by its field. temperatures: the members', and the ensemble's. calibration:
    the digest of the record that they come from, if any. inputs: their names in order, if there are several.
    distortions: what projections do to distances, by tap.
    """

    data: DataConfig
    members: tuple[MemberIdentity, ...]
    precision: Resolved
    splits: Mapping[str, Split]
    taps: Mapping[str, Features]
    temperatures: tuple[tuple[float, ...], float]
    audit: Renderings
    inputs: tuple[str, ...] = ()
    calibration: str | None = None
    distortions: Mapping[str, float] = field(default_factory=dict)


def prepare(
    data: DataConfig,
    config: CacheConfig,
    sources: Mapping[str, Source],
    store: Store,
    leases: Leases,
    devices: Sequence[torch.device],
    append: bool = False,
    report: Report = silent,
) -> tuple[Plan, Ensemble]:
    """The plan of this capture and the ensemble, ready to run.

    ``append``: what the pipeline has beyond what is sealed is added to it. ``report`` hears of the calibration. Raises
    Mismatch where the directory holds another plan, naming the first field that differs.
    """
    held = existing_plan(store)
    sealed = _sealed(store, held)
    # Resolved once and stored: a resumed capture must not choose anew. Of what is being appended nothing is stored that
    # the sealed plan does not say.
    before = sealed[1] if sealed else held
    precision = before.capture.precision if before and config.precision == "auto" else config.precision
    pieces, ensemble = load_pieces(data, config, sources, devices, precision)
    if config.calibrate is not None:
        pieces = _calibrated(pieces, config, ensemble, sources, store, before, report)
    plan = make_plan(pieces, config)
    if append:
        return _fitting(_appended(plan, held, sources, store)), ensemble
    if held is not None and sealed is not None:
        plan = _with_renderings(sealed[1], grown(sealed[1], sealed[0], plan, sources, store.root), store.root)
    elif held is not None and held.parents:
        plan = grown(held, str(store.plan_digest()), plan, sources, store.root)
    if held is not None and (kept := with_held_audit(held, plan)) == held:
        plan = kept  # and not what is held, whose transforms have no functions
    elif held is not None:
        with at_work(store.storage, PLANNING) as own:  # a capture that begins now sees this, or is seen from here
            others = [item for item in leases.live() if item != own]
            if newest(store) or store.current() is not None or next(store.committed(), None) is not None or others:
                refuse_difference(held, plan, store.root)
                measured = {"audit": held.capture.audit, "distortions": held.capture.distortions}
                plan = plan.model_copy(update={"capture": plan.capture.model_copy(update=measured)})
            else:
                # Nothing was captured under it: another batch size or precision may be tried in the same place.
                store.drop_plan(str(store.plan_digest()))
                held = None
    for name in plan.splits if held is not None else ():
        _prove_order(store, plan, name, sources[name], RESUMED_ROWS)
    return _fitting(plan), ensemble


def _fitting(plan: Plan) -> Plan:
    """The plan, if readers would read it, and what is sealed of it: UsageError unless both are within their bounds."""
    for what, size, most in (
        ("plan", len(records.dump(plan)), records.MAX_PLAN),
        ("manifest, with the statistics of each split,", plan.manifest_bytes, records.MAX_MANIFEST),
    ):
        if size > most:
            raise UsageError(
                f"{len(plan.capture.members)} member(s), {len(plan.splits)} split(s) and {len(plan.reading.classes)} "
                f"classes: the {what} would take {size} bytes, at most {most} are read",
                hint="capture the splits into several caches, or use fewer members or shorter names",
            )
    return plan


def _sealed(store: Store, held: Plan | None) -> tuple[str, Plan] | None:
    """The digest of the plan that was sealed before the held one grew out of it, and that plan; None where there is
    none, or it does not lie here, as in a copy."""
    if held is None or not held.parents or store.storage.size(f"plans/{held.parents[-1]}.json") is None:
        return None
    return held.parents[-1], store.plan(held.parents[-1], Plan)


def _appended(plan: Plan, held: Plan | None, sources: Mapping[str, Source], store: Store) -> Plan:
    """The plan that adds to what is sealed; Mismatch if nothing is, or if another append has begun."""
    current = store.current()
    if held is None or current is None:
        raise Mismatch(
            f"{store.root} is not sealed: only to a complete cache can something be appended",
            hint="finish it with `ensemble-distill cache`, and the pipeline that it was begun with",
        )
    if (later := put_back(store)) is not None and later.whole:
        raise Corrupt(f"{store.root}: CURRENT names {current}, and {later.digest} was sealed since", hint=MEND)
    digest = store.manifest(current).plan
    base = store.plan(digest, Plan)
    check_sealed(store, current, complete=True)
    result = _with_renderings(base, grown(base, digest, plan, sources, store.root), store.root)
    result = with_held_audit(held, result) if held != base else result
    for name, split in base.splits.items():
        if result.splits[name].rows > split.rows:
            _prove_order(store, base, name, sources[name], PROVED_ROWS)
    if held not in (base, result):
        raise Mismatch(
            f"{store.root}: something else is being appended to it, and is not complete",
            hint="run `ensemble-distill append` with the pipeline that it was begun with, to its end, or give that up: "
            f"ensemble-distill append --cache {store.root} --abandon",
        )
    return result


def _prove_order(store: Store, plan: Plan, name: str, source: Source, count: int) -> None:
    """Mismatch unless so many rows of a source, evenly spread over a split, are the samples that were captured.

    So new samples that stand in front of the old ones, or a source that was sorted anew, are not taken for more. Of
    pages of keys that are not there, or damaged, nothing is known.
    """
    split = plan.splits[name]
    rows = np.unique(np.linspace(0, split.rows - 1, count).astype(np.int64))
    pages = split.page_of(rows)
    for page in np.unique(pages):
        item = plan.item(plan.number(name, 0, int(page)))
        if (held := _keys_of(store, plan, item)) is None:
            continue
        for index in np.array_split(rows[pages == page], -(-int((pages == page).sum()) // PROBE_ROWS)):
            keys = read(source, index)[2]
            if (wrong := np.flatnonzero((held[index - item.first] != keys).any(axis=1))).size:
                raise Mismatch(
                    f"{store.root}: row {index[wrong[0]]} of {name} is not the sample that was captured as that row",
                    hint="restore the source, and its order: new samples stand behind those there are",
                )


def _keys_of(store: Store, plan: Plan, item: WorkItem) -> np.ndarray | None:
    """The page of keys of an item in view 0, uint8 [rows, 16]; None for one that is not there, or not as committed."""
    held = store.held_keys(item.split, item.page, item.rows)
    if held is not None and store.is_committed(unit := item.unit(plan.groups[0])):
        with contextlib.suppress(Corrupt, Unsafe):
            return held if store.commit(unit).keys == sha256(held.tobytes()) else None
    return held


def _with_renderings(base: Plan, plan: Plan, where: str) -> Plan:
    """The plan with the renderings of ``base`` and those of the views that are appended.

    Mismatch for transforms that do not show the samples as they were when ``base`` was captured.
    """
    if not (held := base.capture.audit):
        return plan
    new = plan.capture.audit
    known = {(entry.sample, entry.view) for entry in held}
    same = comparable(held, new)
    again = [entry for entry in comparable(new, same) if (entry.sample, entry.view) in known]
    refuse_other_pixels(same, again, where)
    more = (*held, *(entry for entry in new if (entry.sample, entry.view) not in known))
    measured = {"audit": more, "distortions": plan.capture.distortions | base.capture.distortions}
    return plan.model_copy(update={"capture": plan.capture.model_copy(update=measured)})


def as_held(plan: Plan, held: Plan, config: CacheConfig, store: Store) -> Plan:
    """The plan with what two planners may measure differently (precision, temperatures) as ``held`` has it."""
    capture, reading = plan.capture, plan.reading
    if config.precision == "auto":
        capture = capture.model_copy(update={"precision": held.capture.precision})
    ours, theirs = (_calibration(p, store) for p in (plan, held))
    if ours and theirs and ours.on == theirs.on:
        capture = capture.model_copy(update={"calibration": held.capture.calibration})
        reading = reading.model_copy(
            update={name: getattr(theirs, name) for name in ("temperature_before", "temperature_after")}
        )
    return plan.model_copy(update={"capture": capture, "reading": reading})


def _calibration(plan: Plan | None, store: Store) -> Calibration | None:
    digest = plan.capture.calibration if plan is not None else None
    return None if digest is None else store.calibration(digest, Calibration)


def _calibrated(
    pieces: Pieces,
    config: CacheConfig,
    ensemble: Ensemble,
    sources: Mapping[str, Source],
    store: Store,
    held: Plan | None,
    report: Report,
) -> Pieces:
    """Fit the ensemble's temperatures, or take those that were fitted on the same rows when this capture began."""
    split = str(config.calibrate)
    if split not in sources:
        raise UsageError(f"calibrate={split!r}: there is no such split{suggestion(split, sources)}")
    on = calibrated_on(ensemble, sources[split], split, pieces.members, report)
    record = _calibration(held, store)
    if record is None or record.on != on:
        record = calibrate(ensemble, sources[split], on, config.batch_size, report)
    ensemble.temper(record.temperature_before, record.temperature_after)
    return replace(
        pieces,
        temperatures=(record.temperature_before, record.temperature_after),
        calibration=store.put_calibration(record),
    )


def load_pieces(
    data: DataConfig,
    config: CacheConfig,
    sources: Mapping[str, Source],
    devices: Sequence[torch.device],
    precision: Precision,
) -> tuple[Pieces, Ensemble]:
    """The pieces of a plan, and the ensemble: the members are loaded and see one batch, ``auto`` is decided.

    Raises UsageError for an empty source, and for views that are none; what loading a member raises.
    """
    _check(data, config, sources)
    _check_views(data, config, sources)
    members = load_members(config.members)
    ensemble = Ensemble(members, config, len(data.classes), devices)
    probe = _probe(sources)
    taps, distortions = _taps(ensemble, probe, config)
    gives = ensemble.gives or []
    pieces = Pieces(
        data=data,
        members=tuple(
            MemberIdentity(
                name=m.config.name,
                weights=m.weights,
                structure=m.structure,
                version=m.config.version,
                share=share,
                gives=kind,
            )
            for m, share, kind in zip(members, config.shares, gives, strict=True)
        ),
        precision=ensemble.resolve_precision(precision, probe),
        splits={name: _rows(name, source, config.views) for name, source in sources.items()},
        taps=taps,
        inputs=tuple(probe) if len(probe) > 1 else (),
        temperatures=(ensemble.temperatures, ensemble.temperature),
        audit=_audit(data, config, sources),
        distortions=distortions,
    )
    return pieces, ensemble


def make_plan(pieces: Pieces, config: CacheConfig) -> Plan:
    """The plan that a configuration gives, from what was loaded for it (or for one with another codec or format).

    Raises UsageError for a codec that keeps more classes than there are, for units that are too large, and for more of
    anything than a plan may hold.
    """
    try:
        return _made(pieces, config)
    except ValidationError as error:
        raise UsageError(f"this cannot be captured into one cache ({explain(error, Plan)})") from error


def _made(pieces: Pieces, config: CacheConfig) -> Plan:
    classes = pieces.data.classes
    groups = _groups(config, len(classes), pieces.taps, pieces.data.views.mix is not None and config.views > 1)
    widest = max(group.row_bytes for group in groups)
    if config.unit_rows and config.unit_rows * max(16, widest) > MAX_SHARD:
        raise UsageError(
            f"unit_rows={config.unit_rows} makes units of {config.unit_rows * widest / 1e6:.0f} MB",
            hint=f"at most {MAX_SHARD // max(16, widest)} rows fit in one; or leave it out",
        )
    return Plan(
        reading=Reading(
            inputs=pieces.inputs,
            classes=classes,
            heads={"main": len(classes)},
            combine=config.combine,
            temperature_before=pieces.temperatures[0],
            temperature_after=pieces.temperatures[1],
            views=pieces.data.views,
        ),
        capture=Capture(
            members=pieces.members,
            precision=pieces.precision,
            batch_size=config.batch_size,
            calibration=pieces.calibration,
            tail=resolved_tail(config, [member.gives for member in pieces.members]),
            audit=pieces.audit,
            distortions=dict(pieces.distortions),
        ),
        format=config.format,
        splits={
            name: Split(**dict(split) | {"unit_rows": config.unit_rows or unit_rows(split.rows, widest)})
            for name, split in pieces.splits.items()
        },
        groups=groups,
    )


def existing_plan(store: Store) -> Plan | None:
    digest = store.plan_digest()
    return store.plan(digest, Plan) if digest else None


def with_held_audit(held: Plan, plan: Plan) -> Plan:
    """The plan with the renderings that are held, unless they differ by more than a machine's last bits.

    Those of a plan from before there were renderings are none, and stay none. So do figures of projections.
    """
    if held.capture.audit and differs(held.capture.audit, plan.capture.audit):
        return plan
    measured = {"audit": held.capture.audit, "distortions": plan.capture.distortions | held.capture.distortions}
    return plan.model_copy(update={"capture": plan.capture.model_copy(update=measured)})


def refuse_difference(held: Plan, plan: Plan, where: str) -> None:
    """Mismatch if a directory was begun with another plan, or with views that look otherwise."""
    measured = {"capture": {"audit", "distortions"}}
    old_plan, new_plan = (p.model_dump(mode="json", exclude=measured) for p in (held, plan))
    # Another number of rows changes the labels' digest and the unit size too: say the cause.
    rows = [{"splits": {n: {"rows": s["rows"]} for n, s in p["splits"].items()}} for p in (old_plan, new_plan)]
    hit = difference(rows[0], rows[1]) or difference(old_plan, new_plan)
    if hit is None:
        return refuse_other_pixels(held.capture.audit, plan.capture.audit, where)
    field, old, new = hit
    raise Mismatch(
        f"{where} was begun with {field} = {_short(old)}, this run says {_short(new)}",
        hint=f"restore {field}, or capture into another directory with --out",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check(data: DataConfig, config: CacheConfig, sources: Mapping[str, Source]) -> None:
    if config.views > 1 and data.views.plain and not isinstance(config.codec, (VarOpt, Sampled)):
        raise UsageError(
            f"{config.views} views were asked for, but data() has no transforms: they would all be the same",
            hint="give ViewsConfig some transforms or mix, or drop --views; only varopt and sampled draw anew in each",
        )
    names = [*(member.name for member in config.members), "ensemble"]
    if state_bytes(names, len(data.classes)) > MAX_STATE_BYTES:
        raise UsageError(
            f"{len(config.members)} members: their statistics would not fit into the record of a unit",
            hint="use at most some 400 members; shorter names leave room for a few more",
        )
    for name, source in sources.items():
        if len(source) == 0:
            raise UsageError(f"source {name!r} is empty")
        check_label_range(source, name, len(data.classes))
    _check_inputs({name: check_source(source, name) for name, source in sources.items()})


def _check_inputs(names: Mapping[str, tuple[str, ...]]) -> None:
    """UsageError for a split with other inputs than the first, or in another order: members are called with them so."""
    first, expected = next(iter(names.items()))
    for split, found in names.items():
        if found != expected and max(len(found), len(expected)) > 1:
            raise UsageError(
                f"the source {split!r} gives the inputs {', '.join(found)}, and {first!r} {', '.join(expected)}",
                hint="give the same in all, in one order: a module is called with them one after another",
            )


def _check_views(data: DataConfig, config: CacheConfig, sources: Mapping[str, Source]) -> None:
    """Refuse transforms that do not give the same pixels each time, on the first rows of what is shown in views."""
    if config.views > 1 and "train" in sources and not data.views.plain:
        inputs, _, keys = read(sources["train"], np.arange(min(PROBE_ROWS, len(sources["train"]))))
        check_deterministic(viewed(inputs, data.views), keys, data.views)


def _audit(data: DataConfig, config: CacheConfig, sources: Mapping[str, Source]) -> tuple[Rendering, ...]:
    if config.views == 1 or "train" not in sources or data.views.plain:
        return ()
    source = sources["train"]
    return renderings(source, data.views, range(min(config.views, AUDIT_VIEWS)), len(source))


def _rows(name: str, source: Source, views: int) -> Split:
    labels = None if source.labels is None else array_digest(source.labels)
    return Split(rows=len(source), views=views if name == "train" else 1, unit_rows=1, labels=labels)


def _probe(sources: Mapping[str, Source]) -> dict[str, Tensor]:
    source = next(iter(sources.values()))
    inputs, _ = load(source, np.arange(min(PROBE_ROWS, len(source))))
    return inputs


def _taps(
    ensemble: Ensemble, probe: Mapping[str, Tensor], config: CacheConfig
) -> tuple[dict[str, Features], dict[str, float]]:
    """The codec of each tap, by field, from the first rows; and what projections do to distances, from all."""
    try:
        features = ensemble.look(probe)
        distortions = ensemble.distortions(probe)
    except InvalidRow as error:
        message = f"{error} for sample {error.row} of the first source; nothing is committed"
        raise InvalidOutput(message, hint=error.hint) from error
    codecs = {tap.field: feature_codec(tap, tuple(features[tap.field].shape[1:])) for tap in config.taps}
    return codecs, distortions


def _groups(config: CacheConfig, classes: int, taps: Mapping[str, Features], mixes: bool) -> tuple[Group, ...]:
    try:
        main = resolved(config.codec, classes, tuple(member.name for member in config.members))
    except ValueError as error:
        raise UsageError(f"cache().codec: {error}", hint=f"keep at most {classes}, or use the codec dense") from error
    partner = {PARTNER: PartnerKey()} if mixes else {}
    groups = [Group.of(TARGETS, {MAIN: main, ROW: RowFigures(), **partner})]
    for tap in config.taps:
        groups.append(Group.of(tap.field.replace("/", "."), {tap.field: taps[tap.field]}))
    return tuple(groups)
