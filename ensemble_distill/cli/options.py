"""Options that several commands share, as decorators; ``common`` and ``reading`` hand theirs over as one object."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

import click

F = TypeVar("F", bound=Callable[..., Any])

_COMMON: dict[str, tuple[dict[str, Any], str]] = {
    "limit": ({"type": click.IntRange(1), "metavar": "N"}, "Use the first N samples of each split."),
    "batch-size": ({"type": click.IntRange(1), "metavar": "N"}, "Samples in a batch."),
    "workers": (
        {"type": click.IntRange(1), "default": 1, "show_default": True, "metavar": "N"},
        "Threads that read samples ahead.",
    ),
    "device": (
        {"default": "auto", "show_default": True, "metavar": "NAME"},
        "auto, cpu, cuda, or a list: cuda:0,cuda:1.",
    ),
    "quiet": ({"is_flag": True}, "Print errors only."),
}


@dataclass(frozen=True)
class Common:
    """What ``common`` adds to a command."""

    limit: int | None
    batch_size: int | None
    workers: int
    device: str
    quiet: bool


@dataclass(frozen=True)
class Reading:
    """What ``reading`` adds to a command. memory, copies_size: MB, as people give them."""

    expect_digest: str | None
    allow_partial: bool
    manifest: str | None
    memory: int | None
    copies: str | None
    copies_size: int


def _as_one(kind: type[Any], name: str, command: F) -> F:
    """The command called with the options that are fields of ``kind`` as one argument."""

    @functools.wraps(command)
    def called(**options: Any) -> Any:
        own = {field.name: options.pop(field.name) for field in fields(kind)}
        return command(**options, **{name: kind(**own)})

    return cast(F, called)


def version(command: F) -> F:
    return click.option(
        "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
    )(command)


def common(command: F) -> F:
    """--limit, --batch-size, --workers, --device, --quiet, as ``common: Common``; and --version."""
    command = version(_as_one(Common, "common", command))
    for name, (kind, text) in reversed(_COMMON.items()):
        command = click.option(f"--{name}", help=text, **kind)(command)
    return command


def accepted(*names: str) -> Callable[[F], F]:
    """Options of ``common`` that mean nothing to a command: taken, so that one set of flags serves all."""

    def add(command: F) -> F:
        for name in reversed(names):
            kind = {key: value for key, value in _COMMON[name][0].items() if key in ("type", "metavar", "is_flag")}
            text = "Taken as by the other commands; changes nothing here."
            command = click.option(f"--{name}", expose_value=False, help=text, **kind)(command)
        return command

    return add


def quiet(command: F) -> F:
    kind, text = _COMMON["quiet"]
    return click.option("--quiet", help=text, **kind)(command)


def grace(command: F) -> F:
    return click.option(
        "--grace",
        type=click.FloatRange(0),
        default=25.0,
        show_default=True,
        metavar="SECONDS",
        help="After SIGTERM, SIGINT or SIGUSR1, the time to end in order.",
    )(command)


def expect_digest(command: F) -> F:
    return click.option(
        "--expect-digest", metavar="HEX", help="Refuse the cache unless its manifest digest is this one."
    )(command)


def reading(command: F) -> F:
    """What every command that learns from a cache, or compares with one, takes, as ``reading: Reading``."""
    options = [
        expect_digest,
        click.option(
            "--allow-partial", is_flag=True, help="Use what is committed of a cache that is not complete; recorded."
        ),
        click.option(
            "--manifest", metavar="HEX", help="Open the cache as it was under this manifest, before an append."
        ),
        click.option(
            "--memory",
            type=click.IntRange(1),
            metavar="MB",
            help="Keep at most this much of the cache in memory.  [default: a quarter of the RAM]",
        ),
        click.option(
            "--copies", metavar="DIR", help="Keep copies of what is read from a bucket here; processes may share it."
        ),
        click.option(
            "--copies-size",
            type=click.IntRange(1),
            default=10_000,
            show_default=True,
            metavar="MB",
            help="Their size at most.",
        ),
    ]
    command = _as_one(Reading, "reading", command)
    for option in reversed(options):
        command = option(command)
    return command


class Span(click.ParamType[range]):
    """A range of units, ``first:last`` with last excluded, either of which may be left out."""

    name = "A:B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:
        if isinstance(value, range):
            return value
        first, colon, last = str(value).partition(":")
        try:
            span = range(int(first or 0), int(last or 1 << 62))
        except ValueError:
            colon = ""
        if not colon or span.start < 0 or not span:
            self.fail(f"{value!r} is no range of units: expected A:B, as in 0:100", param, ctx)
        return span


def settings(command: F) -> F:
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="A.B=VALUE",
        help="Override a field of the configuration; repeatable.",
    )(command)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from ensemble_distill import __version__

        click.echo(f"ensemble-distill {__version__}")
        ctx.exit()
