"""What the ensemble said about a batch: as it came from the members, and as a codec has kept it.

Legend of shape suffixes, here and in losses: B batch, C classes, K kept classes, D feature width, M members,
G grid of temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.errors import UsageError

Kind = Literal["dense", "ghost", "unbiased"]


@dataclass(frozen=True)
class Said:
    """A batch as the members said it, for codecs to keep. All log-probabilities float32 in nats, on one device.

    logprobs: [B, C] of the ensemble. members: [B, C] of each, and their shares (any positive sum). labels: int64 [B]
    or None (also of samples that are mixed). keys: content keys uint8 [B, 16] and view number, which decide what a
    codec draws. known: bool [B, C], the classes whose own log-probabilities are known, where that is not all; of the
    others only their sum is. partner_keys: uint8 [B, 16], of what each sample is mixed with, or None.
    names: of the members.
    """

    logprobs: Tensor
    members: Sequence[Tensor]
    shares: Sequence[float]
    labels: Tensor | None
    keys: np.ndarray
    view: int
    known: Tensor | None = None
    partner_keys: np.ndarray | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Targets:
    """Decoded targets of one head for a batch, the figures of its rows, and features by tap. All float32.

    logprobs: log-probabilities in nats. ``dense``: [B, C], one for each class. ``ghost``: [B, K], of the classes
    ``ids`` (int64 [B, K]); all the others have ``residual`` (probability, [B]) together. ``unbiased``: [B, K], logs of
    the weights of ``ids``, whose expectations are the probabilities; an id may stand twice.
    log_z: [B, G], log Σ p^(1/T) over all classes for the ``temperatures``, where a codec kept it.
    entropy, mutual_information (nats), label_logprob (NaN without a label): [B]. labels: int64 [B], of the source that
    the batch was read from, or None.
    features: [B, ...] by tap, as ``tap/<member>.<module>``. masks: of ragged ones, bool [B, T], true on the real
    tokens; at the others the feature is zero.
    """

    logprobs: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    kind: Kind = "dense"
    ids: Tensor | None = None
    residual: Tensor | None = None
    log_z: Tensor | None = None
    temperatures: tuple[float, ...] = ()
    classes: int = 0
    entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    label_logprob: Tensor | None = None
    labels: Tensor | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.logprobs)

    def at(self, temperature: float) -> Targets:
        """The same at another temperature: p_T ∝ p^(1/T) of the averaged distribution (average, then temper).

        Of kept classes by the stored normalisers, interpolated between the temperatures of the grid; what they then
        have in residual may be most of the mass. UsageError where that cannot be known.
        """
        if temperature == 1:
            return self
        if self.kind == "dense":
            return replace(self, logprobs=torch.log_softmax(self.logprobs / temperature, dim=1))
        if self.kind == "unbiased":
            raise UsageError(
                f"temperature {temperature}: a sample of classes cannot be tempered, for p^(1/T) of a draw is biased",
                hint="use temperature 1, or capture with the codec topk or dense",
            )
        logprobs = self.logprobs / temperature - self.log_z_at(temperature)[:, None]
        # Rounding may leave a kept set of all the mass a trifle more than one.
        logprobs = logprobs - torch.logsumexp(logprobs, dim=1, keepdim=True).clamp(min=0)
        residual = -torch.expm1(torch.logsumexp(logprobs, dim=1).clamp(max=0))
        if self.logprobs.shape[1] >= self.classes > 0:
            # Nothing can be left over where all classes are kept: a trifle by rounding would make the loss infinite.
            logprobs, residual = torch.log_softmax(self.logprobs / temperature, dim=1), torch.zeros_like(residual)
        return replace(self, logprobs=logprobs, residual=residual, log_z=None, temperatures=())

    def log_z_at(self, temperature: float) -> Tensor:
        """log Σ p^(1/T) over all classes, [B], by a cubic through the nearest temperatures of the grid.

        In α = 1/T it is smooth and convex, 0 at α = 1. With the default grid it is off by 2⁻¹¹ of its size at the
        grid's temperatures and between them by about .005, and .03 for very sharp rows of many classes. UsageError
        outside of the grid.
        """
        grid = sorted([1.0, *self.temperatures])
        if self.log_z is None or not grid[0] <= temperature <= grid[-1]:
            held = f"between 1 and {grid[-1]:g}" if self.log_z is not None and self.temperatures else "at 1 only"
            raise UsageError(
                f"temperature {temperature:g}: these targets can be tempered {held}",
                hint="capture with this temperature in the codec's temperatures, or with the codec dense",
            )
        log_z = torch.cat([self.log_z.new_zeros(len(self), 1), self.log_z], dim=1)
        alphas = [1.0, *(1 / t for t in self.temperatures)]
        near = sorted(range(len(alphas)), key=lambda i: abs(alphas[i] - 1 / temperature))[:4]
        return sum(_lagrange(alphas, near, i, 1 / temperature) * log_z[:, i] for i in near)  # type: ignore[return-value]

    def top1(self) -> Tensor:
        """The likeliest class of each row, int64 [B]."""
        if self.kind != "unbiased":
            best = self.logprobs.argmax(dim=1)  # of equal values the first, which is the likelier in a topk row
            return best if self.ids is None else self.ids.gather(1, best[:, None])[:, 0]
        assert self.ids is not None
        # An id may stand several times: equal ones side by side, and their weights together.
        ids, order = self.ids.sort(dim=1)
        group = torch.nn.functional.pad((ids[:, 1:] != ids[:, :-1]).long().cumsum(dim=1), (1, 0))
        weights = self.logprobs.exp().gather(1, order)
        best = torch.zeros_like(weights).scatter_add(1, group, weights).argmax(dim=1, keepdim=True)
        return ids.gather(1, (group == best).int().argmax(dim=1, keepdim=True))[:, 0]

    def to(self, device: torch.device | str) -> Targets:
        def moved(value: object) -> object:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        by_tap = {
            kind: {name: f.to(device, non_blocking=True) for name, f in getattr(self, kind).items()}
            for kind in ("features", "masks")
        }
        held = {f.name: moved(getattr(self, f.name)) for f in fields(self)}
        return replace(self, **held | by_tap)  # type: ignore[arg-type]


def _lagrange(points: Sequence[float], near: Sequence[int], i: int, x: float) -> float:
    """The weight of point ``i`` in the polynomial through the points ``near``, at x."""
    weight = 1.0
    for j in near:
        if j != i:
            weight *= (x - points[j]) / (points[i] - points[j])
    return weight
