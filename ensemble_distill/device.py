"""Devices and precision: ``auto`` is what is measured to be faster here, and is then written down."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ensemble_distill.config import Precision
from ensemble_distill.errors import OutOfMemory, UsageError

Resolved = Literal["fp32", "bf16"]

# bfloat16 rounds; it has to be clearly faster to be chosen.
WORTH = 1.15


def devices(choice: str) -> list[torch.device]:
    """The devices of ``auto`` (all CUDA devices, else the CPU) or of a list such as ``cuda:0,cuda:1``."""
    if choice == "auto":
        count = torch.cuda.device_count()
        return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    found = []
    for name in choice.split(","):
        try:
            device = torch.device(name.strip())
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"--device {name}: {reason}", hint="use auto, cpu, cuda or cuda:0,cuda:1") from error
        found.append(device)
    return found


def autocast(device: torch.device, precision: Resolved) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move to a device; convolutions in channels_last, which is faster on CPUs and GPUs alike."""
    module = module.to(device)
    if any(p.ndim == 4 for p in module.parameters()):
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def upload(value: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device: through pinned memory to CUDA, so that the copy overlaps with work."""
    if device.type == "cuda":
        value = value.pin_memory().to(device, non_blocking=True)
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def own(inputs: Iterable[Tensor]) -> list[Tensor]:
    """Copies: a module may work in place on what it is given, and on a CPU that is the source's memory.

    Ordinary tensors, which may be changed on any thread.
    """
    with torch.inference_mode(False), torch.no_grad():
        return [x.clone() for x in inputs]


def choose_precision(choice: Precision, device: torch.device, step: Callable[[Resolved], object]) -> Resolved:
    """``auto``: bf16 where ``step`` runs clearly faster in it than in fp32 (medians of five), else fp32."""
    if choice != "auto":
        return choice
    times: dict[Resolved, list[float]] = {"fp32": [], "bf16": []}
    for repetition in range(6):
        for precision in times:
            start = time.perf_counter()
            step(precision)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repetition:  # the first one warms up
                times[precision].append(time.perf_counter() - start)
    ratio = statistics.median(times["fp32"]) / statistics.median(times["bf16"])
    return "bf16" if ratio > WORTH else "fp32"


@contextlib.contextmanager
def memory_errors(batch_size: int) -> Iterator[None]:
    """Turn running out of memory, on the device or the host, into one sentence that says what to try."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        host = "can't allocate memory" in str(error) or isinstance(error, MemoryError)
        if not host and not isinstance(error, torch.OutOfMemoryError):
            raise
        where = "host" if host else "device"
        raise OutOfMemory(
            f"out of {where} memory at batch size {batch_size}",
            hint=f"try --batch-size {max(1, batch_size // 2)}",
        ) from error
