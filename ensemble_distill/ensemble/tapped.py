"""What becomes of the members' taps: projected where that is wanted, and held to the shapes of the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ensemble_distill.config import Tap
from ensemble_distill.errors import Mismatch, UsageError
from ensemble_distill.explain import suggestion
from ensemble_distill.projection import Projector, distortion


class Tapped:
    """The configured taps; once ``expect`` was called, features of other shapes are refused."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self._taps = {tap.field: tap for tap in taps}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._project = Projector()

    def expect(self, features: Mapping[str, Tensor]) -> None:
        """From now on all batches have features of these shapes."""
        self._shapes = {field: tuple(feature.shape[1:]) for field, feature in features.items()}

    def kept(self, features: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        """Features by field as they are to be kept, float32 [rows, ...].

        UsageError for one that is not of ``rows`` rows, Mismatch for one of another shape than was planned.
        """
        found = {}
        for field, feature in features.items():
            found[field] = self._projected(field, feature)
            self._check(field, found[field], rows)
        return found

    def masks(self, inputs: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the ragged ones among the features [B, T, D]: which tokens are real, bool [B, T].

        UsageError for an input that there is not, or that is no mask of these tokens.
        """
        masked = {field: str(self._taps[field].mask) for field in features if self._taps[field].mask is not None}
        return {field: _mask(field, name, inputs, features[field]) for field, name in masked.items()}

    def distortions(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Of the projected ones, how far squared distances between rows change."""
        chosen = {field: f for field, f in features.items() if self._taps[field].project}
        figures = {field: distortion(f, self._projected(field, f)) for field, f in chosen.items()}
        return {field: float(f"{figure:.3g}") for field, figure in figures.items() if figure is not None}

    def _projected(self, field: str, feature: Tensor) -> Tensor:
        random = self._taps[field].project
        if random is None:
            return feature
        try:
            return self._project(random, feature)
        except ValueError as error:
            raise UsageError(f"{field}: {error}", hint="reduce it first, as with pool, or to fewer dim") from error

    def _check(self, field: str, feature: Tensor, rows: int) -> None:
        who = f"member {self._taps[field].member!r}: {self._taps[field].what}"
        if len(feature) != rows:
            raise UsageError(
                f"{who} gives features of {len(feature)} rows for a batch of {rows}: the first axis must be the batch"
            )
        planned = self._shapes.get(field)
        if planned is not None and tuple(feature.shape[1:]) != planned:
            raise Mismatch(
                f"{who} gives features of shape {list(feature.shape[1:])} for a batch, "
                f"and {list(planned)} when the capture was planned",
                hint="a cache keeps one shape for all rows: reduce it, as with pool",
            )


def _mask(field: str, name: str, inputs: Mapping[str, Tensor], feature_BTD: Tensor) -> Tensor:
    if name not in inputs:
        raise UsageError(f"{field}: mask: the source has no input {name!r}{suggestion(name, inputs)}")
    mask, wanted = inputs[name], list(feature_BTD.shape[:2])
    if mask.is_floating_point() or mask.is_complex():
        raise UsageError(f"{field}: mask: the input {name!r} is {mask.dtype}, expected bool or an integer type")
    if list(mask.shape) != wanted:
        raise UsageError(f"{field}: mask: the input {name!r} has shape {list(mask.shape)}, the tokens {wanted}")
    return (mask != 0).to(feature_BTD.device)
