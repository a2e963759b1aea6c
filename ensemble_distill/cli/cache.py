"""`ensemble-distill cache`."""

from __future__ import annotations

import click

from ensemble_distill.cli.options import Common, Span, common, grace, settings


@click.command(name="cache")
@click.argument("pipeline")
@click.option(
    "--out", required=True, metavar="DIR", help="Directory or URL of the cache; the same one goes on where it stopped."
)
@click.option("--format", type=click.Choice(["hdf5", "parquet"]), help="Format of the shards.  [default: hdf5]")
@click.option(
    "--views", type=click.IntRange(1), metavar="N", help="Views of each training sample; the first is as it is."
)
@click.option("--units", type=Span(), metavar="A:B", help="Capture units A to B-1 only; `seal` when all are there.")
@grace
@settings
@common
def command(
    pipeline: str,
    out: str,
    format: str | None,
    views: int | None,
    units: range | None,
    grace: float,
    settings: tuple[str, ...],
    common: Common,
) -> None:
    """Run the teachers of PIPELINE once and write what they said into a cache.

    Stopped anywhere, the same command goes on and (on a CPU) ends with the same content. Started several times
    at once, also on several machines, it shares the work.

    \b
    Example:
      ensemble-distill cache pipelines/fashion_mnist.py --out caches/fmnist
    """
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli.pipeline import Pipeline, overridden
    from ensemble_distill.cli.recording import record

    console = ui.Console(common.quiet)
    loaded = Pipeline(pipeline)
    config = overridden(loaded.cache(), settings, format=format, views=views, batch_size=common.batch_size)
    record(console, loaded.data(), config, out, common, grace, units)
