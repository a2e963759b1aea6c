"""Capturing, as the commands that do it show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from ensemble_distill.cache.plan import Plan
from ensemble_distill.cli import console as ui
from ensemble_distill.cli.options import Common
from ensemble_distill.cli.pipeline import sources
from ensemble_distill.cli.show import show_statistics, show_tail, show_taps
from ensemble_distill.config import CacheConfig, DataConfig
from ensemble_distill.device import devices
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.recording.capture import Recorder
from ensemble_distill.recording.planning import prepare
from ensemble_distill.recording.progress import Progress
from ensemble_distill.sources.arrays import Source
from ensemble_distill.store.leases import Leases, lease_storage
from ensemble_distill.store.store import Store, open_store


class Capture(NamedTuple):
    """What a capture takes: the plan, the members that are loaded for it, what they are shown, and where it goes."""

    plan: Plan
    ensemble: Ensemble
    splits: Mapping[str, Source]
    store: Store
    leases: Leases


def prepared(
    console: ui.Console, data: DataConfig, config: CacheConfig, out: str, common: Common, append: bool
) -> Capture:
    """A capture that may begin; Mismatch if the cache there was begun otherwise."""
    splits = sources(data, common.limit)
    store = open_store(out, create=not append)
    leases = Leases(lease_storage(store.storage))
    on = devices(common.device)
    if config.calibrate is not None:
        console.say(f"calibrating on {config.calibrate}, unless that was done already")
    plan, ensemble = prepare(data, config, splits, store, leases, on, append, console.phase)
    return Capture(plan, ensemble, splits, store, leases)


def record(
    console: ui.Console,
    data: DataConfig,
    config: CacheConfig,
    out: str,
    common: Common,
    grace: float,
    units: range | None = None,
    append: bool = False,
) -> None:
    """Capture what a cache lacks, seal it where it is complete, and say what it holds.

    ``append``: to a sealed cache, what the pipeline has beyond it.
    """
    run(console, partial(prepared, console, data, config, out, common, append), out, common.workers, grace, units)


def run(
    console: ui.Console, begin: Callable[[], Capture], out: str, workers: int, grace: float, units: range | None = None
) -> None:
    """The same, of what ``begin`` prepares."""
    with ui.stoppable(grace) as stop:
        with console.live():
            plan, ensemble, splits, store, leases = begin()
        where = ", ".join(map(str, dict.fromkeys(ensemble.devices)))
        console.say(f"members {', '.join(ensemble.names)}: eval mode, {plan.capture.precision} on {where}")
        show_tail(console, plan.capture)
        show_taps(console, plan)
        size = ui.size(plan.rows * plan.bytes_per_row)
        most = "at most " if any(group.ragged for group in plan.groups) else ""
        console.say(f"{plan.rows:,} rows, {most}{plan.bytes_per_row} B each, {most}{size} in {plan.units} units")
        recorder = Recorder(plan, ensemble, splits, store, leases)
        with console.live():
            digest = recorder.run(lambda p: console.progress(_progress(p, plan.rows)), stop, workers, units)
    done = recorder.progress
    if done.rows:
        took = f"{ui.duration(done.seconds_so_far)} ({done.rows_per_second:,.0f} rows/s; {done.shares})"
        console.say(f"captured {done.rows:,} rows, {ui.size(done.bytes)} in {took}")
    else:
        console.say("already complete: nothing to capture")
    if done.late:
        console.say(f"{done.late} units were committed by another worker first")
    if digest is None:
        console.say(
            f"{out}: {done.units}/{done.units_total} units committed; when all are: ensemble-distill seal {out}"
        )
        return
    manifest = store.manifest(digest)
    show_statistics(console, manifest.statistics)
    console.say(f"{out}: {manifest.units} units, {manifest.rows:,} rows, {ui.size(manifest.bytes)}")
    console.say(f"content digest   {manifest.content_digest}")
    console.say(f"manifest digest  {digest}")


def _progress(p: Progress, rows: int) -> str:
    left = rows * (1 - p.units / p.units_total) / p.rows_per_second if p.rows else 0
    return (
        f"{p.units}/{p.units_total} units  {p.rows_per_second:,.0f} rows/s  {ui.size(p.bytes)}  "
        f"{ui.duration(left)} left  waiting for: {p.waiting_for}"
    )
