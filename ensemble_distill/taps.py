"""Taps: what named modules are given or give, taken by forward hooks from a teacher or a student alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ensemble_distill.errors import UsageError
from ensemble_distill.explain import suggestion
from ensemble_distill.reduction import Take, title
from ensemble_distill.reductions import check_values, reduce


class Taps:
    """Records features of named modules, in the passes made under ``watch`` and in no others.

    A name may leave out the prefixes of torch.compile and DistributedDataParallel. Make the taps of a compiled model
    before its first pass, which is when its hooks are looked at.
    """

    def __init__(self, model: nn.Module, takes: Mapping[str, Take], owner: str) -> None:
        """takes: by the names that the features shall have. UsageError for a module that there is not."""
        self._owner, self._takes = owner, dict(takes)
        self._watching = False
        self._values: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        for key, take in takes.items():
            module = find(model, take.module, owner)
            if take.input is None:
                module.register_forward_hook(self._after(key, take))
            else:
                module.register_forward_pre_hook(self._before(key, take), with_kwargs=True)

    @contextlib.contextmanager
    def watch(self) -> Iterator[dict[str, Tensor]]:
        """Gives a dict that holds the features float32 [B, ...] by name once the one pass inside is made.

        UsageError for a module that did not run, or ran twice where no ``call`` was chosen, and for what its reduction
        does not take.
        """
        found: dict[str, Tensor] = {}
        self._values.clear()
        self._calls.clear()
        self._watching = True
        try:
            yield found
        finally:
            self._watching = False
        for key, take in self._takes.items():
            self._check(key, take)
        found.update(self._values)
        self._values.clear()

    def _check(self, key: str, take: Take) -> None:
        calls, who = self._calls.get(key, 0), f"{self._owner}: module {take.module!r}"
        if calls == 0:
            raise UsageError(f"{who} did not run in the forward pass")
        if take.call is None and calls > 1:
            raise UsageError(f"{who} ran {calls} times in one pass", hint="say which: call=0 for the first")
        if take.call is not None and take.call >= calls:
            raise UsageError(f"{who} ran {calls} time(s) in one pass: there is no call {take.call}")
        try:
            check_values(take.reduction, self._values[key])
        except ValueError as error:
            raise UsageError(f"{self._owner}: {take.what}: {error}") from error

    def _after(self, key: str, take: Take) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            self._record(key, take, output)

        return hook

    def _before(self, key: str, take: Take) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            self._record(key, take, (*args, *kwargs.values()))

        return hook

    def _record(self, key: str, take: Take, value: object) -> None:
        if not self._watching:
            return
        number = self._calls.get(key, 0)
        self._calls[key] = number + 1
        if number != (take.call or 0):
            return
        try:
            self._values[key] = reduce(take.reduction, _chosen(take, value))
        except ValueError as error:
            raise UsageError(f"{self._owner}: {take.what}: {error}") from error


def _chosen(take: Take, value: Any) -> Tensor:
    """The tensor that is meant among a module's outputs or inputs; ValueError if there is none."""
    number = take.output if take.output is not None else take.input
    parts = tuple(value.values()) if isinstance(value, Mapping) else value
    if number is not None:
        if not isinstance(parts, (tuple, list)):
            raise ValueError(f"it is one {type(value).__name__} and not several: leave the number out")
        if number >= len(parts):
            raise ValueError(f"there are {len(parts)}, counted from 0")
        parts = parts[number]
    elif isinstance(parts, (tuple, list)):
        raise ValueError(f"it gives a {type(value).__name__} of {len(parts)}: say which, as in output=0")
    if not isinstance(parts, Tensor):
        raise ValueError(f"expected a tensor for {title(take.reduction)}, found a {type(parts).__name__}")
    return parts


def find(model: nn.Module, name: str, owner: str) -> nn.Module:
    """The module of this name; UsageError with near names. A shared module has all of its names."""
    known: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    plain = {_unwrapped(path): module for path, module in known.items()}
    if name in known:
        return known[name]
    if name not in plain:
        raise UsageError(f"{owner} has no module {name!r}{suggestion(name, [path for path in plain if path])}")
    return plain[name]


def _unwrapped(path: str) -> str:
    """A module's name without what torch.compile (anywhere) and DistributedDataParallel (in front) add to it."""
    parts = [part for part in path.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[:1] == ["module"] else parts)
