"""`ensemble-distill append`."""

from __future__ import annotations

import click

from ensemble_distill.cli.options import Common, common, grace, settings


@click.command(name="append")
@click.argument("pipeline", required=False)
@click.option("--cache", "cache_path", required=True, metavar="DIR", help="A complete cache, a directory or a URL.")
@click.option(
    "--views", type=click.IntRange(1), metavar="N", help="Views of each training sample, with those there are."
)
@click.option(
    "--abandon",
    is_flag=True,
    help="Give up an append that is not complete: the cache is as it was sealed. No PIPELINE.",
)
@grace
@settings
@common
def command(
    pipeline: str | None,
    cache_path: str,
    views: int | None,
    abandon: bool,
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
      ensemble-distill append --cache caches/fmnist --abandon
    """
    if abandon:
        _abandon(cache_path, common.quiet)
        return
    if pipeline is None:
        raise click.UsageError("Missing argument 'PIPELINE'.")
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli.pipeline import Pipeline, overridden
    from ensemble_distill.cli.recording import record

    console = ui.Console(common.quiet)
    loaded = Pipeline(pipeline)
    config = overridden(loaded.cache(), settings, views=views, batch_size=common.batch_size)
    record(console, loaded.data(), config, cache_path, common, grace, append=True)


def _abandon(cache_path: str, quiet: bool) -> None:
    from ensemble_distill.cache.abandon import abandon
    from ensemble_distill.cli import console as ui
    from ensemble_distill.store.store import open_store

    console = ui.Console(quiet)
    store = open_store(cache_path)
    units = abandon(store)
    console.say(
        f"dropped: {len(units)} units that were being appended; `ensemble-distill gc {cache_path}` finds their shards"
        if units
        else "dropped: nothing, for nothing was appended"
    )
    console.say(f"{cache_path}: as it was sealed, manifest digest {store.current()}")
