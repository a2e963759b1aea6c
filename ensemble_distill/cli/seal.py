"""`ensemble-distill seal`."""

from __future__ import annotations

import click

from ensemble_distill.cli.options import accepted, quiet, version


@click.command(name="seal")
@click.argument("cache")
@accepted("limit", "batch-size", "workers", "device")
@quiet
@version
def command(cache: str, quiet: bool) -> None:
    """Seal a CACHE whose units were captured apart, with `cache --units`; a cache that is sealed stays as it is.

    \b
    Example:
      ensemble-distill cache pipelines/fashion_mnist.py --out caches/fmnist --units 0:69
      ensemble-distill cache pipelines/fashion_mnist.py --out caches/fmnist --units 69:138
      ensemble-distill seal caches/fmnist
    """
    from ensemble_distill.cache.commits import held_plan
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli.show import show_statistics
    from ensemble_distill.recording.seal import seal
    from ensemble_distill.store.store import open_store

    console = ui.Console(quiet)
    store = open_store(cache)
    digest = seal(held_plan(store), str(store.plan_digest()), store)
    manifest = store.manifest(digest)
    show_statistics(console, manifest.statistics)
    console.say(f"{cache}: {manifest.units} units, {manifest.rows:,} rows, {ui.size(manifest.bytes)}")
    console.say(f"content digest   {manifest.content_digest}")
    console.say(f"manifest digest  {digest}")
