"""What a pipeline says, as data: frozen pydantic models, extra fields forbidden, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ensemble_distill.codec import Dense, FeatureValues, HeadCodec, Input, Members, TopK
from ensemble_distill.errors import UsageError
from ensemble_distill.explain import explain, suggestion
from ensemble_distill.frozen import Config, Name
from ensemble_distill.reduction import Random, Take, title
from ensemble_distill.terms import Term
from ensemble_distill.transforms import ViewsConfig

Precision = Literal["auto", "fp32", "bf16"]
Format = Literal["hdf5", "parquet"]
Gives = Literal["all", "topk"]  # the classes that a member tells apart
Tail = Literal["unknown", "uniform"]  # how the others are taken
Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/@+= -]+$", max_length=200)]


# Data: used by both stages --------------------------------------------------------------------------


class DataConfig(Config):
    """Sources by split (``train`` is shown in views; the others in view 0) and what they mean."""

    sources: dict[Name, Any]
    classes: tuple[str, ...] = Field(min_length=2)
    views: ViewsConfig = ViewsConfig()

    @field_validator("sources")
    @classmethod
    def _are_sources(cls, sources: dict[str, Any]) -> dict[str, Any]:
        for name, source in sources.items():
            missing = [a for a in ("load", "labels", "__len__") if not hasattr(source, a)]
            if missing:
                raise ValueError(f"source {name!r} has no {' and no '.join(missing)}: see docs/pipelines.md")
        return sources


# Stage 1 --------------------------------------------------------------------------------------------


class Member(Config):
    """One teacher: a function that builds the module, its weights, its share and temperature.

    ``build`` may return any other callable, such as a client of a served model: it is called with the batch's inputs
    on the CPU, in the order of the source, and ``version`` says who it is, for no hash can. Of a module, ``version``
    may say what its weights and structure do not.
    ``share``: of the mixture; None for equal ones. Either all members state theirs, and they sum to one, or none does.
    ``temperature`` divides the member's logits before averaging: calibration of the member.
    """

    name: Name = Field(max_length=100)
    build: Callable[[], Any]
    weights: Path | None = None
    version: Version | None = None
    share: float | None = Field(None, gt=0)
    temperature: float = Field(1.0, gt=0)


MAX_FIELD = 180


class Tap(Take):
    """What is kept of a named module of a member: by default its output [B, C, ...], averaged to [B, C].

    ``name``: of the field, where that is not to be the module's. ``values``: how activations are stored. ``project``:
    to fewer values, after the reduction. ``mask``: the input of the source, bool or integer [B, T], that is non-zero on
    the real tokens; of ``tokens`` these alone are kept.
    """

    member: Name
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=100)] | None = None
    values: FeatureValues = "fp16"
    project: Random | None = None
    mask: Input | None = None

    @property
    def field(self) -> str:
        return f"tap/{self.member}.{self.name or self.module}"

    @model_validator(mode="after")
    def _short(self) -> Self:
        if len(self.field) > MAX_FIELD:
            raise ValueError(f"its field {self.field!r} is longer than {MAX_FIELD} characters: give it a name")
        return self

    @model_validator(mode="after")
    def _masks_tokens(self) -> Self:
        if self.mask is not None and (self.reduction != "tokens" or self.project is not None):
            other = "project" if self.reduction == "tokens" else f"reduction={title(self.reduction)!r}"
            raise ValueError(f"mask={self.mask!r} is for reduction='tokens' without project, found {other}")
        return self

    @property
    def take(self) -> Take:
        return Take(**{name: getattr(self, name) for name in Take.model_fields})

    @property
    def recipe(self) -> Take | None:
        """What the plan says of how it is taken; None for the mean of the output of the module that the field names."""
        return None if self.name is None and self.take == Take(module=self.module) else self.take


class CacheConfig(Config):
    """Who teaches, how their predictions are combined, and what is kept.

    ``temperature`` is applied after averaging; a member's own before it. The two orders differ. ``calibrate``: a split
    on whose labels both are fitted, in a pass before the capture (Guo et al. 2017). ``tail``: how classes are taken
    that a top-k member does not list: ``unknown`` (then only what is known is kept), or ``uniform``: even.
    ``one_at_a_time``: a member is on its device only while it runs.
    """

    members: tuple[Member, ...] = Field(min_length=1)
    combine: Literal["mean_probs", "mean_logits"] = "mean_probs"
    temperature: float = Field(1.0, gt=0)
    calibrate: Name | None = None
    codec: HeadCodec = Field(Dense(), discriminator="name")
    taps: tuple[Tap, ...] = ()
    tail: Tail = "unknown"
    views: int = Field(1, ge=1, lt=2**24)
    format: Format = "hdf5"
    batch_size: int = Field(512, ge=1)
    unit_rows: int | None = Field(None, ge=1)
    precision: Precision = "auto"
    one_at_a_time: bool = False

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [m.name for m in self.members]
        _distinct("members are named", names)
        _distinct("taps are kept as", [tap.field for tap in self.taps])
        if any(name.casefold() == "ensemble" for name in names):
            raise ValueError("a member is named 'ensemble', as statistics call the mixture: give it another name")
        kept = isinstance(self.codec, Members) and isinstance(self.codec.inner, TopK)
        if kept and (self.combine != "mean_probs" or self.temperature != 1):
            raise ValueError(
                "a topk of members is mixed by mean_probs at temperature 1 only, "
                "for anything else needs all classes: use Members(inner=Dense())"
            )
        if self.calibrate is not None:
            self._free_temperatures()
        for tap in self.taps:
            if tap.member not in names:
                raise ValueError(f"tap {tap.field!r} names no member{suggestion(tap.member, names)}")
        return self

    def _free_temperatures(self) -> None:
        stated = [f"member {m.name!r}" for m in self.members if m.temperature != 1]
        if stated or self.temperature != 1:
            raise ValueError(f"calibrate fits the temperature of {(*stated, 'the ensemble')[0]}, which is stated too")
        if isinstance(self.codec, Members) and isinstance(self.codec.inner, TopK):
            raise ValueError("calibrate fits a temperature after averaging, which a topk of members cannot have")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        stated = [member.share for member in self.members if member.share is not None]
        if stated and len(stated) < len(self.members):
            without = next(member.name for member in self.members if member.share is None)
            raise ValueError(f"member {without!r} states no share, but others do: state that of all, or of none")
        if stated and abs(math.fsum(stated) - 1) > 1e-6:
            raise ValueError(f"the shares of the members sum to {math.fsum(stated):.9g}, expected 1")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """Each member's part of the mixture; 1/M where none is stated."""
        return tuple(1 / len(self.members) if m.share is None else m.share for m in self.members)


