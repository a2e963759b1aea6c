"""Optimiser, schedule and EMA, from their configurations."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import nn

from ensemble_distill.config import OptimizerConfig, ScheduleConfig


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Weight decay acts on matrices and filters only, not on biases and norms."""
    held = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in held if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in held if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.kind == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, config.lr)


def learning_rate(config: ScheduleConfig, base: float, step: int, steps: int) -> float:
    """The rate at ``step`` of ``steps``: a pure function, so that resuming needs no state."""
    progress = (step + 0.5) / steps
    if progress < config.warmup:
        return base * progress / config.warmup
    rest = (progress - config.warmup) / (1 - config.warmup)
    shape = {"constant": 1.0, "linear": 1 - rest, "cosine": 0.5 * (1 + math.cos(math.pi * rest))}
    return base * shape[config.kind]


class Ema:
    """An exponential moving average of a module's parameters; its buffers are those of the last step."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for mean, value in zip(self.module.parameters(), module.parameters(), strict=True):
            mean.lerp_(value, 1 - self.decay)
        for held, now in zip(self.module.buffers(), module.buffers(), strict=True):
            held.copy_(now)
