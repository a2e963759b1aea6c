"""`ensemble-distill append`."""

from __future__ import annotations

import click

from ensemble_distill.cli.options import Common, common, grace, settings


@click.command(name="append")
@click.argument("pipeline")
@click.option("--cache", "cache_path", required=True, metavar="DIR", help="A complete cache, a directory or a URL.")
@click.option(
    "--views", type=click.IntRange(1), metavar="N", help="Views of each training sample, with those there are."
)
@grace
@settings
@common
def command(
    pipeline: str,
    cache_path: str,
    views: int | None,
    grace: float,
    settings: tuple[str, ...],
    common: Common,
) -> None:
    """Add to a cache what PIPELINE has beyond it: members, taps, views, samples or splits.

    What there is stays as it is, and is not captured again. The cache as it was can still be opened by its manifest
    digest: train --manifest HEX.

    \b
    Example:
      ensemble-distill append pipelines/fashion_mnist.py --cache caches/fmnist --views 4
    """
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli.pipeline import Pipeline, overridden
    from ensemble_distill.cli.recording import record

    console = ui.Console(common.quiet)
    loaded = Pipeline(pipeline)
    config = overridden(loaded.cache(), settings, views=views, batch_size=common.batch_size)
    record(console, loaded.data(), config, cache_path, common, grace, append=True)
