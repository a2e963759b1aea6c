"""What people are told of values: what is wrong with one, which name was meant, where two differ."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ensemble_distill.frozen import Config


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One sentence for the first thing that a config got wrong, with a suggestion for a misspelt field."""
    first = error.errors()[0]
    names = [str(part)[:100] for part in first["loc"]]
    where = ".".join(name for name in names if "[" not in name) or model.__name__  # a type tried is no name: literal[…]
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        fields = model.model_fields if len(first["loc"]) == 1 else _all_fields(model)
        return f"{where}: {model.__name__} has no such field{suggestion(name, fields)}"
    found = first["input"]
    shown = repr(found)[:200] if isinstance(found, (int, float, bool, type(None))) else _short(found)
    return f"{where}: {first['msg'].removeprefix('Value error, ')[:500]} (found {shown})"


def _short(value: Any) -> str:
    """A value as text, if that is no more than people read; else what it is. Whole lists may be huge."""
    if isinstance(value, (str, bytes)):
        return repr(value[:200])
    if isinstance(value, (list, tuple, dict, set)):
        return (
            repr(value)
            if len(value) <= 8 and len(str(type(value))) < 100
            else f"a {type(value).__name__} of {len(value)}"
        )
    return repr(value)[:200]


def _all_fields(model: type[BaseModel]) -> set[str]:
    return {name for kind in Config.__subclasses__() for name in kind.model_fields} | set(model.model_fields)


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or the list of what there is."""
    known = list(known)
    if len(name) > 100:
        return ""
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is {', '.join(map(repr, known[:8]))}" if known else ""


def difference(expected: Any, found: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The first (field, expected, found) in which two JSON values differ, or None."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for name in sorted(set(expected) | set(found)):
            inner = f"{where}.{name}" if where else name
            if (hit := difference(expected.get(name), found.get(name), inner)) is not None:
                return hit
        return None
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)) and len(expected) == len(found):
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            if (hit := difference(a, b, f"{where}[{i}]")) is not None:
                return hit
        return None
    return None if expected == found else (where, expected, found)
