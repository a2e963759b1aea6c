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
    from ensemble_distill.cache.verify import Verdict, verify
    from ensemble_distill.cli import console as ui
    from ensemble_distill.errors import Corrupt
    from ensemble_distill.store.store import open_store

    console = ui.Console(quiet or as_json)

    def report(verdict: Verdict) -> None:
        console.progress(f"{verdict.files} files, {ui.size(verdict.bytes)}, {len(verdict.damaged)} damaged")

    store = open_store(cache)
    with console.live():
        verdict = verify(store, report, workers, limit)
    if as_json:
        damaged = [str(damage) for damage in verdict.damaged]
        click.echo(json.dumps(dataclasses.asdict(verdict) | {"damaged": damaged, "ok": verdict.ok}, indent=1))
    for damage in verdict.damaged[:20]:
        console.say(f"damaged: {damage}")
    if not verdict.ok:
        raise Corrupt(
            f"{cache}: {len(verdict.damaged)} of {verdict.files} files are damaged or missing",
            hint=f"ensemble-distill repair {cache} PIPELINE captures them again; or restore them from a copy",
        )
    state = (
        f"manifest digest {verdict.manifest_digest}"
        if verdict.sealed
        else "not complete: what is committed so far is whole"
    )
    console.say(f"{cache}: {verdict.files} files, {ui.size(verdict.bytes)}, all as they were committed; {state}")
