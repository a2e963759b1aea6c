"""The objective: a weighted sum of losses over (student outputs, targets, labels)."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ensemble_distill.cache.cache import Batch, Cache
from ensemble_distill.config import FeatureTerm, HardLabels, SoftTargets, Term, TrainConfig
from ensemble_distill.device import Resolved
from ensemble_distill.errors import UsageError
from ensemble_distill.losses import feature_cosine, feature_l2, hard_labels, mixed_labels, soft_targets
from ensemble_distill.scoring import logits_of
from ensemble_distill.targets import Targets
from ensemble_distill.training.features import FeaturePairs

log = logging.getLogger(__name__)

_DISTANCES = {"cosine": feature_cosine, "l2": feature_l2}


class Objective(nn.Module):
    """Terms by name; owns the adapters that they learn, which train with the student and stay out of it."""

    def __init__(self, config: TrainConfig, student: nn.Module, cache: Cache, has_labels: bool) -> None:
        super().__init__()
        self.terms = {name: term for name, term in config.objective.items() if term.weight > 0}
        self.weight = config.weight
        if not self.terms:
            raise UsageError("the objective has no term of positive weight")
        for name, term in self.terms.items():
            if isinstance(term, HardLabels) and not has_labels:
                raise UsageError(f"objective.{name} needs labels, but the source has none")
        matches = {n: t for n, t in self.terms.items() if isinstance(t, FeatureTerm)}
        self.features = FeaturePairs(matches, student, cache)
        self.taps, self.adapters = self.features.taps, self.features.adapters

    def check(self, targets: Targets) -> None:
        """Refuse what these targets cannot give (UsageError), before anything is written or trained."""
        for name, term in self.terms.items():
            if isinstance(term, SoftTargets):
                _warn_of_rest(name, term.temperature, targets.at(term.temperature))
        if self.weight is not None:
            row_weights(self.weight(targets), targets)

    def build_adapters(self, student: nn.Module, batch: Batch, device: torch.device) -> None:
        """A learned map student → teacher for each feature term whose shapes differ. Call once, before step 1."""
        self.features.build(student, batch, device)

    def forward(
        self, student: nn.Module, batch: Batch, device: torch.device, precision: Resolved
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term's own value (detached, unweighted), for one batch."""
        with self.features.watch() as features:
            logits = logits_of(student, batch.inputs, device, precision)
        targets = batch.targets.to(device)
        weights = None if self.weight is None else row_weights(self.weight(targets), targets)
        parts = {
            name: self._term(name, term, logits, features, targets, batch, weights) for name, term in self.terms.items()
        }
        total = torch.stack([self.terms[name].weight * value for name, value in parts.items()]).sum()
        return total, {name: value.detach() for name, value in parts.items()}

    def _term(
        self,
        name: str,
        term: Term,
        logits: Tensor,
        features: Mapping[str, Tensor],
        targets: Targets,
        batch: Batch,
        weights: Tensor | None,
    ) -> Tensor:
        if isinstance(term, SoftTargets):
            return soft_targets(logits, targets, term.temperature, weights)
        if isinstance(term, HardLabels):
            return _labels(logits, batch, term.label_smoothing, weights)
        feature, cached = self.features.pair(name, features, targets)
        return _DISTANCES[term.distance](feature.flatten(1), cached.flatten(1), weights)


def _warn_of_rest(name: str, temperature: float, tempered: Targets) -> None:
    """Tempered, kept classes hold less of the mass: the more of it is in the rest, the less a row says."""
    if tempered.residual is not None and (rest := float(tempered.residual.mean())) > 0.5:
        log.warning(
            "objective.%s: at temperature %g the kept classes hold %.0f%% of the mass, and the rest is one class: "
            "a lower temperature, or more kept classes, say more",
            name, temperature, 100 * (1 - rest),
        )  # fmt: skip


def row_weights(weights: object, targets: Targets) -> Tensor:
    """What a pipeline's ``weight`` gave for a batch, as float32 [B]; UsageError unless these are weights."""
    if not isinstance(weights, Tensor) or weights.shape != (len(targets),):
        found = f"shape {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise UsageError(f"weight() gave {found}, expected a tensor [{len(targets)}], one for each row")
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise UsageError(
            f"weight() gave {float(weights[~(weights.isfinite() & (weights >= 0))][0])} for a row, expected 0 or more",
            hint="clamp it, and mind that a row without a label has label_logprob NaN",
        )
    return weights.detach().float()


def _labels(logits: Tensor, batch: Batch, label_smoothing: float, weights: Tensor | None) -> Tensor:
    """Cross-entropy with the labels of a batch; where its samples are mixed, with both labels by their shares."""
    assert batch.labels is not None
    labels, partners = batch.labels.to(logits.device), batch.partners
    if partners is None:
        return hard_labels(logits, labels, label_smoothing, weights)
    assert partners.labels is not None
    others, lam = partners.labels.to(logits.device), partners.lam.to(logits.device)
    return mixed_labels(logits, labels, others, lam, label_smoothing, weights)
