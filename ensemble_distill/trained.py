"""What the outputs and the arguments of a trained student stand for: classes and inputs, each in their order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_distill.config import DataConfig
from ensemble_distill.errors import Mismatch
from ensemble_distill.explain import difference
from ensemble_distill.sources.arrays import Source
from ensemble_distill.sources.loading import load

HINTS = {
    "classes": "the outputs of the student stand for the classes as they were",
    "inputs": "the student is called with its inputs one after another",
}


def inputs_of(source: Source) -> list[str]:
    """The names of a source's inputs in their order; none where there is only one."""
    names = list(load(source, np.arange(min(1, len(source))))[0])
    return names if len(names) > 1 else []


def check_trained(who: str | Path, config: Mapping[str, Any], data: DataConfig, source: Source) -> None:
    """Mismatch where the run of this ``config.json`` was of other classes or inputs, or of them in another order.

    Runs of several inputs that do not say which are not compared by them: they are of an earlier release.
    """
    held = config["data"]
    expected = {"classes": held.get("classes") if isinstance(held, dict) else None}
    found = {"classes": list(data.classes)}
    if "inputs" in config:
        expected["inputs"], found["inputs"] = config["inputs"], inputs_of(source)
    if (hit := difference(expected, found)) is not None:
        field, old, new = hit
        raise Mismatch(
            f"{who} was trained with {field} = {old!r}, this pipeline says {new!r}",
            hint=f"restore {field}: {HINTS[field.partition('[')[0]]}",
        )
