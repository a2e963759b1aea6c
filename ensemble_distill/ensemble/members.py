"""Members: built by the pipeline, loaded from safetensors, identified by their weights, in eval mode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ensemble_distill.config import Member
from ensemble_distill.errors import UsageError
from ensemble_distill.fingerprint import sha256
from ensemble_distill.weights import load_weights

PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class Loaded:
    """A member ready to run, and who it is: SHA-256 of its state and of its printed structure.

    A callable that is no module has neither: it is known by the version that its configuration states.
    """

    config: Member
    module: nn.Module | Callable[..., Any]
    weights: str | None
    structure: str | None


def load_member(member: Member) -> Loaded:
    """Build and load one member, on the CPU, in eval mode.

    Raises UsageError (no file, nothing to call, a callable without a version), Unsafe (pickled weights), Mismatch
    (weights that do not fit).
    """
    module = member.build()
    if not isinstance(module, nn.Module):
        _check_callable(member, module)
        return Loaded(member, module, None, None)
    if member.weights is not None:
        load_weights(f"member {member.name!r}", module, member.weights, "build()")
    module.eval().requires_grad_(False)
    return Loaded(member, module, state_digest(module), structure_digest(module))


def _check_callable(member: Member, function: object) -> None:
    kind, name = type(function).__name__, repr(member.name)
    if not callable(function):
        raise UsageError(f"member {name}: build() gave a {kind}, expected an nn.Module or another callable")
    if member.weights is not None:
        raise UsageError(f"member {name}: weights are loaded into an nn.Module, but build() gave a {kind}")
    if member.version is None:
        raise UsageError(
            f"member {name}: build() gave a {kind}, and no hash can tell whether another run would call the same",
            hint="say who answers: Member(…, version='name and version of the served model')",
        )


def structure_digest(module: nn.Module) -> str:
    """SHA-256 over what a module prints and the attributes of its parts: scales, means, switches, tables of these.

    The code of ``forward`` is not covered: no hash of it is the same on two machines.
    """
    attributes = [
        f"{path}.{name}={said}"
        for path, part in module.named_modules()
        for name, value in sorted(vars(part).items())
        if not name.startswith("_") and name != "training" and (said := _said(value)) is not None
    ]
    return sha256("\n".join([repr(module), *attributes]).encode())


def _said(value: object) -> str | None:
    """What an attribute says of a module, as text; None for what is no value: functions, other objects, None."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        h = hashlib.sha256()
        _hash(h, "", value)
        return h.hexdigest()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_said(child)}" for key, child in value.items()) + "}"
    if isinstance(value, (list, tuple)) and not all(isinstance(child, PLAIN) for child in value):
        return "[" + ", ".join(str(_said(child)) for child in value) + "]"
    return repr(value) if isinstance(value, (*PLAIN, list, tuple)) else None


def state_digest(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state, and of buffers that are no part of it."""
    h, state = hashlib.sha256(), module.state_dict()
    for name, tensor in sorted(state.items()):
        _hash(h, name, tensor)
    for name, tensor in sorted(module.named_buffers(remove_duplicate=False)):
        if name not in state:
            _hash(h, f"buffer {name}", tensor)
    return h.hexdigest()


def _hash(h: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    tensor = tensor.detach().cpu().contiguous()
    h.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
    h.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