def _distinct(what: str, names: Iterable[str]) -> None:
    """ValueError for two that are alike, or differ by case only: some file systems take those for one."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.get(name.casefold())) is not None:
            alike = f"{name!r}" if other == name else f"{other!r} and {name!r}, which differ by case only"
            raise ValueError(f"two {what} {alike}")
        seen[name.casefold()] = name


# Stage 2 --------------------------------------------------------------------------------------------


class OptimizerConfig(Config):
    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True


class ScheduleConfig(Config):
    """Learning rate over the steps: up linearly during ``warmup`` (a share of them), then as named."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)


def _shares(weights: dict[str, float] | None) -> dict[str, float] | None:
    if weights is not None and abs(sum(weights.values()) - 1) > 1e-6:
        raise ValueError(f"the shares sum to {sum(weights.values()):g}, expected 1")
    return weights


_Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class EnsembleConfig(Config):
    """Another ensemble than the captured one, from a cache that keeps its members (codec ``members``).

    ``weights``: shares by member, which sum to one; members left out do not teach. ``temperatures``: by member, applied
    before averaging in place of those of the capture; ``temperature``: after it. What is None stays as captured.
    """

    weights: Annotated[
        dict[Name, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None, AfterValidator(_shares)
    ] = None
    combine: Literal["mean_probs", "mean_logits"] | None = None
    temperatures: dict[Name, _Temperature] | None = None
    temperature: _Temperature | None = None


class TrainConfig(Config):
    """A student, what it is taught, and for how long.

    ``weight``: a function of a batch's ``Targets`` that gives a weight ≥ 0 for each row, float [B]; zero leaves a row
    out. ``views``: how many of the cached views to walk, one an epoch (None: all). ``start``: weights to begin with
    instead of fresh ones: a safetensors file, or the directory of a finished run, of which it is ``last.safetensors``.
    """

    student: Callable[[], Any]
    objective: dict[Name, Term] = Field(min_length=1)
    ensemble: EnsembleConfig = EnsembleConfig()
    weight: Callable[[Any], Any] | None = None
    views: int | None = Field(None, ge=1)
    start: Path | None = None
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(128, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: float | None = Field(None, gt=0, lt=1)
    clip: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0, lt=2**32)
    precision: Precision = "auto"


# Overrides, descriptions, messages ------------------------------------------------------------------

C = TypeVar("C", bound=Config)


def override(config: C, settings: Iterable[str]) -> C:
    """A copy of ``config`` with each ``a.b=value`` applied; values are JSON, or else plain text."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: expected a.b=value")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        config = _replace(config, path.split("."), value, path)
    return config


def _replace(node: Any, path: list[str], value: Any, whole: str) -> Any:
    if not path:
        return value
    name, rest = path[0], path[1:]
    children = dict(node) if isinstance(node, (Config, Mapping)) else {}
    if name not in children:
        raise UsageError(f"--set {whole}: there is no field {name!r} here{suggestion(name, children)}")
    children[name] = _replace(children[name], rest, value, whole)
    if not isinstance(node, Config):
        return children
    try:
        return type(node)(**children)
    except ValidationError as error:
        field, _, problem = explain(error, type(node)).partition(": ")
        inner = field.removeprefix(name).strip(".")  # the field's own name stands in the option
        raise UsageError(f"--set {whole}: {inner + ': ' if inner else ''}{problem}") from error


def describe(value: Any) -> Any:
    """A configuration as JSON: functions by name, paths as text, sources by their length; not what plans leave out."""
    if isinstance(value, DataConfig):
        sources = {name: {"rows": len(source)} for name, source in value.sources.items()}
        return {"sources": sources, "classes": list(value.classes), "views": describe(value.views)}
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {name: describe(child) for name, child in value if not fields[name].exclude}
    if isinstance(value, Mapping):
        return {str(name): describe(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(child) for child in value]
    if isinstance(value, Path):
        return str(value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value
