"""What the members are shown of a batch: read, rendered in a view, and mixed where the views mix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ensemble_distill.cache.plan import Plan, WorkItem
from ensemble_distill.cache.samples import read, render_inputs
from ensemble_distill.sources.arrays import Source
from ensemble_distill.sources.mixing import Partners, mixed


@dataclass(frozen=True)
class Shown:
    """Inputs by name [B, ...], labels int64 [B] (None where there are none, or the samples are mixed), keys [B, 16]."""

    inputs: dict[str, Tensor]
    labels: Tensor | None
    keys: np.ndarray
    partners: Partners | None

    @property
    def partner_keys(self) -> np.ndarray | None:
        return self.partners.keys if self.partners else None


def show(source: Source, plan: Plan, item: WorkItem, index: np.ndarray) -> Shown:
    """The samples at positions ``index`` int64 [B] of a work item's split, in its view."""
    views = plan.reading.views
    inputs, labels, keys = read(source, index)
    inputs = render_inputs(inputs, keys, views, item.view)
    inputs, partners = mixed(inputs, keys, source, views, item.view, plan.splits[item.split].rows)
    return Shown(inputs, None if partners else labels, keys, partners)
