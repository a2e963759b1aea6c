"""Evaluate a run's student: scores, parameters, latency."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ensemble_distill.cache.cache import Cache
from ensemble_distill.cache.samples import read
from ensemble_distill.config import DataConfig, EnsembleConfig, TrainConfig
from ensemble_distill.device import own, place, upload
from ensemble_distill.errors import Corrupt, Error, InvalidOutput, Mismatch, UsageError
from ensemble_distill.fingerprint import sha256
from ensemble_distill.scoring import score
from ensemble_distill.sources.arrays import Source
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.store import is_url, open_store
from ensemble_distill.targets import Targets
from ensemble_distill.trained import check_trained
from ensemble_distill.weights import UNREADABLE, fit, most_bytes, printed_digest


@dataclass(frozen=True)
class _Plain:
    inputs: dict[str, Tensor]
    labels: Tensor | None
    targets: Targets | None


def load_student(config: TrainConfig, run: str | Path, device: torch.device) -> nn.Module:
    """The run's exported student, in eval mode. UsageError if the run has none, Mismatch if it is another one."""
    path, student = Path(run) / "student.safetensors", config.student()
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="finish the run: `ensemble-distill train` goes on with it")
    data, expected = LocalStorage(run).read(path.name, most_bytes(student)), _student_digest(Path(run))
    if expected not in (None, sha256(data)):
        raise Corrupt(f"{path} is damaged: not the weights that the run exported")
    try:
        fit(student, safetensors.torch.load(data))
    except UNREADABLE as error:
        raise Mismatch(
            f"{path} does not fit the pipeline's student: {str(error)[:200]}",
            hint="name the variant that it was trained with: PIPELINE:VARIANT",
        ) from error
    if os.path.lexists(Path(run) / "config.json") and printed_digest(student) != _config(run)["student"]:
        raise Mismatch(
            f"{run} trained another student than the pipeline's, whose weights fit it: its modules print otherwise",
            hint="name the variant that it was trained with: PIPELINE:VARIANT",
        )
    model: nn.Module = place(student.eval(), device)
    return model


def evaluate(
    model: nn.Module,
    source: Source,
    cache: Cache | None,
    split: str,
    device: torch.device,
    *,
    batch_size: int = 512,
    workers: int = 1,
) -> dict[str, Any]:
    """accuracy, nll, ece; agreement and kl to the ensemble where a cache is given; parameters; latency_ms.

    InvalidOutput for a score that is no number.
    """
    if cache is not None:
        batches = cache.loader(source, batch_size, split=split, shuffle=False, workers=workers)
        scores, rows = score(model, batches, device), len(cache.positions(source, split))
    else:
        scores, rows = score(model, _plain(source, batch_size), device), len(source)
    if wrong := [name for name, value in scores.items() if not math.isfinite(value)]:
        raise InvalidOutput(
            f"{', '.join(wrong)} of the student on {split} is no finite number",
            hint="its logits are NaN or infinite for some sample: look at the run's losses",
        )
    example = read(source, np.arange(min(64, len(source))))[0]
    return {
        "split": split,
        "rows": rows,
        **scores,
        "parameters": sum(p.numel() for p in model.parameters()),
        "latency_ms": {str(n): latency(model, example, n, device) for n in (1, 64)},
    }


@torch.inference_mode()
def latency(model: nn.Module, example: Mapping[str, Tensor], batch: int, device: torch.device) -> float:
    """Median milliseconds of a forward pass in fp32 at this batch size, over 30 passes after 5."""
    inputs = own(upload(x[:1].expand(batch, *x.shape[1:]).contiguous(), device) for x in example.values())
    times = []
    for _ in range(35):
        start = time.perf_counter()
        model(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times[5:]), 3)


def _plain(source: Source, batch_size: int) -> Iterator[_Plain]:
    for first in range(0, len(source), batch_size):
        index = np.arange(first, min(len(source), first + batch_size))
        inputs, labels, _ = read(source, index)
        yield _Plain(inputs, labels, None)


def run_cache(run: str | Path) -> str | None:
    """The cache that a run was trained from, if its directory is still there."""
    place = str(_config(run)["cache"])
    # A run may be somebody else's: no bucket is asked for anything because its files say so.
    return place if not is_url(place) and os.path.isdir(place) else None  # noqa: PTH112 (false for a name too long)


def of_bucket(run: str | Path) -> bool:
    """Whether a run says that its cache is in a bucket."""
    return is_url(str(_config(run)["cache"]))


def check_same_cache(run: str | Path, cache: Cache) -> None:
    """Refuse a cache that has taken the place of the one that the run was trained from (Mismatch)."""
    expected = _config(run)["cache_content"]
    if cache.content_digest != expected:
        raise Mismatch(
            f"{cache.root} has content digest {cache.content_digest}, {run} was trained from {expected}",
            hint="name the cache to compare with: --cache DIR",
        )


def check_data(run: str | Path, data: DataConfig, source: Source) -> None:
    """Refuse classes and inputs that are not those that the student was trained with, in their order (Mismatch)."""
    check_trained(run, _config(run), data, source)


def run_manifest(run: str | Path, place: str) -> str | None:
    """The manifest that a run was trained from, where its cache holds more since and still has that one; or None."""
    config, store = _config(run), open_store(place)
    own, current = config["manifest"], store.current()
    if not own or current in (None, own) or store.manifest(str(current)).content_digest == config["cache_content"]:
        return None
    return str(own) if store.storage.size(f"manifests/{own}.json") is not None else None


def run_ensemble(run: str | Path) -> EnsembleConfig:
    """The ensemble that a run was taught by, where it chose another than the captured one."""
    try:
        return EnsembleConfig.model_validate(_config(run)["train"].get("ensemble", {}))
    except (ValidationError, AttributeError) as error:
        raise Corrupt(f"{run}/config.json is damaged: it does not say by whom the student was taught") from error


def _config(run: str | Path) -> dict[str, Any]:
    try:
        value = json.loads(LocalStorage(run).read("config.json"))
        needed = {name: value[name] for name in ("cache", "cache_content", "data", "manifest", "student", "train")}
        return {**value, **needed}
    except (Error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{run} is no run: it has no config.json that can be read") from error


def _student_digest(run: Path) -> str | None:
    """The SHA-256 of the exported weights, from the last line of the run's metrics; None for a file of its own.

    Corrupt for a run whose metrics do not say it.
    """
    storage = LocalStorage(run)
    if not any(os.path.lexists(run / name) for name in ("metrics.jsonl", "config.json")):
        return None  # a student that was taken out of its run
    try:
        return str(json.loads(storage.read("metrics.jsonl").splitlines()[-1])["student"])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise Corrupt(f"{run / 'metrics.jsonl'} does not say which weights the run exported") from error
