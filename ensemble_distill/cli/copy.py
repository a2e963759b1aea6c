"""`ensemble-distill copy`."""

from __future__ import annotations

import click

from ensemble_distill.cli.options import Span, accepted, expect_digest, grace, quiet, version


@click.command(name="copy")
@click.argument("source")
@click.argument("target")
@click.option("--units", type=Span(), metavar="A:B", help="Copy units A to B-1 only.")
@expect_digest
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True, metavar="N", help="Threads that copy.")
@grace
@accepted("limit", "batch-size", "device")
@quiet
@version
def command(
    source: str, target: str, units: range | None, expect_digest: str | None, workers: int, grace: float, quiet: bool
) -> None:
    """Copy a cache from SOURCE to TARGET, directories or URLs (s3://…, gs://…), checking every byte.

    Stopped anywhere, the same command goes on.

    \b
    Example:
      ensemble-distill copy caches/fmnist s3://bucket/fmnist
    """
    from ensemble_distill.cache.copy import Copied, copy
    from ensemble_distill.cli import console as ui
    from ensemble_distill.store.store import open_store, trust

    console = ui.Console(quiet)
    origin = open_store(source)
    if expect_digest is not None:
        trust(origin, expect_digest)

    def report(copied: Copied) -> None:
        console.progress(f"{copied.units}/{copied.units_total} units  {ui.size(copied.bytes)}")

    with ui.stoppable(grace) as stop, console.live():
        done = copy(origin, open_store(target, create=True), report, stop, workers, units, expect_digest)
    console.say(f"{target}: {done.units}/{done.units_total} units, {ui.size(done.bytes)} copied now")
    if done.sealed:
        console.say(f"manifest digest  {done.sealed}")
    else:
        console.say("not sealed: the copy is not complete" if done.units < done.units_total else "not sealed")
