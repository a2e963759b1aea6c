"""What a pipeline says, as data: frozen pydantic models, extra fields forbidden, no torch."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ensemble_distill.codec import Dense, FeatureValues, HeadCodec, Input, Members, TopK
from ensemble_distill.errors import UsageError
from ensemble_distill.frozen import Config
from ensemble_distill.reduction import Random, Take, title
from ensemble_distill.terms import Term

Precision = Literal["auto", "fp32", "bf16"]
Format = Literal["hdf5", "parquet"]
Gives = Literal["all", "topk"]  # the classes that a member tells apart
Tail = Literal["unknown", "uniform"]  # how the others are taken
Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/@+= -]+$", max_length=200)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


# Data: used by both stages --------------------------------------------------------------------------


class Flip(Config):
    """Mirror left to right with probability one half."""

    kind: Literal["flip"] = "flip"


class Crop(Config):
    """Pad with zeros on all sides, then cut a window at a drawn position (``size`` pixels square)."""

    kind: Literal["crop"] = "crop"
    padding: int = Field(0, ge=0)
    size: int | None = Field(None, ge=1)


class Erase(Config):
    """Random erasing (Zhong et al. 2020): with probability ``p`` fill a drawn rectangle."""

    kind: Literal["erase"] = "erase"
    p: float = Field(0.5, ge=0, le=1)
    area: tuple[float, float] = (0.02, 0.3)
    aspect: tuple[float, float] = (0.3, 3.3)
    fill: float = 0


def _rising(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError(f"the first number must not be above the second, found {span}")
    return span


_Share = Annotated[float, Field(gt=0, le=1)]
_Ratio = Annotated[float, Field(ge=0.01, le=100)]


class Rotate(Config):
    """Turn about the centre by an angle uniform in ±``degrees``, bilinear; ``fill`` is the pixel value around it."""

    kind: Literal["rotate"] = "rotate"
    degrees: float = Field(ge=0, le=180)
    fill: float = Field(0, ge=0, le=255)


class ColorJitter(Config):
    """Brightness, contrast, saturation and hue, changed in this order by drawn amounts.

    The first three are scaled by factors uniform in [max(0, 1 − x), 1 + x], hue is turned by a part of a full turn
    uniform in [−x, x]. 0 leaves one as it is. Saturation and hue need three channels.
    """

    kind: Literal["color_jitter"] = "color_jitter"
    brightness: float = Field(0, ge=0, le=100)
    contrast: float = Field(0, ge=0, le=100)
    saturation: float = Field(0, ge=0, le=100)
    hue: float = Field(0, ge=0, le=0.5)


class ResizedCrop(Config):
    """Inception crop (Szegedy et al. 2015): cut a drawn rectangle and resize it to ``size`` pixels square, bilinear.

    Its area is uniform in ``area`` (a share of the image), its aspect (width over height) log-uniform in
    ``aspect``; it is clipped to the image.
    """

    kind: Literal["resized_crop"] = "resized_crop"
    size: int = Field(ge=1, le=1 << 14)
    area: Annotated[tuple[_Share, _Share], AfterValidator(_rising)] = (0.08, 1.0)
    aspect: Annotated[tuple[_Ratio, _Ratio], AfterValidator(_rising)] = (3 / 4, 4 / 3)


class Custom(Config):
    """A transform of the user's own: ``function(images [B, C, H, W], u float64 [B, slots]) -> images``.

    It must be a pure function of its arguments, and treat each row by itself: ``u`` holds all that is drawn, uniform
    in [0, 1). A plan knows it by ``name`` and ``slots`` only, so give a function that was changed another name. What
    was read back from a plan has no function.
    """

    kind: Literal["custom"] = "custom"
    name: Name = Field(max_length=100)
    slots: int = Field(ge=0, le=1024)
    function: Callable[[Any, Any], Any] | None = Field(None, exclude=True, repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and (self.name, self.slots) == (other.name, other.slots)

    def __hash__(self) -> int:
        return hash((self.kind, self.name, self.slots))


Transform = Annotated[
    Flip | Crop | Erase | Rotate | ColorJitter | ResizedCrop | Custom,
    Field(discriminator="kind"),
]


def named(transform: Transform) -> str:
    """How messages call a transform: ``flip``, ``custom 'blur'``."""
    return f"custom {transform.name!r}" if isinstance(transform, Custom) else transform.kind


class Mixup(Config):
    """Blend each sample with a partner: λ x + (1 − λ) x', λ from Beta(``alpha``, ``alpha``) (Zhang et al. 2018)."""

    kind: Literal["mixup"] = "mixup"
    alpha: float = Field(0.2, gt=0, le=1000)


