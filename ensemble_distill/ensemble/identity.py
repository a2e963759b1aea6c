"""Who a module is: SHA-256 over its state, and over its structure and the values in its attributes.

Both are the same in every process and on every machine: nothing of addresses, devices, paths or code is in them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import sys
import types
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn

from ensemble_distill.fingerprint import array_digest, sha256
from ensemble_distill.weights import contents

PLAIN = (bool, int, float, str)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OF_MODULES = frozenset(vars(nn.Module()))  # what every module has: weights, buffers, parts, hooks, training
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_NAMESPACES = ("SimpleNamespace", "Namespace")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def state_digest(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state, and of what is no part of it.

    That is buffers that are not persistent, and weights that a ``state_dict`` of one's own leaves out.
    """
    h, state = hashlib.sha256(), module.state_dict()
    for name, value in sorted(state.items()):
        _hash(h, name, value)
    for kind, named in (("buffer", module.named_buffers), ("parameter", module.named_parameters)):
        for name, tensor in sorted(named(remove_duplicate=False)):
            if name not in state:
                _hash(h, f"{kind} {name}", tensor)
    return h.hexdigest()


def _hash(h: hashlib._Hash, name: str, value: Any) -> None:
    """Add a tensor, or another value of a state, such as a module's extra state."""
    if not isinstance(value, torch.Tensor):
        h.update(f"{name}:{_Said(()).of(value)}\n".encode())
        return
    h.update(f"{name}:{value.dtype}:{tuple(value.shape)}\n".encode())
    h.update(contents(value))


def structure_digest(module: nn.Module) -> str:
    """SHA-256 over what a module prints and the values in the attributes of its parts, and of what these hold.

    Numbers, arrays, tensors, tables of these, modules in lists; words, but for private attributes; names, defaults and
    closures of functions and hooks; the numbers in public attributes of other objects. Code is not covered, nor what it
    reads elsewhere: no hash of ``forward`` is the same on two machines.
    """
    return _structure(module, _Said(module.modules()))


def _structure(module: nn.Module, said: _Said) -> str:
    lines = [
        f"{path}.{name}={text}"
        for path, part in module.named_modules()
        for name, value in _attributes(part)
        if (text := said.of(value, *[not name.startswith("_") or name in _HOOKS] * 2)) is not None
    ]
    return sha256("\n".join([_ADDRESS.sub("", repr(module)), *lines]).encode())


def _attributes(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """What one module has beyond what every module has; private things of torch's own are how they work inside."""
    own = type(part).__module__.partition(".")[0] == "torch"
    for name, value in sorted(vars(part).items()):
        if name in _HOOKS and value:
            yield name, list(value.values())
        elif name not in _OF_MODULES and not (own and name.startswith("_")):
            yield name, value


class _Said:
    """Values as text. known: modules that are covered already, of which nothing is said again."""

    def __init__(self, known: Iterable[object]) -> None:
        self._seen = {id(part) for part in known}

    def of(self, value: Any, words: bool = True, objects: bool = True) -> str | None:
        """None for what is no value. words: whether strings count. objects: whether attributes of objects do."""
        if isinstance(value, Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if isinstance(value, np.generic):
            return f"{value.dtype}:{value.item()!r}"
        if isinstance(value, (str, bytes)):
            return repr(value) if words else None
        if isinstance(value, (*PLAIN, complex, torch.dtype)):
            return repr(value)
        if isinstance(value, np.ndarray):
            return None if value.dtype.hasobject else array_digest(value)
        if isinstance(value, torch.Tensor):
            _hash(h := hashlib.sha256(), "", value)
            return h.hexdigest()
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            return self._container(value, words, objects)
        if isinstance(value, (*_FUNCTIONS, functools.partial)):
            return self._function(value, words)
        return self._object(value) if objects or isinstance(value, nn.Module) else None

    def _container(self, value: Any, words: bool, objects: bool) -> str:
        each = [str(self.of(child, words, objects)) for child in (value.values() if isinstance(value, dict) else value)]
        if isinstance(value, dict):  # a key may be a function, whose repr holds an address
            keys = [repr(key) if isinstance(key, PLAIN) else self.of(key) for key in value]
            return "{" + ", ".join(f"{key}: {child}" for key, child in zip(keys, each, strict=True)) + "}"
        if isinstance(value, (set, frozenset)):
            return "{" + ", ".join(sorted(each)) + "}"
        return repr(value) if words and all(isinstance(c, PLAIN) for c in value) else "[" + ", ".join(each) + "]"

    def _function(self, value: Any, words: bool) -> str:
        """A function by its name, with what it was made with."""
        if isinstance(value, functools.partial):
            return f"{self.of(value.func, words)}{self.of(value.args, words)}{self.of(value.keywords, words)}"
        if (value.__module__ or "").partition(".")[0] == "torch":
            return str(value.__name__)
        made = [getattr(value, "__defaults__", None), getattr(value, "__kwdefaults__", None), *_closed_over(value)]
        return f"{value.__name__}{self.of([part for part in made if part is not None], words)}"

    def _object(self, value: Any) -> str | None:
        """The numbers in the public attributes of an object, and a module in full.

        Words would tell where it was loaded from, and by which version. Objects of the standard library and of torch
        are clocks, locks, loggers and devices.
        """
        if id(value) in self._seen:
            return type(value).__qualname__
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self._seen.update(map(id, value.modules()))
            return f"{state_digest(value)} {_structure(value, self)}"
        kind, home = type(value), type(value).__module__.partition(".")[0]
        if kind.__name__ not in _NAMESPACES and (home in sys.stdlib_module_names or home in ("torch", "numpy")):
            return None
        public = {name: child for name, child in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
        said = {name: self.of(child, words=False) for name, child in sorted(public.items())}
        return f"{kind.__qualname__}{ {name: text for name, text in said.items() if text is not None} }"


def _closed_over(function: Any) -> list[Any]:
    """What is in the cells of a function; of those that are empty yet, nothing."""
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found
