"""Weights of a module from a safetensors file. Never from a pickle: loading one can run its author's code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ensemble_distill.errors import Mismatch, Unsafe, UsageError
from ensemble_distill.fingerprint import sha256

HEADER = 1 << 20  # bytes that a file of weights may hold beside them
# What the parser raises for bytes that are none: a KeyError is a type of numbers that torch does not have.
UNREADABLE = (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError)


def load_weights(who: str, module: nn.Module, path: Path, maker: str) -> None:
    """Load a file's weights into a module that ``maker`` made, all of them.

    Raises, in the name of ``who``, UsageError (no file), Unsafe (no safetensors), Mismatch (damaged, or of another
    module).
    """
    if not path.is_file():
        raise UsageError(f"{who}: {path}: no such file")
    if path.suffix != ".safetensors":
        raise Unsafe(
            f"{who}: {path} is no safetensors file, and loading a pickle can run its author's code",
            hint="convert it where you trust it: safetensors.torch.save_file("
            f"torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')",
        )
    try:
        state = load_file(path)
    except UNREADABLE as error:
        raise Mismatch(
            f"{who}: {path} is no safetensors file: {error}",
            hint="restore the file, or save the weights again",
        ) from error
    try:
        fit(module, state)
    except ValueError as error:
        raise Mismatch(
            f"{who}: {path} does not fit the module that {maker} made: {error}",
            hint=f"{maker} must make the module that these weights were saved from",
        ) from error


def fit(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state into a module, all of it; ValueError, with the first thing that does not fit."""
    own = module.state_dict()
    for name, given in state.items():
        held = own.get(name)
        if isinstance(held, Tensor) and held.is_floating_point() and not given.is_floating_point():
            raise ValueError(f"{name} is of {given.dtype}, expected {held.dtype}")  # torch would cast it in silence
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split("\n\t")[1:2]) or str(error)) from error


def most_bytes(module: nn.Module) -> int:
    """What a file of a module's weights may hold, in twice their precision."""
    return HEADER + 2 * sum(int(t.numel()) * int(t.element_size()) for t in module.state_dict().values())


def printed_digest(module: nn.Module) -> str:
    """SHA-256 of what a module prints, but for places in memory: the same weights may fit others."""
    return sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(module)).encode())


def contents(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers, wherever and however it keeps them; none where it has no memory."""
    if tensor.is_meta:
        return memoryview(b"")
    value = tensor.detach().cpu().resolve_conj().resolve_neg()
    value = value.dequantize() if value.is_quantized else value.to_dense() if value.layout != torch.strided else value
    data: memoryview = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
