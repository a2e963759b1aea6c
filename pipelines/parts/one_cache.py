"""One cache of Fashion-MNIST for the pipelines beside it: six members, each kept by itself, and every tap they need.

Who teaches is said by the student: the four residual networks, or the two vision transformers. The pipelines differ in
what their students are and learn, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import ensemble_distill as ed
from fashion_mnist import TEACHERS, data
from parts.resnet import ResNet
from parts.vit import ViT
from train_teachers import MEMBERS

__all__ = ["SOFT", "cache", "data", "every", "resnet", "taught", "vit"]

RESNETS, VITS = ("a", "b", "c", "d"), ("e", "f")
LAST_BLOCK = {"e": "blocks.2", "f": "blocks.3"}
SOFT = {"soft": ed.SoftTargets(weight=0.7, temperature=4), "hard": ed.HardLabels(weight=0.3)}


def taps() -> Iterable[ed.Tap]:
    for name in RESNETS:
        yield ed.Tap(member=name, module="pool")
        for stage in ("stage2", "stage3"):
            yield ed.Tap(member=name, module=stage, name=f"{stage}_attention", reduction=ed.Attention())
    yield ed.Tap(member="a", module="stage3", name="stage3_map", reduction="none")
    yield ed.Tap(member="a", module="stage3", name="stage3_map_int8", reduction="none", values="int8")
    for name, block in LAST_BLOCK.items():
        yield ed.Tap(member=name, module=f"{block}.attention.softmax", name="attention", reduction="attention_probs")


def cache() -> ed.CacheConfig:
    members = tuple(
        ed.Member(name=name, build=recipe.model, weights=TEACHERS / f"{name}.safetensors")
        for name, recipe in MEMBERS.items()
    )
    return ed.CacheConfig(members=members, codec=ed.Members(), taps=tuple(taps()))


def every(tap: str, members: Iterable[str] = RESNETS) -> tuple[str, ...]:
    """One tap of several members."""
    return tuple(f"tap/{name}.{tap}" for name in members)


def resnet() -> ResNet:
    """32 thousand parameters: its stage1 and stage2 have the height and width of the teachers' stage2 and stage3."""
    return ResNet((16, 24, 32), classes=10, first_stride=2)


def vit() -> ViT:
    """21 thousand parameters, and the 50 tokens of the teachers."""
    return ViT(patch=4, width=32, depth=2, heads=4, classes=10, hidden=64, stem=16)


def taught(objective: dict[str, Any], student: Callable[[], Any] = resnet, **changes: Any) -> ed.TrainConfig:
    """A student of the residual networks, or of the transformers if it is one."""
    teachers = VITS if student is vit else RESNETS
    return ed.TrainConfig(
        student=student,
        objective=objective,
        ensemble=ed.EnsembleConfig(weights=dict.fromkeys(teachers, 1 / len(teachers))),
        epochs=12,
        optimizer=ed.OptimizerConfig(kind="adamw", lr=3e-3, weight_decay=0.05),
        **changes,
    )
