"""Codecs as data: their parameters, the arrays that they make of a row, and the error that they declare. No torch.

What they do to tensors stands in ``codecs/``. In a pipeline ``classes`` (and the members' names) are left out: the
plan fills them in.

Legend of shapes: C classes, K kept entries. All arrays are little-endian. Ids are packed at ``id_bits`` bits each.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ensemble_distill.frozen import Config
from ensemble_distill.reduction import Random, Take

MAX_CLASSES = 1 << 25
TEMPERATURES = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)

# numpy dtype and shape (without the row axis) of each array of a row, by name.
Arrays = dict[str, tuple[str, tuple[int, ...]]]

Classes = Annotated[int, Field(ge=0, le=MAX_CLASSES)]


def _distinct(temperatures: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(temperatures)) < len(temperatures):
        raise ValueError(f"a temperature stands twice in {temperatures}")
    return temperatures


class Dense(Config):
    """Every class: float16 log-probabilities, 2C bytes; or ``bits=8``, log-uniform codes and their range, C + 4 bytes.

    float16: a log-probability is off by at most 2⁻¹¹ of its size or 3·10⁻⁸. 8 bits: by at most half a step, a step
    being 1/254 of the row's range of logs, 20 nats at most; what lies below is raised to the lowest code. Rows are
    normalised again when they are decoded. Certainties and impossibilities (−inf) are kept.
    """

    name: Literal["dense"] = "dense"
    classes: Classes = 0
    bits: Literal[8, 16] = 16

    def arrays(self) -> Arrays:
        if self.bits == 16:
            return {"logprobs": ("<f2", (self.classes,))}
        return {"codes": ("|u1", (self.classes,)), "range": ("<f2", (2,))}

    @property
    def error(self) -> str:
        return "2⁻¹¹ of a log-probability" if self.bits == 16 else "half of 1/254 of a row's range of logs"


class TopK(Config):
    """The k likeliest classes, what is left, and log Σ p^(1/T) over all classes for a few temperatures.

    ``values``: bits of a log-probability, 8 (log-uniform over the row's range, 4 bytes more) or 16 (float16). The
    kept set is normalised to one minus the residual when it is decoded, and never to one: the residual is a class of
    its own to every loss, so that nothing is renormalised or spread in silence.
    """

    name: Literal["topk"] = "topk"
    classes: Classes = 0
    k: int = Field(ge=1, le=1 << 16)
    values: Literal[8, 16] = 8
    temperatures: Annotated[tuple[Annotated[float, Field(gt=1, le=100)], ...], AfterValidator(_distinct)] = Field(
        TEMPERATURES, max_length=32
    )

    def arrays(self) -> Arrays:
        # Without temperatures there is no array: HDF5 has none of size zero.
        grid: Arrays = {"log_z": ("<f2", (len(self.temperatures),))} if self.temperatures else {}
        kept = {"ids": ids(self.k, self.classes), **kept_values(self.k, self.values)}
        return {**kept, "residual": ("<f2", ()), **grid}

    @property
    def error(self) -> str:
        kept = "half of 1/254 of the kept range of logs" if self.values == 8 else "2⁻¹¹ of a log-probability"
        return f"{kept}; the classes not kept are one"


class VarOpt(Config):
    """An unbiased sample of exactly k classes with total weight one: likely classes as they are, a draw of the rest.

    A class of probability p ≥ τ is kept at p; each other one with probability p/τ, at the one weight τ, where
    Σ min(1, p/τ) = k (VarOpt, Cohen et al. 2011). So the expectation of each weight is p, with the smallest possible
    variance for k entries. The draw is systematic, and a function of (seed, key, view) alone.
    """

    name: Literal["varopt"] = "varopt"
    classes: Classes = 0
    k: int = Field(ge=1, le=1 << 16)
    seed: int = Field(0, ge=0, lt=2**32)

    def arrays(self) -> Arrays:
        return {"ids": ids(self.k, self.classes), **kept_values(self.k, 8), "residual": ("<f2", ())}

    @property
    def error(self) -> str:
        return "unbiased but for the rounding of the likely classes to half of 1/254 of their range"


class Sampled(Config):
    """n classes drawn from the distribution, each of weight 1/n (random sampling KD, Anshumann et al. 2025)."""

    name: Literal["sampled"] = "sampled"
    classes: Classes = 0
    n: int = Field(ge=1, le=1 << 16)
    seed: int = Field(0, ge=0, lt=2**32)

    def arrays(self) -> Arrays:
        return {"ids": ids(self.n, self.classes)}

    @property
    def error(self) -> str:
        return "unbiased"


class Members(Config):
    """Each member's own row, so that shares and combine rule can change after the capture.

    ``inner`` dense: all of it. ``inner`` topk: the k likeliest classes of the ensemble, the same for all members, with
    each member's values and residual: a mixture of them is exact on that support, whatever the shares.
    """

    name: Literal["members"] = "members"
    inner: Dense | TopK = Field(Dense(), discriminator="name")
    members: Annotated[tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], ...], Field(max_length=1 << 10)] = ()

    @property
    def classes(self) -> int:
        return self.inner.classes

    def arrays(self) -> Arrays:
        inner = self.inner.arrays()
        shared = {"ids": inner.pop("ids")} if isinstance(self.inner, TopK) else {}
        return shared | {f"{member}/{name}": array for member in self.members for name, array in inner.items()}

    @property
    def error(self) -> str:
        return f"of each member: {self.inner.error}"


class RowFigures(Config):
    """Three figures of each row in float16, for filters and weights, and what the label is worth to the ensemble.

    entropy: of the ensemble, nats. mutual_information: H(mean of the members) − mean of the members' H, nats, at the
    shares of the capture: what they disagree about. label_logprob: nats, NaN where there is no label.
    """

    name: Literal["row"] = "row"

    def arrays(self) -> Arrays:
        return {"entropy": ("<f2", ()), "mutual_information": ("<f2", ()), "label_logprob": ("<f2", ())}

    @property
    def error(self) -> str:
        return "2⁻¹¹ of a figure"


class PartnerKey(Config):
    """The content key of the sample that a row's sample was mixed with; zeros in view 0, which mixes nothing."""

    name: Literal["partner"] = "partner"

    def arrays(self) -> Arrays:
        return {"": ("|u1", (16,))}

    @property
    def error(self) -> str:
        return "none"


FeatureValues = Literal["fp16", "bf16", "int8"]
Input = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)]  # of a source, by name
MAX_FEATURE = 1 << 27


