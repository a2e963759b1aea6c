"""Features of terms: what each asks for of cache and student, and what it learns to compare them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ensemble_distill.cache.cache import Batch, Cache
from ensemble_distill.errors import UsageError
from ensemble_distill.reduction import Take
from ensemble_distill.scoring import logits_of
from ensemble_distill.taps import Taps
from ensemble_distill.targets import Targets
from ensemble_distill.terms import FeatureTerm
from ensemble_distill.training.adapters import learn, shape_together, together


class FeaturePairs(nn.Module):
    """For each term on features, the student's and the cached one: float32 [B, ...].

    taps: all that are to be read of the cache. adapters: by term, where it learns one; once ``build`` was called.
    """

    def __init__(self, terms: Mapping[str, FeatureTerm], student: nn.Module, cache: Cache) -> None:
        """UsageError for a tap that the cache does not hold, a module that the student does not have, several masks."""
        super().__init__()
        self.terms = dict(terms)
        self.codecs = {name: [cache.tap_codec(tap) for tap in term.taps] for name, term in terms.items()}
        self.taps = tuple(dict.fromkeys(tap for term in terms.values() for tap in term.taps))
        self._student = Taps(student, {name: self._take(name) for name in self.terms}, "the student")
        self.adapters = nn.ModuleDict()
        self._shapes: dict[str, list[int]] = {}
        for name, (codec, *others) in self.codecs.items():
            dims = [c.dims for c in (codec, *others)]
            if any(other.mask != codec.mask for other in others):
                masks = [c.mask for c in (codec, *others)]
                raise UsageError(f"objective.{name}: its taps have the masks {masks}: they must have one, or none")
            self._shapes[name] = shape_together(f"objective.{name}", dims, self.terms[name].combine, codec.axis)

    def _take(self, name: str) -> Take:
        """What is taken of the student: reduced as the cached tap was, unless the term says otherwise."""
        first = self.codecs[name][0].take
        return self.terms[name].take(first.reduction if first else "pool")

    def build(self, student: nn.Module, batch: Batch, device: torch.device) -> None:
        """Make the adapters, from the shapes in one pass. UsageError for those that do not fit."""
        if not self.terms:
            return
        was_training = student.training
        student.eval()  # a pass in training mode would move the batch statistics
        with torch.no_grad(), self.watch() as features:
            logits_of(student, batch.inputs, device, "fp32")
        student.train(was_training)
        for name, term in self.terms.items():
            shape = features[name].shape[1:]
            adapter = learn(f"objective.{name}", term, shape, self._shapes[name])
            if adapter is not None:
                self.adapters[name] = adapter.to(device)

    @contextlib.contextmanager
    def watch(self) -> Iterator[dict[str, Tensor]]:
        """Gives a dict that holds the student's features by term once the one pass inside is made, not adapted."""
        with self._student.watch() as features:
            yield features

    def pair(self, name: str, features: Mapping[str, Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        """The student's feature and the cached one of a term, float32 [B, ...], not adapted."""
        cached = [targets.features[tap] for tap in self.terms[name].taps]
        return features[name], together(cached, self.terms[name].combine, self.codecs[name][0].axis)

    def mask(self, name: str, targets: Targets) -> Tensor | None:
        """Which tokens of a term's cached feature are real, bool [B, T]; None where it is not ragged."""
        return targets.masks.get(self.terms[name].taps[0])

    def learned(self, name: str) -> nn.Module | None:
        """What a term learns; None if nothing."""
        return dict(self.adapters.items()).get(name)
