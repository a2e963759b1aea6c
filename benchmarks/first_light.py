"""Four ratios, each of two things measured in one run, in turn; medians of several repetitions.

    python benchmarks/first_light.py

1. stage 1: the bare forward passes of the members / the whole capture of the same rows     (goal: at least 0.95)
2. stage 2: waiting for the loader / the whole epoch                                          (goal: below 0.03)
3. stage 2: rows/s of shuffled target batches, checked / a memory-map gather of the same rows (goal: at least 0.5)
4. the time a cache saves: an epoch with the ensemble live in the loop / an epoch from the cache
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
import fashion_mnist
from ensemble_distill.cache.opening import open_cache
from ensemble_distill.cache.samples import read
from ensemble_distill.device import devices, place
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.losses import hard_labels, soft_targets
from ensemble_distill.philox import permutation
from ensemble_distill.recording.capture import Recorder
from ensemble_distill.recording.planning import prepare
from ensemble_distill.scoring import logits_of
from ensemble_distill.sources.arrays import Limited, Source
from ensemble_distill.store.leases import Leases, lease_storage
from ensemble_distill.store.store import open_store
from ensemble_distill.targets import Targets
from ensemble_distill.training.run import Run

GOALS = {
    "bare forward / capture": "at least 0.95",
    "loader wait / epoch": "below 0.03",
    "target reads / memory-map gather": "at least 0.5",
    "live epoch / cached epoch": "",
}


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def pairs(first: Callable[[], object], second: Callable[[], object], repetitions: int) -> tuple[float, list[float]]:
    """The median of first/second, and all of them; the two run in turn, so that drift hits both."""
    first(), second()
    ratios = [timed(first) / timed(second) for _ in range(repetitions)]
    return statistics.median(ratios), ratios


def bare_forward(ensemble: Ensemble, batches: list[dict[str, torch.Tensor]]) -> None:
    """What capturing cannot do without: the members' passes over inputs that lie ready in memory."""
    for inputs in batches:
        ensemble.look(inputs)
    synchronize()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stage1(sources: dict[str, Source], folder: Path, repetitions: int) -> tuple[float, list[float]]:
    data, config = fashion_mnist.data(), fashion_mnist.cache()
    count = iter(range(1000))
    store = open_store(folder / "plan", create=True)
    plan, ensemble = prepare(data, config, sources, store, Leases(store.storage), devices("auto"))
    batches = [
        read(source, index)[0]
        for source in sources.values()
        for index in np.array_split(np.arange(len(source)), -(-len(source) // plan.capture.batch_size))
    ]

    def capture() -> None:
        store = open_store(folder / f"capture-{next(count)}", create=True)
        Recorder(plan, ensemble, sources, store, Leases(lease_storage(store.storage))).run()

    return pairs(lambda: bare_forward(ensemble, batches), capture, repetitions)


def stage2_reads(cache_path: Path, source: Source, repetitions: int) -> tuple[float, list[float]]:
    cache = open_cache(cache_path)
    rows = len(source)
    raw = np.memmap(cache_path.parent / "raw.bin", np.float16, "w+", shape=(rows, 10))
    raw[:] = cache.targets_at(np.arange(rows)).logprobs.half().numpy()
    order = permutation(rows, 0, 0)
    batches = [order[i : i + 256] for i in range(0, rows, 256)]

    def ours() -> None:
        for index in batches:
            cache.targets_at(index)

    def limit() -> None:  # the same rows, decoded the same way: what is left is the reader's own cost
        for index in batches:
            torch.log_softmax(torch.from_numpy(raw[index]).float(), 1)

    return pairs(limit, ours, repetitions)


def live_against_cached(
    cache_path: Path, source: Source, ensemble: Ensemble, repetitions: int
) -> tuple[float, list[float]]:
    """An epoch of the student with the ensemble live in the loop / the same epoch from the cache."""
    cache, config = open_cache(cache_path), fashion_mnist.train()
    device = devices("auto")[0]

    def live() -> Iterator[tuple[dict[str, torch.Tensor], Targets, torch.Tensor]]:
        order = permutation(len(source), 0, 0)
        for index in np.array_split(order, -(-len(order) // config.batch_size)):
            inputs, labels, _ = read(source, index)
            yield inputs, Targets(ensemble(inputs).logprobs.clone()), labels

    def cached() -> Iterator[tuple[dict[str, torch.Tensor], Targets, torch.Tensor]]:
        for batch in cache.loader(source, config.batch_size):
            yield batch.inputs, batch.targets, batch.labels

    def epoch(batches: Callable[[], Iterator[tuple[dict[str, torch.Tensor], Targets, torch.Tensor]]]) -> None:
        torch.manual_seed(0)
        student = place(config.student(), device)
        optimizer = torch.optim.AdamW(student.parameters())
        for inputs, targets, labels in batches():
            logits = logits_of(student, inputs, device, ensemble.precision)
            loss = 0.7 * soft_targets(logits, targets.to(device), 4.0) + 0.3 * hard_labels(logits, labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        synchronize()

    return pairs(lambda: epoch(live), lambda: epoch(cached), repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="training samples to measure on")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write a page of the figures here")
    args = parser.parse_args()
    data = fashion_mnist.data()
    sources: dict[str, Source] = {"train": Limited(data.sources["train"], args.rows)}
    results: dict[str, Any] = {
        "rows": args.rows,
        "machine": f"{cpu()}, {torch.get_num_threads()} threads, {devices('auto')[0]}, torch {torch.__version__}",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ratio, spread = stage1(sources, folder, args.repetitions)
        report(results, "bare forward / capture", ratio, spread)
        cache_path = folder / "capture-0"
        config = fashion_mnist.train().model_copy(update={"epochs": 3})
        run = Run(data, config, sources, open_cache(cache_path), folder / "run", devices("auto")[0])
        run.train()
        waits = [line["timing"]["loader_wait"] for line in run.history if "timing" in line]
        report(results, "loader wait / epoch", statistics.median(waits), waits)
        ratio, spread = stage2_reads(cache_path, sources["train"], args.repetitions)
        report(results, "target reads / memory-map gather", ratio, spread)
        store = open_store(cache_path)
        _, ensemble = prepare(data, fashion_mnist.cache(), sources, store, Leases(store.storage), devices("auto"))
        ratio, spread = live_against_cached(cache_path, sources["train"], ensemble, max(1, args.repetitions // 2))
        report(results, "live epoch / cached epoch", ratio, spread)
    print(json.dumps(results, indent=1))
    if args.write:
        args.write.write_text(page(results, args))


def report(results: dict[str, Any], name: str, ratio: float, spread: list[float]) -> None:
    results[name] = {"median": round(ratio, 4), "all": [round(r, 4) for r in spread]}
    print(f"{name}: {ratio:.3f}  ({', '.join(f'{r:.3f}' for r in spread)})", flush=True)


def page(results: dict[str, Any], args: argparse.Namespace) -> str:
    rows = [
        f"| {name} | {goal} | {results[name]['median']} | {', '.join(map(str, results[name]['all']))} |"
        for name, goal in GOALS.items()
    ]
    return f"""# Benchmarks

Each figure is the ratio of two things measured in one run, in turn, on the teachers and the student of the
Fashion-MNIST pipeline and {args.rows:,} training samples; medians of the repetitions. Written by

    python benchmarks/first_light.py --rows {args.rows} --repetitions {args.repetitions} --write docs/benchmarks.md

on {results["machine"]}.

| | goal | median | all |
|---|---|---|---|
{chr(10).join(rows)}

- *bare forward / capture*: the members' passes over inputs that lie ready, against the whole of stage 1.
- *loader wait / epoch*: the share of a training epoch that the student waits for its next batch.
- *target reads / memory-map gather*: rows/s of shuffled, decoded target batches from HDF5 shards, first touch verified,
  against a gather of the same rows from one memory-mapped array, decoded the same way.
- *live epoch / cached epoch*: how many times longer an epoch takes with the ensemble in the loop.
"""


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return f"{names[0].split(':')[1].strip() if names else platform.processor()} ({platform.machine()})"


if __name__ == "__main__":
    main()
