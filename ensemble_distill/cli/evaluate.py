"""`ensemble-distill evaluate`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ensemble_distill.cli.options import Common, Reading, common, reading

if TYPE_CHECKING:
    from ensemble_distill.cache.cache import Cache
    from ensemble_distill.cli.console import Console


@click.command(name="evaluate")
@click.argument("pipeline", metavar="PIPELINE[:VARIANT]")
@click.option("--run", "run_path", required=True, metavar="RUN", help="Directory of a finished run.")
@click.option(
    "--cache",
    "cache_path",
    metavar="DIR",
    help="Cache to compare with.  [default: the run's own directory, if it is there]",
)
@reading
@click.option("--split", default="test", show_default=True, help="Split to score on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@common
def command(
    pipeline: str,
    run_path: str,
    cache_path: str | None,
    split: str,
    as_json: bool,
    common: Common,
    reading: Reading,
) -> None:
    """Score the student of a finished RUN: against the labels, and against the cached ensemble.

    Where the run's cache has grown since, it is opened as it was when the run was trained.

    \b
    Example:
      ensemble-distill evaluate pipelines/fashion_mnist.py --run runs/a
    """
    from ensemble_distill.cli.console import Console
    from ensemble_distill.cli.pipeline import Pipeline, sources
    from ensemble_distill.device import devices
    from ensemble_distill.errors import UsageError
    from ensemble_distill.evaluation.evaluate import check_data, evaluate, load_student
    from ensemble_distill.explain import suggestion
    from ensemble_distill.sources.arrays import check_label_range

    console = Console(common.quiet or as_json)
    loaded = Pipeline(pipeline)
    on = devices(common.device)[0]
    model = load_student(loaded.train(), run_path, on)
    data = loaded.data()
    splits = sources(data, common.limit)
    if split not in splits:
        raise UsageError(f"there is no split {split!r}{suggestion(split, splits)}")
    check_data(run_path, data, splits[split])
    cache = _taught_by(run_path, cache_path, reading, console)
    if cache is not None:
        cache.check(data)
        cache.check_labels(splits[split], split)
    else:
        check_label_range(splits[split], split, len(data.classes))
    result = evaluate(
        model, splits[split], cache, split, on, batch_size=common.batch_size or 512, workers=common.workers
    )
    if cache is not None:
        result |= {"manifest": cache.digest, "taught_by": cache.taught_by()}
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        _show(result, split, str(on), console)


def _taught_by(run_path: str, cache_path: str | None, reading: Reading, console: Console) -> Cache | None:
    """The cache that is named, or the run's own as it was trained from it; its members combined as they taught."""
    from ensemble_distill.cli.reading import opened
    from ensemble_distill.errors import UsageError
    from ensemble_distill.evaluation.evaluate import (
        check_same_cache,
        of_bucket,
        run_cache,
        run_ensemble,
        run_manifest,
    )

    path = cache_path or run_cache(run_path)
    if path is None:
        if reading.expect_digest is not None:
            raise UsageError("--expect-digest: there is no cache to compare with", hint="give it with --cache")
        where = ": the run's is in a bucket, which is opened where you name it" if of_bucket(run_path) else ""
        console.say(f"no cache: agreement and KL to the ensemble are left out (give --cache{where})")
        return None
    if cache_path is None and reading.manifest is None and (held := run_manifest(run_path, path)) is not None:
        console.say(f"{path} has grown: opened as {run_path} was trained from it, manifest {held}")
        reading = replace(reading, manifest=held)
    cache = opened(path, reading)
    if cache_path is None:
        check_same_cache(run_path, cache)
    return cache.mixed(run_ensemble(run_path))


def _show(result: dict[str, Any], split: str, device: str, console: Console) -> None:
    from ensemble_distill.cli.show import scores

    figures = {name: value for name, value in result.items() if name in ("accuracy", "nll", "ece", "agreement", "kl")}
    console.say(f"{split}: {result['rows']:,} rows  {scores(figures)}")
    one, many = result["latency_ms"]["1"], result["latency_ms"]["64"]
    console.say(f"{result['parameters']:,} parameters; {one} ms at batch 1, {many} ms at batch 64 (fp32, {device})")
