"""What is taken of a module and what is made of it, as data, for teachers and students alike. No torch.

What reductions do to tensors stands in ``reductions.py``, projections in ``projection.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ensemble_distill.frozen import Config

ModulePath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=200)]
Place = Annotated[int, Field(ge=0, lt=1024)]


class Attention(Config):
    """A map [B, C, H, W] to where its activity is: Σ_c |A|^p, [B, H, W] (Zagoruyko & Komodakis 2017, section 3.1)."""

    name: Literal["attention"] = "attention"
    p: float = Field(2.0, gt=0, le=16)


class AttentionProbs(Config):
    """Attention probabilities [B, heads, T, T]: their mean over the heads, [B, T, T], or all of them."""

    name: Literal["attention_probs"] = "attention_probs"
    heads: Literal["mean", "keep"] = "mean"


Plain = Literal["none", "pool", "flatten", "cls", "tokens", "token_mean", "gram"]
Named = Literal["attention", "attention_probs"]


def _spelled(reduction: Plain | Named | Attention | AttentionProbs) -> Plain | Named | Attention | AttentionProbs:
    """A name alone stands for the reduction with its defaults."""
    if reduction == "attention":
        return Attention()
    return AttentionProbs() if reduction == "attention_probs" else reduction


Reduction = Annotated[Plain | Named | Attention | AttentionProbs, AfterValidator(_spelled)]


def title(reduction: Reduction) -> str:
    """How messages call a reduction: ``pool``, ``attention(p=2)``."""
    if isinstance(reduction, Attention):
        return f"attention(p={reduction.p:g})"
    return f"attention_probs(heads={reduction.heads})" if isinstance(reduction, AttentionProbs) else reduction


def channel_axis(reduction: Reduction, axes: int) -> int:
    """Which axis of a feature (without the batch) holds its channels: the last of tokens, else the first."""
    return axes - 1 if reduction == "tokens" else 0


class Random(Config):
    """Random projection of a feature's D values to ``dim``, which keeps distances on average; drawn, never stored.

    sparse: entries ±√(3/dim) with probability 1/6 each, else 0 (Achlioptas 2003, eq. 2), the same to the bit on all
    machines. gaussian: N(0, 1/dim) (Johnson & Lindenstrauss 1984; Indyk & Motwani 1998). Either is a function of
    (seed, D, dim).
    """

    name: Literal["random"] = "random"
    dim: int = Field(ge=1, le=1 << 16)
    seed: int = Field(0, ge=0, lt=2**32)
    kind: Literal["sparse", "gaussian"] = "sparse"


class Take(Config):
    """What is taken of a module's pass, and what is made of it.

    output, input: which of several outputs, or which input, counted from 0 (keyword arguments last); by default the
    output, which must then be a tensor. call: which pass of a module that runs several times.
    """

    module: ModulePath
    reduction: Reduction = "pool"
    output: Place | None = None
    input: Place | None = None
    call: Place | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if self.output is not None and self.input is not None:
            raise ValueError("a tap takes an output or an input, not both")
        return self

    @property
    def what(self) -> str:
        """How messages call it: ``module 'x'``, ``output 1 of module 'x'``."""
        side = "output" if self.output is not None else "input"
        number = self.output if self.output is not None else self.input
        return f"module {self.module!r}" if number is None else f"{side} {number} of module {self.module!r}"
