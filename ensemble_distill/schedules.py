"""Weights and temperatures that change during training: pure functions of progress, 0 at the start and 1 at the end."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ensemble_distill.errors import UsageError
from ensemble_distill.frozen import Config


def constant(progress: float, value: float) -> float:
    """The same throughout."""
    _checked(progress)
    return value


def linear(progress: float, start: float, end: float) -> float:
    """From ``start`` to ``end`` in a straight line."""
    return start + (end - start) * _checked(progress)


def cosine(progress: float, start: float, end: float) -> float:
    """From ``start`` to ``end`` along half a cosine: level at both ends (Loshchilov & Hutter 2017, eq. 5)."""
    return end + (start - end) * (1 + math.cos(math.pi * _checked(progress))) / 2


def warm_up(progress: float, value: float, until: float) -> float:
    """From 0 in a straight line to ``value``, which it has from ``until`` on."""
    return value * min(1.0, _checked(progress) / until) if until > 0 else constant(progress, value)


def switch_off(progress: float, value: float, after: float) -> float:
    """``value`` before the point ``after``, 0 from there on (teach first, then leave the student to the labels)."""
    return value if _checked(progress) < after else 0.0


def _checked(progress: float) -> float:
    if not 0 <= progress <= 1:
        raise UsageError(f"progress={progress}: expected a number from 0 to 1")
    return progress


# As data --------------------------------------------------------------------------------------------

Progress = Annotated[float, Field(ge=0, le=1)]


class Ramp(Config):
    """From ``start`` to ``end`` over the whole training, in a straight line or along half a cosine."""

    kind: Literal["ramp"] = "ramp"
    start: float = Field(ge=0)
    end: float = Field(ge=0)
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, progress: float) -> float:
        return (linear if self.shape == "linear" else cosine)(progress, self.start, self.end)

    @property
    def ends(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


class WarmUp(Config):
    """From 0 in a straight line to ``value``, which is reached at the share ``until`` of the training."""

    kind: Literal["warm_up"] = "warm_up"
    value: float = Field(1.0, ge=0)
    until: Progress = 0.1

    def at(self, progress: float) -> float:
        return warm_up(progress, self.value, self.until)

    @property
    def ends(self) -> tuple[float, float]:
        return 0.0, self.value


class SwitchOff(Config):
    """``value`` until the share ``after`` of the training is over, then 0."""

    kind: Literal["switch_off"] = "switch_off"
    value: float = Field(1.0, ge=0)
    after: Progress = 0.8

    def at(self, progress: float) -> float:
        return switch_off(progress, self.value, self.after)

    @property
    def ends(self) -> tuple[float, float]:
        return 0.0, self.value


def _kind(value: Any) -> str | None:
    if isinstance(value, (int, float)):
        return "number"
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else None


Scheduled = Annotated[
    Annotated[float, Tag("number")]
    | Annotated[Ramp, Tag("ramp")]
    | Annotated[WarmUp, Tag("warm_up")]
    | Annotated[SwitchOff, Tag("switch_off")],
    Discriminator(
        _kind,
        custom_error_type="scheduled",
        custom_error_message="expected a number, or a schedule of kind ramp, warm_up or switch_off",
    ),
]


def at(value: float | Ramp | WarmUp | SwitchOff, progress: float) -> float:
    """What a number, or a schedule of it, is at a point of the training."""
    return constant(progress, value) if isinstance(value, (int, float)) else value.at(progress)


def ends(value: float | Ramp | WarmUp | SwitchOff) -> tuple[float, float]:
    """The least and the largest value that a number, or a schedule of it, has."""
    return (value, value) if isinstance(value, (int, float)) else value.ends
