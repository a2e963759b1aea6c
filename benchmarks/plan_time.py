"""How near `plan` comes: predicted seconds / seconds that the capture then took, on the Fashion-MNIST pipeline.

    python benchmarks/plan_time.py --write docs/plan-time.md

Both run in turn, each time anew, so that drift hits both; the capture is timed with its commits and its seal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from first_light import cpu

import fashion_mnist
from ensemble_distill.config import CacheConfig
from ensemble_distill.device import devices
from ensemble_distill.recording.capture import Recorder
from ensemble_distill.recording.planning import prepare
from ensemble_distill.recording.prices import price_list
from ensemble_distill.sources.arrays import Limited, Source
from ensemble_distill.store.leases import Leases, lease_storage
from ensemble_distill.store.store import open_store


def predicted(config: CacheConfig, sources: Mapping[str, Source], batches: int) -> tuple[float, float]:
    """Seconds of the capture as `plan` has them, and the seconds that it took to say so."""
    start = time.perf_counter()
    found = price_list(fashion_mnist.data(), config, sources, devices("auto"), batches=batches)
    return found.own.seconds, time.perf_counter() - start


def captured(config: CacheConfig, sources: Mapping[str, Source]) -> float:
    """Seconds of the capture, from the first batch to the manifest."""
    with tempfile.TemporaryDirectory() as name:
        store = open_store(name, create=True)
        leases = Leases(lease_storage(store.storage))
        plan, ensemble = prepare(fashion_mnist.data(), config, sources, store, leases, devices("auto"))
        recorder = Recorder(plan, ensemble, sources, store, leases)
        recorder.run()
        return recorder.progress.seconds_so_far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--limit", type=int, default=1024, help="samples of each split")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=5, help="batches of the probe")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write a page of the figures here")
    args = parser.parse_args()
    sources = {name: Limited(source, args.limit) for name, source in fashion_mnist.data().sources.items()}
    config = fashion_mnist.cache().model_copy(update={"precision": "fp32", "batch_size": args.batch_size})
    rows, load = [], os.getloadavg()[0]
    for _ in range(args.repetitions):
        said, planning = predicted(config, sources, args.batches)
        took = captured(config, sources)
        rows.append((said, took, said / took, planning))
        print(
            f"predicted {said:.2f} s, took {took:.2f} s: {said / took:.3f} (plan itself {planning:.2f} s)", flush=True
        )
    if args.write:
        args.write.write_text(page(args, sum(map(len, sources.values())), rows, load))


def page(args: argparse.Namespace, count: int, rows: list[tuple[float, ...]], load: float) -> str:
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    lines = [
        f"| {name} | {said:.2f} | {took:.2f} | {ratio:.3f} | {planning:.2f} |"
        for name, (said, took, ratio, planning) in [*enumerate(rows, 1), ("median", medians)]
    ]
    machine = f"{cpu()}, {torch.get_num_threads()} threads, {devices('auto')[0]}, torch {torch.__version__}"
    return f"""# What `plan` says of time, and what it took

`python {" ".join(sys.argv)}` on {machine}.
The Fashion-MNIST pipeline, {count:,} rows in batches of {args.batch_size}, fp32; a probe of {args.batches} batches.
Prediction and capture in turn, each anew; the capture with its commits and its seal. Load of the machine before the
first: {load:.1f} on {os.cpu_count()} cores.

| | predicted, s | took, s | predicted / took | `plan` itself, s |
|---|---|---|---|---|
{chr(10).join(lines)}
"""


if __name__ == "__main__":
    main()
