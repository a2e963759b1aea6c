"""Stages: an ensemble as it has grown. Each group of predictions keeps what the ensemble said when its members joined.

So the bytes of a unit follow from its plan and its samples: whether members were appended before it was captured or
after, and whichever of its neighbours are captured again with it, it is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.cache.groups import MAIN, Group, field_name, head_of
from ensemble_distill.cache.plan import Plan
from ensemble_distill.codec import HeadCodec, Members
from ensemble_distill.codecs import heads
from ensemble_distill.ensemble.ensemble import Ensemble, Ran
from ensemble_distill.mixture import Mixture
from ensemble_distill.recording.shown import Shown
from ensemble_distill.targets import Said


@dataclass(frozen=True)
class Stage:
    """The ensemble when a group of predictions was captured first.

    mixture: of all members so far, as they were combined then. own: those among them whose predictions the group keeps.
    head: how all groups so far keep them together.
    """

    group: Group
    mixture: Mixture
    own: tuple[str, ...]
    head: HeadCodec

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.mixture.shares)

    @property
    def of_its_own(self) -> Mixture:
        """The mixture of the members that the group keeps, by themselves."""
        return replace(self.mixture, shares=tuple(part for part in self.mixture.shares if part[0] in self.own))

    def said(self, ensemble: Ensemble, ran: Ran, before: Mapping[str, Tensor], shown: Shown, view: int) -> Said:
        """What the ensemble said of a batch, for the codecs of the group.

        before: log-probabilities [B, C] of the members of earlier groups, as these have kept them. InvalidRow for what
        is no distribution.
        """
        shares = [share for _, share in self.mixture.shares]
        logits = {name: before[name] if name in before else ran.logits[name] for name in self.names}
        logprobs, members = ensemble.average(logits, shares)
        return Said(
            logprobs,
            members,
            shares,
            shown.labels,
            shown.keys,
            view,
            known=ran.known,
            partner_keys=shown.partner_keys,
            names=self.names,
        )

    def arrays(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The arrays [B, …] of the predictions in records of the group."""
        names = self.group.codecs[MAIN].arrays()
        return {name: torch.from_numpy(rows[field_name(MAIN, name)].copy()) for name in names}

    def kept(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log-probabilities [B, C] of the group's own members, decoded from its arrays of ``main``."""
        codec = self.group.codecs[MAIN]
        assert isinstance(codec, Members), "members are appended only to a codec that keeps each"
        return {name: heads.decode(codec, arrays, Mixture(((name, 1.0),), "mean_probs")).logprobs for name in self.own}


def stages(plan: Plan) -> tuple[Stage, ...]:
    """The stages of a plan, in order: one, and one more for each append of members."""
    return tuple(_stages(plan))


def _stages(plan: Plan) -> Iterator[Stage]:
    said, reading = plan.said, plan.reading
    for n, group in enumerate(said):
        shares = plan.shares_by(group.name)
        head = head_of(said[: n + 1])
        codec = group.codecs[MAIN]
        own = codec.members if isinstance(codec, Members) else tuple(shares)
        yield Stage(group, Mixture(tuple(shares.items()), reading.combine, reading.temperature_after), own, head)
