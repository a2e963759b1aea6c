"""The weights that a run begins with, where these are not fresh ones."""

from __future__ import annotations

import json
from pathlib import Path

from ensemble_distill.errors import Corrupt, UsageError
from ensemble_distill.fingerprint import sha256
from ensemble_distill.store.local import LocalStorage

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


def _written(run: Path) -> str:
    """The SHA-256 of the last weights, from the last line of the run's metrics."""
    try:
        line = json.loads(LocalStorage(run).read("metrics.jsonl").splitlines()[-1])
        return str(line["last"])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise Corrupt(f"start: {run / 'metrics.jsonl'} does not say which weights the run wrote last") from error
