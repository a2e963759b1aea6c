"""Bytes committed per second against one fsynced write of the same bytes. Prints a table.

    python benchmarks/commit_speed.py --write docs/commit-speed.md

Both are measured in turn, in one directory, several times; the ratio of each pair counts, and its median is shown.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ensemble_distill.cache.verify import verify  # noqa: F401  (loads what a first call would load)
from ensemble_distill.fingerprint import sha256
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.store import Store

UNIT = 64 << 20


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def measure(folder: Path, row: int, size: int, format: str, repetitions: int) -> list[float]:
    """Ratios of throughput, commit / bare write, of units of ``size`` bytes with rows of ``row`` bytes."""
    records = np.random.default_rng(0).integers(0, 255, (size // row, row), np.uint8)
    table = records.view([("main/logprobs", "|u1", (row,))]).reshape(-1)
    store = Store(LocalStorage(folder / f"{format}-{row}-{size}"))
    ratios = []
    for i in range(repetitions + 1):
        table["main/logprobs"][:, :8] = i  # other content, or the object would stand there already
        data = table.tobytes()
        bare = seconds(lambda i=i, data=data: write(folder / f"bare-{format}-{row}-{size}-{i}", data))
        mine = seconds(lambda i=i: store.put_unit("p", f"u-{i}", table, format, "0" * 64, None, {}))
        if i:  # the first round warms up
            ratios.append(bare / mine)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write  [default: the temporary directory]")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, row in (("dense, 1000 classes, 2000 B a row", 2000), ("top-k, 128 B a row", 128)):
            for size in (UNIT, UNIT // 16):
                for format in ("hdf5", "parquet"):
                    found = measure(Path(folder), row, size, format, args.repetitions)
                    middle = statistics.median(found)
                    rows.append(
                        f"| {name} | {size >> 20} MiB | {format} | {middle:.2f} | {min(found):.2f}–{max(found):.2f} |"
                    )
                    print(rows[-1], flush=True)
    hashing = 64 / seconds(lambda: sha256(bytes(64 << 20)))
    lines = [
        "# Commit speed",
        "",
        f"`python {' '.join(sys.argv)}` on {os.cpu_count()} cores, {platform.system()} {platform.machine()}; "
        f"SHA-256 hashes {hashing:,.0f} MiB/s here on one core. Ratio: bytes committed per second (encode, hashes "
        "of the bytes, write, fsync, link, fsync of the directory, commit) to one fsynced write of the same bytes.",
        "",
        "| rows | unit | format | ratio, median | range |",
        "|---|---|---|---|---|",
        *rows,
    ]
    if args.write:
        args.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
