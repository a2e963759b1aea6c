"""`ensemble-distill train`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ensemble_distill.cli.options import Common, Reading, common, grace, reading, settings


@click.command(name="train")
@click.argument("pipeline", metavar="PIPELINE[:VARIANT]")
@click.option("--cache", "cache_path", required=True, metavar="DIR", help="The cache to learn from.")
@click.option("--out", required=True, metavar="RUN", help="Directory of the run; the same command resumes it.")
@reading
@click.option("--verify-source", is_flag=True, help="Look up every sample's key before the first step.")
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events (extra: tensorboard).")
@grace
@settings
@common
def command(
    pipeline: str,
    cache_path: str,
    out: str,
    verify_source: bool,
    tensorboard: bool,
    grace: float,
    settings: tuple[str, ...],
    common: Common,
    reading: Reading,
) -> None:
    """Train the student of PIPELINE from a cache; no teacher is loaded.

    \b
    Example:
      ensemble-distill train pipelines/fashion_mnist.py --cache caches/fmnist --out runs/a
      ensemble-distill train pipelines/fashion_mnist.py:alone --cache caches/fmnist --out runs/b
    """
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli.pipeline import Pipeline, overridden, sources
    from ensemble_distill.cli.reading import opened
    from ensemble_distill.cli.show import scores, taught_by
    from ensemble_distill.device import devices
    from ensemble_distill.training.events import Events
    from ensemble_distill.training.run import Progress, Run

    console = ui.Console(common.quiet)
    loaded = Pipeline(pipeline)
    config = overridden(loaded.train(), settings, batch_size=common.batch_size)
    cache = opened(cache_path, reading)
    data = loaded.data()
    splits = sources(data, common.limit)
    events = Events(out) if tensorboard else None
    with ui.stoppable(grace) as stop:
        if verify_source:
            for split in (name for name in splits if name in cache.parts):
                own = cache.verify_source(splits[split], split)
                console.say(f"{split}: {len(own):,} samples proved by key, {own.sum():,} at their own row")
        run = Run(data, config, splits, cache, out, devices(common.device)[0], workers=common.workers)
        if run.state["finished"]:
            console.say(f"{out} is finished: nothing to train")
        elif run.state["step"]:
            console.say(f"going on at epoch {run.state['epoch'] + 1}, step {run.state['step']}")
        parameters = sum(p.numel() for p in run.student.parameters())
        views = cache.parts["train"].views
        console.say(
            f"student: {parameters:,} parameters, {run.precision} on {run.device}; "
            f"cache {cache.content_digest[:12]}, {views} view(s)"
        )
        console.say(f"targets: {taught_by(run.cache.taught_by())}")

        def report(p: Progress) -> None:
            if p.line is None:
                console.progress(f"epoch {p.epoch + 1}/{p.epochs}  step {p.step}/{p.steps}")
                return
            if events is not None:
                events.write(p.step, p.line)
            if "test" in p.line or "train" not in p.line:
                return
            console.say(_epoch(p.line, p.epochs))

        with console.live():
            line = run.train(report, stop)
    if "test" in line:
        best = f" (best held-out: epoch {line['best']['epoch']})" if line["best"] else ""
        console.say(f"test: {scores(line['test'])}{best}")
    console.say(f"{out}/student.safetensors")


def _epoch(line: Mapping[str, Any], epochs: int) -> str:
    from ensemble_distill.cli.show import scores

    losses = "  ".join(f"{name} {value:.4f}" for name, value in line["train"].items())
    held_out = f"  held-out {scores(line['held_out'])}" if "held_out" in line else ""
    seconds, wait = line["timing"]["seconds"], line["timing"]["loader_wait"]
    return f"epoch {line['epoch']}/{epochs}  {losses}{held_out}  {seconds:.1f} s, {wait:.1%} waiting for data"
