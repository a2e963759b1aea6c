"""The codecs that `plan` prices beside the pipeline's own, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ensemble_distill.codec import Dense, HeadCodec, Members, Sampled, TopK, VarOpt


def default_sizes(classes: int) -> tuple[int, ...]:
    """Numbers of kept classes worth a look: powers of two up to 128 and half of the classes, in steps of 4.

    With fewer than 64 classes in steps of 2. 1000 classes: 8, 32, 128; 10 classes: 2, 4.
    """
    largest = min(128, 1 << (classes.bit_length() - 2))
    step = 4 if classes >= 64 else 2
    return tuple(size for size in (largest // step**2, largest // step, largest) if size > 1) or (1,)


def offers(sizes: Sequence[int]) -> Iterator[HeadCodec]:
    """Every codec, those that keep or draw some classes at each of the sizes."""
    yield Dense()
    yield Dense(bits=8)
    for size in sizes:
        yield TopK(k=size)
        yield TopK(k=size, values=16)
    yield from (VarOpt(k=size) for size in sizes)
    yield from (Sampled(n=size) for size in sizes)
    yield Members()
    yield Members(inner=Dense(bits=8))
    yield from (Members(inner=TopK(k=size)) for size in sizes)


def as_written(codec: HeadCodec) -> HeadCodec:
    """The same without what a plan fills in."""
    return type(codec).model_validate(spelled(codec))


def size_of(codec: HeadCodec) -> int | None:
    """How many classes a codec keeps or draws; None for all of them."""
    inner = codec.inner if isinstance(codec, Members) else codec
    if isinstance(inner, (TopK, VarOpt)):
        return inner.k
    return inner.n if isinstance(inner, Sampled) else None


def spelled(codec: HeadCodec) -> dict[str, Any]:
    """A codec as a pipeline's ``codec`` in JSON: its name, and the parameters that are not the defaults."""
    chosen = codec.model_dump(mode="json", exclude_defaults=True, exclude={"name", "classes", "members", "inner"})
    inner = {"inner": spelled(codec.inner)} if isinstance(codec, Members) else {}
    return {"name": codec.name, **chosen, **inner}


def name_of(codec: HeadCodec) -> str:
    """``topk k=8 values=16``, ``members topk k=8``: as ``spelled``, for people."""

    def words(parts: dict[str, Any]) -> Iterator[str]:
        yield parts["name"]
        yield from (f"{key}={_short(value)}" for key, value in parts.items() if key not in ("name", "inner"))
        if "inner" in parts:
            yield from words(parts["inner"])

    return " ".join(words(spelled(codec)))


def setting(codec: HeadCodec) -> str:
    """What to give to --set to have this codec."""
    return "codec=" + json.dumps(spelled(codec), separators=(",", ":"))


def _short(value: Any) -> str:
    return ",".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)
