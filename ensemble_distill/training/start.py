"""The weights that a run begins with, where these are not fresh ones."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from ensemble_distill.config import DataConfig
from ensemble_distill.errors import Corrupt, Error, Mismatch, UsageError
from ensemble_distill.fingerprint import sha256
from ensemble_distill.sources.arrays import Source
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.trained import check_trained
from ensemble_distill.weights import load_weights, most_bytes, printed_digest

LAST = "last.safetensors"


def begin(start: Path, student: nn.Module, data: DataConfig, source: Source) -> str:
    """Give a student the weights of a file, or of a finished run those after its last step; their SHA-256.

    UsageError where a directory is no finished run; Corrupt where its weights are not those that the run wrote;
    Mismatch where that run was of another student, classes or inputs, and its weights fit nevertheless.
    """
    file = _of_run(start, student) if start.is_dir() else start
    load_weights("start", student, file, "student()")
    if start.is_dir():
        _check_run(start, student, data, source)
    return sha256(file.read_bytes())


def _of_run(start: Path, student: nn.Module) -> Path:
    file = start / LAST
    if not file.is_file():
        raise UsageError(f"start: {start} holds no {LAST}", hint="train that run to its end first")
    if sha256(LocalStorage(start).read(LAST, most_bytes(student))) != _written(start):
        raise Corrupt(f"start: {file} is damaged: not the weights that the run wrote")
    return file


def _check_run(start: Path, student: nn.Module, data: DataConfig, source: Source) -> None:
    try:
        config = json.loads(LocalStorage(start).read("config.json"))
        held, _ = config["student"], config["data"]
    except (Error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"start: {start / 'config.json'} does not say which student the run trained") from error
    if held != printed_digest(student):
        raise Mismatch(
            f"start: {start} trained another student, whose weights fit this one: its modules print otherwise",
            hint=f"if that is meant, name the file: start={start / LAST}",
        )
    check_trained(f"start: {start}", config, data, source)


def _written(run: Path) -> str:
    """The SHA-256 of the last weights, from the last line of the run's metrics."""
    try:
        line = json.loads(LocalStorage(run).read("metrics.jsonl").splitlines()[-1])
        return str(line["last"])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise Corrupt(f"start: {run / 'metrics.jsonl'} does not say which weights the run wrote last") from error
