"""Options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

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


def version(command: F) -> F:
    return click.option(
        "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
    )(command)


def common(command: F) -> F:
    """--limit, --batch-size, --workers, --device, --quiet, --version."""
    command = version(command)
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
