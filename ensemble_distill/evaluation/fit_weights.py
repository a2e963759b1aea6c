"""Shares and temperatures of a cache's members that make the labels of a split likeliest, and what that is worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.cache.cache import Batch, Cache
from ensemble_distill.calibration import LOWEST, fit_shares, fit_temperature, mixture_nll
from ensemble_distill.codec import Dense, Members
from ensemble_distill.config import EnsembleConfig
from ensemble_distill.errors import UsageError
from ensemble_distill.mixture import combine
from ensemble_distill.phase import Phase, Report, silent
from ensemble_distill.philox import permutation
from ensemble_distill.sources.arrays import Source
from ensemble_distill.sources.loading import labels_at
from ensemble_distill.targets import Targets

BATCH = 4096


@dataclass(frozen=True)
class _Rows:
    """What each member said of rows with labels: log p(label) [N, M], and all of log p [N, C] where that is needed.

    All at the temperatures ``before`` averaging of the capture, by member, and at 1 after it.
    """

    names: tuple[str, ...]
    before: tuple[float, ...]
    labels: Tensor
    label_logprobs: Tensor
    logprobs: tuple[Tensor, ...]

    def at(self, index: Tensor) -> _Rows:
        parts = tuple(part[index] for part in self.logprobs)
        return replace(self, labels=self.labels[index], label_logprobs=self.label_logprobs[index], logprobs=parts)

    def tempered(self, temperatures: Mapping[str, float]) -> list[Tensor]:
        """Each member's log p [N, C] at a temperature as students state it, which replaces that of the capture."""
        return [
            torch.log_softmax(part.double() / (temperatures[name] / before), dim=1)
            for name, before, part in zip(self.names, self.before, self.logprobs, strict=True)
        ]


# How an ensemble is fitted to rows; what was fitted of it is added to the phase.
_Fit = Callable[[_Rows, Phase], EnsembleConfig]


def fit_weights(
    cache: Cache,
    source: Source,
    split: str,
    *,
    temperatures: bool = False,
    workers: int = 1,
    report: Report = silent,
) -> dict[str, Any]:
    """The mixture (mean_probs) of the members with the least NLL on a split's labels; nats.

    Members are tempered as they were captured, and their mixture is not: ``temperatures`` fits one for each member
    first, and one after averaging last, which takes members of all classes.
    Reports ``nll`` as captured, with equal shares, as fitted, and ``elsewhere``: fitted on one half of the rows and
    measured on the other, both ways, which is what to expect on new data. ``report`` hears of each batch and each fit.
    UsageError for a cache that does not keep its members, and for a split without labels.
    """
    rows, captured = _read(cache, source, split, temperatures, workers, report)
    fit: _Fit = _tempered if temperatures else _weighted
    halves = [torch.from_numpy(part) for part in np.array_split(permutation(len(rows.labels), 0, 0), 2)]
    ways = [(here, there) for here, there in (halves, halves[::-1]) if len(here) and len(there)]
    fits = len(rows.names) + 2 if temperatures else 1
    phase = Phase("fitting", fits * (1 + len(ways)), report, "fits")
    chosen = fit(rows, phase)
    elsewhere = [_nll(rows.at(there), fit(rows.at(here), phase)) * len(there) for here, there in ways]
    equal = EnsembleConfig(weights=dict.fromkeys(rows.names, 1 / len(rows.names)))
    if chosen.temperature is None and cache.captured.temperature != 1:  # which would else stay as captured
        chosen = chosen.model_copy(update={"temperature": 1.0})
    shown = {name: value for name, value in chosen.model_dump().items() if value is not None}
    return {
        "split": split,
        "rows": len(rows.labels),
        "members": {
            name: {"captured": _shares(cache)[name], "nll": -float(rows.label_logprobs[:, i].mean())}
            for i, name in enumerate(rows.names)
        },
        "nll": {
            "captured": captured,
            "equal": _nll(rows, equal),
            "fitted": _nll(rows, chosen),
            "elsewhere": sum(elsewhere) / len(rows.labels) if ways else None,
        },
        "ensemble": shown,
        "settings": [f"ensemble.{name}={_compact(value)}" for name, value in shown.items()],
    }


def _weighted(rows: _Rows, phase: Phase) -> EnsembleConfig:
    shares = fit_shares(rows.label_logprobs).shares
    phase.add(1)
    return EnsembleConfig(weights=_rounded(rows.names, shares), combine="mean_probs")


