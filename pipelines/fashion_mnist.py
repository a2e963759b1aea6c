"""Fashion-MNIST: four residual teachers of up to 0.4 M parameters, a student of 30 thousand.

ensemble-distill cache pipelines/fashion_mnist.py --out caches/fmnist
ensemble-distill train pipelines/fashion_mnist.py --cache caches/fmnist --out runs/distilled
ensemble-distill train pipelines/fashion_mnist.py:alone --cache caches/fmnist --out runs/alone
"""

from pathlib import Path

import ensemble_distill as ed
from parts.fashion_mnist import CLASSES, split
from parts.resnet import ResNet

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
    return ResNet((12, 24, 40), classes=10)


def train() -> ed.TrainConfig:
    return ed.TrainConfig(
        student=student,
        objective={
            "soft": ed.SoftTargets(weight=0.7, temperature=4),
            "hard": ed.HardLabels(weight=0.3),
        },
        epochs=12,
        optimizer=ed.OptimizerConfig(kind="adamw", lr=3e-3, weight_decay=0.05),
    )


def alone() -> ed.TrainConfig:
    """The same student from the same initialisation, in the same order and views, from labels only."""
    return train().model_copy(update={"objective": {"hard": ed.HardLabels()}})
