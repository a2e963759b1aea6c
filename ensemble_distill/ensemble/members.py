"""Members: built by the pipeline, loaded from safetensors, identified by their weights, in eval mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ensemble_distill.config import Member
from ensemble_distill.ensemble.identity import state_digest, structure_digest
from ensemble_distill.errors import UsageError
from ensemble_distill.weights import load_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A member ready to run, and who it is: SHA-256 of its state and of its printed structure.

    A callable that is no module has neither: it is known by the version that its configuration states.
    """

    config: Member
    module: nn.Module | Callable[..., Any]
    weights: str | None
    structure: str | None


def load_members(members: Sequence[Member]) -> list[Loaded]:
    """All members, one after another; raises what ``load_member`` does.

    Members may share parts that say the same for both. UsageError where loading one changed another.
    """
    loaded = [load_member(member) for member in members]
    for i, member in enumerate(loaded):
        _check_unchanged(member, loaded[i + 1 :])
    _warn_of_twins(loaded)
    return loaded


def _warn_of_twins(loaded: Sequence[Loaded]) -> None:
    """Several of one kind are allowed, and more often a lambda in a loop, which builds what the last round named."""
    named: dict[tuple[str | None, str | None], list[str]] = {}
    for member in loaded:
        named.setdefault((member.weights, member.structure), []).append(repr(member.config.name))
    for who, names in named.items():
        if len(names) > 1 and who != (None, None):
            log.warning("members %s have the same weights and structure (in a loop: lambda i=i: …)", ", ".join(names))


def _check_unchanged(member: Loaded, later: Sequence[Loaded]) -> None:
    """UsageError where a member shares parts with a later one and is no longer what it was when it was loaded."""
    module = member.module
    if not isinstance(module, nn.Module):
        return
    parts = _parts(module)
    sharing = [m.config.name for m in later if isinstance(m.module, nn.Module) and parts & _parts(m.module)]
    if sharing and (state_digest(module), structure_digest(module)) != (member.weights, member.structure):
        raise UsageError(
            f"members {member.config.name!r} and {sharing[0]!r} share parts, and what was loaded later changed "
            f"{member.config.name!r}",
            hint="let build() make a module of its own each time that it is called, not one that is cached or global",
        )


def _parts(module: nn.Module) -> set[int]:
    """Where the parts of a module and the values of its weights and buffers lie in memory."""
    tensors = [*module.parameters(), *module.buffers()]
    return {id(part) for part in module.modules()} | {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


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
    _check_values(member, module)
    module.eval()  # not chained: a train() of the user's own may return nothing
    module.requires_grad_(False)
    return Loaded(member, module, state_digest(module), structure_digest(module))


def _check_values(member: Member, module: nn.Module) -> None:
    """UsageError for weights that have no values: of lazy modules that saw no batch, or on the meta device."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor) or tensor.is_meta:
            raise UsageError(
                f"member {member.name!r}: {name} has no values",
                hint="give the member weights, or let build() run a lazy module once on a batch",
            )


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
