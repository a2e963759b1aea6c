"""Transforms of ``torchvision.transforms.v2`` (or their like) in views: what they draw comes from the counter.

Such a transform takes one image, uint8 or floating [C, H, W], and draws from torch's global generator, which all
threads of a process share: a loader that seeded it would disturb, and be disturbed by, the dropout of the training
loop. So each row runs under a generator of its own, which is seeded by the row's draws and handed to every drawing
function that the transform calls in this thread. torchvision itself is not imported here: the pipeline makes the
transform (extra: ``torchvision``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ensemble_distill.config import Custom

# The functions and methods of torch that draw and take a generator.
_DRAWING = frozenset({
    "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal",
    "normal_", "poisson", "rand", "randint", "randn", "random_", "randperm", "uniform_",
})  # fmt: skip


def from_torchvision(name: str, transform: Callable[[Tensor], Tensor]) -> Custom:
    """A ``Custom`` transform for ``ViewsConfig`` out of a transform of torchvision's v2, which runs row by row.

    It is a pure function of (image, u): two slots of u seed all that the transform draws for a row. It must give
    images of one shape, in the dtype that it was given. The plan knows it by ``name``: give another parameter or
    another version of torchvision, if its pixels are others, another name. `cache` refuses what draws by other means,
    such as Python's ``random`` or a function that takes no generator (``rand_like``, ``dropout``).
    """

    def function(images: Tensor, u: Tensor) -> Tensor:
        return torch.stack([_under(seed, transform, image) for seed, image in zip(_seeds(u), images, strict=True)])

    return Custom(name=name, slots=2, function=function)


def _seeds(u: Tensor) -> list[int]:
    """A seed of 63 bits for each row of u, float64 [B, 2]: whole multiples of 2⁻³²."""
    high, low = (u * 2**32).long().unbind(1)
    seeds: list[int] = ((high >> 1) << 32 | low).tolist()
    return seeds


def _under(seed: int, transform: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    with _Drawing(torch.Generator().manual_seed(seed)):
        return transform(image.clone())  # some transforms write into the image that they are given


class _Drawing(TorchFunctionMode):
    """In this thread, what torch draws comes from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _DRAWING and kwargs.get("generator") is None:
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)
