"""`ensemble-distill inspect`."""

from __future__ import annotations

import json
from typing import Any

import click

from ensemble_distill.cli.options import accepted, expect_digest, quiet, version


@click.command(name="inspect")
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--rows", "keys", multiple=True, metavar="KEY", help="Show the sample whose key begins so (hex); repeatable."
)
@click.option(
    "--worst",
    type=click.IntRange(1),
    metavar="N",
    help="Show the N rows whose label is least likely; without labels, those most disagreed about.",
)
@click.option("--split", metavar="NAME", help="Split of these.  [default: all for --rows, else test or the first]")
@click.option("--view", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="View of these.")
@click.option("--plot", "picture", metavar="FILE", help="Draw the statistics of a split (png, pdf, svg).")
@expect_digest
@accepted("limit", "batch-size", "workers", "device")
@quiet
@version
def command(
    cache: str,
    as_json: bool,
    keys: tuple[str, ...],
    worst: int | None,
    split: str | None,
    view: int,
    picture: str | None,
    expect_digest: str | None,
    quiet: bool,
) -> None:
    """Show what a CACHE holds: plan, members, rows, bytes, statistics; or single samples of it.

    \b
    Example:
      ensemble-distill inspect caches/fmnist
      ensemble-distill inspect caches/fmnist --worst 20 --split test
    """
    from ensemble_distill.cache.opening import open_cache
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli import rows
    from ensemble_distill.cli.show import section
    from ensemble_distill.errors import Corrupt

    held = open_cache(cache, expect_digest=expect_digest)
    plan, manifest = held.plan, held.manifest()
    samples, order = _samples(held, keys, worst, split, view)
    if picture is not None:
        _plot(held, manifest.statistics, picture, split)
    if as_json:
        calibration = held.calibration()
        report = {
            "path": str(held.root),
            "manifest_digest": held.digest,
            "content_digest": held.content_digest,
            "plan": plan.model_dump(mode="json"),
            "calibration": calibration and calibration.model_dump(mode="json"),
            **manifest.model_dump(mode="json", include={"units", "rows", "bytes", "statistics", "provenance"}),
            "fidelity": section(manifest.statistics, "fidelity"),
            "ensemble": section(manifest.statistics, "ensemble"),
        }
        if keys or worst:
            report["samples"] = samples
        click.echo(json.dumps(report, indent=1))
        return
    console = ui.Console(quiet)
    if keys or worst or picture is not None:
        if order:
            console.say(order)
        for shown in samples:
            rows.show(console, shown)
        if picture is not None:
            console.say(f"drawn: {picture}")
        return
    try:
        _show(console, held, plan, manifest)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(
            f"{held.root}: its plan or manifest says what no capture writes ({type(error).__name__}: {error})",
            hint="this is no cache of ours: do not use it",
        ) from error


def _samples(
    held: Any, keys: tuple[str, ...], worst: int | None, split: str | None, view: int
) -> tuple[list[dict[str, Any]], str]:
    """The samples that were asked for, and in words how they were chosen."""
    from ensemble_distill.cli import rows

    places, order = rows.find(held, keys, [_split(held, split)] if split else list(held.parts)), ""
    if worst:
        chosen, what = rows.worst(held, _split(held, split), view, worst)
        order = f"{chosen[0][0]}: the {len(chosen)} rows with the {what}"
        places += chosen
    return [rows.sample(held, place, view) for place in places], order


def _split(held: Any, split: str | None) -> str:
    """The split that was asked for: ``test``, or else the first, where none was."""
    from ensemble_distill.errors import UsageError
    from ensemble_distill.explain import suggestion

    chosen = split or ("test" if "test" in held.parts else next(iter(held.parts)))
    if chosen not in held.parts:
        raise UsageError(f"{held.root} has no split {chosen!r}{suggestion(chosen, held.parts)}")
    return chosen


def _plot(held: Any, statistics: dict[str, Any], picture: str, split: str | None) -> None:
    from ensemble_distill.cli.plots import plot

    chosen = _split(held, split)
    plot(picture, chosen, statistics.get(chosen, {}), held.plan.reading.classes)


def _show(console: Any, held: Any, plan: Any, manifest: Any) -> None:
    from ensemble_distill.cache.groups import field_name
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli.show import show_calibration, show_statistics, show_tail, show_taps, taught_by
    from ensemble_distill.transforms import named

    reading, capture = plan.reading, plan.capture
    console.say(f"{held.root}: {manifest.rows:,} rows, {manifest.units} {plan.format} units, {ui.size(manifest.bytes)}")
    console.say(f"content digest   {held.content_digest}")
    console.say(f"manifest digest  {held.digest}")
    more = ", …" if len(reading.classes) > 12 else ""
    console.say(f"classes   {len(reading.classes)}: {', '.join(reading.classes[:12])}{more}")
    console.say(f"combine   {taught_by(held.taught_by())}")
    transforms = ", ".join(named(t) for t in reading.views.transforms) or "none"
    mix = reading.views.mix
    mixed = f"; {mix.kind} (alpha {mix.alpha:g})" if mix else ""
    console.say(f"views     transforms: {transforms}{mixed}; seed {reading.views.seed}")
    console.table(
        ui.table(
            "members",
            ["", "share", "temperature", "weights or version"],
            [
                [m.name, m.share, t, _identity(m)]
                for m, t in zip(capture.members, reading.temperature_before, strict=True)
            ],
        )
    )
    show_tail(console, capture)
    rows = [[name, f"{s.rows:,}", s.views, s.unit_rows, "yes" if s.labels else "no"] for name, s in plan.splits.items()]
    console.table(ui.table("splits", ["", "rows", "views", "rows a unit", "labels"], rows))
    fields = [
        [field_name(head, name), dtype.lstrip("<|"), "×".join(map(str, shape)), codec.name, g.name]
        for g in plan.groups
        for head, codec in g.codecs.items()
        for name, (dtype, shape) in codec.arrays().items()
    ]
    tokens = [
        [f.name, f.dtype.lstrip("<|"), f"tokens×{f.shape[0]}", "features", g.name]
        for g in plan.groups
        for f in g.token_fields
    ]
    most, fields = "at most " if tokens else "", fields + tokens
    console.table(
        ui.table(f"fields: {most}{plan.bytes_per_row} B a row", ["", "dtype", "shape", "codec", "group"], fields)
    )
    show_taps(console, plan)
    show_calibration(console, held.calibration())
    show_statistics(console, manifest.statistics)
    made = manifest.provenance
    console.say(
        f"captured {made['time'][0]} to {made['time'][1]} in {capture.precision} on {', '.join(made['device'])}"
    )


def _identity(member: Any) -> str:
    """The first digits of a module's weights and what its pipeline says of it, as far as there is either."""
    known = [f"{member.weights[:12]}…" if member.weights else "", member.version or ""]
    return ", ".join(filter(None, known))
