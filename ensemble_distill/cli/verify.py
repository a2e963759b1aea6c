"""`ensemble-distill verify`."""

from __future__ import annotations

import dataclasses
import json
import os

import click

from ensemble_distill.cli.options import accepted, quiet, version


@click.command(name="verify")
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    metavar="N",
    help="Threads that hash.  [default: all cores]",
)
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="Check the shards of the first N samples of each split only."
)
@accepted("batch-size", "device")
@quiet
@version
def command(cache: str, as_json: bool, workers: int, limit: int | None, quiet: bool) -> None:
    """Check every byte of a CACHE against its hash; exit 4 if one is wrong.

    \b
    Example:
      ensemble-distill verify caches/fmnist
    """
    from ensemble_distill.cache.plan import Plan
    from ensemble_distill.cli import console as ui
    from ensemble_distill.errors import Corrupt
    from ensemble_distill.store.store import open_store
    from ensemble_distill.store.verify import Verdict, verify

    console = ui.Console(quiet or as_json)

    def report(verdict: Verdict) -> None:
        console.progress(f"{verdict.files} files, {ui.size(verdict.bytes)}, {len(verdict.damaged)} damaged")

    store = open_store(cache)

    def within(unit: str) -> bool:
        return limit is None or plan.locate(unit).first < limit

    with console.live():
        if limit is not None:
            plan = store.plan(store.plans()[0], Plan)
        verdict = verify(store, report, workers, within)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(verdict) | {"ok": verdict.ok}, indent=1))
    for problem in verdict.damaged[:20]:
        console.say(f"damaged: {problem}")
    if not verdict.ok:
        raise Corrupt(
            f"{cache}: {len(verdict.damaged)} of {verdict.files} files are damaged or missing",
            hint="restore them from a copy of the cache, or capture into another directory",
        )
    state = (
        f"manifest digest {verdict.manifest_digest}"
        if verdict.sealed
        else "not complete: what is committed so far is whole"
    )
    console.say(f"{cache}: {verdict.files} files, {ui.size(verdict.bytes)}, all as they were committed; {state}")
