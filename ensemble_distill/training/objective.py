"""The objective: a weighted sum of losses over (student outputs, targets, labels)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_distill.cache.cache import Batch, Cache
from ensemble_distill.config import TrainConfig
from ensemble_distill.device import Resolved
from ensemble_distill.errors import Error, UsageError
from ensemble_distill.schedules import at, ends
from ensemble_distill.scoring import logits_of
from ensemble_distill.targets import Targets
from ensemble_distill.terms import AnyTerm, Decoupled, FeatureTerm, SoftTargets, Tempered
from ensemble_distill.training.features import FeaturePairs
from ensemble_distill.training.terms import of_features, of_logits
from ensemble_distill.training.unchanged import tensors_of, unchanged

log = logging.getLogger(__name__)


def combine(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ weight · loss, a scalar."""
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


class Objective(nn.Module):
    """Terms by name; owns what they learn, which trains with the student and stays out of it."""

    def __init__(self, config: TrainConfig, student: nn.Module, cache: Cache, has_labels: bool) -> None:
        """UsageError for terms without labels, taps or modules that they need."""
        super().__init__()
        self.terms: dict[str, AnyTerm] = {n: term for n, term in config.objective.items() if ends(term.weight)[1] > 0}
        self.weight, self.classes = config.weight, len(cache.plan.reading.classes)
        if not self.terms:
            raise UsageError("the objective has no term of positive weight")
        for name, term in self.terms.items():
            if term.needs_labels and not has_labels:
                raise UsageError(f"objective.{name} needs labels, but the source has none")
            if isinstance(term, Decoupled) and cache.plan.reading.views.mix is not None:
                raise UsageError(f"objective.{name} needs one label a row, and these views mix samples")
        self.features = FeaturePairs(
            {n: t for n, t in self.terms.items() if isinstance(t, FeatureTerm)}, student, cache
        )
        self.taps, self.adapters = self.features.taps, self.features.adapters

    # Before the first step --------------------------------------------------------------------------

    def check(self, targets: Targets, rows: int, batch_size: int) -> None:
        """Refuse what these targets and batches cannot give (UsageError), before anything is written or trained."""
        least = rows % batch_size or min(rows, batch_size)
        for name, term in self.terms.items():
            if isinstance(term, Tempered):
                for temperature in set(ends(term.temperature)):
                    tempered = targets.at(temperature)
                    if isinstance(term, SoftTargets):
                        _warn_of_rest(name, temperature, tempered)
            if least < term.least_rows:
                raise UsageError(
                    f"objective.{name} compares at least {term.least_rows} rows, and of {rows} rows in batches of "
                    f"{batch_size} the last has {least}",
                    hint="choose another batch_size",
                )
        if self.weight is not None:
            row_weights(self.weight, targets, "weight()")
            for name in (n for n, term in self.terms.items() if term.compares_rows):
                log.warning("objective.%s compares rows with each other: weight() does not act on it", name)

    def build_adapters(self, student: nn.Module, batch: Batch, device: torch.device) -> None:
        """What the terms learn, from the shapes of a first batch; and each loss once. Call it before step 1.

        UsageError for what does not fit, with the name of the term.
        """
        was_training = student.training
        student.eval()  # a pass in training mode would move the batch statistics
        try:
            with torch.no_grad():
                self.features.build(student, batch, device)
                self(student, batch, device, "fp32")
        finally:
            student.train(was_training)

    # A step -----------------------------------------------------------------------------------------

    def forward(
        self, student: nn.Module, batch: Batch, device: torch.device, precision: Resolved, progress: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term's own value (detached, unweighted), for one batch.

        ``progress``: the part of the training that is over, from 0 to 1; weights and temperatures may change with it.
        """
        with self.features.watch() as features:
            logits = logits_of(student, batch.inputs, device, precision)
        if logits.shape[1] != self.classes:  # which a loss on a few kept classes would not notice
            raise UsageError(
                f"the student gives {logits.shape[1]} logits for each sample, and the cache has {self.classes} classes",
                hint="let it end in one output for each class, in their order",
            )
        targets = batch.targets.to(device)
        shared = None if self.weight is None else row_weights(self.weight, targets, "weight()")
        parts = {}
        for name, term in self.terms.items():
            with _named(name):
                weights = _own_weights(term, targets, shared)
                if isinstance(term, FeatureTerm):
                    pair = self.features.pair(name, features, targets)
                    mask = self.features.mask(name, targets)
                    parts[name] = of_features(term, self.features.learned(name), *pair, weights, mask)
                else:
                    parts[name] = of_logits(term, logits, targets, batch, weights, progress)
        total = combine(parts, {name: at(term.weight, progress) for name, term in self.terms.items()})
        return total, {name: value.detach() for name, value in parts.items()}


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """What a loss refuses, in the name of its term."""
    try:
        yield
    except Error as error:
        if not str(error).startswith("objective."):
            error.args = (f"objective.{name}: {error}", *error.args[1:])
        raise


def _own_weights(term: AnyTerm, targets: Targets, shared: Tensor | None) -> Tensor | None:
    """The weights of rows for a term: its own times those of all terms."""
    if term.rows is None:
        return shared
    own = row_weights(term.rows, targets, "rows()")
    return own if shared is None else own * shared


def _warn_of_rest(name: str, temperature: float, tempered: Targets) -> None:
    """Tempered, kept classes hold less of the mass: the more of it is in the rest, the less a row says."""
    if tempered.residual is not None and (rest := float(tempered.residual.mean())) > 0.5:
        log.warning(
            "objective.%s: at temperature %g the kept classes hold %.0f%% of the mass, and the rest is one class: "
            "a lower temperature, or more kept classes, say more",
            name, temperature, 100 * (1 - rest),
        )  # fmt: skip


def row_weights(function: Callable[[Targets], Any], targets: Targets, who: str) -> Tensor:
    """What a pipeline's function gives for a batch, as float32 [B]; UsageError for others, and where it writes."""
    with unchanged(who, *tensors_of(targets)):
        weights = function(targets)
    if not isinstance(weights, Tensor) or weights.shape != (len(targets),):
        found = f"shape {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise UsageError(f"{who} gave {found}, expected a tensor [{len(targets)}], one for each row")
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise UsageError(
            f"{who} gave {float(weights[~(weights.isfinite() & (weights >= 0))][0])} for a row, expected 0 or more",
            hint="clamp it, and mind that a row without a label has label_logprob NaN",
        )
    return weights.detach().float()
