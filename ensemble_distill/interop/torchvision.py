"""Transforms of ``torchvision.transforms.v2`` (or their like) in views: what they draw comes from the counter.

Such a transform takes one image, uint8 or floating [C, H, W], and draws from torch's global generator, which all
threads of a process share: a loader that seeded it would disturb, and be disturbed by, the dropout of the training
loop. So each row runs under a generator of its own, which is seeded by the row's draws and handed to every drawing
function that the transform calls in this thread. torchvision itself is not imported here: the pipeline makes the
transform (extra: ``torchvision``).

And names of the modules that one usually taps in its models: ``taps``, ``explicit_attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ensemble_distill.interop.attention import ExplicitAttention
from ensemble_distill.interop.names import numbered, present, under, unknown
from ensemble_distill.transforms import Custom

Model = TypeVar("Model", bound=nn.Module)

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


def taps(model: nn.Module, prefix: str = "") -> dict[str, str]:
    """Usual names to module paths, for ``Tap(member, module)`` and ``FeatureMatch(module=...)``.

    ResNet, MobileNet, EfficientNet, ConvNeXt: ``stage1`` … ``stageN`` [B, C, h, w], the last module of each resolution
    (without the 1×1 convolution before the pooling), and ``pool`` [B, C, 1, 1]; MobileNetV2 pools by a function, so
    there ``pool`` is what goes in, [B, C, h, w], of which a tap keeps the mean. ViT: ``block1`` … ``blockN`` and,
    after the last norm, ``tokens`` [B, T, D]; ``attention1`` … ``attentionN``, probabilities [B, heads, T, T], once
    ``explicit_attention`` has made them modules. ``prefix``: the path of the model within the module that is tapped.
    Raises UsageError for other models.
    """
    known = dict(model.named_modules())
    pool = present(known, pool="avgpool") or present(known, pool="features")
    if blocks := numbered(known, r"encoder\.layers\.encoder_layer_(\d+)", "block"):
        softmax = {
            name.replace("block", "attention"): f"{path}.self_attention.softmax" for name, path in blocks.items()
        }
        return under(prefix, blocks | present(known, **softmax) | present(known, tokens="encoder.ln"))
    if layers := numbered(known, r"layer(\d+)", "stage"):
        return under(prefix, layers | pool)
    if "features.0" in known:
        return under(prefix, _ends(known) | pool)
    raise unknown(model, "torchvision's ResNet, MobileNet, EfficientNet, ViT or ConvNeXt")


def explicit_attention(model: Model) -> Model:
    """The model itself, each ``nn.MultiheadAttention`` replaced by one that computes the same and has a softmax to tap.

    The parameters keep their names and are shared. Raises UsageError for attention that is no plain self-attention.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, ExplicitAttention(module))
    return model


def _ends(known: Mapping[str, nn.Module]) -> dict[str, str]:
    """Of the children of ``features`` those that a change of resolution, the head or nothing follows."""
    paths = [*numbered(known, r"features\.(\d+)", "").values()]
    bodies = [path for path in paths if any(max(conv.kernel_size) > 1 for conv in _convolutions(known[path]))]
    strided = {path for path in bodies if any(max(conv.stride) > 1 for conv in _convolutions(known[path]))}
    ends = [path for path, after in pairwise(bodies) if after in strided] + bodies[-1:]
    return {f"stage{i}": path for i, path in enumerate(ends, 1)}


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [conv for conv in module.modules() if isinstance(conv, nn.Conv2d)]
