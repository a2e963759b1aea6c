"""Calibration: a pass over held-out rows that fits a temperature to each member, and one to the ensemble after it."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.cache.plan import Calibrated, Calibration, MemberIdentity, Worth
from ensemble_distill.cache.samples import read
from ensemble_distill.calibration import fit_temperature
from ensemble_distill.device import memory_errors
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.errors import UsageError
from ensemble_distill.fingerprint import array_digest
from ensemble_distill.metrics import ece, nll
from ensemble_distill.mixture import combine
from ensemble_distill.phase import Phase, Report, silent
from ensemble_distill.sources.arrays import Source
from ensemble_distill.sources.loading import labels_at, load

# The members' log-probabilities of all rows are held at once: a GiB of float32 at most.
MOST_VALUES = 1 << 28
KEYS = 4096


def calibrated_on(
    ensemble: Ensemble, source: Source, split: str, members: tuple[MemberIdentity, ...], report: Report = silent
) -> Calibrated:
    """The rows of a split that temperatures are fitted on: all of them, or the first that fit into memory."""
    if source.labels is None:
        raise UsageError(f"calibrate={split!r}: it has no labels", hint="name a split with labels")
    rows = min(len(source), max(1, MOST_VALUES // (ensemble.classes * len(ensemble.names))))
    keys, phase = hashlib.sha256(), Phase(f"reading {split}", rows, report)
    for first in range(0, rows, KEYS):
        index = np.arange(first, min(rows, first + KEYS))
        keys.update(load(source, index)[1].tobytes())
        phase.add(len(index))
    return Calibrated(
        members=members,
        combine=ensemble.config.combine,
        split=split,
        rows=rows,
        keys=keys.hexdigest(),
        labels=array_digest(source.labels[:rows]),
    )


def calibrate(
    ensemble: Ensemble, source: Source, on: Calibrated, batch_size: int, report: Report = silent
) -> Calibration:
    """Fit each member's temperature to the labels, average at these, and fit that of the average.

    ``report`` hears of each batch and each fit. Raises InvalidRow where a member's output is no distribution.
    """
    members, labels = _said(ensemble, source, on, batch_size, report)
    fits = Phase("fitting temperatures", len(members) + 1, report, "fits")
    before = tuple(_fitted(part, labels, fits) for part in members)
    shares = [member.share for member in on.members]
    tempered = [torch.log_softmax(part / t, dim=1) for part, t in zip(members, before, strict=True)]
    mixed = combine(tempered, shares, on.combine)
    after = _fitted(mixed, labels, fits)
    worth = {name: _worth(old, new, labels) for name, old, new in zip(ensemble.names, members, tempered, strict=True)}
    worth["ensemble"] = _worth(combine(members, shares, on.combine), torch.log_softmax(mixed / after, dim=1), labels)
    return Calibration(on=on, temperature_before=before, temperature_after=after, worth=worth)


def _fitted(logprobs: Tensor, labels: Tensor, fits: Phase) -> float:
    temperature = fit_temperature(logprobs, labels)
    fits.add(1)
    return temperature


def _said(
    ensemble: Ensemble, source: Source, on: Calibrated, batch_size: int, report: Report
) -> tuple[list[Tensor], Tensor]:
    """Each member's log-probabilities at temperature one, float32 [N, C] on the CPU, and the labels int64 [N]."""
    ensemble.temper([1.0] * len(ensemble.names), 1.0)
    parts: list[list[Tensor]] = []
    phase = Phase(f"running the members on {on.split}", on.rows, report)
    for first in range(0, on.rows, batch_size):
        index = np.arange(first, min(on.rows, first + batch_size))
        inputs, _, _ = read(source, index)
        with memory_errors(batch_size):
            parts.append([said.cpu() for said in ensemble(inputs).members])
        phase.add(len(index))
    labels = labels_at(source, slice(on.rows))
    assert labels is not None
    return [torch.cat(member) for member in zip(*parts, strict=True)], labels


def _worth(before: Tensor, after: Tensor, labels: Tensor) -> Worth:
    pair = [logprobs.clamp(min=-65504) for logprobs in (before, after)]
    return Worth(nll=tuple(nll(p, labels) for p in pair), ece=tuple(ece(p, labels) for p in pair))