def _tempered(rows: _Rows, phase: Phase) -> EnsembleConfig:
    """Each member at its own temperature, then the shares, then the temperature of the mixture."""
    fitted = {
        name: _temperature(part, rows.labels, phase, before)
        for name, before, part in zip(rows.names, rows.before, rows.logprobs, strict=True)
    }
    tempered = rows.tempered(fitted)
    label = torch.cat([part.gather(1, rows.labels[:, None]) for part in tempered], dim=1)
    weights = _rounded(rows.names, fit_shares(label).shares)
    phase.add(1)
    mixed = combine(tempered, [max(weights[name], 1e-12) for name in rows.names], "mean_probs")
    return EnsembleConfig(
        weights=weights,
        combine="mean_probs",
        temperatures=fitted,
        temperature=_temperature(mixed, rows.labels, phase),
    )


def _temperature(logprobs: Tensor, labels: Tensor, phase: Phase, before: float = 1.0) -> float:
    """The best one for what was tempered by ``before`` already, which is a part of it; five digits, for pasting."""
    fitted = float(f"{before * fit_temperature(logprobs, labels):.5g}")
    phase.add(1)
    return fitted


def _nll(rows: _Rows, ensemble: EnsembleConfig) -> float:
    """Of the mixture that ``ensemble`` says, on these rows."""
    weights = ensemble.weights or {}
    shares = torch.tensor([weights[name] for name in rows.names], dtype=torch.float64)
    if ensemble.temperatures is None:
        return mixture_nll(rows.label_logprobs, shares)
    mixed = combine(rows.tempered(ensemble.temperatures), [max(float(share), 1e-12) for share in shares], "mean_probs")
    after = torch.log_softmax(mixed / (ensemble.temperature or 1.0), dim=1)
    return -float(after.gather(1, rows.labels[:, None]).clamp(min=LOWEST).mean())


def _read(cache: Cache, source: Source, split: str, whole: bool, workers: int, report: Report) -> tuple[_Rows, float]:
    """What the members said, and the NLL of their mixture as it was captured."""
    codec = cache.head
    if not isinstance(codec, Members):
        raise UsageError(
            f"{cache.root} keeps the members' mixture only (codec {codec.name})",
            hint="capture with codec=Members(), and shares can be fitted and chosen after it",
        )
    if whole and not isinstance(codec.inner, Dense):
        raise UsageError(f"--temperatures: {cache.root} keeps {codec.inner.k} classes of each member, not all of them")
    labels = labels_at(source, slice(None))
    if labels is None:
        raise UsageError(f"{split!r} has no labels: there is nothing to fit shares to")
    index = cache.positions(source, split)
    phase = Phase("reading", (1 + len(codec.members)) * len(index), report)

    def said(ensemble: EnsembleConfig, whole: bool) -> tuple[Tensor, Tensor]:
        batches = cache.mixed(ensemble).loader(source, BATCH, split=split, shuffle=False, workers=workers)
        return _said(batches, labels, whole, phase)

    label, _ = said(EnsembleConfig(weights=_shares(cache)), False)
    parts = [said(EnsembleConfig(weights={name: 1.0}, temperature=1.0), whole) for name in codec.members]
    rows = _Rows(
        codec.members,
        cache.plan.reading.temperature_before,
        labels[index],
        torch.stack([part[0] for part in parts], dim=1),
        tuple(part[1] for part in parts),
    )
    return rows, -float(label.double().clamp(min=LOWEST).mean())


def _said(batches: Iterable[Batch], labels: Tensor, whole: bool, phase: Phase) -> tuple[Tensor, Tensor]:
    """One member's log p(label) [N], and its log p of all classes [N, C], or of none where ``whole`` is not wanted."""
    columns, parts = [], []
    for batch in batches:
        targets = batch.targets
        columns.append(_label_logprob(targets, labels[batch.index]))
        parts.append(targets.logprobs if whole else targets.logprobs[:, :0])
        phase.add(len(batch.index))
    return torch.cat(columns), torch.cat(parts)


def _label_logprob(targets: Targets, labels_B: Tensor) -> Tensor:
    """log p(label) [B]; of a label that was not kept, that of all which were not: what is known of it."""
    if targets.ids is None:
        return targets.logprobs.gather(1, labels_B[:, None])[:, 0]
    assert targets.residual is not None
    hit = targets.ids == labels_B[:, None]
    kept = targets.logprobs.masked_fill(~hit, -torch.inf).amax(dim=1)
    return torch.where(hit.any(dim=1), kept, targets.residual.log())


def _rounded(names: tuple[str, ...], shares: tuple[float, ...]) -> dict[str, float]:
    """Shares at four digits, as people paste them; the largest takes what rounding leaves."""
    rounded = {name: round(share, 4) for name, share in zip(names, shares, strict=True)}
    most = max(rounded, key=lambda name: rounded[name])
    rounded[most] = round(rounded[most] + 1 - sum(rounded.values()), 4)
    return rounded


def _shares(cache: Cache) -> dict[str, float]:
    """Of the members as they were captured."""
    total = sum(share for _, share in cache.captured.shares)
    return {name: share / total for name, share in cache.captured.shares}


def _compact(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
