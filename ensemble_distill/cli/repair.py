"""`ensemble-distill repair`."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import click

from ensemble_distill.cli.options import Common, common, grace, settings

if TYPE_CHECKING:
    from ensemble_distill.cache.verify import Verdict
    from ensemble_distill.cli.recording import Capture


@click.command(name="repair")
@click.argument("cache")
@click.argument("pipeline", required=False)
@click.option("--views", type=click.IntRange(1), metavar="N", help="As in the `cache` command that made it.")
@grace
@settings
@common
def command(
    cache: str,
    pipeline: str | None,
    views: int | None,
    grace: float,
    settings: tuple[str, ...],
    common: Common,
) -> None:
    """Drop what is damaged in a CACHE, and capture exactly that again if PIPELINE is given.

    Records that the cache holds twice are restored. Give the options that `cache` was given, or those of the last
    `append`. A pipeline that did not make the cache is refused before anything is dropped.

    \b
    Example:
      ensemble-distill repair caches/fmnist pipelines/fashion_mnist.py
    """
    from ensemble_distill.cache.commits import held_plan
    from ensemble_distill.cache.repair import repair
    from ensemble_distill.cache.verify import verify
    from ensemble_distill.cli import console as ui
    from ensemble_distill.recording.seal import remake, seal
    from ensemble_distill.store.store import open_store

    console = ui.Console(common.quiet)
    store = open_store(cache, mend=True)

    def report(files: int, damaged: int) -> None:
        console.progress(f"{files} files checked, {damaged} damaged")

    @functools.cache
    def begin() -> Capture:
        """The capture of what is missing; Mismatch for a pipeline that did not make this cache."""
        from ensemble_distill.cli.pipeline import Pipeline, overridden
        from ensemble_distill.cli.recording import prepared

        loaded, format = Pipeline(str(pipeline)), held_plan(store).format
        config = overridden(loaded.cache(), settings, format=format, views=views, batch_size=common.batch_size)
        return prepared(console, loaded.data(), config, cache, common, append=False)

    def check() -> Verdict:
        threads = os.cpu_count() or 1
        return verify(store, lambda v: report(v.files, len(v.damaged)), threads, most=1 << 18)

    if remake(store):
        console.say(f"restored: manifests/{store.current()}.json")
    with ui.stoppable(grace), console.live():
        mended = repair(store, check, begin if pipeline is not None else lambda: None)
    done = {"restored": mended.restored, "removed": mended.removed, "dropped": mended.dropped, "left": mended.left}
    for verb, names in done.items():
        for name in names[:20]:
            console.say(f"{verb}: {name}")
        if len(names) > 20:
            console.say(f"{verb}: … and {len(names) - 20} more")
    plan = held_plan(store)
    if mended.missing and pipeline is None:
        console.say(
            f"{cache}: {plan.units - mended.missing}/{plan.units} units are whole; "
            f"capture the rest: ensemble-distill repair {cache} PIPELINE"
        )
    elif mended.missing:
        from ensemble_distill.cli.recording import run

        run(console, begin, cache, common.workers, grace)
    elif store.current() is None:
        digest = seal(plan, str(store.plan_digest()), store)
        console.say(f"{cache}: sealed again, manifest digest {digest}")
    else:
        state = "nothing is damaged that is in force" if mended.left else "nothing is damaged"
        console.say(f"{cache}: {'all is as it was sealed' if mended.files else state}")
