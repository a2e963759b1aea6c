"""`ensemble-distill verify`."""

from __future__ import annotations

import dataclasses
import json
import os

import click

from ensemble_distill.cli.options import accepted, expect_digest, quiet, version


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
@click.option("--deep", is_flag=True, help="Also parse each shard, in a limited process, and decode it.")
@click.option(
    "--deep-memory", type=click.IntRange(1), default=1000, show_default=True, metavar="MB", help="Its memory."
)
@click.option("--deep-seconds", type=click.FloatRange(0), default=60.0, show_default=True, help="Its time for a shard.")
@expect_digest
@accepted("batch-size", "device")
@quiet
@version
def command(
    cache: str,
    as_json: bool,
    workers: int,
    limit: int | None,
    deep: bool,
    deep_memory: int,
    deep_seconds: float,
    expect_digest: str | None,
    quiet: bool,
) -> None:
    """Check every byte of a CACHE against its hash; exit 4 if one is wrong.

    \b
    Example:
      ensemble-distill verify caches/fmnist
    """
    from ensemble_distill.cache.commits import held_plan
    from ensemble_distill.cache.deep import Parser
    from ensemble_distill.cache.verify import DeepCheck, Verdict, verify
    from ensemble_distill.cli import console as ui
    from ensemble_distill.errors import Corrupt, Unsafe
    from ensemble_distill.store.store import open_store, trust

    console = ui.Console(quiet or as_json)

    def report(verdict: Verdict) -> None:
        console.progress(f"{verdict.files} files, {ui.size(verdict.bytes)}, {len(verdict.damaged)} damaged")

    store = open_store(cache)
    if expect_digest is not None:
        trust(store, expect_digest)
    looks: tuple[DeepCheck, ...] = ()
    parser = None
    if deep:
        from ensemble_distill.cache.decoded import Decoder

        plan = held_plan(store)
        parser = Parser(plan.format, deep_memory * 1_000_000, deep_seconds)
        looks = (parser, Decoder(plan))
    try:
        with console.live():
            verdict = verify(store, report, workers, limit, looks, trusted=expect_digest)
    finally:
        if parser is not None:
            parser.close()
    if as_json:
        damaged = [str(damage) for damage in verdict.damaged]
        click.echo(json.dumps(dataclasses.asdict(verdict) | {"damaged": damaged, "ok": verdict.ok}, indent=1))
    for damage in verdict.damaged[:20]:
        console.say(f"damaged: {damage}")
    if not verdict.ok:
        kind = Unsafe if any(damage.unsafe for damage in verdict.damaged) else Corrupt
        raise kind(
            f"{cache}: {len(verdict.damaged)} of {verdict.files} files are damaged or missing",
            hint=f"ensemble-distill repair {cache} PIPELINE captures them again; or restore them from a copy",
        )
    state = "not complete: what is committed so far is whole"
    if verdict.sealed:
        state = f"manifest digest {verdict.manifest_digest}"
        if verdict.appended:
            state += f"; beyond it {verdict.appended} units of an append that is not complete"
    elif verdict.waiting:
        state = f"not sealed, though manifest {verdict.waiting} is whole: ensemble-distill repair {cache}"
    console.say(f"{cache}: {verdict.files} files, {ui.size(verdict.bytes)}, all as they were committed; {state}")
