"""`ensemble-distill fit-weights`."""

from __future__ import annotations

import json
from typing import Any

import click

from ensemble_distill.cli.options import Common, Reading, common, reading


@click.command(name="fit-weights")
@click.argument("pipeline", metavar="PIPELINE[:VARIANT]")
@click.option("--cache", "cache_path", required=True, metavar="DIR", help="A cache that keeps its members.")
@click.option("--split", default="held_out", show_default=True, help="Split whose labels decide.")
@click.option("--temperatures", is_flag=True, help="Also fit a temperature per member and one after averaging.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reading
@common
def command(
    pipeline: str,
    cache_path: str,
    split: str,
    temperatures: bool,
    as_json: bool,
    common: Common,
    reading: Reading,
) -> None:
    """Find the shares of a cache's members under which the labels of a held-out split are likeliest.

    Nothing is written: hand the settings that it prints to `train`.

    \b
    Example:
      ensemble-distill fit-weights pipelines/fashion_mnist.py --cache caches/members
    """
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli.pipeline import Pipeline, sources
    from ensemble_distill.cli.reading import opened
    from ensemble_distill.errors import UsageError
    from ensemble_distill.evaluation.fit_weights import fit_weights
    from ensemble_distill.explain import suggestion

    console = ui.Console(common.quiet, aside=as_json)
    cache = opened(cache_path, reading)
    data = Pipeline(pipeline).data()
    splits = sources(data, common.limit)
    if split not in splits:
        raise UsageError(f"there is no split {split!r}{suggestion(split, splits)}")
    cache.check(data)
    cache.check_labels(splits[split], split)
    with console.live():
        result = fit_weights(
            cache, splits[split], split, temperatures=temperatures, workers=common.workers, report=console.phase
        )
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    _show(console, result)


def _show(console: Any, result: dict[str, Any]) -> None:
    from ensemble_distill.cli import console as ui

    fitted, nll = result["ensemble"], result["nll"]
    columns = ["", "share captured", "share fitted", "NLL alone"]
    rows = [
        [name, f"{m['captured']:.4f}", f"{fitted['weights'][name]:.4f}", f"{m['nll']:.4f}"]
        for name, m in result["members"].items()
    ]
    if "temperatures" in fitted:
        columns.append("temperature")
        rows = [[*row, f"{fitted['temperatures'][row[0]]:.4f}"] for row in rows]
    console.table(ui.table(f"{result['split']}: {result['rows']:,} rows", columns, rows))
    if "temperature" in fitted:
        console.say(f"temperature after averaging: {fitted['temperature']:.4f}")
    shown = f"NLL {nll['captured']:.4f} as captured, {nll['equal']:.4f} with equal shares, {nll['fitted']:.4f} fitted"
    elsewhere = "" if nll["elsewhere"] is None else f", {nll['elsewhere']:.4f} on rows that it was not fitted on"
    console.say(shown + elsewhere)
    console.say(" ".join(f"--set '{setting}'" for setting in result["settings"]))
