"""The functions of a configuration by what they do: a run does not go on with another one of the same name."""

from __future__ import annotations

import dis
import platform
from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from ensemble_distill.fingerprint import array_digest, sha256
from ensemble_distill.weights import contents

PLAIN = (bool, int, float, complex, str, bytes, type(None))
NUMBERS = (np.ndarray, np.generic, Tensor)
TABLES = (list, tuple, dict, set, frozenset)


def digests(config: BaseModel, without: str) -> dict[str, str]:
    """SHA-256 of each function by its place (``objective.soft.rows``), but for one; and the Python that compiled them.

    Digested are byte code, constants, defaults, what a function closes over and what it names of its file: numbers,
    words, arrays, tensors, tables of these, and functions in the same way. Of other objects there is the type alone,
    and of functions of other files nothing.
    """
    found = {place: sha256(_Said().of(value).encode()) for place, value in _functions(config, "") if place != without}
    return found | {"python": ".".join(platform.python_version_tuple()[:2])} if found else {}


def _functions(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (BaseModel, Mapping)):
        for name, child in dict(value).items():
            yield from _functions(child, f"{place}.{name}" if place else str(name))
    elif callable(value):
        yield place, value


class _Said:
    """Values as text. What functions read of their file is said of the file of the first of them alone."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._home: dict[str, Any] | None = None

    def of(self, value: Any) -> str:
        if isinstance(value, PLAIN):
            return repr(value)
        if isinstance(value, NUMBERS):
            return self._numbers(value)
        if not isinstance(value, (*TABLES, partial, FunctionType)) or id(value) in self._seen:
            return type(value).__qualname__
        self._seen.add(id(value))
        if isinstance(value, FunctionType):
            return self._function(value)
        said = self._table(value)
        self._seen.remove(id(value))  # only what holds itself is not said again: equal tables may be one or two
        return said

    def _table(self, value: Any) -> str:
        if isinstance(value, partial):
            return self.of([value.func, value.args, *sorted(value.keywords.items())])
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self.of(key)}: {self.of(child)}" for key, child in value.items()) + "}"
        each = [self.of(child) for child in value]
        # Sets have another order in each process.
        return "{" + ", ".join(sorted(each)) + "}" if isinstance(value, (set, frozenset)) else f"[{', '.join(each)}]"

    def _numbers(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{value.dtype} {tuple(value.shape)} {sha256(contents(value))}"
        array = np.asarray(value)
        return f"{array.shape} {self.of(array.tolist())}" if array.dtype.hasobject else array_digest(array)

    def _function(self, value: FunctionType) -> str:
        there = value.__globals__
        self._home = there if self._home is None else self._home
        closed = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # but for empty ones
        defaults = [value.__defaults__ or (), *sorted((value.__kwdefaults__ or {}).items())]
        used = [there[name] for name in sorted(_names(value.__code__)) if name in there]
        named: list[Any] = [child for child in used if isinstance(child, PLAIN)]
        named += [child for child in used if isinstance(child, FunctionType) and child.__globals__ is there]
        data = [child for child in used if isinstance(child, (*NUMBERS, *TABLES, partial)) and there is self._home]
        return f"{_code(value.__code__, value.__doc__)} {self.of([closed, defaults, named + ([data] if data else [])])}"


def _code(code: CodeType, doc: str | None = None) -> str:
    """Without docstring, comments, and where its lines stand."""
    constants = [_constant(value) for value in code.co_consts if doc is None or value != doc]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return _code(value)
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _names(code: CodeType) -> set[str]:
    """All that a code and those inside of it read of their file."""
    own = {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_names(value) for value in code.co_consts if isinstance(value, CodeType)))
