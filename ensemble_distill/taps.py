"""Taps: the outputs of named modules, taken by forward hooks from a teacher or a student alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from ensemble_distill.config import suggestion
from ensemble_distill.errors import UsageError


class Taps:
    """Records the pooled outputs of named modules, in the passes made under ``watch`` and in no others."""

    def __init__(self, model: nn.Module, modules: Sequence[str], owner: str) -> None:
        self._owner, self._names = owner, tuple(modules)
        self._values: dict[str, Tensor] | None = None
        known = dict(model.named_modules())
        for name in modules:
            if name not in known:
                raise UsageError(f"{owner} has no module {name!r}{suggestion(name, [k for k in known if k])}")
            known[name].register_forward_hook(self._hook(name))

    @contextlib.contextmanager
    def watch(self) -> Iterator[dict[str, Tensor]]:
        """Gives a dict that holds the features [B, D] by module name once the one pass inside is made."""
        values: dict[str, Tensor] = {}
        self._values = values
        try:
            yield values
        finally:
            self._values = None
        for name in self._names:
            if name not in values:
                raise UsageError(f"{self._owner}: module {name!r} did not run in the forward pass")

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if self._values is None:
                return
            if not isinstance(output, Tensor) or output.ndim < 2:
                raise UsageError(f"{self._owner}: module {name!r} gives no tensor [B, C, ...] to pool")
            if name in self._values:
                raise UsageError(f"{self._owner}: module {name!r} ran twice in one pass: tap another")
            self._values[name] = pool(output)

        return hook


def pool(features: Tensor) -> Tensor:
    """[B, C, ...] to float32 [B, C]: the mean over all positions."""
    return features.float().flatten(2).mean(2) if features.ndim > 2 else features.float()
