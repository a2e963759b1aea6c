"""Are the pixels still those that the ensemble saw? Renderings of the first samples, made and compared."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble_distill.cache.renderings import Rendering
from ensemble_distill.errors import Mismatch
from ensemble_distill.sources.views import audit_differs


def refuse_other_pixels(expected: Sequence[Rendering], made: Sequence[Rendering], where: str) -> None:
    """Mismatch if a rendering differs by more than the last bits of another machine's arithmetic or decoder."""
    problem = differs(expected, made)
    if problem:
        raise Mismatch(
            f"the views of {where} are not what this pipeline renders: {problem}",
            hint="restore the transform, or give it another name and capture again: "
            "ensemble-distill cache PIPELINE --out NEW_DIR",
        )


def differs(expected: Sequence[Rendering], made: Sequence[Rendering]) -> str:
    """The first sample and view that differ, in words, or ""."""
    return audit_differs([entry.model_dump() for entry in expected], [entry.model_dump() for entry in made])


def comparable(expected: Sequence[Rendering], made: Sequence[Rendering]) -> list[Rendering]:
    """Those expected whose sample stands at the same position in the source that the others were made from."""
    there = {(entry.sample, entry.key) for entry in made}
    return [entry for entry in expected if (entry.sample, entry.key) in there]
