"""Shares and temperatures of a cache's members that make the labels of a split likeliest, and what that is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.cache.cache import Cache
from ensemble_distill.calibration import fit_shares, fit_temperature, mixture_nll
from ensemble_distill.codec import Dense, Members
from ensemble_distill.config import EnsembleConfig
from ensemble_distill.errors import UsageError
from ensemble_distill.mixture import combine
from ensemble_distill.philox import permutation
from ensemble_distill.sources.arrays import Source
from ensemble_distill.targets import Targets

BATCH = 4096


@dataclass(frozen=True)
class _Rows:
    """What each member said of rows with labels: log p(label) [N, M], and all of log p [N, C] where that is needed."""

    names: tuple[str, ...]
    labels: Tensor
    label_logprobs: Tensor
    logprobs: tuple[Tensor, ...]

    def at(self, index: Tensor) -> _Rows:
        return _Rows(
            self.names, self.labels[index], self.label_logprobs[index], tuple(part[index] for part in self.logprobs)
        )


# How an ensemble is fitted to rows, and the NLL that it has on others.
_Fit = Callable[[_Rows], EnsembleConfig]


def fit_weights(
    cache: Cache, source: Source, split: str, *, temperatures: bool = False, workers: int = 1
) -> dict[str, Any]:
    """The mixture (mean_probs) of the members with the least NLL on a split's labels; nats.

    ``temperatures``: fit one for each member first, and one after averaging last, which takes members of all classes.
    Reports ``nll`` as captured, with equal shares, as fitted, and ``elsewhere``: fitted on one half of the rows and
    measured on the other, both ways, which is what to expect on new data. UsageError for a cache that does not keep its
    members, and for a split without labels.
    """
    rows = _read(cache, source, split, temperatures, workers)
    fit: _Fit = _tempered if temperatures else _weighted
    chosen = fit(rows)
    halves = [torch.from_numpy(part) for part in np.array_split(permutation(len(rows.labels), 0, 0), 2)]
    sizes = [len(part) for part in halves]
    elsewhere = [
        _nll(rows.at(there), fit(rows.at(here))) * len(there)
        for here, there in (halves, halves[::-1])
        if len(here) and len(there)
    ]
    equal = EnsembleConfig(weights=dict.fromkeys(rows.names, 1 / len(rows.names)))
    captured = EnsembleConfig(weights=_normalised(dict(cache.captured.shares)))
    shown = {name: value for name, value in chosen.model_dump().items() if value is not None}
    return {
        "split": split,
        "rows": len(rows.labels),
        "members": {
            name: {"captured": (captured.weights or {})[name], "nll": -float(rows.label_logprobs[:, i].mean())}
            for i, name in enumerate(rows.names)
        },
        "nll": {
            "captured": _nll(rows, captured),
            "equal": _nll(rows, equal),
            "fitted": _nll(rows, chosen),
            "elsewhere": sum(elsewhere) / sum(sizes) if len(elsewhere) == 2 else None,
        },
        "ensemble": shown,
        "settings": [f"ensemble.{name}={_compact(value)}" for name, value in shown.items()],
    }


def _weighted(rows: _Rows) -> EnsembleConfig:
    shares = fit_shares(rows.label_logprobs).shares
    return EnsembleConfig(weights=_rounded(rows.names, shares), combine="mean_probs")


def _tempered(rows: _Rows) -> EnsembleConfig:
    """Each member at its own temperature, then the shares, then the temperature of the mixture."""
    fitted = [round(fit_temperature(part, rows.labels), 4) for part in rows.logprobs]
    tempered = [torch.log_softmax(part / t, dim=1) for part, t in zip(rows.logprobs, fitted, strict=True)]
    label = torch.cat([part.gather(1, rows.labels[:, None]) for part in tempered], dim=1)
    weights = _rounded(rows.names, fit_shares(label).shares)
    mixed = combine(tempered, [max(weights[name], 1e-12) for name in rows.names], "mean_probs")
    return EnsembleConfig(
        weights=weights,
        combine="mean_probs",
        temperatures=dict(zip(rows.names, fitted, strict=True)),
        temperature=round(fit_temperature(mixed, rows.labels), 4),
    )


def _nll(rows: _Rows, ensemble: EnsembleConfig) -> float:
    """Of the mixture that ``ensemble`` says, on these rows."""
    weights = ensemble.weights or {}
    shares = torch.tensor([weights[name] for name in rows.names], dtype=torch.float64)
    if ensemble.temperatures is None:
        return mixture_nll(rows.label_logprobs, shares)
    tempered = [
        torch.log_softmax(part.double() / ensemble.temperatures[name], dim=1)
        for name, part in zip(rows.names, rows.logprobs, strict=True)
    ]
    mixed = combine(tempered, [max(float(share), 1e-12) for share in shares], "mean_probs")
    after = torch.log_softmax(mixed / (ensemble.temperature or 1.0), dim=1)
    return -float(after.gather(1, rows.labels[:, None]).clamp(min=-65504).mean())


def _read(cache: Cache, source: Source, split: str, whole: bool, workers: int) -> _Rows:
    codec = cache.head
    if not isinstance(codec, Members):
        raise UsageError(
            f"{cache.root} keeps the members' mixture only (codec {codec.name})",
            hint="capture with codec=Members(), and shares can be fitted and chosen after it",
        )
    if whole and not isinstance(codec.inner, Dense):
        raise UsageError(f"--temperatures: {cache.root} keeps {codec.inner.k} classes of each member, not all of them")
    labels, columns, parts = source.labels, [], []
    if labels is None:
        raise UsageError(f"{split!r} has no labels: there is nothing to fit shares to")
    for name in codec.members:
        one = cache.mixed(EnsembleConfig(weights={name: 1.0}, temperature=1.0 if whole else None))
        batches = list(one.loader(source, BATCH, split=split, shuffle=False, workers=workers))
        columns.append(torch.cat([_label_logprob(b.targets, torch.from_numpy(labels[b.index])) for b in batches]))
        parts.append(torch.cat([b.targets.logprobs for b in batches]) if whole else torch.empty(len(columns[-1]), 0))
    index = np.concatenate([b.index for b in batches])
    return _Rows(codec.members, torch.from_numpy(labels[index]), torch.stack(columns, dim=1), tuple(parts))


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


def _normalised(shares: dict[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _compact(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
