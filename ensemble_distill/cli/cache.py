"""`ensemble-distill cache`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ensemble_distill.cli.options import Span, common, grace, settings

if TYPE_CHECKING:
    pass


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
    limit: int | None,
    batch_size: int | None,
    workers: int,
    device: str,
    quiet: bool,
) -> None:
    """Run the teachers of PIPELINE once and write what they said into a cache.

    Stopped anywhere, the same command goes on and (on a CPU) ends with the same content. Started several times
    at once, also on several machines, it shares the work.

    \b
    Example:
      ensemble-distill cache pipelines/fashion_mnist.py --out caches/fmnist
    """
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli.pipeline import Pipeline
    from ensemble_distill.cli.recording import record
    from ensemble_distill.config import override

    console = ui.Console(quiet)
    loaded = Pipeline(pipeline)
    given = {"format": format, "views": views, "batch_size": batch_size}
    config = override(loaded.cache(), [f"{k}={v}" for k, v in given.items() if v is not None])
    config = override(config, settings)
    record(console, loaded.data(), config, out, limit, workers, device, grace, units)
