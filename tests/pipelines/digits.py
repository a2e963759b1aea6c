"""scikit-learn's digits: three small teachers and a smaller student; ``prepare`` writes what they read."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

import ensemble_distill as ed

HERE = Path(__file__).parent
VIEW_SEED = 3
CLASSES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


class Net(nn.Module):
    """Images uint8 [B, 1, 8, 8] to logits [B, 10]."""

    def __init__(self, width):
        super().__init__()
        self.pool = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.head = nn.Linear(width, 10)

    def forward(self, image):
        return self.head(self.pool(image.float() / 16))


def arrays():
    digits = np.load(HERE / "digits.npz")
    return digits["images"], digits["labels"]


def data():
    images, labels = arrays()
    parts = {"train": slice(0, 1000), "held_out": slice(1000, 1200), "test": slice(1200, None)}
    return ed.DataConfig(
        sources={name: ed.ArraySource({"image": images[part]}, labels[part]) for name, part in parts.items()},
        classes=CLASSES,
        views=ed.ViewsConfig(transforms=(ed.Crop(padding=1),), seed=VIEW_SEED),
    )


def cache():
    members = tuple(
        ed.Member(name=name, build=lambda: Net(48), weights=HERE / f"{name}.safetensors") for name in ("a", "b", "c")
    )
    return ed.CacheConfig(
        members=members,
        taps=(ed.Tap(member="a", module="pool"),),
        views=2,
        unit_rows=200,
        batch_size=64,
        precision="fp32",
    )


def student():
    return Net(16)


def train():
    return ed.TrainConfig(
        student=student,
        objective={
            "soft": ed.SoftTargets(weight=0.7, temperature=2),
            "hard": ed.HardLabels(weight=0.3),
            "feature": ed.FeatureMatch(tap="tap/a.pool", module="pool", weight=0.1),
        },
        epochs=4,
        batch_size=20,
        optimizer=ed.OptimizerConfig(lr=1e-2),
        ema=0.9,
        precision="fp32",
    )


def other():
    """Another architecture at another temperature, with dropout and plain SGD."""
    return ed.TrainConfig(
        student=lambda: nn.Sequential(
            Scale(), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(144, 10)
        ),
        objective={"soft": ed.SoftTargets(temperature=4)},
        epochs=2,
        batch_size=100,
        optimizer=ed.OptimizerConfig(kind="sgd", lr=0.1),
        schedule=ed.ScheduleConfig(kind="linear"),
        clip=1.0,
        precision="fp32",
    )


class Scale(nn.Module):
    def forward(self, x):
        return x.float() / 16


def prepare(folder):
    """Write the data and the members' weights into ``folder``: sixty full-batch steps each."""
    from safetensors.torch import save_file
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = pixels.astype(np.uint8).reshape(-1, 1, 8, 8)
    np.savez(Path(folder) / "digits.npz", images=images, labels=labels)
    x, y = torch.from_numpy(images[:1000]), torch.from_numpy(labels[:1000])
    for seed, name in enumerate(("a", "b", "c")):
        torch.manual_seed(seed)
        net = Net(48)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        save_file(net.state_dict(), Path(folder) / f"{name}.safetensors")
