"""`ensemble-distill cache`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ensemble_distill.cli.options import common, settings

if TYPE_CHECKING:
    from ensemble_distill.recording.capture import Progress


@click.command(name="cache")
@click.argument("pipeline")
@click.option(
    "--out", required=True, metavar="DIR", help="Directory of the cache; the same one goes on where it stopped."
)
@click.option("--format", type=click.Choice(["hdf5", "parquet"]), help="Format of the shards.  [default: hdf5]")
@click.option(
    "--views", type=click.IntRange(1), metavar="N", help="Views of each training sample; the first is as it is."
)
@settings
@common
def command(
    pipeline: str,
    out: str,
    format: str | None,
    views: int | None,
    settings: tuple[str, ...],
    limit: int | None,
    batch_size: int | None,
    workers: int,
    device: str,
    quiet: bool,
) -> None:
    """Run the teachers of PIPELINE once and write what they said into a cache.

    Stopped anywhere, the same command goes on and (on a CPU) ends with the same content.

    \b
    Example:
      ensemble-distill cache pipelines/fashion_mnist.py --out caches/fmnist
    """
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli.pipeline import Pipeline, sources
    from ensemble_distill.cli.show import show_statistics
    from ensemble_distill.config import override
    from ensemble_distill.device import devices
    from ensemble_distill.recording.capture import Recorder
    from ensemble_distill.recording.planning import prepare
    from ensemble_distill.store.store import open_store

    console = ui.Console(quiet)
    loaded = Pipeline(pipeline)
    given = {"format": format, "views": views, "batch_size": batch_size}
    config = override(loaded.cache(), [f"{k}={v}" for k, v in given.items() if v is not None])
    config = override(config, settings)
    data = loaded.data()
    splits = sources(data, limit)
    store = open_store(out, create=True)
    on = devices(device)
    with ui.stoppable() as stop:
        plan, ensemble = prepare(data, config, splits, store, on)
        where = ", ".join(map(str, dict.fromkeys(ensemble.devices)))
        console.say(f"members {', '.join(ensemble.names)}: eval mode, {plan.capture.precision} on {where}")
        size = ui.size(plan.rows * plan.bytes_per_row)
        console.say(f"{plan.rows:,} rows, {plan.bytes_per_row} B each, {size} in {plan.units} units")
        recorder = Recorder(plan, ensemble, splits, store)
        with console.live():
            digest = recorder.run(lambda p: console.progress(_progress(p, plan.rows)), stop, workers)
    manifest, done = store.manifest(digest), recorder.progress
    if done.rows:
        took = f"{ui.duration(done.seconds_so_far)} ({done.rows_per_second:,.0f} rows/s; {done.shares})"
        console.say(f"captured {done.rows:,} rows, {ui.size(done.bytes)} in {took}")
    else:
        console.say("already complete: nothing to capture")
    show_statistics(console, manifest.statistics)
    console.say(f"{out}: {manifest.units} units, {manifest.rows:,} rows, {ui.size(manifest.bytes)}")
    console.say(f"content digest   {manifest.content_digest}")
    console.say(f"manifest digest  {digest}")


def _progress(p: Progress, rows: int) -> str:
    from ensemble_distill.cli.console import duration, size

    left = rows * (1 - p.units / p.units_total) / p.rows_per_second if p.rows else 0
    return (
        f"{p.units}/{p.units_total} units  {p.rows_per_second:,.0f} rows/s  {size(p.bytes)}  "
        f"{duration(left)} left  waiting for: {p.waiting_for}"
    )