class Features(Config):
    """A tap's activations: ``width`` of them, or an array of ``shape`` (two axes or more, without the batch).

    values, for D activations. fp16: 2D bytes, off by at most 2⁻¹¹ of their size or 3·10⁻⁸, none beyond ±65504. bf16: 2D
    bytes, the upper halves of float32, off by at most 2⁻⁸ of their size. int8: D bytes and a float16 scale s for each
    channel (index of ``axis``), or one for a feature of one axis; an activation is q·s, |q| ≤ 127, off by at most s/2,
    where s is the channel's largest size over 127, rounded up.
    take, project: how the tap is taken, where that is more than the mean of a module's only output; for readers.

    mask: where it names an input of the source, the feature is *ragged*: of tokens [T, D] those alone are kept that
    this input [T] marks as real. A row has the bits of its mask, where its tokens begin among all those of its unit,
    and for int8 a scale for each channel of these tokens; the tokens, D values each, stand one after another beside
    the rows.
    """

    name: Literal["features"] = "features"
    width: int = Field(0, ge=0, le=MAX_FEATURE)
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_FEATURE)], ...], Field(max_length=6)] = ()
    values: FeatureValues = "fp16"
    axis: int = Field(0, ge=0, lt=6)
    take: Take | None = None
    project: Random | None = None
    mask: Input | None = None

    @classmethod
    def of(cls, shape: tuple[int, ...], values: FeatureValues = "fp16", axis: int = 0, **how: Any) -> Features:
        """The codec of features [B, *shape]. ValueError for one that is too large."""
        size = {"width": shape[0]} if len(shape) == 1 else {"shape": shape, "axis": axis}
        return cls(**size, values=values, **how)

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.width > 0) == bool(self.shape) or len(self.shape) == 1:
            raise ValueError("a feature has a width, or a shape of two axes or more")
        if math.prod(self.dims) > MAX_FEATURE or self.axis >= len(self.dims):
            raise ValueError(f"a feature of shape {list(self.dims)}, axis {self.axis} is more than can be kept")
        if self.mask is not None and (len(self.shape) != 2 or self.axis != 1 or self.project is not None):
            raise ValueError("a mask is for tokens [T, D], which are not projected and whose channels stand last")
        return self

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is as it always was is no field: so plans from before there was more than a width are what they were."""
        dumped: dict[str, Any] = handler(self)
        return {k: v for k, v in dumped.items() if k == "name" or v not in (0, "fp16", None, (), [])}

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape of a row, of one axis or more."""
        return self.shape or (self.width,)

    def arrays(self) -> Arrays:
        """What stands in each row; of a ragged feature all but the tokens."""
        if self.mask is None:
            return self._whole()
        scales = {name: array for name, array in self._whole().items() if name not in self.token()}
        return {"mask": self._bits, "start": ("<u4", ()), **scales}

    def token(self) -> Arrays:
        """The one array of a token of a ragged feature; empty for others, which are kept whole."""
        if self.mask is None:
            return {}
        name, (dtype, shape) = next(iter(self._whole().items()))
        return {name: (dtype, shape[1:])}

    def padded(self) -> Arrays:
        """What a row is decoded from: what stands in it, but of a ragged feature with the tokens where they were."""
        return self._whole() if self.mask is None else {"mask": self._bits, **self._whole()}

    def _whole(self) -> Arrays:
        if self.values == "int8":
            scales = (self.shape[self.axis],) if self.shape else ()
            return {"codes": ("|i1", self.dims), "scale": ("<f2", scales)}
        return {"": ("<f2" if self.values == "fp16" else "<u2", self.dims)}

    @property
    def _bits(self) -> tuple[str, tuple[int, ...]]:
        return "|u1", (math.ceil(self.dims[0] / 8),)

    @property
    def error(self) -> str:
        each = "channel" if self.shape else "row"
        int8 = f"half of 1/127 of the largest feature of its {each}"
        return {"fp16": "2⁻¹¹ of a feature", "bf16": "2⁻⁸ of a feature", "int8": int8}[self.values]


