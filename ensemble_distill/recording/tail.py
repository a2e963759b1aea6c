"""What top-k members leave unsaid: what can be kept without it, and what a plan says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ensemble_distill.codec import Members, TopK
from ensemble_distill.config import CacheConfig, Gives, Tail
from ensemble_distill.errors import UsageError


def resolved_tail(config: CacheConfig, gives: Sequence[Gives]) -> Tail | None:
    """How the plan's captures treat the classes that top-k members do not list; None where all give all classes.

    UsageError where they stay unknown (``tail="unknown"``) and something was asked for that needs them.
    """
    if "topk" not in gives:
        return None
    if config.tail == "unknown" and (needs := next(_needs_all(config, gives), None)) is not None:
        name = config.members[gives.index("topk")].name
        raise UsageError(
            f"member {name!r} gives its likeliest classes only, but {needs} needs all of them",
            hint="use TopK(k=…, temperatures=()), alone or in Members, with mean_probs at temperature 1; or set "
            'tail="uniform" to take what is not listed as even, which is then no longer what the member said',
        )
    return config.tail


def _needs_all(config: CacheConfig, gives: Sequence[Gives]) -> Iterator[str]:
    codec = config.codec.inner if isinstance(config.codec, Members) else config.codec
    if not isinstance(codec, TopK):
        yield f"the codec {codec.name}"
    elif codec.temperatures:
        yield "log_z of the codec topk (temperatures)"
    if config.combine != "mean_probs":
        yield config.combine
    if config.temperature != 1:
        yield f"temperature={config.temperature:g}"
    for member, kind in zip(config.members, gives, strict=True):
        if kind == "topk" and member.temperature != 1:
            yield f"temperature={member.temperature:g} of {member.name!r}"
