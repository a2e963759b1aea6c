"""Fashion-MNIST: four residual teachers of up to 0.4 M parameters, students of 32 thousand.

ensemble-distill cache pipelines/fashion_mnist.py --out caches/fmnist
ensemble-distill train pipelines/fashion_mnist.py --cache caches/fmnist --out runs/distilled
ensemble-distill train pipelines/fashion_mnist.py:alone --cache caches/fmnist --out runs/alone
"""

from pathlib import Path

import ensemble_distill as ed
from parts.fashion_mnist import CLASSES, split
from parts.resnet import ResNet
from parts.separable import SeparableNet

TEACHERS = Path(__file__).parents[1] / "data" / "teachers"
WIDTHS = {"a": (32, 64, 128), "b": (32, 64, 128), "c": (32, 64, 128), "d": (24, 64, 160)}


def data() -> ed.DataConfig:
    sources = {}
    for name in ("train", "held_out", "test"):
        images, labels = split(name)
        sources[name] = ed.ArraySource({"image": images}, labels)
    views = ed.ViewsConfig(transforms=(ed.Flip(), ed.Crop(padding=2)))
    return ed.DataConfig(sources=sources, classes=CLASSES, views=views)


def cache() -> ed.CacheConfig:
    members = tuple(
        ed.Member(name=name, build=lambda widths=widths: ResNet(widths, 10), weights=TEACHERS / f"{name}.safetensors")
        for name, widths in WIDTHS.items()
    )
    return ed.CacheConfig(members=members, taps=(ed.Tap(member="a", module="pool"),))


def student() -> ResNet:
    return ResNet((16, 24, 32), classes=10, first_stride=2)


def train() -> ed.TrainConfig:
    return ed.TrainConfig(
        student=student,
        objective={
            "soft": ed.SoftTargets(weight=0.7, temperature=4),
            "hard": ed.HardLabels(weight=0.3),
        },
        epochs=18,
        optimizer=ed.OptimizerConfig(kind="adamw", lr=3e-3, weight_decay=0.05),
    )


def alone() -> ed.TrainConfig:
    """The same student from the same initialisation, in the same order and views, from labels only."""
    return train().model_copy(update={"objective": {"hard": ed.HardLabels()}})


def cool() -> ed.TrainConfig:
    """The same student at temperature 1, from the ensemble alone, for fewer epochs."""
    return train().model_copy(update={"objective": {"soft": ed.SoftTargets()}, "epochs": 13})


def hint() -> ed.TrainConfig:
    """The same student, whose pooled feature is also pulled towards member a's."""
    feature = ed.FeatureMatch(tap="tap/a.pool", module="pool", distance="cosine", weight=0.5)
    return train().model_copy(update={"objective": train().objective | {"feature": feature}})


def separable() -> ed.TrainConfig:
    """Another architecture of the same size, for fewer epochs."""

    def build() -> SeparableNet:
        return SeparableNet(16, ((48, 2), (48, 1), (96, 2), (96, 1), (96, 1)), classes=10)

    return train().model_copy(update={"student": build, "epochs": 13})
