"""What a million units cost: planning, resuming, sealing and opening, on simulated shards. Prints a table.

    python benchmarks/scale.py --units 100000 1000000 --write docs/scale.md

The commits are the tool's own records, but made up when they are read, instead of kept in a directory: what is
measured is the tool, not the file system. Each size runs in a process of its own, whose peak memory is shown.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from small import a_plan

from ensemble_distill.cache.commits import Commits, committed_units, held_plan
from ensemble_distill.cache.plan import Capture, MemberIdentity, Plan
from ensemble_distill.fingerprint import sha256
from ensemble_distill.recording.seal import seal
from ensemble_distill.store import records
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.records import Commit
from ensemble_distill.store.store import Store
from ensemble_distill.tally import Tally


class Simulated:
    """A storage whose commits and key pages are made up when they are read; the rest is kept in a folder."""

    root = "simulated"

    def __init__(self, plan: Plan, present: int, folder: Path) -> None:
        self.plan, self.present = plan, present
        self._files = LocalStorage(folder, sync=False)
        self.requests: dict[str, int] = {}
        self._lock = threading.Lock()
        self.keys = bytes(16)
        self.plan_digest = ""
        tally = Tally.empty(plan.predictors, len(plan.reading.classes))
        tally.add("rows", 1)
        self._template = Commit(
            plan="P", unit="U", object="0" * 64 + ".h5", size=1000, rows=1, segments=(), blocks=("0" * 64,),
            content="0" * 64, keys=sha256(self.keys), statistics=tally.state(),
            provenance={"time": "2026", "device": "cpu"},
        )  # fmt: skip
        self._body = records.dump(self._template).decode()
        self._plain = records.dump(self._template.model_copy(update={"statistics": None})).decode()

    def _count(self, name: str) -> None:
        kind = name.partition("/")[0]
        with self._lock:
            self.requests[kind] = self.requests.get(kind, 0) + 1

    def create(self, name: str, *parts: bytes | memoryview) -> bool:
        self._count("create")
        return self._files.create(name, *parts)

    def replace(self, name: str, data: bytes) -> None:
        self._files.replace(name, data)

    def swap(self, name: str, expected: bytes | None, data: bytes) -> bool:
        return self._files.swap(name, expected, data)

    def read(self, name: str, at_most: int = 0) -> bytes:
        self._count("read")
        if name.startswith("commits/"):
            unit = name.removeprefix("commits/").removesuffix(".json")
            text = self._body if unit.endswith(".targets") else self._plain  # as in a capture
            body = text.replace('"U"', f'"{unit}"').replace('"P"', f'"{self.plan_digest}"').encode()
            return records.sealed(body)
        return self.keys if name.startswith("keys/") else self._files.read(name)

    def size(self, name: str) -> int | None:
        return self._files.size(name)

    def list(self, folder: str) -> Iterator[str]:
        self._count("list of 1000")
        for n in range(self.present if folder == "commits" else 0):
            yield f"commits/{self.plan.unit_name(n)}.json"

    def remove(self, name: str) -> None:
        self._files.remove(name)

    def free(self) -> None:
        return None


def measure(units: int, folder: Path) -> dict[str, str | float]:
    views = 10
    rows = units // views // 2
    result: dict[str, str | float] = {"units": f"{units:,}"}

    def timed(name: str, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        value = call()
        result[f"{name}, s"] = round(time.perf_counter() - start, 2)
        return value

    plan = timed("plan", lambda: plan_and_count(rows, views))
    assert isinstance(plan, Plan) and plan.units == units
    storage = Simulated(plan, units - 2, folder)
    store = Store(storage)
    storage.plan_digest = store.put_plan(plan)
    done = timed("resume", lambda: committed_units(store, plan))
    assert isinstance(done, np.ndarray) and int(done.sum()) == units - 2
    storage.present = units
    storage.requests.clear()
    digest = timed("seal", lambda: seal(plan, storage.plan_digest, store))
    result["reads"], result["creates"] = f"{storage.requests['read']:,}", f"{storage.requests['create']:,}"

    def first_row() -> object:
        held = held_plan(store)
        return Commits(store, held, store.manifest(str(digest)))._page(0)

    timed("open and touch a unit", first_row)
    result["peak of the process, MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    return result


def plan_and_count(rows: int, views: int) -> Plan:
    members = tuple(MemberIdentity(name=name, weights="", structure="", share=1.0) for name in "ab")
    capture = Capture(members=members, precision="fp32", batch_size=4)
    plan = a_plan(rows=rows, unit_rows=1, views=views).model_copy(update={"capture": capture})
    assert sum(1 for _ in plan.items()) == plan.item_count
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    table = []
    for units in args.units:
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1) as fresh:
            table.append(fresh.submit(measure, units, Path(folder)).result())
    lines = [
        "# A million units",
        "",
        f"`python {' '.join(sys.argv)}` on {os.cpu_count()} cores, {platform.system()} {platform.machine()}. Plan, "
        "resume and seal on simulated shards; the requests are those of sealing. A listing gives 1,000 names.",
        "",
        "| " + " | ".join(table[0]) + " |",
        "|" + "---|" * len(table[0]),
        *("| " + " | ".join(map(str, row.values())) + " |" for row in table),
    ]
    print("\n".join(lines))
    if args.write:
        args.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
