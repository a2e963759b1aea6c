"""The base of everything that is configured or recorded: frozen pydantic models."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """The base of every configuration: immutable; an unknown field is an error, and so is a NaN or an infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
