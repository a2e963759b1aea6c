"""`ensemble-distill`: the group, its errors and exit codes."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import signal
import sys
import traceback

import click

from ensemble_distill.cli.options import version

COMMANDS = {
    "plan": "Show what a capture would take, with each codec.",
    "cache": "Run the teachers once and write what they said.",
    "append": "Add members, taps, views or samples to a cache.",
    "train": "Train a student from a cache.",
    "evaluate": "Score a run's student.",
    "fit-weights": "Find the shares of a cache's members that suit the labels best.",
    "inspect": "Show what a cache holds.",
    "audit": "Run the teachers again on some rows and compare.",
    "verify": "Check every byte of a cache against its hash.",
    "repair": "Drop what is damaged and capture it again.",
    "copy": "Copy a cache to another directory or bucket.",
    "seal": "Seal a cache whose units were captured apart.",
    "gc": "Remove what no commit and no manifest needs.",
}


class Group(click.Group):
    """Commands are imported when they are called, so that --help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"ensemble_distill.cli.{name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], COMMANDS, 1)
        if args[0] not in COMMANDS and near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@version
def cli() -> None:
    """Run an ensemble of teachers once; train any number of students from what they said.

    \b
    Example:
      ensemble-distill cache pipelines/fashion_mnist.py --out caches/fmnist
      ensemble-distill train pipelines/fashion_mnist.py --cache caches/fmnist --out runs/a

    Exit codes: 0 done, 1 a bug of ours, 2 usage, 3 mismatch, 4 corrupt, 5 refused as unsafe, 6 storage,
    7 invalid teacher output, 8 out of memory, 75 interrupted (run the same command again).
    """


def main() -> None:
    """The entry point: one sentence and the documented exit code for whatever goes wrong."""
    debug = "--debug" in sys.argv
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        # As Ctrl-C, where no command says otherwise; set outright, for process 1 of a container has no defaults.
        signal.signal(number, signal.default_int_handler)
    try:
        code = cli.main(args=[a for a in sys.argv[1:] if a != "--debug"], standalone_mode=False) or 0
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        _say("error: interrupted", "run the same command to go on")
        code = 75
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = _explain(error)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> int:
    from ensemble_distill.errors import Error, Interrupted

    if isinstance(error, Error):
        _say(f"{'stopped' if isinstance(error, Interrupted) else 'error'}: {error}", error.hint)
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS):
        _say(
            f"error: {error.filename or 'storage'}: {error.strerror}",
            "run the same command again; what is committed is safe",
        )
        return 6
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error):
        _say("error: out of memory", "try a smaller --batch-size")
        return 8
    from ensemble_distill.cli.pipeline import failed, user_line

    if user_line(error):  # the pipeline's code raised it, or was on the way: a teacher, a student, a source
        return _explain(failed(error))
    _say(
        f"error: {type(error).__name__}: {error} (this is a bug of ours)",
        "run the same command with --debug and report what it prints",
    )
    return 1


def _say(message: str, hint: str) -> None:
    click.echo(message, err=True)
    if hint:
        click.echo(f"  → {hint}", err=True)
