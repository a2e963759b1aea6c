"""Weights of a module from a safetensors file. Never from a pickle: loading one can run its author's code."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ensemble_distill.errors import Mismatch, Unsafe, UsageError
from ensemble_distill.fingerprint import sha256


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
    except SafetensorError as error:
        raise Mismatch(
            f"{who}: {path} is no safetensors file: {error}",
            hint="restore the file, or save the weights again",
        ) from error
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise Mismatch(
            f"{who}: {path} does not fit the module that {maker} made: {detail}",
            hint=f"{maker} must make the module that these weights were saved from",
        ) from error


def printed_digest(module: nn.Module) -> str:
    """SHA-256 of what a module prints, but for places in memory: the same weights may fit others."""
    return sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(module)).encode())
