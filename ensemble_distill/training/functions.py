"""The functions of a configuration by what they do: a run does not go on with another one of the same name."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import Any

from pydantic import BaseModel

from ensemble_distill.fingerprint import sha256

PLAIN = (bool, int, float, complex, str, bytes, type(None))


def digests(config: BaseModel, without: str) -> dict[str, str]:
    """SHA-256 of each function by its place (``objective.soft.rows``), but for one; and the Python that compiled them.

    Digested are byte code, constants, defaults, what a function closes over, and the same of the functions of its file
    that it names. Of other objects there is the type alone, and of functions of other files nothing.
    """
    found = {place: sha256(_said(value, set()).encode()) for place, value in _functions(config, "") if place != without}
    return found | {"python": ".".join(platform.python_version_tuple()[:2])} if found else {}


def _functions(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (BaseModel, Mapping)):
        for name, child in dict(value).items():
            yield from _functions(child, f"{place}.{name}" if place else str(name))
    elif callable(value):
        yield place, value


def _said(value: Any, seen: set[int]) -> str:
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_said(child, seen) for child in value) + "]"
    if isinstance(value, partial):
        return _said([value.func, value.args, *sorted(value.keywords.items())], seen)
    if not isinstance(value, FunctionType) or id(value) in seen:
        return type(value).__qualname__
    seen.add(id(value))
    closed = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # but for empty ones
    defaults = [value.__defaults__ or (), *sorted((value.__kwdefaults__ or {}).items())]
    return f"{_code(value.__code__, value.__doc__)} {_said([closed, defaults, _named(value)], seen)}"


def _code(code: CodeType, doc: str | None = None) -> str:
    """Without docstring, comments, and where its lines stand."""
    constants = [_constant(value) for value in code.co_consts if doc is None or value != doc]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return _code(value)
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _named(function: FunctionType) -> list[Any]:
    """The functions and numbers of its own file that a function names."""
    there = function.__globals__
    used = [there[name] for name in sorted(_names(function.__code__)) if name in there]
    own = (value for value in used if isinstance(value, FunctionType) and value.__globals__ is there)
    return [*(value for value in used if isinstance(value, PLAIN)), *own]


def _names(code: CodeType) -> set[str]:
    """All that a code and those inside of it name."""
    return set(code.co_names).union(*(_names(value) for value in code.co_consts if isinstance(value, CodeType)))
