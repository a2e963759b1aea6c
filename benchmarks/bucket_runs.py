"""What two writers lose in a bucket whose requests fail, whose replies get lost and whose listings are behind.

    python benchmarks/bucket_runs.py --write docs/bucket-runs.md

Each run has a schedule of its own, drawn from its seed: a fifth of all requests fail, before or after they did their
work, and of every other listing half of the names are left out. Two writers capture the same small cache at the same
time; then it is sealed and verified by the same bad connection. The services are those of tests/test_buckets.py, on
loopback. A command that gives up after its eight attempts is run again, as a user would.
"""

from __future__ import annotations

import argparse
import logging
import platform
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import buckets
from buckets import FAULTS, LATE, Service
from crash_runs import cpu
from small import a_plan, put_item

from ensemble_distill.cache.plan import Plan
from ensemble_distill.cache.verify import verify
from ensemble_distill.errors import StorageError
from ensemble_distill.recording.seal import seal
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.store import Store

T = TypeVar("T")

NAMES = {"s3": "S3 (moto)", "gs": "Google Cloud Storage (fake-gcs-server)"}
PLAN = a_plan(rows=8, views=1)
# A server is fresh for so many runs: it looks through all that it holds for every listing.
BLOCK = 20


def fill(store: Store, plan: Plan, by: str, won: set[str]) -> None:
    """Capture the cache; notes the units that this writer was told it committed."""
    digest = store.put_plan(plan)
    for item in plan.items():
        units = [item.unit(group) for group in plan.groups]
        won.update(unit for unit, first in zip(units, put_item(store, plan, digest, item, by), strict=True) if first)


class Run:
    """One schedule: two writers, the seal, and what ``verify`` says. ``counts`` adds up over the runs."""

    def __init__(self, service: Service, seed: int, counts: Counter[str]) -> None:
        self.service, self.counts, self.folder = service, counts, f"run-{seed}"
        self._chance = random.Random(seed)

    def __call__(self, expected: str) -> None:
        proxy = self.service.proxy
        before, proxy.schedule = proxy.requests, self._fault
        won: dict[str, set[str]] = {"a": set(), "b": set()}
        writers = [threading.Thread(target=self._write, args=(by, units)) for by, units in won.items()]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        self.again(lambda: self._check(won, expected))
        self.counts["requests"] += proxy.requests - before
        self.counts["schedules"] += 1

    def _fault(self, method: str, path: str, n: int) -> str:
        if buckets.is_listing(method, path) and self._chance.random() < 0.5:
            fault = LATE
        else:
            fault = self._chance.choice(FAULTS) if self._chance.random() < 0.2 else ""
        self.counts[fault] += bool(fault)
        return fault

    def again(self, call: Callable[[], T]) -> T:
        for _ in range(10):
            try:
                return call()
            except StorageError:
                self.counts["given up"] += 1
        return call()

    def _write(self, by: str, won: set[str]) -> None:
        self.again(lambda: fill(Store(self.service.storage(self.folder)), PLAN, by, won))

    def _check(self, won: dict[str, set[str]], expected: str) -> None:
        store = Store(self.service.storage(self.folder))
        units = [PLAN.unit_name(number) for number in range(PLAN.units)]
        done = np.array([store.is_committed(unit) for unit in units])
        found: Counter[str] = Counter(losses=int((~done).sum()), doubles=len(won["a"] & won["b"]))
        found["losses"] += len(set(units) - won["a"] - won["b"])
        for by, mine in won.items():  # what each was told is what stands there
            found["losses"] += sum(store.commit(unit).provenance["by"] != by for unit in mine)
        digest = seal(PLAN, str(store.plan_digest()), store, done)
        found["other content"] = int(store.manifest(digest).content_digest != expected)
        found["damages"] = len(verify(store, workers=1).damaged)
        self.counts.update(found)


