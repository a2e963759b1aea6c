"""`ensemble-distill audit`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ensemble_distill.cli.options import Common, Reading, common, reading, settings

if TYPE_CHECKING:
    from ensemble_distill.cli.console import Console
    from ensemble_distill.recording.audit import Audit


@click.command(name="audit")
@click.argument("pipeline")
@click.option("--cache", "cache_path", required=True, metavar="DIR", help="Directory or URL of the cache.")
@click.option("--rows", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="Rows of each split.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Decides which rows.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reading
@settings
@common
def command(
    pipeline: str,
    cache_path: str,
    rows: int,
    seed: int,
    as_json: bool,
    settings: tuple[str, ...],
    common: Common,
    reading: Reading,
) -> None:
    """Run the teachers of PIPELINE again on random rows; exit 4 if the cache says something else.

    Exit 3 if the members, samples, labels, classes or views are not those of the cache.

    \b
    Example:
      ensemble-distill audit pipelines/fashion_mnist.py --cache caches/fmnist
    """
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli.pipeline import Pipeline, overridden, sources
    from ensemble_distill.cli.reading import opened
    from ensemble_distill.device import devices
    from ensemble_distill.ensemble.ensemble import Ensemble
    from ensemble_distill.ensemble.members import load_members
    from ensemble_distill.errors import Corrupt
    from ensemble_distill.recording.audit import audit, check_members

    console = ui.Console(common.quiet, aside=as_json)
    loaded, on = Pipeline(pipeline), devices(common.device)
    cache = opened(cache_path, reading)
    data, config = loaded.data(), overridden(loaded.cache(), settings)
    cache.check(data)
    members = load_members(config.members)
    check_members(cache.plan, members, config)
    ensemble = Ensemble(members, config, len(data.classes), on, cache.plan.capture.precision)
    with console.live():
        splits = sources(data, common.limit)
        result = audit(cache, ensemble, data, splits, rows, seed, common.batch_size, console.phase)
    if as_json:
        click.echo(json.dumps(_report(result), indent=1))
    else:
        _show(console, result)
    if bad := result.unexplained:
        split, name, difference = bad[0]
        raise Corrupt(
            f"{cache.root}: {name} of {split}, {difference.where}, is not what the members say: "
            f"they differ by {difference.worst:.3g} times what rounding explains",
            hint="`verify` shows whether bytes changed since; on another device than the capture's, try --device",
        )
    if not as_json:
        rounding = f"but for rounding in {cache.plan.capture.precision} and in the codec"
        console.say(f"{cache.root}: the {sum(result.rows.values())} rows are what the members say, {rounding}")


def _report(result: Audit) -> dict[str, Any]:
    fields = {split: {name: d.report() for name, d in parts.items()} for split, parts in result.fields.items()}
    return {"ok": not result.unexplained, "rows": result.rows, "fields": fields}


def _show(console: Console, result: Audit) -> None:
    from ensemble_distill.cli import console as ui

    for split, parts in result.fields.items():
        rows = []
        for name, difference in parts.items():
            figures = difference.report()
            shown = ["–" if figures[k] is None else f"{figures[k]:.2g}" for k in ("largest", "mean", "allowed")]
            rows.append([name, f"{figures['equal']:.1%}", *shown])
        title = f"{split}: {result.rows[split]} rows, captured against said now"
        console.table(ui.table(title, ["", "equal", "largest", "mean", "allowed there"], rows))
