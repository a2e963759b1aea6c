"""`ensemble-distill plan`."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import click

from ensemble_distill.cli.options import Common, common, settings

if TYPE_CHECKING:
    from ensemble_distill.cli.console import Console
    from ensemble_distill.recording.prices import Price, PriceList, TapPrice

MAX_SIZE = 1 << 16


class Sizes(click.ParamType[tuple[int, ...]]):
    """Numbers of classes, separated by commas."""

    name = "K,K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = sorted({int(part) for part in str(value).split(",")})
        except ValueError:
            sizes = [0]
        if sizes[0] < 1 or sizes[-1] > MAX_SIZE:
            self.fail(f"{value!r}: expected numbers from 1 to {MAX_SIZE}, as in 8,32,128", param, ctx)
        return tuple(sizes)


@click.command(name="plan")
@click.argument("pipeline")
@click.option(
    "--k",
    "sizes",
    type=Sizes(),
    metavar="K,K",
    help="Numbers of classes to keep, or to draw.  [default: up to half of the classes and 128]",
)
@click.option("--format", type=click.Choice(["hdf5", "parquet"]), help="Format of the shards.  [default: hdf5]")
@click.option(
    "--views", type=click.IntRange(1), metavar="N", help="Views of each training sample; the first is as it is."
)
@click.option(
    "--batches",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    metavar="N",
    help="Batches to measure on, spread over all samples.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings
@common
def command(
    pipeline: str,
    sizes: tuple[int, ...] | None,
    format: str | None,
    views: int | None,
    batches: int,
    as_json: bool,
    settings: tuple[str, ...],
    common: Common,
) -> None:
    """Show what `cache` would take for PIPELINE with each codec: bytes, time, memory, error.

    Runs the teachers on a few batches and writes nothing.

    \b
    Example:
      ensemble-distill plan pipelines/fashion_mnist.py --k 2,4
    """
    from ensemble_distill.cli import console as ui
    from ensemble_distill.cli.pipeline import Pipeline, overridden, sources
    from ensemble_distill.device import devices
    from ensemble_distill.recording.prices import price_list

    console = ui.Console(common.quiet, aside=as_json)
    loaded = Pipeline(pipeline)
    config = overridden(loaded.cache(), settings, format=format, views=views, batch_size=common.batch_size)
    data = loaded.data()
    with console.live():
        console.progress(f"running the teachers on {batches} batches")
        splits, on = sources(data, common.limit), devices(common.device)
        found = price_list(data, config, splits, on, sizes, batches, common.workers, console.phase)
    if as_json:
        click.echo(json.dumps(_report(found), indent=1))
    else:
        _show(console, found)


def _report(found: PriceList) -> dict[str, Any]:
    from ensemble_distill.recording.offers import name_of

    plan, own = found.plan, found.own
    return {
        "rows": plan.rows,
        "views": max(split.views for split in plan.splits.values()),
        "splits": {name: {"rows": split.rows, "views": split.views} for name, split in plan.splits.items()},
        "device": ",".join(found.devices),
        "precision": plan.capture.precision,
        "batch_size": plan.capture.batch_size,
        "format": plan.format,
        "seconds": own.seconds,
        "bytes": own.bytes,
        "units": own.units,
        "break_even_epochs": own.epochs,
        "memory": found.memory,
        "probe": {"batches": found.batches, "rows": found.probed, "seconds_per_row": found.seconds_per_row},
        "taps": [_tap(tap) for tap in found.taps],
        "codecs": [_price(price) for price in found.prices],
        "left_out": [{"codec": name_of(codec), "reason": reason} for codec, reason in found.left_out],
    }


def _tap(tap: TapPrice) -> dict[str, Any]:
    return {
        "tap": tap.field,
        "shape": list(tap.codec.dims),
        "values": tap.codec.values,
        "bytes_per_row": tap.bytes_per_row,
        "bytes": tap.bytes,
        "distortion": tap.distortion,
        "tokens": tap.tokens,
    }


def _price(price: Price) -> dict[str, Any]:
    from ensemble_distill.recording.offers import name_of, setting, spelled

    return {
        "codec": name_of(price.codec),
        "config": spelled(price.codec),
        "set": f"--set {shlex.quote(setting(price.codec))}",
        "own": price.own,
        "bytes_per_row": price.bytes_per_row,
        "bytes": price.bytes,
        "units": price.units,
        "seconds": price.seconds,
        "break_even_epochs": price.epochs,
        "error": price.error,
    }


def _show(console: Console, found: PriceList) -> None:
    from ensemble_distill.cli import console as ui
    from ensemble_distill.recording.offers import name_of, setting

    plan, memory = found.plan, found.memory
    splits = ", ".join(f"{name} {s.rows:,}×{s.views}" for name, s in plan.splits.items())
    console.say(f"{plan.rows:,} rows ({splits}), {plan.format}, batches of {plan.capture.batch_size}")
    console.say(f"{plan.capture.precision} on {', '.join(found.devices)}; measured on {found.batches} batches")
    console.say(
        f"memory: members {ui.size(memory['members'])}, batches {ui.size(memory['batch'])}, "
        f"records {ui.size(memory['records'])}; peak of the process {ui.size(memory['host_peak'])}"
        + "".join(f", {name} {ui.size(peak)}" for name, peak in (memory["device_peak"] or {}).items())
    )
    columns = ["", "B/row", "bytes", "units", "time", "KL", "TV", "top-1", "angle", "epochs"]
    console.say("")
    console.table(ui.table("", columns, [_line(price) for price in found.prices]))
    console.say("")
    if found.taps:
        columns = ["taps (within all of the above)", "shape", "values", "B/row", "bytes", "distances"]
        console.table(ui.table("", columns, [_tap_line(tap) for tap in found.taps]))
        if any(tap.distortion is not None for tap in found.taps):
            console.say("distances: how far a projection changes squared ones between rows, on average.")
        if any(tap.tokens is not None for tap in found.taps):
            console.say("~: an estimate, by the mean number of real tokens in the rows that were measured.")
        console.say("")
    console.say("KL (nats), TV: on the classes that are kept, all others as one. top-1: same likeliest class.")
    console.say("angle: of a student's gradient to that from all classes. epochs: until the cache is paid for.")
    console.say("*: the pipeline's own codec. To have another one, give `cache`")
    console.say("")
    chosen = [[name_of(price.codec), f"--set {shlex.quote(setting(price.codec))}"] for price in found.prices]
    for name, text in chosen:
        console.say(f"{name:<{max(len(name) for name, _ in chosen)}}  {text}")
    for reason in dict.fromkeys(reason for _, reason in found.left_out):
        names = ", ".join(name_of(codec) for codec, why in found.left_out if why == reason)
        console.say(f"left out: {names}: {reason}")


def _line(price: Price) -> list[str]:
    from ensemble_distill.cli import console as ui
    from ensemble_distill.recording.offers import name_of

    error = price.error
    return [
        f"{name_of(price.codec)}{' *' if price.own else ''}",
        f"{price.bytes_per_row:,}",
        ui.size(price.bytes),
        f"{price.units:,}",
        _time(price.seconds),
        _figure(error["kl"], "{:.1e}"),
        _figure(error["total_variation"], "{:.1e}"),
        _figure(error["top1_agreement"], "{:.2%}"),
        _figure(error["gradient_degrees"], "{:.2f}°"),
        _figure(price.epochs, "{:.1f}"),
    ]


def _tap_line(tap: TapPrice) -> list[str]:
    from ensemble_distill.cli import console as ui

    shape = "×".join(map(str, tap.codec.dims))
    distortion = _figure(tap.distortion, "±{:.1%}")
    about = ""
    if tap.tokens is not None:
        shape, about = f"~{tap.tokens:.1f} of {shape}", "~"
    size = ui.size(tap.bytes)
    return [tap.field, shape, tap.codec.values, f"{about}{tap.bytes_per_row:,}", f"{about}{size}", distortion]


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _time(seconds: float) -> str:
    from ensemble_distill.cli import console as ui

    return ui.duration(seconds) if seconds >= 60 else f"{seconds:.1f} s"
