"""Views of samples, as a configuration says them: transforms, mixing, seed. What they do is in ``sources/``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer

from ensemble_distill.frozen import Config, Name


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
