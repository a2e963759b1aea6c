"""Train the committed Fashion-MNIST teachers, or go on with a training that was stopped.

    python pipelines/train_teachers.py --out data/teachers      # a to d: residual networks; e, f: transformers
    python pipelines/train_teachers.py --out data/teachers --only e f

Each member has its own seed, width, augmentation and schedule: one or two cycles of the learning rate
(Loshchilov & Hutter 2017), of which some epochs may see random 24-pixel windows, at 1.4 times less work, before
the whole 28-pixel images that the network is used at (Touvron et al. 2019). After each epoch the state is
saved beside the weights, so the same command resumes. The test set is looked at for the last line of each
member's log only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ensemble_distill.fingerprint import sample_keys
from ensemble_distill.sources.views import render
from ensemble_distill.transforms import Crop, Erase, Flip, ViewsConfig
from parts.fashion_mnist import split
from parts.resnet import ResNet
from parts.vit import ViT


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One member. ``cycles``: (epochs, peak learning rate, share of the epochs that see small windows)."""

    erase: float
    seed: int
    cycles: tuple[tuple[int, float, float], ...]
    batch_size: int = 128
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class ResNetRecipe(Recipe):
    widths: tuple[int, ...]
    weight_decay: float = 5e-4

    def model(self) -> nn.Module:
        return ResNet(self.widths, classes=10)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class ViTRecipe(Recipe):
    """A transformer of 28-pixel images only: no small windows. The weight decay is of matrices and kernels only."""

    width: int
    heads: int
    hidden: int
    depth: int
    patch: int = 4
    stem: int = 32
    batch_size: int = 64
    weight_decay: float = 0.05

    def model(self) -> nn.Module:
        return ViT(self.patch, self.width, self.depth, self.heads, classes=10, hidden=self.hidden, stem=self.stem)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        decayed = {layer.weight for layer in layers}
        others = [p for p in model.parameters() if p not in decayed]
        groups = [{"params": [layer.weight for layer in layers]}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, weight_decay=self.weight_decay, fused=True)


MEMBERS: dict[str, ResNetRecipe | ViTRecipe] = {
    "a": ResNetRecipe(widths=(32, 64, 128), erase=0.5, seed=1, cycles=((20, 0.15, 0.75), (12, 0.08, 0.0))),
    "b": ResNetRecipe(widths=(32, 64, 128), erase=0.3, seed=2, cycles=((24, 0.1, 0.0),)),
    "c": ResNetRecipe(widths=(32, 64, 128), erase=0.3, seed=3, cycles=((20, 0.15, 0.75), (12, 0.08, 0.0))),
    "d": ResNetRecipe(widths=(24, 64, 160), erase=0.2, seed=4, cycles=((24, 0.1, 0.0),)),
    "e": ViTRecipe(
        width=64, depth=3, heads=4, hidden=128, erase=0.1, seed=5, cycles=((10, 2e-3, 0.0), (5, 1.5e-3, 0.0))
    ),
    "f": ViTRecipe(width=48, depth=4, heads=3, hidden=144, erase=0.0, seed=6, cycles=((10, 3e-3, 0.0), (5, 2e-3, 0.0))),
}


@dataclass(frozen=True)
class Epoch:
    """Number over all cycles, place in its cycle (first: fresh momentum), and what its samples look like."""

    number: int
    place: int
    length: int
    lr: float
    views: ViewsConfig

    def learning_rate(self, share: float) -> float:
        """Within a cycle: up linearly for a fifth of the steps, then down along a cosine."""
        progress = (self.place + share) / self.length
        if progress < 0.2:
            return self.lr * (0.04 + 0.96 * progress / 0.2)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))


def epochs(recipe: Recipe) -> Iterator[Epoch]:
    number = 0
    for length, lr, small in recipe.cycles:
        for place in range(length):
            window = Crop(size=24) if place < small * length else Crop(padding=2)
            views = ViewsConfig(transforms=(Flip(), window, Erase(p=recipe.erase)), seed=recipe.seed)
            yield Epoch(number, place, length, lr, views)
            number += 1


def train(name: str, out: Path) -> None:
    recipe, weights, state = MEMBERS[name], out / f"{name}.safetensors", out / f"{name}.state.safetensors"
    log = out / f"{name}.jsonl"
    if weights.exists():
        print(f"{weights} is there: nothing to do")
        return
    torch.manual_seed(recipe.seed)
    model = recipe.model().to(memory_format=torch.channels_last)
    optimizer = recipe.optimizer(model)
    done = restore(model, optimizer, state)
    images, labels = split("train")
    keys = sample_keys({"image": images})
    for epoch in epochs(recipe):
        if epoch.number < done:
            continue
        if epoch.place == 0:
            optimizer.state.clear()
        start = time.perf_counter()
        loss = train_epoch(model, optimizer, recipe, epoch, (images, labels, keys))
        save(model, optimizer, epoch.number + 1, state)
        seconds = round(time.perf_counter() - start, 1)
        line = {"epoch": epoch.number + 1, "loss": loss, **evaluate(model, "held_out"), "seconds": seconds}
        append(log, name, line)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights)
    append(log, name, {"recipe": asdict(recipe), **evaluate(model, "test")})
    state.unlink()


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    epoch: Epoch,
    data: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> float:
    """One pass over the data in an order of (seed, epoch); the mean loss."""
    images, labels, keys = data
    model.train()
    order = np.random.default_rng((recipe.seed, epoch.number)).permutation(len(images))
    steps, total = len(images) // recipe.batch_size, 0.0
    for step in range(steps):
        index = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        batch = render(torch.from_numpy(images[index]), keys[index], epoch.views, epoch.number)
        for group in optimizer.param_groups:
            group["lr"] = epoch.learning_rate(step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), torch.from_numpy(labels[index]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    return round(total / steps, 4)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, path: Path) -> None:
    moments = {
        f"optimizer/{name}/{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
    }
    tensors = {k: v.contiguous() for k, v in (model.state_dict() | moments).items()}
    part = path.with_suffix(".part")
    save_file(tensors | {"epoch": torch.tensor(epoch)}, part)
    os.replace(part, path)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """The number of epochs done."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    done = int(tensors.pop("epoch"))
    parameters = dict(model.named_parameters())
    for field in [key for key in tensors if key.startswith("optimizer/")]:
        _, name, key = field.split("/")
        optimizer.state[parameters[name]][key] = tensors.pop(field)
    model.load_state_dict(tensors)
    return done


@torch.inference_mode()
def evaluate(model: nn.Module, part: str) -> dict[str, float]:
    model.eval()
    images, labels = split(part)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.cat([model(b).float() for b in torch.from_numpy(images).split(500)])
    target = torch.from_numpy(labels)
    return {
        f"{part}_accuracy": round(float((logits.argmax(1) == target).float().mean()), 4),
        f"{part}_nll": round(float(F.cross_entropy(logits, target)), 4),
    }


def append(log: Path, name: str, line: dict[str, object]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(name, line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/teachers"))
    parser.add_argument("--only", nargs="+", choices=MEMBERS, default=list(MEMBERS))
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        train(name, args.out)


if __name__ == "__main__":
    main()
