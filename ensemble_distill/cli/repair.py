"""`ensemble-distill repair`."""

from __future__ import annotations

import os

import click

from ensemble_distill.cli.options import Common, common, grace, settings


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

    Records that the cache holds twice are restored. Give the options that `cache` was given.

    \b
    Example:
      ensemble-distill repair caches/fmnist pipelines/fashion_mnist.py
    """
    from ensemble_distill.cache.commits import held_plan
    from ensemble_distill.cache.repair import repair
    from ensemble_distill.cache.verify import verify
    from ensemble_distill.cli import console as ui
    from ensemble_distill.store.store import open_store

    console = ui.Console(common.quiet)
    store = open_store(cache, create=True)  # also where PLAN itself is lost

    def report(files: int, damaged: int) -> None:
        console.progress(f"{files} files checked, {damaged} damaged")

    with ui.stoppable(grace), console.live():
        workers = os.cpu_count() or 1
        mended = repair(store, lambda: verify(store, lambda v: report(v.files, len(v.damaged)), workers, most=1 << 18))
    for verb, names in (("restored", mended.restored), ("removed", mended.removed), ("dropped", mended.dropped)):
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
        from ensemble_distill.cli.pipeline import Pipeline, overridden
        from ensemble_distill.cli.recording import record

        loaded = Pipeline(str(pipeline))
        config = overridden(loaded.cache(), settings, format=plan.format, views=views, batch_size=common.batch_size)
        record(console, loaded.data(), config, cache, common, grace)
    elif store.current() is None:
        from ensemble_distill.recording.seal import seal

        digest = seal(plan, str(store.plan_digest()), store)
        console.say(f"{cache}: sealed again, manifest digest {digest}")
    else:
        console.say(f"{cache}: {'all is as it was sealed' if mended.files else 'nothing is damaged'}")
