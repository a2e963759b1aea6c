"""The weights that a run begins with, where these are not fresh ones."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from ensemble_distill.errors import Corrupt, Error, Mismatch, UsageError
from ensemble_distill.fingerprint import sha256
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.weights import printed_digest

LAST = "last.safetensors"


def start_file(start: Path) -> Path:
    """A file of weights as it is; of a finished run those after its last step, whichever did best.

    UsageError where a directory is no finished run; Corrupt where its weights are not those that the run wrote.
    """
    if not start.is_dir():
        return start
    file = start / LAST
    if not file.is_file():
        raise UsageError(f"start: {start} holds no {LAST}", hint="train that run to its end first")
    if sha256(file.read_bytes()) != _written(start):
        raise Corrupt(f"start: {file} is damaged: not the weights that the run wrote")
    return file


def check_student(start: Path, student: nn.Module) -> None:
    """Mismatch where the run that a student begins with was of another one, whose weights fit it nevertheless."""
    if not start.is_dir():
        return
    try:
        held = json.loads(LocalStorage(start).read("config.json"))["student"]
    except (Error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"start: {start / 'config.json'} does not say which student the run trained") from error
    if held != printed_digest(student):
        raise Mismatch(
            f"start: {start} trained another student, whose weights fit this one: its modules print otherwise",
            hint=f"if that is meant, name the file: start={start / LAST}",
        )


def _written(run: Path) -> str:
    """The SHA-256 of the last weights, from the last line of the run's metrics."""
    try:
        line = json.loads(LocalStorage(run).read("metrics.jsonl").splitlines()[-1])
        return str(line["last"])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise Corrupt(f"start: {run / 'metrics.jsonl'} does not say which weights the run wrote last") from error
