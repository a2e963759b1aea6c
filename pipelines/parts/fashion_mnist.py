"""Fashion-MNIST from the files in data/: 55,000 images to train on, 5,000 held out, 10,000 to test."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from ensemble_distill.sources.idx import read_idx

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
HELD_OUT = 5_000
DATA = Path(__file__).parents[2] / "data" / "fashion_mnist"


@cache
def _read(name: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(DATA / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(DATA / f"{name}-labels-idx1-ubyte.gz")
    return images[:, None], labels.astype(np.int64)


def split(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 1, 28, 28] and labels int64 [N] of ``train``, ``held_out`` or ``test``."""
    if name == "test":
        return _read("t10k")
    images, labels = _read("train")
    part = slice(-HELD_OUT, None) if name == "held_out" else slice(None, -HELD_OUT)
    return images[part], labels[part]
