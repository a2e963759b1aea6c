"""The ensemble: one forward pass of all members gives targets, members' predictions and taps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ensemble_distill.codec import Members, TopK
from ensemble_distill.config import CacheConfig, Gives, Precision
from ensemble_distill.device import Resolved, autocast, choose_precision, own, place, upload
from ensemble_distill.ensemble.distributions import InvalidRow, Stated, refuse_probabilities, stated
from ensemble_distill.ensemble.members import Loaded
from ensemble_distill.ensemble.steady import check_steady
from ensemble_distill.ensemble.tapped import Tapped
from ensemble_distill.ensemble.visit import settle, visit
from ensemble_distill.errors import InvalidOutput, UsageError
from ensemble_distill.mixture import combine
from ensemble_distill.taps import Taps

_SAID = {"all": "all classes", "topk": "its likeliest classes only"}


@dataclass(frozen=True)
class Ran:
    """What members gave for a batch, on the first device.

    logits: float32 [B, C] by member, at its own temperature. features: float32 [B, ...] by tap field. masks: bool
    [B, T] of those that are ragged. known: bool [B, C], the classes that all members told apart, whose
    log-probabilities alone are known; None where all are, or are taken as even.
    """

    logits: dict[str, Tensor]
    features: dict[str, Tensor]
    masks: dict[str, Tensor]
    known: Tensor | None


@dataclass(frozen=True)
class Outputs(Ran):
    """What the whole ensemble said: logprobs float32 [B, C], and those of each of its ``members``."""

    logprobs: Tensor
    members: list[Tensor]


class Ensemble:
    """Members placed round-robin over the devices; kernels of different devices run at the same time.

    One at a time, if so configured: then each is on its device only while it runs, with the same result.
    Each gets inputs of its own; callables that are no modules get them on the CPU. gives: what each member tells apart,
    once ``look`` saw.
    """

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
        put = settle if config.one_at_a_time else place
        self.modules = [
            put(m.module, d) if isinstance(m.module, nn.Module) else m.module
            for m, d in zip(members, self.devices, strict=True)
        ]
        self.names = [m.config.name for m in members]
        self.temper([m.temperature for m in config.members], config.temperature)
        self.gives: list[Gives] | None = None
        self._taps: dict[str, Taps] = {}
        self._tapped = Tapped(config.taps)
        for name, module in zip(self.names, self.modules, strict=True):
            tapped = {t.field: t.take for t in config.taps if t.member == name}
            if isinstance(module, nn.Module):
                self._taps[name] = Taps(module, tapped, f"member {name!r}")
            elif tapped:
                raise UsageError(
                    f"member {name!r} is no nn.Module but a {type(module).__name__}: "
                    f"it has no {next(iter(tapped.values())).module!r} to tap"
                )

    def temper(self, before: Sequence[float], after: float) -> None:
        """Temperatures of the members, applied before averaging, and of the ensemble, applied after it."""
        self.temperatures, self.temperature = tuple(before), after

    def resolve_precision(self, choice: Precision, inputs: Mapping[str, Tensor]) -> Resolved:
        """Fix ``precision``; ``auto`` is decided by timing the modules on a batch of real inputs."""
        modules = [i for i, module in enumerate(self.modules) if isinstance(module, nn.Module)]

        def step(precision: Resolved) -> None:
            self.precision = precision
            self._forward(inputs, modules)

        if choice == "auto" and not modules:
            choice = "fp32"
        self.precision = choose_precision(choice, self.devices[0], step)
        return self.precision

    def __call__(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Run all members on a batch (inputs by name, [B, ...]) and average what they say; raises what these raise."""
        ran = self.run(inputs)
        return Outputs(ran.logits, ran.features, ran.masks, ran.known, *self.average(ran.logits))

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor], names: Collection[str] | None = None) -> Ran:
        """Run these members (by default all) on a batch.

        Raises InvalidRow for what is no distribution, naming the member and the row.
        """
        which = [i for i, name in enumerate(self.names) if names is None or name in names]
        said, raw = self._forward(inputs, which)
        features = self._tapped.kept(raw, len(next(iter(inputs.values()))))
        first = self.devices[0]
        logits = {self.names[i]: s.logits.to(first) for i, s in zip(which, said, strict=True)}
        features = {name: f.to(first) for name, f in features.items()}
        known = self._known(said, list(logits))
        return Ran(logits, features, self._tapped.masks(inputs, features), known)

    @torch.inference_mode()
    def average(
        self, logits: Mapping[str, Tensor], shares: Sequence[float] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities [B, C] of the ensemble of these members (logits [B, C], each at its own temperature), and
        of each. ``shares``: by default those of the configuration.

        Raises InvalidRow for NaN and +inf, naming the member and the row.
        """
        tempered = [z.to(self.devices[0]) for z in logits.values()]
        members = [torch.log_softmax(z, dim=1) for z in tempered]
        for name, logprobs in zip(logits, members, strict=True):
            _check(f"member {name!r}", logprobs)
        combined = combine(tempered, self.config.shares if shares is None else shares, self.config.combine)
        if self.temperature != 1:
            combined = torch.log_softmax(combined / self.temperature, dim=1)
        _check("the ensemble", combined)
        return combined, members

    def look(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The taps of the first two rows, to learn their shapes; these, and what each ``gives``, are fixed then.

        InvalidOutput for a member that says something else of them again, or when two more are in the batch.
        """
        few = {name: x[:2] for name, x in inputs.items()}
        said, raw = self._forward(few)
        for name, s, temperature in zip(self.names, said, self.temperatures, strict=True):
            refuse_probabilities(f"member {name!r}", s.logits * temperature)
        self.gives = [s.gives for s in said]
        features = self._tapped.kept(raw, len(next(iter(few.values()))))
        self._tapped.masks(few, features)  # what is no mask is refused before anything is captured
        self._tapped.expect(features)
        check_steady(self.names, self.modules, said, lambda rows: self._forward(_rows(inputs, rows))[0])
        return features

    def distortions(self, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """By projected tap: how far squared distances between the rows of a batch change (see ``projection.py``)."""
        if not any(tap.project for tap in self.config.taps):
            return {}
        return self._tapped.distortions(self._forward(inputs)[1])

    @torch.inference_mode()
    def _forward(
        self, inputs: Mapping[str, Tensor], which: Sequence[int] | None = None
    ) -> tuple[list[Stated], dict[str, Tensor]]:
        """What the members (by default all) say of a batch, each at its own temperature, and their taps."""
        rows = len(next(iter(inputs.values())))
        copies: dict[torch.device, list[Tensor]] = {}
        said: list[Stated] = []
        features: dict[str, Tensor] = {}
        for i in range(len(self.modules)) if which is None else which:
            output, tapped = self._run(i, inputs, copies)
            of_batch = stated(f"member {self.names[i]!r}", output, rows, self.classes)
            # The quotient is a copy: another member, or the next batch, may be answered in the same buffer.
            said.append(replace(of_batch, logits=of_batch.logits / self.temperatures[i]))
            features |= tapped
            if self.gives is not None and said[-1].gives != self.gives[i]:
                raise InvalidOutput(
                    f"member {self.names[i]!r} gave {_SAID[said[-1].gives]}, "
                    f"and {_SAID[self.gives[i]]} when the capture was planned",
                    hint="let it give one or the other for all batches",
                )
        return said, features

    def _run(
        self, i: int, inputs: Mapping[str, Tensor], copies: dict[torch.device, list[Tensor]]
    ) -> tuple[object, dict[str, Tensor]]:
        """What a member returns, and its taps. ``copies``: the inputs by device, which are added to."""
        name, module, device = self.names[i], self.modules[i], self.devices[i]
        if not isinstance(module, nn.Module):
            return module(*own(inputs.values())), {}
        if device not in copies:
            copies[device] = [upload(x, device) for x in inputs.values()]
        there = visit(module, device) if self.config.one_at_a_time else nullcontext()
        with there, autocast(device, self.precision), self._taps[name].watch() as tapped:
            output: object = module(*own(copies[device]))
        return output, tapped

    def _known(self, said: Sequence[Stated], names: Sequence[str]) -> Tensor | None:
        """Of the classes that top-k members leave unknown; InvalidRow where less is known than is to be kept."""
        listed = [s.listed.to(self.devices[0]) for s in said if s.listed is not None]
        codec = self.config.codec.inner if isinstance(self.config.codec, Members) else self.config.codec
        if not listed or self.config.tail == "uniform" or not isinstance(codec, TopK):
            return None
        known = torch.stack(listed).all(dim=0)
        count = known.sum(dim=1)
        if bool((few := count < codec.k).any()):
            row = int(few.nonzero()[0, 0])
            raise InvalidRow(
                " and ".join(f"member {n!r}" for n, s in zip(names, said, strict=True) if s.listed is not None),
                row,
                f"only {int(count[row])} known classes, the codec keeps {codec.k}",
                hint='lower the codec\'s k, or let members list more, or set tail="uniform"',
            )
        return known


def _rows(inputs: Mapping[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """These rows of the inputs, in this order; those that there are."""
    return {name: x[[row for row in rows if row < len(x)]] for name, x in inputs.items()}


def _check(name: str, logprobs: Tensor) -> None:
    # log_softmax turns a +inf logit into NaN; -inf alone is a class of probability zero, which is fine.
    if logprobs.isnan().any():
        row = int(logprobs.isnan().any(dim=1).nonzero()[0, 0])
        raise InvalidRow(name, row, "NaN or infinite logits")
