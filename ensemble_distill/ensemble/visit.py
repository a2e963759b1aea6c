"""Members one after another: each is on its device only while it runs, for ensembles that do not fit together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ensemble_distill.device import place


def settle(module: nn.Module, device: torch.device) -> nn.Module:
    """Keep a module on the host, laid out as it will be on ``device``; pinned for CUDA, where copies are then fast."""
    module = place(module, torch.device("cpu"))
    if device.type == "cuda":
        for parameter in module.parameters():
            parameter.data = parameter.data.pin_memory()
    return module


@contextmanager
def visit(module: nn.Module, device: torch.device) -> Iterator[None]:
    """While inside, the module is on ``device``; then its weights there are dropped and those of the host are back.

    A forward pass changes no weights, so nothing is copied back but buffers.
    """
    home = [(parameter, parameter.data) for parameter in module.parameters()]
    with torch.inference_mode(False):  # weights that were moved in inference mode could be used in no other
        module.to(device, non_blocking=True)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            for parameter, data in home:
                parameter.data = data
            module.to("cpu")
