"""Options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def common(command: F) -> F:
    """--limit, --batch-size, --workers, --device, --quiet."""
    for option in reversed(
        [
            click.option("--limit", type=click.IntRange(1), metavar="N", help="Use the first N samples of each split."),
            click.option("--batch-size", type=click.IntRange(1), metavar="N", help="Samples in a batch."),
            click.option(
                "--workers",
                type=click.IntRange(1),
                default=1,
                show_default=True,
                metavar="N",
                help="Threads that read samples ahead.",
            ),
            click.option(
                "--device",
                default="auto",
                show_default=True,
                metavar="NAME",
                help="auto, cpu, cuda, or a list: cuda:0,cuda:1.",
            ),
            click.option("--quiet", is_flag=True, help="Print errors only."),
        ]
    ):
        command = option(command)
    return command


def settings(command: F) -> F:
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="A.B=VALUE",
        help="Override a field of the configuration; repeatable.",
    )(command)