class CutMix(Config):
    """Paste a rectangle of a partner into each sample, of a share 1 − λ of it before it is clipped to the image.

    λ comes from Beta(``alpha``, ``alpha``) (Yun et al. 2019).
    """

    kind: Literal["cutmix"] = "cutmix"
    alpha: float = Field(1.0, gt=0, le=1000)


class ViewsConfig(Config):
    """Deterministic views of each training sample: pure functions of (seed, key, view number).

    View 0 is the sample as it is; the transforms draw the others. They act on the source's input named
    ``input``, images [B, C, H, W]. ``mix`` then mixes each with another sample of the split, in the same view.
    """

    transforms: tuple[Transform, ...] = ()
    seed: int = Field(0, ge=0, lt=2**32)
    input: str = "image"
    mix: Annotated[Mixup | CutMix, Field(discriminator="kind")] | None = None

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Views that mix nothing do not speak of it: so plans from before there was ``mix`` are what they were."""
        dumped: dict[str, Any] = handler(self)
        if self.mix is None:
            dumped.pop("mix", None)
        return dumped

    @property
    def plain(self) -> bool:
        """Whether all views show the sample as it is: then they differ in what a codec draws, and in nothing else."""
        return not self.transforms and self.mix is None


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


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One sentence for the first thing that a config got wrong, with a suggestion for a misspelt field."""
    first = error.errors()[0]
    names = [str(part)[:100] for part in first["loc"]]
    where = ".".join(name for name in names if "[" not in name) or model.__name__  # a type tried is no name: literal[…]
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        fields = model.model_fields if len(first["loc"]) == 1 else _all_fields(model)
        return f"{where}: {model.__name__} has no such field{suggestion(name, fields)}"
    found = first["input"]
    shown = repr(found)[:200] if isinstance(found, (int, float, bool, type(None))) else _short(found)
    return f"{where}: {first['msg'].removeprefix('Value error, ')[:500]} (found {shown})"


def _short(value: Any) -> str:
    """A value as text, if that is no more than people read; else what it is. Whole lists may be huge."""
    if isinstance(value, (str, bytes)):
        return repr(value[:200])
    if isinstance(value, (list, tuple, dict, set)):
        return (
            repr(value)
            if len(value) <= 8 and len(str(type(value))) < 100
            else f"a {type(value).__name__} of {len(value)}"
        )
    return repr(value)[:200]


def _all_fields(model: type[BaseModel]) -> set[str]:
    return {name for kind in Config.__subclasses__() for name in kind.model_fields} | set(model.model_fields)


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or the list of what there is."""
    known = list(known)
    if len(name) > 100:
        return ""
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there is {', '.join(map(repr, known[:8]))}" if known else ""


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


def difference(expected: Any, found: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The first (field, expected, found) in which two JSON values differ, or None."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for name in sorted(set(expected) | set(found)):
            inner = f"{where}.{name}" if where else name
            if (hit := difference(expected.get(name), found.get(name), inner)) is not None:
                return hit
        return None
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)) and len(expected) == len(found):
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            if (hit := difference(a, b, f"{where}[{i}]")) is not None:
                return hit
        return None
    return None if expected == found else (where, expected, found)
