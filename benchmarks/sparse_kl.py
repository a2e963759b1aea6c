"""Sparse KL against plain cross-entropy on the same logits: time and peak memory of forward and backward, as ratios.

    python benchmarks/sparse_kl.py --write docs/sparse-kl.md

Both run in turn in one process for the times; each in a process of its own for the memory beyond the logits.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ensemble_distill.losses import soft_targets
from ensemble_distill.targets import Targets

Loss = Callable[[Tensor], Tensor]
NAMES = ("cross-entropy", "ghost", "unbiased")


def case(name: str, rows: int, classes: int, kept: int) -> tuple[Tensor, Loss]:
    """Logits [rows, classes] that want a gradient, and a loss on them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).requires_grad_()
    ids = torch.randint(0, classes, (rows, kept), generator=generator)
    if name == "cross-entropy":
        return logits, lambda x: F.cross_entropy(x, ids[:, 0])
    logprobs = torch.log_softmax(torch.randn(rows, kept + 1, generator=generator), dim=1)
    if name == "ghost":
        targets = Targets(logprobs[:, 1:], kind="ghost", ids=ids, residual=logprobs[:, 0].exp(), classes=classes)
    else:
        targets = Targets(logprobs[:, 1:], kind="unbiased", ids=ids, classes=classes)
    return logits, lambda x: soft_targets(x, targets)


def seconds(logits: Tensor, loss: Loss) -> float:
    logits.grad = None
    start = time.perf_counter()
    loss(logits).backward()
    return time.perf_counter() - start


def memory(name: str, rows: int, classes: int, kept: int) -> int:
    """Bytes that forward and backward take at their peak beyond the logits, in this (fresh) process."""
    small, warm = case(name, 2, classes, kept)
    warm(small).backward()
    logits, loss = case(name, rows, classes, kept)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss(logits).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1 << 17)
    parser.add_argument("--kept", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    shape = (args.rows, args.classes, args.kept)
    peaks = {}
    for name in NAMES:
        with ProcessPoolExecutor(1) as fresh:
            peaks[name] = fresh.submit(memory, name, *shape).result()
    cases = {name: case(name, *shape) for name in NAMES}
    ratios: dict[str, list[float]] = {name: [] for name in NAMES}
    for repetition in range(args.repetitions + 1):
        times = {name: seconds(*cases[name]) for name in NAMES}
        if repetition:  # the first one warms up
            for name in NAMES:
                ratios[name].append(times[name] / times["cross-entropy"])
    lines = [
        "# Sparse KL", "",
        f"`python {' '.join(sys.argv)}` on {os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch "
        f"{torch.__version__}: {args.rows} rows, {args.classes:,} classes, {args.kept} kept, float32. Ratios to "
        "`torch.nn.functional.cross_entropy` on the same logits, forward and backward; memory beyond the logits.", "",
        "| loss | time, median | range | peak memory | MB |", "|---|---|---|---|---|",
        *(
            f"| {name} | {statistics.median(ratios[name]):.2f} | {min(ratios[name]):.2f}–{max(ratios[name]):.2f} "
            f"| {peaks[name] / peaks['cross-entropy']:.2f} | {peaks[name] / 1e6:.0f} |"
            for name in NAMES
        ),
    ]  # fmt: skip
    print("\n".join(lines))
    if args.write:
        args.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
