"""A run's resumable state: one safetensors file and one JSON record that names it. No pickle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from ensemble_distill.errors import Corrupt
from ensemble_distill.fingerprint import sha256
from ensemble_distill.frozen import Config, without_empty
from ensemble_distill.store import records
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.weights import UNREADABLE

NAME = "checkpoint.json"


class State(Config):
    """Where a run stands: ``step`` optimiser steps done, ``batch`` of them in ``epoch``; and its history.

    ``best_sha256`` and ``config`` are the SHA-256 of the best weights (empty before there are any) and config.json.
    ``order``: a digest of the order of the samples, where it is in the middle of an epoch.
    """

    schema_version: Literal[1] = 1
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    batch: int = Field(ge=0)
    sums: dict[str, float]
    best: dict[str, int | float]
    best_sha256: str
    history: tuple[dict[str, Any], ...]
    finished: bool
    config: str
    order: str = ""

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(handler(self), "order")

    def of(self, epochs: int, batches: int, sums: Iterable[str]) -> bool:
        """Whether a training of so many epochs, of so many batches each, comes to it."""
        return (
            self.step == self.epoch * batches + self.batch
            and self.batch <= batches
            and self.step <= epochs * batches
            and self.finished <= (self.epoch == epochs)
            and len(self.history) == self.epoch + self.finished
            and set(self.sums) == set(sums)
            and (not self.best or self.best.get("epoch") in range(1, self.epoch + 1))
        )


class Checkpoint(Config):
    state: State
    tensors: str = Field(pattern=r"^checkpoint-[0-9]{9,}\.safetensors$")
    size: int = Field(ge=0)
    sha256: str


def save(storage: LocalStorage, state: State, tensors: Mapping[str, Tensor]) -> None:
    """Durable on return: the tensors first, then the record that names them, then the old ones go."""
    data = to_bytes(tensors)
    name = f"checkpoint-{state.step:09d}.safetensors"
    storage.replace(name, data)
    storage.replace(NAME, records.seal(Checkpoint(state=state, tensors=name, size=len(data), sha256=sha256(data))))
    for path in storage.path.glob("checkpoint-*.safetensors"):
        if path.name != name:
            storage.remove(path.name)


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file; each tensor is copied, since tied weights share memory and the format allows none."""
    return safetensors.torch.save(
        {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    )


def load(storage: LocalStorage) -> tuple[State, dict[str, Tensor]] | None:
    """The last saved state, or None where there is none yet. Corrupt if a byte of it changed."""
    if storage.size(NAME) is None:
        return None
    checkpoint = records.unseal(Checkpoint, storage.read(NAME), str(storage.path / NAME))
    data = storage.read(checkpoint.tensors, checkpoint.size + 1)
    if sha256(data) != checkpoint.sha256:
        raise Corrupt(
            f"{storage.path / checkpoint.tensors}: not the bytes that were saved",
            hint="train into another --out, or restore the file",
        )
    try:
        return checkpoint.state, safetensors.torch.load(data)
    except UNREADABLE as error:
        raise Corrupt(f"{storage.path / checkpoint.tensors}: no safetensors file ({error})") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state by parameter number and name, as tensors."""
    return {
        f"optimizer/{i}/{name}": torch.as_tensor(value)
        for i, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser its state back; ValueError for one of other parameters."""
    held: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, i, field = name.split("/")
            held.setdefault(int(i), {})[field] = value
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for number, values in held.items():
        for name, value in values.items():
            if number not in parameters or value.shape not in (parameters[number].shape, torch.Size([])):
                raise ValueError(f"optimizer/{number}/{name} is the state of no parameter")
    optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        for field, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # In the parameter's own memory format, or the arithmetic takes another path to other last bits.
                state[field] = torch.empty_like(parameter).copy_(value)
