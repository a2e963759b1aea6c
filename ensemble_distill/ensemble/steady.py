"""Does a member say the same of a sample each time, and in any batch? A few rows show it before a capture begins.

A member that draws by chance, or changes as it runs, cannot be captured again; one that mixes the rows of a batch says
things of which no content key is the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ensemble_distill.ensemble.distributions import Stated
from ensemble_distill.errors import InvalidOutput

# What rounding may do to a log-probability, relative to the largest of its row, at least 1: the last bits of the same
# kernels, as an audit allows it in fp32; in half precision, or on a server, as in bf16; and of activations that are
# quantised in the range of their batch (.05 was seen in a deep network in int8).
SAME, ROUGH, QUANTISED = 1e-3, 5e-2, 1e-1
LOWEST = -30.0
FIRST = [0, 1]
AMONG_OTHERS = [1, 0, 2, 3]


def check_steady(
    names: Sequence[str], modules: Sequence[object], once: Sequence[Stated], run: Callable[[list[int]], list[Stated]]
) -> None:
    """InvalidOutput, naming the member, for one that says something else of the same rows.

    once: what each said of rows 0 and 1. run: what they say of these rows of the same inputs, in this order.
    """
    back = [1, 0][-len(once[0].logits) :]
    others = [_rows(said, back) for said in run(AMONG_OTHERS)]
    apart = [i for i, (a, b) in enumerate(zip(once, others, strict=True)) if _apart(a, b, SAME)]
    again = run(FIRST) if apart else []
    for i in apart:
        if _apart(once[i], again[i], SAME if _exact(modules[i]) else ROUGH):
            raise InvalidOutput(
                f"member {names[i]!r} says something else when it is shown the same samples again",
                hint="it draws by chance or changes as it runs: F.dropout needs training=self.training, and eval mode "
                "reaches registered modules only",
            )
        if _apart(once[i], others[i], QUANTISED):
            raise InvalidOutput(
                f"member {names[i]!r} says something else of a sample when others are in its batch",
                hint="what it says must be of each sample alone: batch norm needs running statistics",
            )


def _exact(module: object) -> bool:
    """Whether the same kernels give the same but for last bits: modules whose weights are not in half precision."""
    return isinstance(module, nn.Module) and all(p.element_size() >= 4 for p in module.parameters())


def _rows(said: Stated, order: list[int]) -> Stated:
    return Stated(said.logits[order], None if said.listed is None else said.listed[order])


def _apart(a: Stated, b: Stated, tolerance: float) -> bool:
    """Whether log-probabilities differ by more than a share of the largest of their row. NaN is told elsewhere."""
    x, y = (_logprobs(said.logits) for said in (a, b))
    difference = (x - y).abs()
    if a.listed is not None and b.listed is not None:  # the last of the likeliest may be another
        difference = difference.where(a.listed & b.listed, torch.zeros_like(difference))
    size = torch.maximum(x.abs(), y.abs()).amax(dim=1, keepdim=True).clamp(min=1)
    return bool((difference > tolerance * size).any())


def _logprobs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), dim=1).clamp(min=LOWEST)
