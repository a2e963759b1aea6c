"""Usual names for the modules of models that others wrote: what the files beside this one share."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from ensemble_distill.errors import UsageError


def numbered(paths: Iterable[str], pattern: str, name: str) -> dict[str, str]:
    """The paths that match ``pattern``, whose one group is a number, in its order: as ``name1``, ``name2``, …"""
    found = sorted((int(match[1]), path) for path in paths if (match := re.fullmatch(pattern, path)))
    return {f"{name}{i}": path for i, (_, path) in enumerate(found, 1)}


def present(known: Iterable[str], **names: str) -> dict[str, str]:
    """Those of the names whose module there is."""
    known = set(known)
    return {name: path for name, path in names.items() if path in known}


def under(prefix: str, names: dict[str, str]) -> dict[str, str]:
    """The same modules as seen from a module that holds the model as ``prefix``; an empty prefix changes nothing."""
    return {name: f"{prefix}.{path}" for name, path in names.items()} if prefix else names


def unknown(model: nn.Module, families: str) -> UsageError:
    """What to raise for a model of no known family."""
    hint = "name the modules to tap by their paths in named_modules()"
    return UsageError(f"{type(model).__name__} has none of the modules of {families}", hint=hint)