def block(scheme: str, seeds: list[int], expected: str) -> Counter[str]:
    """Some runs on one fresh server; what they add up to."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    counts: Counter[str] = Counter()
    with buckets.SERVERS[scheme]() as port:
        service = Service(scheme, port)
        for seed in seeds:
            Run(service, seed, counts)(expected)
        service.close()
    return counts


def undisturbed(folder: Path) -> str:
    store = Store(LocalStorage(folder, sync=False))
    fill(store, PLAN, "alone", set())
    return store.manifest(seal(PLAN, str(store.plan_digest()), store)).content_digest


BAD = ("losses", "doubles", "other content", "damages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--s3", type=int, default=700, help="schedules against S3")
    parser.add_argument("--gs", type=int, default=300, help="schedules against Google Cloud Storage")
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--jobs", type=int, default=4, help="processes, which mostly wait")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write a page of the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        expected = undisturbed(Path(name))
    columns: dict[str, Counter[str]] = {}
    for scheme in buckets.SCHEMES:
        seeds = list(range(args.seed, args.seed + getattr(args, scheme)))
        start = time.perf_counter()
        columns[scheme] = counts = Counter()
        with ProcessPoolExecutor(args.jobs) as pool:
            parts = [pool.submit(block, scheme, seeds[i : i + BLOCK], expected) for i in range(0, len(seeds), BLOCK)]
            for part in as_completed(parts):
                counts.update(part.result())
                print(scheme, dict(counts), f"{time.perf_counter() - start:.0f} s", flush=True)
        counts["seconds"] = round(time.perf_counter() - start)
    text = page(columns, args)
    print(text)
    if args.write:
        args.write.write_text(text)
    sys.exit(any(counts[kind] for counts in columns.values() for kind in BAD))


def page(columns: dict[str, Counter[str]], args: argparse.Namespace) -> str:
    def row(what: str, value: Callable[[Counter[str]], Any]) -> str:
        return f"| {what} | " + " | ".join(f"{value(columns[scheme]):,}" for scheme in buckets.SCHEMES) + " |"

    faults = {
        "answered 409, not done": "409 before", "answered 500, not done": "500 before",
        "answered 503, not done": "503 before", "answered 500, done": "500 after",
        "no answer, done": "cut after", "listings without half of their names": LATE,
    }  # fmt: skip
    lines = [
        row("schedules, two writers each", lambda c: c["schedules"]),
        row("units", lambda c: c["schedules"] * PLAN.units),
        row("requests", lambda c: c["requests"]),
        *(row(f"… {what}", lambda c, kind=kind: c[kind]) for what, kind in faults.items()),
        row("commands that gave up and were run again", lambda c: c["given up"]),
        row("**units lost**, or not what their writer was told", lambda c: c["losses"]),
        row("**units that both writers were told they committed**", lambda c: c["doubles"]),
        row("**other content** than an undisturbed capture", lambda c: c["other content"]),
        row("**damages** that `verify` found", lambda c: c["damages"]),
        row("seconds", lambda c: c["seconds"]),
    ]
    command = f"python benchmarks/bucket_runs.py --s3 {args.s3} --gs {args.gs} --seed {args.seed} --jobs {args.jobs}"
    return f"""# Bucket runs

Two writers capture the same small cache in a bucket at once, while a fifth of all requests fail, before or after they
did their work, and every other listing lacks half of its names; then it is sealed and verified by the same connection.
Written by

    {command} --write docs/bucket-runs.md

on {cpu()}, Python {platform.python_version()}, {platform.system()} {platform.release()}.

| | {" | ".join(NAMES[scheme] for scheme in buckets.SCHEMES)} |
|---|{"---|" * len(buckets.SCHEMES)}
{chr(10).join(lines)}

Nobody waits between attempts here; a command gives up after eight. Both services run on loopback and keep everything in
memory: what is tried is what a client does with their answers.
"""


if __name__ == "__main__":
    main()
