"""The base of everything that is configured or recorded: frozen pydantic models."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


class Config(BaseModel):
    """The base of every configuration: immutable; an unknown field is an error, and so is a NaN or an infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


def without_empty(dumped: dict[str, Any], *names: str) -> dict[str, Any]:
    """What there is none of is no field: so records from before there was such a field are what they were."""
    return {name: value for name, value in dumped.items() if value or name not in names}
