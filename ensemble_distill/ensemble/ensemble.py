"""The ensemble: one forward pass of all members gives targets, members' predictions and taps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ensemble_distill.config import CacheConfig, Precision
from ensemble_distill.device import Resolved, autocast, choose_precision, place, upload
from ensemble_distill.ensemble.members import Loaded
from ensemble_distill.errors import InvalidOutput, UsageError
from ensemble_distill.mixture import combine
from ensemble_distill.taps import Taps


@dataclass(frozen=True)
class Outputs:
    """What the ensemble said about a batch, on the first device.

    logprobs: float32 [B, C]. members: float32 log-probabilities [B, C] of each, at its own temperature.
    features: float32 [B, D] by tap field.
    """

    logprobs: Tensor
    members: list[Tensor]
    features: dict[str, Tensor]


class InvalidRow(InvalidOutput):
    """An output is no distribution; ``row`` is its place in the batch."""

    def __init__(self, member: str, row: int, what: str) -> None:
        super().__init__(f"{member} gave {what}")
        self.member, self.row = member, row


class Ensemble:
    """Members placed round-robin over the devices; kernels of different devices run at the same time."""

    def __init__(
        self,
        members: Sequence[Loaded],
        config: CacheConfig,
        classes: int,
        devices: Sequence[torch.device],
        precision: Resolved = "fp32",
    ) -> None:
        self.config, self.classes, self.precision = config, classes, precision
        self.devices = [devices[i % len(devices)] for i in range(len(members))]
        self.modules = [place(m.module, d) for m, d in zip(members, self.devices, strict=True)]
        self.names = [m.config.name for m in members]
        self.temper([m.temperature for m in config.members], config.temperature)
        self._taps = {
            name: Taps(module, [t.module for t in config.taps if t.member == name], f"member {name!r}")
            for name, module in zip(self.names, self.modules, strict=True)
        }

    def temper(self, before: Sequence[float], after: float) -> None:
        """Temperatures of the members, applied before averaging, and of the ensemble, applied after it."""
        self.temperatures, self.temperature = tuple(before), after

    def resolve_precision(self, choice: Precision, inputs: Mapping[str, Tensor]) -> Resolved:
        """Fix ``precision``; ``auto`` is decided by timing the members on a batch of real inputs."""

        def step(precision: Resolved) -> None:
            self.precision = precision
            self._forward(inputs)

        self.precision = choose_precision(choice, self.devices[0], step)
        return self.precision

    @torch.inference_mode()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Run all members on a batch (inputs by name, [B, ...]).

        Raises InvalidRow for NaN or +inf in a member's output, naming the member and the row.
        """
        logits, features = self._forward(inputs)
        first = self.devices[0]
        tempered = [z.to(first) / t for z, t in zip(logits, self.temperatures, strict=True)]
        members = [torch.log_softmax(z, dim=1) for z in tempered]
        for name, logprobs in zip(self.names, members, strict=True):
            _check(f"member {name!r}", logprobs)
        combined = combine(tempered, self.config.shares, self.config.combine)
        if self.temperature != 1:
            combined = torch.log_softmax(combined / self.temperature, dim=1)
        _check("the ensemble", combined)
        return Outputs(combined, members, {name: f.to(first) for name, f in features.items()})

    def features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The taps of a batch alone, unchecked: to learn their widths."""
        return self._forward(inputs)[1]

    @torch.inference_mode()
    def _forward(self, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        copies = {d: {name: upload(x, d) for name, x in inputs.items()} for d in dict.fromkeys(self.devices)}
        logits: list[Tensor] = []
        features: dict[str, Tensor] = {}
        for name, module, device in zip(self.names, self.modules, self.devices, strict=True):
            with autocast(device, self.precision), self._taps[name].watch() as tapped:
                output = module(*copies[device].values())
            logits.append(self._logits(name, output))
            features |= {f"tap/{name}.{m}": f for m, f in tapped.items()}
        return logits, features

    def _logits(self, name: str, output: object) -> Tensor:
        value = getattr(output, "logits", output)
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] != self.classes:
            found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"member {name!r} gave {found}, expected logits [batch, {self.classes}]")
        return value.float()


def _check(name: str, logprobs: Tensor) -> None:
    # log_softmax turns a +inf logit into NaN; -inf alone is a class of probability zero, which is fine.
    if logprobs.isnan().any():
        row = int(logprobs.isnan().any(dim=1).nonzero()[0, 0])
        raise InvalidRow(name, row, "NaN or infinite logits")
