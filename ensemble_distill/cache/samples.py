"""Samples as members and students are shown them: read from a source, rendered in a view."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from ensemble_distill.cache.renderings import Rendering
from ensemble_distill.errors import UsageError
from ensemble_distill.explain import suggestion
from ensemble_distill.sources.arrays import Source
from ensemble_distill.sources.loading import labels_at, load
from ensemble_distill.sources.mixing import mixed
from ensemble_distill.sources.views import AUDIT_ROWS, audited, render
from ensemble_distill.transforms import ViewsConfig


def read(source: Source, index: np.ndarray) -> tuple[dict[str, Tensor], Tensor | None, np.ndarray]:
    """Inputs by name [B, ...], labels int64 [B] or None, and keys uint8 [B, 16] of the samples at ``index``."""
    inputs, keys = load(source, index)
    return inputs, labels_at(source, index), keys


def render_inputs(inputs: dict[str, Tensor], keys: np.ndarray, views: ViewsConfig, view: int) -> dict[str, Tensor]:
    """A batch as the teachers and the student see it: view 0 is the sample as it is, the others are drawn."""
    if view == 0 or views.plain:
        return inputs
    return inputs | {views.input: render(viewed(inputs, views), keys, views, view)}


def renderings(source: Source, views: ViewsConfig, numbers: Iterable[int], rows: int) -> tuple[Rendering, ...]:
    """The first samples in these views as teachers and students are shown them, small; rows: of the captured split."""
    inputs, _, keys = read(source, np.arange(min(AUDIT_ROWS, len(source))))
    entries: list[Rendering] = []
    for view in numbers:
        shown = render_inputs(inputs, keys, views, view)
        shown, _ = mixed(shown, keys, source, views, view, rows)
        entries += map(Rendering.model_validate, audited(viewed(shown, views), keys, view))
    return tuple(sorted(entries, key=lambda entry: (entry.sample, entry.view)))


def viewed(inputs: dict[str, Tensor], views: ViewsConfig) -> Tensor:
    """The input that the views act on; UsageError if there is none of that name."""
    if views.input not in inputs:
        raise UsageError(f"views act on the input {views.input!r}{suggestion(views.input, inputs)}")
    return inputs[views.input]