HeadCodec = Dense | TopK | VarOpt | Sampled | Members
AnyCodec = Annotated[HeadCodec | RowFigures | PartnerKey | Features, Field(discriminator="name")]


def resolved(codec: HeadCodec, classes: int, members: tuple[str, ...]) -> HeadCodec:
    """The codec of a plan: with the number of classes, and the members' names where it keeps them.

    ValueError where it would keep more classes than there are.
    """
    if isinstance(codec, Members):
        inner = resolved(codec.inner, classes, members)
        return Members.model_validate({**dict(codec), "inner": dict(inner), "members": members})
    if isinstance(codec, (TopK, VarOpt)) and codec.k > classes:
        raise ValueError(f"{codec.name} would keep k={codec.k} of {classes} classes")
    return type(codec).model_validate({**dict(codec), "classes": classes})


def id_bits(classes: int) -> int:
    """Bits of an id: ⌈log2 C⌉, at least one."""
    return max(1, (classes - 1).bit_length())


def ids(count: int, classes: int) -> tuple[str, tuple[int, ...]]:
    return "|u1", (math.ceil(count * id_bits(classes) / 8),)


def kept_values(count: int, bits: int) -> Arrays:
    """Log-probabilities of kept classes: float16, or codes with their range (lowest, highest)."""
    if bits == 16:
        return {"logprobs": ("<f2", (count,))}
    return {"codes": ("|u1", (count,)), "range": ("<f2", (2,))}
